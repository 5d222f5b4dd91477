"""One step of a recurrence, in one pass over its state."""

import triton
import triton.language as tl

from dualform.ops.triton.kernels.early import wait_for_the_kernel_before
from dualform.ops.triton.kernels.pointwise import silu, softplus


@triton.jit
def table_row(rows_ptr, b, R):
    """The row of a table of ``R`` that row b of x has, or 0; whether it has one; and what its results are otherwise."""
    row = tl.load(rows_ptr + b).to(tl.int64)
    there = (row >= 0) & (row < R)
    return tl.where(there, row, 0), there, tl.where(row < 0, 0.0, float("nan"))


@triton.jit
def causal_conv1d_update(
    x_ptr,
    state_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    after_ptr,
    rows_ptr,
    seen_ptr,
    D,
    T,
    S,
    R,
    stride_x_row,
    stride_x,
    stride_state_row,
    stride_state,
    stride_slot,
    stride_after_row,
    stride_after,
    stride_after_slot,
    SILU: tl.constexpr,
    W: tl.constexpr,
    BD: tl.constexpr,
    DOUBLE: tl.constexpr,
    TABLE: tl.constexpr,
    RENEW: tl.constexpr,
    KEPT: tl.constexpr,
    EARLY: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """``T`` steps of ``BD`` channels of a row: the outputs, and the last S inputs, which may lie where they did.

    ``KEPT`` says that these are the W-1 that the next step sees. ``AHEAD`` reads the state and the parameters before it
    waits for the kernel before this one, which must not write them. Rows are found by ``rows_ptr``, if there is one, in
    the state and, with ``TABLE``, in what comes after. ``RENEW``
    writes the new inputs alone, into a ring that holds the others already.
    """
    dtype: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    if EARLY and not AHEAD:
        wait_for_the_kernel_before()
    blocks = tl.cdiv(D, BD)
    d, b = tl.program_id(0) % blocks * BD + tl.arange(0, BD), (tl.program_id(0) // blocks).to(tl.int64)
    mask, column = d < D, d.to(tl.int64)
    row, read, write = b, mask, mask
    if rows_ptr is not None:
        row, there, blank = table_row(rows_ptr, b, R)
        read = mask & there
    after_row = b
    if TABLE:
        after_row, write = row, read
    place = 0  # the slot of the next input
    if seen_ptr is not None:
        place = ((tl.load(seen_ptr + b) % S + S) % S).to(tl.int32)
    state_ptr += row * stride_state_row + column * stride_state
    after_ptr += after_row * stride_after_row + column * stride_after
    x_ptr += b * stride_x_row + d
    y_ptr += b * T * D + d

    w = ()
    for j in tl.static_range(W):
        w = w + (tl.load(weight_ptr + column * W + j, mask=mask, other=0.0).to(dtype),)
    before = ()
    for j in tl.static_range(W - 1):
        slot = (place + S - (W - 1) + j) % S
        before = before + (tl.load(state_ptr + slot * stride_slot, mask=read, other=0.0).to(dtype),)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + d, mask=mask, other=0.0).to(dtype)
    else:
        bias = tl.zeros((BD,), dtype)
    if EARLY and AHEAD:
        wait_for_the_kernel_before()
    for t in range(T):
        x = tl.load(x_ptr + tl.cast(t, tl.int64) * stride_x, mask=mask, other=0.0).to(dtype)
        y = bias + w[W - 1] * x
        for j in tl.static_range(W - 1):
            y += w[j] * before[j]
        if W > 1:
            before = before[1:] + (x,)
        if SILU:
            y = silu(y)
        if rows_ptr is not None:
            y = tl.where(there, y, blank.to(dtype))
        tl.store(y_ptr + tl.cast(t, tl.int64) * D, y.to(y_ptr.dtype.element_ty), mask=mask)

    if KEPT:
        for j in tl.static_range(W - 1):
            value = before[j]
            if rows_ptr is not None:
                value = tl.where(there, value, blank.to(dtype))
            tl.store(after_ptr + j * stride_after_slot, value.to(after_ptr.dtype.element_ty), mask=write)
    else:
        first = tl.maximum(0, T - S) if RENEW else 0
        for i in range(first, T if RENEW else S):
            # What is written to a slot is an input of the S of the state, oldest first, and the T that are new.
            if RENEW:
                slot, at = (place + i) % S, S + i
            elif seen_ptr is not None:
                slot, at = i, ((i - place - T) % S + S) % S + T
            else:
                slot, at = i, i + T
            old = tl.load(state_ptr + (place + at) % S * stride_slot, mask=read & (at < S), other=0.0).to(dtype)
            new = tl.load(x_ptr + tl.cast(at - S, tl.int64) * stride_x, mask=mask & (at >= S), other=0.0).to(dtype)
            value = tl.where(at < S, old, new)
            if rows_ptr is not None:
                value = tl.where(there, value, blank.to(dtype))
            tl.store(after_ptr + slot * stride_after_slot, value.to(after_ptr.dtype.element_ty), mask=write)


@triton.jit
def selective_state_update(
    state_ptr,
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    bias_ptr,
    y_ptr,
    after_ptr,
    rows_ptr,
    steps_ptr,
    R,
    width,
    per_head,
    per_skip,
    per_b,
    per_c,
    stride_state,
    stride_x,
    stride_dt,
    stride_z,
    stride_b,
    stride_b_group,
    stride_c,
    stride_c_group,
    stride_after,
    SOFTPLUS: tl.constexpr,
    BY_HEAD: tl.constexpr,
    TABLE: tl.constexpr,
    EARLY: tl.constexpr,
    AHEAD: tl.constexpr,
    RANK: tl.constexpr,
    RP: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    BD: tl.constexpr,
):
    """``BD`` channels of a row; the next states may lie where those before did.

    ``per_head`` neighbouring channels share a step size and, ``BY_HEAD``, a rate; ``per_skip`` an entry of D; ``per_b``
    and ``per_c`` a group of B and of C. Rows are found as those of the convolution. With ``RANK``, step sizes are given
    as so many numbers of a row, and what is at ``steps_ptr``, ``(width, RANK)``, makes them of those. ``AHEAD`` reads
    the state and the parameters before it waits for the kernel before this one, which must not write them.
    """
    dtype: tl.constexpr = A_ptr.dtype.element_ty
    blocks = tl.cdiv(width, BD)
    d, b = tl.program_id(0) % blocks * BD + tl.arange(0, BD), (tl.program_id(0) // blocks).to(tl.int64)
    n, mask = tl.arange(0, NP)[None, :], d < width
    inside, at = mask[:, None] & (n < N), d[:, None].to(tl.int64) * N + n
    row, read, write = b, inside, inside
    if EARLY and not AHEAD:
        wait_for_the_kernel_before()
    if rows_ptr is not None:
        row, there, blank = table_row(rows_ptr, b, R)
        read = inside & there
    after_row = b
    if TABLE:
        after_row, write = row, read
    if BY_HEAD:
        rates = tl.load(A_ptr + d // per_head, mask=mask, other=0.0)[:, None]
    else:
        rates = tl.load(A_ptr + at, mask=inside, other=0.0)
    before = tl.load(state_ptr + row * stride_state + at, mask=read, other=0.0).to(dtype)
    bias = tl.zeros((BD,), dtype)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + d // per_head, mask=mask, other=0.0).to(dtype)
    skip = tl.zeros((BD,), dtype)
    if D_ptr is not None:
        skip = tl.load(D_ptr + d // per_skip, mask=mask, other=0.0).to(dtype)
    if RANK > 0:
        r = tl.arange(0, RP)
        steps = tl.load(
            steps_ptr + d[:, None] * RANK + r[None, :], mask=mask[:, None] & (r < RANK)[None, :], other=0.0
        ).to(dtype)
    if EARLY and AHEAD:
        wait_for_the_kernel_before()
    x = tl.load(x_ptr + b * stride_x + d, mask=mask, other=0.0).to(dtype)
    if RANK > 0:
        low = tl.load(dt_ptr + b * stride_dt + r, mask=r < RANK, other=0.0).to(dtype)
        dt = bias + tl.sum(steps * low[None, :], 1)
    else:
        dt = bias + tl.load(dt_ptr + b * stride_dt + d // per_head, mask=mask, other=0.0).to(dtype)
    if SOFTPLUS:
        dt = softplus(dt)
    into = tl.load(B_ptr + b * stride_b + (d // per_b)[:, None] * stride_b_group + n, mask=inside, other=0.0).to(dtype)
    out = tl.load(C_ptr + b * stride_c + (d // per_c)[:, None] * stride_c_group + n, mask=inside, other=0.0).to(dtype)
    h = tl.exp(dt[:, None] * rates.to(dtype)) * before + (dt * x)[:, None] * into
    y = tl.sum(h * out, 1)
    if rows_ptr is not None:
        h = tl.where(there, h, blank.to(dtype))
    tl.store(after_ptr + after_row * stride_after + at, h.to(after_ptr.dtype.element_ty), mask=write)
    if D_ptr is not None:
        y += skip * x
    if z_ptr is not None:
        y *= silu(tl.load(z_ptr + b * stride_z + d, mask=mask, other=0.0).to(dtype))
    if rows_ptr is not None:
        y = tl.where(there, y, blank.to(dtype))
    tl.store(y_ptr + b * width + d, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add(x_ptr, y_ptr, sum_ptr, size, EARLY: tl.constexpr, BLOCK: tl.constexpr):
    """``x + y`` in the dtype of the sum."""
    if EARLY:
        wait_for_the_kernel_before()
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    dtype: tl.constexpr = sum_ptr.dtype.element_ty
    total = tl.load(x_ptr + at, mask=mask).to(dtype) + tl.load(y_ptr + at, mask=mask).to(dtype)
    tl.store(sum_ptr + at, total, mask=mask)


@triton.jit
def mamba2_update(
    state_ptr,
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    bias_ptr,
    y_ptr,
    after_ptr,
    heads,
    width,
    per_group,
    stride_state,
    stride_x,
    stride_z,
    stride_after,
    LIMITED: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    EARLY: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    BD: tl.constexpr,
):
    """``BD`` of the ``width`` channels of a head of one row of a Mamba-2, gated where there is a z.

    The rows of x, B and C have ``stride_x``, those of z and dt ``stride_z``; ``per_group`` heads share B and C. The
    next states may lie where those before did. States and parameters are read before this waits for the kernel before
    it, which must not write them.
    """
    dtype: tl.constexpr = A_ptr.dtype.element_ty
    blocks = tl.cdiv(width, BD)
    program = tl.program_id(0) // blocks
    d, head, row = tl.program_id(0) % blocks * BD + tl.arange(0, BD), program % heads, (program // heads).to(tl.int64)
    n, known = tl.arange(0, NP), d < width
    channel, group = head * width + d, head // per_group * N
    at, inside = channel[:, None].to(tl.int64) * N + n[None, :], known[:, None] & (n < N)[None, :]
    before = tl.load(state_ptr + row * stride_state + at, mask=inside, other=0.0).to(dtype)
    rate, bias, skip = tl.load(A_ptr + head), tl.load(bias_ptr + head), tl.load(D_ptr + head)
    if EARLY:
        wait_for_the_kernel_before()
    given, beside = row * stride_x, row * stride_z
    dt = softplus(bias + tl.load(dt_ptr + beside + head).to(dtype))
    if LIMITED:
        dt = tl.where(dt < LOW, LOW, tl.where(dt > HIGH, HIGH, dt))  # NaN stays NaN
    into = tl.load(B_ptr + given + group + n, mask=n < N, other=0.0).to(dtype)
    out = tl.load(C_ptr + given + group + n, mask=n < N, other=0.0).to(dtype)
    x = tl.load(x_ptr + given + channel, mask=known, other=0.0).to(dtype)
    h = tl.exp(dt * rate) * before + (dt * x)[:, None] * into[None, :]
    y = tl.sum(h * out[None, :], 1) + skip * x
    if z_ptr is not None:
        y *= silu(tl.load(z_ptr + beside + channel, mask=known, other=0.0).to(dtype))
    tl.store(after_ptr + row * stride_after + at, h.to(after_ptr.dtype.element_ty), mask=inside)
    tl.store(y_ptr + row * heads * width + channel, y.to(y_ptr.dtype.element_ty), mask=known)
