"""A file of GGUF, the format of llama.cpp: a table of keys, and tensors of floats or of blocks of fewer bits.

All numbers are little-endian::

    "GGUF"  version (4 bytes)  tensors, keys (8 bytes each)
    keys:     name  type (4)  value                            a text is its length (8) and its bytes
    tensors:  name  axes (4)  sizes, innermost first (8 each)  type (4)  offset (8)
    data      from the next multiple of general.alignment on

A block of type Q8_0 is a scale, float16, and 32 whole numbers of 8 bits. That is how matrices of 8 bits are kept here,
too, so they stay what they are: a tensor ``name`` of this type is also given as ``name:whole`` and ``name:scales``.
"""

import math
import os
import struct
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualform.core.errors import CheckpointError
from dualform.core.options import brief

SUFFIX = ".gguf"
GROUP = 32
"""Neighbours in a row that share a scale."""
WHOLE, SCALES = ":whole", ":scales"
MAGIC, ALIGNMENT, Q8_0 = b"GGUF", 32, 8
_VERSIONS = (2, 3)
_FLOATS = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
_BLOCK = 2 + GROUP  # bytes of a block
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
_AXES, _LONGEST = 4, 2**16  # of a tensor; bytes of a name
_COPY = "the file is cut short or damaged; copy or download it again"


class Packed(NamedTuple):
    """A tensor in a file: its shape, outermost first, the number of its type, and where its bytes are."""

    shape: tuple[int, ...]
    kind: int
    start: int
    size: int

    @property
    def eight(self) -> bool:
        """Whether it is whole numbers of 8 bits with a scale for 32 neighbours in a row."""
        return self.kind == Q8_0

    @property
    def dtype(self) -> torch.dtype | None:
        """Of floats; None for blocks."""
        return _FLOATS.get(self.kind)


class Header(NamedTuple):
    """What a file says before its data."""

    about: Mapping[str, Any]
    tensors: Mapping[str, Packed]


def read_header(path: str | os.PathLike[str]) -> Header:
    """The keys and tensors of a file; their values are not read.

    Raises:
        CheckpointError: for a file that is missing, cut short or damaged, another version, or a type of tensor that is
            not known; names it.
    """
    try:
        found = os.stat(path)
        return _header(Path(path), found.st_size, found.st_mtime_ns)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


