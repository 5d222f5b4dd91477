"""Scalars for TensorBoard, written without TensorBoard.

An event file is a TFRecord file of ``tensorflow.Event`` messages. A record is its length, the length's checksum, the
message, the message's checksum, all little-endian; the checksum is CRC-32C, rotated right by 15 bits plus a constant.

References:
    tensorflow/core/util/event.proto, tensorflow/core/framework/summary.proto, tensorflow/core/lib/io/record_writer.h
"""

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

_START = 1  # SessionLog.SessionStatus: TensorBoard then drops what a run before had at this step or later


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_TABLE = _crc_table()


class EventFile:
    """One event file in a folder; ``step`` is where the run starts or resumes."""

    def __init__(self, folder: Path, step: int = 0):
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() // 10**9}.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
        self._file = (folder / name).open("wb")
        self._write(_text(3, "brain.Event:2"))
        self._write(_integer(2, step) + _message(7, _integer(1, _START)))

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write named values of a step, and hand them to the operating system."""
        values = [_message(1, _text(1, tag) + _single(2, value)) for tag, value in scalars.items()]
        self._write(_integer(2, step) + _message(5, b"".join(values)))
        self._file.flush()

    def close(self) -> None:
        """Finish the file."""
        self._file.close()

    def _write(self, message: bytes) -> None:
        message = _double(1, time.time()) + message
        length = struct.pack("<Q", len(message))
        self._file.write(length + _checksum(length) + message + _checksum(message))


def _checksum(data: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _integer(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _double(field: int, value: float) -> bytes:
    return _varint(field << 3 | 1) + struct.pack("<d", value)


def _single(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _text(field: int, content: str) -> bytes:
    return _message(field, content.encode("utf-8"))
