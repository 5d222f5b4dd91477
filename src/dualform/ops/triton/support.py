"""What every wrapper of a Triton kernel needs: whether Triton is here, its kernels, and the layout they read."""

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from dualform.core.packing import sequence_ids

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
DEVICES = ("cuda", "xpu", "cpu") if INTERPRETED else ("cuda", "xpu")
"""AMD's devices are called cuda too; a CPU runs kernels only in Triton's interpreter (``TRITON_INTERPRET=1``)."""
missing = "" if find_spec("triton") else "Triton is not installed; pip install triton (on Windows triton-windows)"


@cache
def kernels(op: str) -> ModuleType:
    """The module of an op's kernels; the first call imports Triton."""
    return import_module(f"dualform.ops.triton.kernels.{op}")


def owners(cu_seqlens: Tensor | None, length: int) -> Tensor | None:
    """The sequence of every packed token, ``(T,)`` int32; computed on the device, without waiting for it."""
    return None if cu_seqlens is None else sequence_ids(cu_seqlens, length).to(torch.int32)


def blocks(size: int, block: int) -> int:
    """How many blocks cover ``size``."""
    return -(-size // block)


def power_of_two(size: int) -> int:
    """The least power of two that is not below ``size``."""
    return 1 << max(0, size - 1).bit_length()


@cache
def _processors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return torch.xpu.get_device_properties(device).max_compute_units


def processors(x: Tensor) -> int:
    """How many processors the device of ``x`` has: fewer programs leave some idle."""
    return 2 if x.device.type == "cpu" else _processors(x.device)


@cache
def _shared_memory(device: torch.device) -> int:
    from triton.runtime import driver

    utils = driver.active.utils  # pyright: ignore[reportAttributeAccessIssue]
    return utils.get_device_properties(device.index or 0)["max_shared_mem"]


def shared_memory(x: Tensor) -> int:
    """Bytes that a program may share on the device of ``x``; without a limit where kernels use little of it."""
    return 2**30 if x.device.type in ("cpu", "meta") or torch.version.hip else _shared_memory(x.device)


def warps(threads: int) -> int:
    """How many warps so many threads are on the device at hand."""
    from triton.runtime import driver

    target = None if INTERPRETED else driver.active.get_current_target()
    return threads // (target.warp_size if target else 32)