class GGUFTensors:
    """The tensors of a file with the interface of an open file of safetensors; those of blocks are given as floats."""

    def __init__(self, path: Path):
        self._path, self._header = path, read_header(path)
        self._bytes = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)

    def keys(self) -> list[str]:
        """The names; a tensor of type Q8_0 has three."""
        more = (name + part for name, t in self._header.tensors.items() if t.eight for part in (WHOLE, SCALES))
        return [*self._header.tensors, *more]

    def get_tensor(self, name: str) -> Tensor:
        """A tensor: a view of the file where it holds the same bytes."""
        first, _, part = name.partition(":")
        found = self._header.tensors[first]
        raw = self._bytes[found.start : found.start + found.size]
        if found.dtype is not None:
            return _seen(raw, found.dtype).view(found.shape)
        if not found.eight:
            return _unpacked(raw, found, f"{self._path}: {name}")
        blocks = raw.view(-1, _BLOCK)
        scales = _seen(blocks[:, :2].contiguous(), torch.float16).float().view(*found.shape[:-1], -1)
        if part == SCALES[1:]:
            return scales
        whole = blocks[:, 2:].view(torch.int8)
        if part == WHOLE[1:]:
            return whole.reshape(found.shape)
        return (whole * scales.view(-1, 1)).view(found.shape)

    def stored(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """The shape and the dtype of what :meth:`get_tensor` gives."""
        first, _, part = name.partition(":")
        found = self._header.tensors[first]
        if part == SCALES[1:]:
            return (*found.shape[:-1], found.shape[-1] // GROUP), torch.float32
        return found.shape, torch.int8 if part else found.dtype or torch.float32


@lru_cache(maxsize=2)
def _header(path: Path, size: int, changed: int) -> Header:
    """The header of a file of so many bytes, changed at that time."""
    with open(path, "rb") as file:
        reader = _Reader(path, file, size)
        return reader.header()


class _Reader:
    """Reads from a file, whose end it knows: no number in it makes anything larger than the file."""

    def __init__(self, path: Path, file: Any, size: int):
        self._path, self._file, self._left, self._size = path, file, size, size

    def header(self) -> Header:
        if self._take(4) != MAGIC:
            raise self._wrong("not a file of GGUF: it does not begin with those letters")
        version = self._one("I")
        if version not in _VERSIONS:
            swapped = " of a machine with the other order of bytes" if version >> 16 else ""
            raise self._wrong(f"version {version} of GGUF{swapped}, expected 2 or 3", "convert the model again")
        tensors, keys = self._one("Q"), self._one("Q")
        about: dict[str, Any] = {}
        for _ in range(self._checked(keys, 13, "keys")):
            name = self._name()
            if name in about:
                raise self._wrong(f"the key {brief(name)} comes twice")
            about[name] = self._value(self._one("I"), name)
        packed = [(self._name(), *self._tensor()) for _ in range(self._checked(tensors, 32, "tensors"))]
        unit = about.get("general.alignment", ALIGNMENT)
        if type(unit) is not int or not 8 <= unit <= 2**20 or unit % 8:
            raise self._wrong(f"general.alignment is {brief(unit)}, expected a multiple of 8")
        begin = -(-(self._size - self._left) // unit) * unit
        found: dict[str, Packed] = {}
        for name, shape, kind, offset in packed:
            size = self._bytes(name, shape, kind)
            if name in found:
                raise self._wrong(f"the tensor {brief(name)} comes twice")
            if ":" in name or offset % 8:
                raise self._wrong(f"a tensor {brief(name)} at byte {offset:,}, expected a multiple of 8")
            if offset + size > self._size - begin:
                raise self._wrong(f"{name} ends at byte {begin + offset + size:,} of {self._size:,}")
            found[name] = Packed(shape, kind, begin + offset, size)
        return Header(about, found)

    def _tensor(self) -> tuple[tuple[int, ...], int, int]:
        axes = self._one("I")
        if not 1 <= axes <= _AXES:
            raise self._wrong(f"a tensor of {axes:,} axes, expected 1 to {_AXES}")
        sizes = struct.unpack(f"<{axes}Q", self._take(8 * axes))
        while len(sizes) > 1 and sizes[-1] == 1:  # outer axes of size 1 say nothing there
            sizes = sizes[:-1]
        return sizes[::-1], self._one("I"), self._one("Q")

    def _bytes(self, name: str, shape: tuple[int, ...], kind: int) -> int:
        """How many bytes a tensor has."""
        entries, types = math.prod(shape), block_types()
        if kind not in types:
            known = ", ".join(name for name, _, _ in types.values())
            raise self._wrong(f"{name} has the type {kind}, which is not known", f"those that are read: {known}")
        _, block, size = types[kind]
        if shape[-1] % block:
            raise self._wrong(f"{name} has rows of {shape[-1]:,}, expected a multiple of {block}")
        return entries // block * size

    def _value(self, kind: int, name: str) -> Any:
        if kind == _TEXT:
            return self._text(name)
        if kind == _LIST:
            inner, count = self._one("I"), self._one("Q")
            if inner == _TEXT:
                return self._texts(self._checked(count, 8, name))
            code = self._scalar(inner, name)
            count = self._checked(count, struct.calcsize(code), name)
            return list(struct.unpack(f"<{count}{code}", self._take(count * struct.calcsize(code))))
        code = self._scalar(kind, name)
        return _shortest(self._one(code)) if code == "f" else self._one(code)

    def _scalar(self, kind: int, name: str) -> str:
        if kind not in _SCALARS:
            raise self._wrong(f"the key {brief(name)} has a value of the type {kind}, which is not known")
        return _SCALARS[kind]

    def _name(self) -> str:
        return self._text("a name", _LONGEST)

    def _text(self, what: str, most: int = 2**40) -> str:
        length = self._one("Q")
        if length > most:
            raise self._wrong(f"{what} of {length:,} bytes")
        return self._take(length).decode("utf-8", "surrogateescape")

    def _texts(self, count: int) -> list[str]:
        """So many texts, of which a vocabulary has some hundred thousand."""
        read, found = self._file.read, list[str]()
        for _ in range(count):
            length = int.from_bytes(read(8), "little")
            self._left -= 8 + length
            if self._left < 0:
                raise self._short()
            found.append(read(length).decode("utf-8", "surrogateescape"))
        return found

    def _one(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(code)))[0]

    def _checked(self, count: int, least: int, what: str) -> int:
        """A number of things, each of at least so many bytes."""
        if count * least > self._left:
            raise self._wrong(f"{count:,} {what}, more than fit into what is left of its {self._size:,} bytes")
        return count

    def _take(self, count: int) -> bytes:
        if count > self._left:
            raise self._short()
        self._left -= count
        found = self._file.read(count)
        if len(found) < count:
            raise self._wrong("it became shorter while it was read")
        return found

    def _short(self) -> CheckpointError:
        return self._wrong(f"it ends after {self._size:,} bytes, in the middle of its header")

    def _wrong(self, what: str, hint: str = _COPY) -> CheckpointError:
        return CheckpointError(f"{self._path}: {what}", hint=hint)


@lru_cache(maxsize=1)
def block_types() -> dict[int, tuple[str, int, int]]:
    """By the number of a type: its name, the entries of a block and their bytes; those of the package gguf, too."""
    found = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 28: ("F64", 1, 8), 30: ("BF16", 1, 2), Q8_0: ("Q8_0", GROUP, _BLOCK)}
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError:
        return {**_NAMED, **found}
    return {**{int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}, **found}


_NAMED = {
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    20: ("IQ4_NL", 32, 18),
    23: ("IQ4_XS", 256, 136),
}
"""The commonest types of blocks that the package gguf unpacks; they are known without it."""


def _unpacked(raw: Tensor, found: Packed, where: str) -> Tensor:
    """Blocks of fewer bits as float32."""
    name = block_types()[found.kind][0]
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        hint = "pip install 'dualform[gguf]'; Q8_0, F16, BF16 and F32 are read without it"
        raise CheckpointError(f"{where} has the type {name}, which the package gguf unpacks", hint=hint) from error
    rows = raw.view(*found.shape[:-1], -1).numpy()
    try:
        return torch.from_numpy(dequantize(rows, GGMLQuantizationType(found.kind))).view(found.shape)
    except NotImplementedError as error:
        hint = "convert the model to Q8_0 or F16 with llama.cpp's own program"
        raise CheckpointError(f"{where} has the type {name}, which gguf does not unpack", hint=hint) from error


def _seen(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as numbers of another dtype."""
    return raw.view(dtype) if raw.storage_offset() % dtype.itemsize == 0 else raw.clone().view(dtype)


def _shortest(value: float) -> float:
    """The number of fewest digits that a float32 is, such as 1e-05."""
    texts = (f"{value:.{digits}g}" for digits in range(1, 9))
    return next((float(text) for text in texts if struct.pack("<f", float(text)) == struct.pack("<f", value)), value)
