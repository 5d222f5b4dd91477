"""A linear map in one step of a block, with the norm before it and what stands behind it.

Behind it there is a convolution, or the residual stream. The norm is an RMS norm, ``x w / sqrt(mean(x^2) + eps)``: x is
multiplied by w on its way into the product, and the rest is a factor of each row, which is known behind it.
"""

import triton
import triton.language as tl

from dualform.ops.triton.kernels.early import fetch, wait_for_the_kernel_before
from dualform.ops.triton.kernels.pointwise import silu


@triton.jit
def _tile(line, begin: tl.constexpr, known, K: tl.constexpr, BK: tl.constexpr):
    """``BK`` columns of the matrix, in its own dtype."""
    k = begin + tl.arange(0, BK)
    return tl.load(line + k[None, :], mask=known[:, None] & (k < K)[None, :], other=0.0)


@triton.jit
def project(
    x_ptr,
    norm_ptr,
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
    eps,
    K: tl.constexpr,
    TAPS: tl.constexpr,
    WIDE: tl.constexpr,
    EARLY: tl.constexpr,
    AHEAD: tl.constexpr,
    HELD: tl.constexpr,
    BR: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
):
    """``BO`` outputs of ``BR`` rows: ``y = W norm(x) + b``, and the residual stream, if there is one.

    With ``TAPS``, the ``channels`` outputs from ``first`` on go through a convolution and SiLU; the last inputs of the
    convolution are read from ``conv_ptr`` and written to ``after_ptr``, which may be the same place. ``AHEAD`` reads
    all but x before it waits for the kernel before this one, which must not write any of that; the matrix where it can
    be ``HELD`` so long.
    """
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    o, row = tl.program_id(0) * BO + tl.arange(0, BO), tl.program_id(1).to(tl.int64) * BR
    known = o < outputs
    line = weight_ptr + o.to(tl.int64)[:, None] * K
    if EARLY and not AHEAD:
        wait_for_the_kernel_before()
    tiles = ()
    if HELD:
        for begin in tl.static_range(0, K, BK):
            tiles = tiles + (_tile(line, begin, known, K, BK),)
    bias = tl.zeros((BO,), dtype)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + o, mask=known, other=0.0).to(dtype)
    streams, taps, befores, conv_bias = (), (), (), tl.zeros((BO,), dtype)
    if stream_ptr is not None:
        for i in tl.static_range(BR):
            at, there = (row + i) * outputs + o, known & (row + i < rows)
            streams = streams + (tl.load(stream_ptr + at, mask=there, other=0.0).to(dtype),)
    c = o - first
    through = known & (c >= 0) & (c < channels)
    if TAPS > 0:
        if conv_bias_ptr is not None:
            conv_bias = tl.load(conv_bias_ptr + c, mask=through, other=0.0).to(dtype)
        for j in tl.static_range(TAPS):
            taps = taps + (tl.load(conv_weight_ptr + c * TAPS + j, mask=through, other=0.0).to(dtype),)
        for i in tl.static_range(BR):
            for j in tl.static_range(TAPS - 1):
                at, there = ((row + i) * channels + c) * (TAPS - 1) + j, through & (row + i < rows)
                befores = befores + (tl.load(conv_ptr + at, mask=there, other=0.0).to(dtype),)
    if EARLY and AHEAD:
        wait_for_the_kernel_before()
    parts, squares = (), ()
    for _ in tl.static_range(BR):
        parts, squares = parts + (tl.zeros((BO, BK), dtype),), squares + (tl.zeros((BK,), dtype),)
    for begin in tl.static_range(0, K, BK):
        w = (tiles[begin // BK] if HELD else _tile(line, begin, known, K, BK)).to(dtype)
        k = begin + tl.arange(0, BK)
        if norm_ptr is not None:
            norm = tl.load(norm_ptr + k, mask=k < K, other=0.0).to(dtype)
        parts_so_far, squares_so_far = parts, squares
        parts, squares = (), ()
        for i in tl.static_range(BR):
            x = tl.load(x_ptr + (row + i) * stride_x + k, mask=(k < K) & (row + i < rows), other=0.0).to(dtype)
            if norm_ptr is not None:
                squares = squares + (squares_so_far[i] + x * x,)
                x *= norm
            parts = parts + (parts_so_far[i] + x[None, :] * w,)
    for i in tl.static_range(BR):
        y = tl.sum(parts[i], 1)
        if norm_ptr is not None:
            y /= tl.sqrt(tl.sum(squares[i], 0) / K + eps)
        y += bias
        there = known & (row + i < rows)
        if TAPS > 0:
            total = conv_bias + taps[TAPS - 1] * y
            state = after_ptr + ((row + i) * channels + c) * (TAPS - 1)
            inside = through & there
            for j in tl.static_range(TAPS - 1):
                before = befores[i * (TAPS - 1) + j]
                total += taps[j] * before
                if j > 0:
                    tl.store(state + j - 1, before.to(after_ptr.dtype.element_ty), mask=inside)
            if TAPS > 1:
                tl.store(state + TAPS - 2, y.to(after_ptr.dtype.element_ty), mask=inside)
            y = tl.where(through, silu(total), y)
        if stream_ptr is not None:
            y += streams[i]
        tl.store(y_ptr + (row + i) * outputs + o, y.to(y_ptr.dtype.element_ty), mask=there)


@triton.jit
def project_tiles(
    x_ptr,
    weight_ptr,
    bias_ptr,
    stream_ptr,
    y_ptr,
    rows,
    outputs,
    stride_x,
    K: tl.constexpr,
    EARLY: tl.constexpr,
    BR: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
    LINES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``BO`` outputs of ``BR`` rows, for more rows: ``y = W x + b``, and the residual stream, if there is one.

    x has the 16 bits of the matrix. Before this waits for the kernel before it, it asks for the first ``LINES`` of
    memory of each row of the matrix.
    """
    o, row = tl.program_id(0) * BO + tl.arange(0, BO), tl.program_id(1).to(tl.int64) * BR + tl.arange(0, BR)
    known, there = o < outputs, row < rows
    line = weight_ptr + tl.minimum(o, outputs - 1).to(tl.int64)[:, None] * K
    if EARLY:
        fetch(line + tl.minimum(tl.arange(0, LINES) * 64, K - 1)[None, :])  # 128 bytes each
        wait_for_the_kernel_before()
    total = tl.zeros((BR, BO), tl.float32)
    for begin in tl.range(0, K, BK, num_stages=STAGES):
        k = begin + tl.arange(0, BK)
        w = tl.load(line + k[None, :], mask=(k < K)[None, :], other=0.0)
        x = tl.load(x_ptr + row[:, None] * stride_x + k[None, :], mask=there[:, None] & (k < K)[None, :], other=0.0)
        total = tl.dot(x, tl.trans(w), total)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + o, mask=known, other=0.0).to(tl.float32)[None, :]
    at, mask = row[:, None] * outputs + o[None, :], there[:, None] & known[None, :]
    if stream_ptr is not None:
        total += tl.load(stream_ptr + at, mask=mask, other=0.0)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=mask)
