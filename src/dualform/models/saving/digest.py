"""Digests: what was written is what is read, or a sentence. XXH3 of 128 bits, as fast as memory.

They find damage, by a disk, a copy or a kill. They are no signature: whoever changes a file can change its digest.
"""

import json
import os
from collections.abc import Mapping

import torch
import xxhash
from torch import Tensor

ALGORITHM = "xxh3-128"
_BUFFER = 2**20  # bytes read at once


def file_digest(path: str | os.PathLike[str]) -> str:
    """32 hexadecimal digits of the bytes of a file, read through a buffer.

    Raises:
        OSError: from the operating system.
    """
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(_BUFFER))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor], words: Mapping[str, str]) -> str:
    """32 hexadecimal digits of names, dtypes, shapes and bytes of tensors, and of the words beside them.

    Args:
        tensors: contiguous, on the CPU; their order does not count.
        words: metadata; its order does not count.
    """
    digest = xxhash.xxh3_128(json.dumps(sorted(words.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
