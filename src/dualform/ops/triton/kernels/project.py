"""A linear map of few rows, and what stands behind it in one step of a block: a convolution, or the residual stream."""

import triton
import triton.language as tl

from dualform.ops.triton.kernels.early import wait_for_the_kernel_before
from dualform.ops.triton.kernels.pointwise import silu


@triton.jit
def _tile(line, begin: tl.constexpr, known, K: tl.constexpr, BK: tl.constexpr):
    """``BK`` columns of the matrix, in its own dtype."""
    k = begin + tl.arange(0, BK)
    return tl.load(line + k[None, :], mask=known[:, None] & (k < K)[None, :], other=0.0)


@triton.jit
def project(
    x_ptr,
    weight_ptr,
    bias_ptr,
    stream_ptr,
    conv_ptr,
    conv_weight_ptr,
    conv_bias_ptr,
    after_ptr,
    y_ptr,
    rows,
    outputs,
    first,
    channels,
    stride_x,
    K: tl.constexpr,
    TAPS: tl.constexpr,
    WIDE: tl.constexpr,
    EARLY: tl.constexpr,
    AHEAD: tl.constexpr,
    BR: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
):
    """``BO`` outputs of ``BR`` rows: ``y = W x + b``, and the residual stream, if there is one.

    With ``TAPS``, the ``channels`` outputs from ``first`` on go through a convolution and SiLU; the last inputs of the
    convolution are read from ``conv_ptr`` and written to ``after_ptr``, which may be the same place. ``AHEAD`` reads
    the matrix before it waits for the kernel before this one, which must not write it.
    """
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    o, row = tl.program_id(0) * BO + tl.arange(0, BO), tl.program_id(1).to(tl.int64) * BR + tl.arange(0, BR)
    known, there = o < outputs, row < rows
    line = weight_ptr + o.to(tl.int64)[:, None] * K
    tiles = ()
    if AHEAD:
        for begin in tl.static_range(0, K, BK):
            tiles = tiles + (_tile(line, begin, known, K, BK),)
    if EARLY:
        wait_for_the_kernel_before()
    part = tl.zeros((BR, BO, BK), dtype)
    for begin in tl.static_range(0, K, BK):
        w = tiles[begin // BK] if AHEAD else _tile(line, begin, known, K, BK)
        k = begin + tl.arange(0, BK)
        mask = there[:, None] & (k < K)[None, :]
        x = tl.load(x_ptr + row[:, None] * stride_x + k[None, :], mask=mask, other=0.0).to(dtype)
        part += x[:, None, :] * w.to(dtype)[None, :, :]
    y = tl.sum(part, 2)
    mask, at = there[:, None] & known[None, :], row[:, None] * outputs + o[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + o, mask=known, other=0.0).to(dtype)[None, :]
    if TAPS > 0:
        c = o - first
        through = known & (c >= 0) & (c < channels)
        inside = there[:, None] & through[None, :]
        state = (row[:, None] * channels + c[None, :]) * (TAPS - 1)
        total = tl.load(conv_weight_ptr + c * TAPS + TAPS - 1, mask=through, other=0.0).to(dtype)[None, :] * y
        if conv_bias_ptr is not None:
            total += tl.load(conv_bias_ptr + c, mask=through, other=0.0).to(dtype)[None, :]
        for j in tl.static_range(TAPS - 1):
            before = tl.load(conv_ptr + state + j, mask=inside, other=0.0).to(dtype)
            total += tl.load(conv_weight_ptr + c * TAPS + j, mask=through, other=0.0).to(dtype)[None, :] * before
            if j > 0:
                tl.store(after_ptr + state + j - 1, before.to(after_ptr.dtype.element_ty), mask=inside)
        if TAPS > 1:
            tl.store(after_ptr + state + TAPS - 2, y.to(after_ptr.dtype.element_ty), mask=inside)
        y = tl.where(through[None, :], silu(total), y)
    if stream_ptr is not None:
        y += tl.load(stream_ptr + at, mask=mask, other=0.0).to(dtype)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)
