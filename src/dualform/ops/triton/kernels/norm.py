"""Norms with a residual or a gate: a program holds some rows of one slice in registers, and reads everything once.

The backward computes the statistics anew. A program runs through every ``programs``-th tile of rows of its slice, and
adds up its part of the gradients of weight and bias on the way.
"""

import triton
import triton.language as tl

from dualform.ops.triton.kernels.early import wait_for_the_kernel_before


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _tile(tile, slice, rows, S, R: tl.constexpr, BS: tl.constexpr):
    """Rows and columns of a tile, and which of them there are."""
    row, at = tile.to(tl.int64) * R + tl.arange(0, R), tl.arange(0, BS)
    return row[:, None], (slice * S + at)[None, :], (row < rows)[:, None] & (at < S)[None, :]


@triton.jit
def _rows(ptr, row, column, mask, stride):
    return tl.load(ptr + row * stride + column, mask=mask, other=0.0)


@triton.jit
def _entries(ptr, column, last, dtype: tl.constexpr):
    """The weight or bias of a slice, (1, BS)."""
    return tl.load(ptr + column, mask=column < last, other=0.0).to(dtype)


@triton.jit
def _centered(v, mask, S, EPS: tl.constexpr, CENTER: tl.constexpr):
    """v, with CENTER minus its mean, and what it is multiplied by, (R, 1)."""
    if CENTER:
        v = tl.where(mask, v - tl.sum(v, 1)[:, None] / S, 0.0)
    return v, 1 / tl.sqrt(tl.sum(v * v, 1)[:, None] / S + EPS)


@triton.jit
def forward(
    x_ptr,
    residual_ptr,
    z_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    r_ptr,
    rows,
    S,
    slices,
    stride_x,
    stride_residual,
    stride_z,
    EPS: tl.constexpr,
    CENTER: tl.constexpr,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    WIDE: tl.constexpr,
    EARLY: tl.constexpr,
    R: tl.constexpr,
    BS: tl.constexpr,
):
    """A program is ``R`` rows of one slice of ``S`` features. The gate is ``BEFORE`` the norm or ``AFTER`` it."""
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    slice = tl.program_id(0) % slices
    row, column, mask = _tile(tl.program_id(0) // slices, slice, rows, S, R, BS)
    to, last = row * (S * slices) + column, slice * S + S
    if EARLY:
        wait_for_the_kernel_before()
    v = _rows(x_ptr, row, column, mask, stride_x).to(dtype)
    if residual_ptr is not None:
        v += _rows(residual_ptr, row, column, mask, stride_residual).to(dtype)
        tl.store(r_ptr + to, v.to(r_ptr.dtype.element_ty), mask=mask)
    if z_ptr is not None:
        z = _rows(z_ptr, row, column, mask, stride_z).to(dtype)
        gate = z * _sigmoid(z)
    if BEFORE:
        v *= gate
    v, scale = _centered(v, mask, S, EPS, CENTER)
    y = v * scale * _entries(weight_ptr, column, last, dtype)
    if bias_ptr is not None:
        y += _entries(bias_ptr, column, last, dtype)
    if AFTER:
        y *= gate
    tl.store(y_ptr + to, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def backward(
    x_ptr,
    residual_ptr,
    z_ptr,
    weight_ptr,
    bias_ptr,
    dy_ptr,
    dr_ptr,
    dx_ptr,
    dresidual_ptr,
    dz_ptr,
    dweight_ptr,
    dbias_ptr,
    rows,
    S,
    slices,
    stride_x,
    stride_residual,
    stride_z,
    programs,
    EPS: tl.constexpr,
    CENTER: tl.constexpr,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    WIDE: tl.constexpr,
    R: tl.constexpr,
    BS: tl.constexpr,
):
    """Of each slice, ``programs`` programs; the sums of each go to dweight and dbias, (programs, slices S).

    The next tile is on its way from memory while the sums of the present one are made.
    """
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    slice, program = tl.program_id(0) % slices, tl.program_id(0) // slices
    D, at = S * slices, tl.arange(0, BS)
    entry, last = (slice * S + at)[None, :], slice * S + S
    weight = _entries(weight_ptr, entry, last, dtype)
    if bias_ptr is not None:
        bias = _entries(bias_ptr, entry, last, dtype)
    dweight, dbias = tl.zeros((BS,), dtype), tl.zeros((BS,), dtype)
    row, column, mask = _tile(tl.cast(program, tl.int64), slice, rows, S, R, BS)
    x_next = _rows(x_ptr, row, column, mask, stride_x)
    dy_next = _rows(dy_ptr, row, column, mask, D)
    residual_next = x_next
    if residual_ptr is not None:
        residual_next = _rows(residual_ptr, row, column, mask, stride_residual)
    z_next = x_next
    if z_ptr is not None:
        z_next = _rows(z_ptr, row, column, mask, stride_z)
    for tile in range(program, tl.cdiv(rows, R), programs):
        to, here = row * D + column, mask
        x, d = x_next.to(dtype), dy_next.to(dtype)
        v = x
        if residual_ptr is not None:
            v += residual_next.to(dtype)
        z = z_next.to(dtype)
        row, column, mask = _tile(tl.cast(tile + programs, tl.int64), slice, rows, S, R, BS)
        x_next = _rows(x_ptr, row, column, mask, stride_x)
        dy_next = _rows(dy_ptr, row, column, mask, D)
        if residual_ptr is not None:
            residual_next = _rows(residual_ptr, row, column, mask, stride_residual)
        if z_ptr is not None:
            z_next = _rows(z_ptr, row, column, mask, stride_z)
        if z_ptr is not None:
            sigmoid = _sigmoid(z)
            gate, slope = z * sigmoid, sigmoid * (1 + z * (1 - sigmoid))
        if BEFORE:
            v *= gate
        v, scale = _centered(v, here, S, EPS, CENTER)
        n = v * scale
        if AFTER:
            u = n * weight
            if bias_ptr is not None:
                u += bias
            tl.store(dz_ptr + to, (d * u * slope).to(dz_ptr.dtype.element_ty), mask=here)
            d *= gate
        dweight += tl.sum(d * n, 0)
        if bias_ptr is not None:
            dbias += tl.sum(d, 0)
        d *= weight
        dv = d - n * (tl.sum(d * n, 1)[:, None] / S)
        if CENTER:
            dv -= tl.sum(d, 1)[:, None] / S
        dv *= scale
        if BEFORE:
            tl.store(dz_ptr + to, (dv * x * slope).to(dz_ptr.dtype.element_ty), mask=here)
            dv *= gate
        if dr_ptr is not None:
            dv += tl.load(dr_ptr + to, mask=here, other=0.0).to(dtype)
        tl.store(dx_ptr + to, dv.to(dx_ptr.dtype.element_ty), mask=here)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + to, dv.to(dresidual_ptr.dtype.element_ty), mask=here)
    to = program.to(tl.int64) * D + slice * S + at
    tl.store(dweight_ptr + to, dweight, mask=at < S)
    if bias_ptr is not None:
        tl.store(dbias_ptr + to, dbias, mask=at < S)
