"""The shared library of the CPU kernels, or the reason why there is none."""

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.ops.layout import flat_stride, inner_contiguous
from dualform.ops.native.structs import DTYPES, FULL, NO_MEMORY, REFUSED, VERSION
from dualform.ops.structs import Structure

_LARGE = 2**22  # bytes: below, memory that was used before is found again
_FILE = Path(__file__).parent / "kernels.so"
_WINDOWS = "the C++ kernels do not run on Windows; run dualform under Linux, such as that of WSL"
_ABSENT = (
    "dualform was installed without its C++ kernels; install a C++ compiler (g++ or clang++), then dualform again with "
    "pip's --force-reinstall --no-deps --no-cache-dir"
)


def _load() -> tuple[ctypes.CDLL | None, str]:
    if not _FILE.exists():
        return None, _WINDOWS if sys.platform == "win32" else _ABSENT
    try:
        library = ctypes.CDLL(str(_FILE))
    except OSError as error:
        return None, f"{_FILE.name} does not load ({error}); reinstall dualform"
    library.dualform_version.restype = ctypes.c_int64
    if library.dualform_version() != VERSION:
        return None, f"{_FILE.name} is of another version; reinstall dualform"
    library.dualform_fresh.restype = None
    library.dualform_choose.restype = ctypes.c_char_p
    wanted = os.environ.get("DUALFORM_NATIVE_ISA", "")
    if library.dualform_choose(os.fsencode(wanted)) is None:
        return (
            None,
            f"this processor cannot run DUALFORM_NATIVE_ISA={wanted!r}; use avx512, avx2 or baseline, or unset it",
        )
    return library, ""


_library, missing = _load()


def why_missing() -> str:
    """Why there are no kernels; empty where there are."""
    return missing


def choose(name: str = "") -> str:
    """Use the kernels of one instruction set from now on: avx512, avx2 or baseline; "" is the best here.

    Returns:
        The name of the one in use, or "" where this processor does not have it.
    """
    found = _library.dualform_choose(name.encode()) if _library is not None else None
    return "" if found is None else found.decode()


def call(name: str, structure: Structure | bytes, **fields: Any) -> bool:
    """Run the function ``dualform_<name>`` on a structure with these fields; the call keeps their tensors alive.

    Args:
        name: of the function.
        structure: of its argument, or that in memory, whose tensors the caller keeps alive.
        fields: of the structure.

    Returns:
        False where a cache has no slot for one more token, so that nothing was done; else True.

    Raises:
        ArgumentError: for what no kernel can run; a last guard behind the checks of the ops.
        MemoryError: when the kernel found no memory.
    """
    assert _library is not None
    if not isinstance(structure, bytes):
        structure = structure.pack(threads=torch.get_num_threads(), **fields)
    found = getattr(_library, f"dualform_{name}")(structure)
    if found == NO_MEMORY:
        raise MemoryError(f"{name}: the kernel found no memory for its intermediate results")
    if found == REFUSED:
        raise ArgumentError(
            f"{name}: the CPU kernel refuses its sizes, dtypes or cu_seqlens",
            hint="no size is negative, groups divide the channels, and cu_seqlens rise from 0 to the length",
        )
    return found != FULL


def saved_states(name: str, kept: list[Tensor], h0: Tensor, *shape: int) -> Tensor:
    """The states that a forward saved, of the shape that its backward reads.

    Raises:
        ArgumentError: says what came and what was expected.
    """
    came = [(tuple(m.shape), m.dtype) for m in kept[:1]]
    if came != [(shape, h0.dtype)]:
        raise ArgumentError(f"{name}_backward: the saved states are {came}, expected {[(shape, h0.dtype)]}")
    return kept[0].contiguous()


def fresh(tensor: Tensor) -> Tensor:
    """An empty tensor that a kernel is about to fill; where it is large, its memory comes in large pages."""
    if tensor.nbytes >= _LARGE and _library is not None:
        _library.dualform_fresh(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_int64(tensor.nbytes))
    return tensor


def timed(tensor: Tensor) -> Tensor:
    """The tensor ``(B, T, ...)`` in a dtype that kernels read, the axes after time contiguous or time itself."""
    if tensor.stride(1) == 1 and tensor.dtype in DTYPES and flat_stride(tensor) is not None:
        return tensor
    return readable(tensor, tensor.dim() - 2)


def readable(tensor: Tensor, inner: int = 1) -> Tensor:
    """The tensor in a dtype that kernels read, its last ``inner`` axes contiguous."""
    return inner_contiguous(tensor if tensor.dtype in DTYPES else tensor.float(), inner)
