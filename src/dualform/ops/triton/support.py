"""What every wrapper of a Triton kernel needs: whether Triton is here, its kernels, and the layout they read."""

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dualform.core.packing import Packing
from dualform.ops.op import Backend, Op

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
DEVICES = ("cuda", "xpu", "cpu") if INTERPRETED else ("cuda", "xpu")
"""AMD's devices are called cuda too; a CPU runs kernels only in Triton's interpreter (``TRITON_INTERPRET=1``)."""
_NO_PRODUCTS = (
    "Triton's interpreter takes products of the bits of bfloat16, not of the numbers; use another dtype, or another "
    "backend, or a GPU"
)
_NO_ROUNDING = (
    "Triton's interpreter cannot round float64 to bfloat16; give states and bfloat16 inputs of at most float32, or use "
    "another backend, or a GPU"
)


@cache
def missing() -> str:
    """Why no kernel can run here, and what to install; empty when they can."""
    return "" if find_spec("triton") else "Triton is not installed; pip install triton (on Windows triton-windows)"


def add_backend(op: Op[Any], *, products: bool = False, **backend: Any) -> None:
    """Register the Triton backend of an op.

    Args:
        op: the operator.
        products: whether its kernels take matrix products of what they are given, without converting it before.
        backend: ``forward`` and all else that a ``Backend`` has, but for its name, its devices and what is missing.
    """
    if INTERPRETED:
        refuses = backend.get("refuses", lambda a: None)
        backend["refuses"] = lambda a: refuses(a) or _not_interpreted(a, products)
    op.add(Backend("triton", devices=DEVICES, missing=missing, **backend))


def _not_interpreted(a: Any, products: bool) -> str | None:
    """Why Triton's interpreter would give wrong numbers for a call, without a word, or None."""
    dtypes = {m.dtype.to_real() for m in a if isinstance(m, Tensor) and (m.is_floating_point() or m.is_complex())}
    if torch.bfloat16 not in dtypes:
        return None
    if products:
        return _NO_PRODUCTS
    return _NO_ROUNDING if torch.float64 in dtypes else None


@cache
def kernels(op: str) -> ModuleType:
    """The module of an op's kernels; the first call imports Triton."""
    return import_module(f"dualform.ops.triton.kernels.{op}")


def owners(packing: Packing | None, length: int) -> Tensor | None:
    """The sequence of every packed step, ``(T,)`` int32; computed on the device, without waiting for it."""
    return None if packing is None else packing.sequence_ids(length).to(torch.int32)


def table_of_chunks(packing: Packing, slots: int, chunk: int) -> Tensor:
    """Begin, end, sequence, and first + 2 last of every chunk, ``(slots, 4)``; those that are not needed are empty."""
    cu_seqlens = packing.cu_seqlens
    begins, counts = cu_seqlens[:-1], -(-cu_seqlens.diff() // chunk)
    ends, ids = counts.cumsum(0), torch.arange(slots, device=cu_seqlens.device)
    row = torch.searchsorted(ends, ids, right=True)
    used, row = row < packing.rows, row.clamp_(max=packing.rows - 1)
    index = ids - (ends - counts)[row]
    begin = begins[row] + index * chunk
    end = torch.minimum(begin + chunk, cu_seqlens[1:][row])
    flags = (index == 0) + 2 * (index == counts[row] - 1)
    return (torch.stack((begin, end, row, flags), 1) * used[:, None]).contiguous()


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


@cache
def _warp_size(driver: Any) -> int:
    """Of a driver's devices; to ask it costs as much as a launch."""
    return driver.get_current_target().warp_size


def warps(threads: int) -> int:
    """How many warps so many threads are on the devices at hand."""
    from triton.runtime import driver

    return threads // (32 if INTERPRETED else _warp_size(driver.active))


@cache
def _starts_early(driver: Any) -> bool:
    target = driver.get_current_target()
    return target.backend == "cuda" and target.arch >= 90


def early() -> dict[str, Any]:
    """Options of a kernel that calls ``wait_for_the_kernel_before``: where devices can, it starts before that ended."""
    from triton.runtime import driver

    if INTERPRETED or not _starts_early(driver.active):
        return {"EARLY": False}
    return {"EARLY": True, "launch_pdl": True}


def exact_products() -> str:
    """How a matrix product of float32 keeps all digits on the device at hand; on NVIDIA's by tensor cores."""
    from triton.runtime import driver

    return "ieee" if INTERPRETED or on_amd(driver.active) else "tf32x3"


@cache
def on_amd(driver: Any) -> bool:
    """Whether a driver's devices are AMD's."""
    return driver.get_current_target().backend == "hip"


def enter(
    decay: Tensor, state: Tensor, rows: int, spans: int, *, packed: bool, start: Tensor | None = None, apart: int = 0
) -> Tensor:
    """What enters every span of time.

    Args:
        decay: of every span, ``(B, spans, ...)``.
        state: what a span makes of the state zero, like ``decay``.
        rows: B.
        spans: of a row.
        packed: whether a decay of 0 says that a sequence begins within the span.
        start: what enters the first span, ``(B, ...)``; zero by default.
        apart: how far behind its real part an imaginary one lies; 0 for real numbers.
    """
    found, width = torch.empty_like(state), state.numel() // (rows * spans * (2 if apart else 1))
    kernels("spans").enter[(rows * blocks(width, 128),)](
        decay, state, start, found, spans, width, 2 if apart == 1 else 1, apart,
        COMPLEX=apart > 0, START=start is not None, PACKED=packed, BD=128,
    )  # fmt: skip
    return found
