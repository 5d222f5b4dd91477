"""The shared library of the CPU kernels, or the reason why there is none."""

import ctypes
import os
import struct
import sys
from pathlib import Path

import torch
from torch import Tensor

from dualform.ops.layout import inner_contiguous

_VERSION = 6  # of the interface, DUALFORM_VERSION in native/dualform.h
_LARGE = 2**22  # bytes: below, memory that was used before is found again
_FILE = Path(__file__).parent / "kernels.so"
_WINDOWS = "the C++ kernels do not run on Windows; run dualform under Linux, such as that of WSL"
_ABSENT = (
    "dualform was installed without its C++ kernels; install a C++ compiler (g++ or clang++), then dualform again with "
    "pip's --force-reinstall --no-deps --no-cache-dir"
)
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def _load() -> tuple[ctypes.CDLL | None, str]:
    if not _FILE.exists():
        return None, _WINDOWS if sys.platform == "win32" else _ABSENT
    try:
        library = ctypes.CDLL(str(_FILE))
    except OSError as error:
        return None, f"{_FILE.name} does not load ({error}); reinstall dualform"
    library.dualform_version.restype = ctypes.c_int64
    if library.dualform_version() != _VERSION:
        return None, f"{_FILE.name} is of another version; reinstall dualform"
    library.dualform_fresh.restype = None
    library.dualform_choose.restype = ctypes.c_char_p
    wanted = os.environ.get("DUALFORM_NATIVE_ISA", "")
    if library.dualform_choose(wanted.encode()) is None:
        return (
            None,
            f"this processor cannot run DUALFORM_NATIVE_ISA={wanted}; use avx512, avx2 or baseline, or unset it",
        )
    return library, ""


_library, missing = _load()


def choose(name: str = "") -> str:
    """Use the kernels of one instruction set from now on: avx512, avx2 or baseline; "" is the best here.

    Returns:
        The name of the one in use, or "" where this processor does not have it.
    """
    found = _library.dualform_choose(name.encode()) if _library is not None else None
    return "" if found is None else found.decode()


def call(name: str, *fields: int) -> None:
    """Run the function ``dualform_<name>`` on a structure of 64-bit fields, its threads first."""
    assert _library is not None
    fields = (torch.get_num_threads(), *fields)
    if getattr(_library, f"dualform_{name}")(struct.pack(f"{len(fields)}q", *fields)):
        raise MemoryError(f"{name}: no memory left")


def fresh(tensor: Tensor) -> Tensor:
    """An empty tensor that a kernel is about to fill; where it is large, its memory comes in large pages."""
    if tensor.nbytes >= _LARGE and _library is not None:
        _library.dualform_fresh(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_int64(tensor.nbytes))
    return tensor


def number(tensor: Tensor) -> int:
    """The number of a dtype."""
    return DTYPES[tensor.dtype]


def readable(tensor: Tensor, inner: int = 1) -> Tensor:
    """The tensor in a dtype that kernels read, its last ``inner`` axes contiguous."""
    return inner_contiguous(tensor if tensor.dtype in DTYPES else tensor.float(), inner)


def view(tensor: Tensor) -> tuple[int, int, int, int]:
    """``View``: a tensor ``(B, T, ...)`` whose axes after time are contiguous."""
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1), DTYPES[tensor.dtype]


NO_VIEW = (0, 0, 0, 0)


def sequences(like: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int, int]:
    """``Sequences``: of a batch ``(B, T, ...)``; ``cu_seqlens`` is int64 and contiguous, and must outlive the call."""
    rows, length = like.shape[:2]
    return (rows, length, rows, 0) if cu_seqlens is None else (rows, length, len(cu_seqlens) - 1, cu_seqlens.data_ptr())
