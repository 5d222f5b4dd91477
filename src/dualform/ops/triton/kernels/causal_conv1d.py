"""The short causal convolution: every program walks along time over some channels, its window in registers.

Each input is read once, and what a tap needs from a neighbouring span is read again there (the halo). Rows are
requested R steps before they are used, which keeps enough memory in flight.
"""

import triton
import triton.language as tl

from dualform.ops.triton.kernels.pointwise import silu


@triton.jit
def _place(pid, D, BD: tl.constexpr, spans):
    """The channels, the span and the batch row of a program."""
    blocks = tl.cdiv(D, BD)
    rest = pid // blocks
    d = (pid % blocks) * BD + tl.arange(0, BD)
    return d, rest % spans, rest // spans


@triton.jit
def _taps(weight_ptr, d, mask, W: tl.constexpr, dtype: tl.constexpr):
    """The columns of the weight."""
    w = ()
    for j in tl.static_range(W):
        w = w + (tl.load(weight_ptr + d.to(tl.int64) * W + j, mask=mask, other=0.0).to(dtype),)
    return w


@triton.jit
def _columns(ptr, row, d, mask, D, n: tl.constexpr):
    """The n columns of one row ``(D, n)``."""
    found = ()
    for j in tl.static_range(n):
        at = tl.cast(row, tl.int64) * D * n + d.to(tl.int64) * n + j
        found = found + (tl.load(ptr + at, mask=mask, other=0.0),)
    return found


@triton.jit
def _put_columns(ptr, row, d, mask, D, n: tl.constexpr, values):
    for j in tl.static_range(n):
        at = tl.cast(row, tl.int64) * D * n + d.to(tl.int64) * n + j
        tl.store(ptr + at, values[j], mask=mask)


@triton.jit
def _earlier(x_ptr, state_ptr, t, start, row, d, mask, D, stride, n: tl.constexpr):
    """The n inputs before time t, oldest first; those before the start of the sequence come from its state."""
    found = ()
    for j in tl.static_range(n):
        at = tl.cast(t, tl.int64) - n + j
        if at >= start:
            x = tl.load(x_ptr + at * stride + d, mask=mask, other=0.0).to(state_ptr.dtype.element_ty)
        else:
            place = tl.cast(row, tl.int64) * D * n + d.to(tl.int64) * n + (at - start + n)
            x = tl.load(state_ptr + place, mask=mask, other=0.0)
        found = found + (x,)
    return found


@triton.jit
def forward(
    x_ptr,
    weight_ptr,
    bias_ptr,
    state_ptr,
    owner_ptr,
    cu_ptr,
    y_ptr,
    final_ptr,
    T,
    D,
    finals,
    stride_b,
    stride_t,
    SILU: tl.constexpr,
    W: tl.constexpr,
    BT: tl.constexpr,
    R: tl.constexpr,
    BD: tl.constexpr,
):
    """A program is ``BT`` steps of ``BD`` channels, or, behind the last span, the final state of a sequence."""
    dtype: tl.constexpr = state_ptr.dtype.element_ty
    spans = tl.cdiv(T, BT)
    d, span, b = _place(tl.program_id(0), D, BD, spans + finals)
    mask = d < D
    x_ptr += tl.cast(b, tl.int64) * stride_b
    begin, end, row, start = span * BT, tl.minimum(T, span * BT + BT), b, 0
    if span >= spans:
        end = T
        if owner_ptr is not None:
            row = span - spans
            start = tl.load(cu_ptr + row).to(tl.int32)
            end = tl.load(cu_ptr + row + 1).to(tl.int32)
        found = _earlier(x_ptr, state_ptr, end, start, row, d, mask, D, stride_t, W - 1)
        _put_columns(final_ptr, row, d, mask, D, W - 1, found)
    else:
        if owner_ptr is not None:
            row = tl.load(owner_ptr + begin)
            start = tl.load(cu_ptr + row).to(tl.int32)
        w = _taps(weight_ptr, d, mask, W, dtype)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + d, mask=mask, other=0.0).to(dtype)
        else:
            bias = tl.zeros((BD,), dtype)
        before = _earlier(x_ptr, state_ptr, begin, start, row, d, mask, D, stride_t, W - 1)
        x_at = x_ptr + tl.cast(begin, tl.int64) * stride_t + d
        y_at = y_ptr + (tl.cast(b, tl.int64) * T + begin) * D + d
        ahead = ()
        for i in tl.static_range(R):
            ahead = ahead + (tl.load(x_at, mask=mask & (begin + i < end), other=0.0),)
            x_at += stride_t
        for base in range(begin, end, R):
            for i in tl.static_range(R):
                t = base + i
                x = ahead[0].to(dtype)
                ahead = ahead[1:] + (tl.load(x_at, mask=mask & (t + R < end), other=0.0),)
                if owner_ptr is not None:
                    now = tl.load(owner_ptr + t, mask=t < end, other=row)
                    if now != row:
                        row = now
                        before = _columns(state_ptr, row, d, mask, D, W - 1)
                y = bias + w[W - 1] * x
                for j in tl.static_range(W - 1):
                    y += w[j] * before[j]
                if SILU:
                    y = silu(y)
                tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=mask & (t < end))
                if W > 1:
                    before = before[1:] + (x,)
                x_at += stride_t
                y_at += D


@triton.jit
def backward(
    x_ptr,
    weight_ptr,
    bias_ptr,
    state_ptr,
    owner_ptr,
    cu_ptr,
    dy_ptr,
    dfinal_ptr,
    dx_ptr,
    partial_ptr,
    dstate_ptr,
    T,
    D,
    stride_b,
    stride_t,
    SILU: tl.constexpr,
    W: tl.constexpr,
    BT: tl.constexpr,
    R: tl.constexpr,
    BD: tl.constexpr,
):
    """A program is ``BT`` steps of ``BD`` channels, walked from last to first.

    ``carry`` is the gradient of the W-1 inputs up to the present one, as far as later outputs have said: it enters a
    sequence as the gradient of the final state and leaves it as that of the initial state.
    """
    dtype: tl.constexpr = state_ptr.dtype.element_ty
    HALO: tl.constexpr = (W - 1 + R - 1) // R * R  # steps behind the span whose outputs saw its inputs
    spans = tl.cdiv(T, BT)
    pid = tl.program_id(0)
    d, span, b = _place(pid, D, BD, spans)
    mask = d < D
    end = T - span * BT  # spans are counted from the last step, so that the first one may be shorter
    begin, top = end - BT, tl.minimum(end + HALO, T)
    x_ptr += tl.cast(b, tl.int64) * stride_b
    row, start, stop = b, 0, T
    if owner_ptr is not None:
        row = tl.load(owner_ptr + top - 1)
        start = tl.load(cu_ptr + row).to(tl.int32)
        stop = tl.load(cu_ptr + row + 1).to(tl.int32)
    before = _earlier(x_ptr, state_ptr, top, start, row, d, mask, D, stride_t, W - 1)
    carry = _columns(dfinal_ptr, row, d, mask & (top == stop), D, W - 1)
    w = _taps(weight_ptr, d, mask, W, dtype)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + d, mask=mask, other=0.0).to(dtype)
    else:
        bias = tl.zeros((BD,), dtype)
    dbias = tl.zeros((BD,), dtype)
    dw = ()
    for j in tl.static_range(W):
        dw = dw + (tl.zeros((BD,), dtype),)
    x_at = x_ptr + tl.cast(top - W, tl.int64) * stride_t + d
    dy_at = dy_ptr + (tl.cast(b, tl.int64) * T + top - 1) * D + d
    dx_at = dx_ptr + (tl.cast(b, tl.int64) * T + top - 1) * D + d
    x_ahead = ()
    dy_ahead = ()
    for i in tl.static_range(R):
        x_ahead = x_ahead + (tl.load(x_at, mask=mask & (top - W - i >= 0), other=0.0),)
        dy_ahead = dy_ahead + (tl.load(dy_at, mask=mask & (top - 1 - i >= 0), other=0.0),)
        x_at -= stride_t
        dy_at -= D
    for base in range(top - 1, tl.maximum(begin, 0) - 1, -R):
        for i in tl.static_range(R):
            t = base - i
            oldest = x_ahead[0].to(dtype)
            g = dy_ahead[0].to(dtype)
            there = mask & (t - R >= begin)
            x_ahead = x_ahead[1:] + (tl.load(x_at, mask=there & (t - R - W + 1 >= 0), other=0.0),)
            dy_ahead = dy_ahead[1:] + (tl.load(dy_at, mask=there & (t - R >= 0), other=0.0),)
            if owner_ptr is not None:
                now = tl.load(owner_ptr + t, mask=t >= 0, other=row)
                if now != row:  # the last step of an earlier sequence
                    row = now
                    start = tl.load(cu_ptr + row).to(tl.int32)
                    before = _earlier(x_ptr, state_ptr, t + 1, start, row, d, mask, D, stride_t, W - 1)
                    carry = _columns(dfinal_ptr, row, d, mask, D, W - 1)
            if t - W + 1 < start:
                place = tl.cast(row, tl.int64) * D * (W - 1) + d.to(tl.int64) * (W - 1) + (t - start)
                oldest = tl.load(state_ptr + place, mask=mask & (t >= start), other=0.0)
            if SILU:
                y = bias + w[0] * oldest
                for j in tl.static_range(1, W):
                    y += w[j] * before[j - 1]
                s = 1 / (1 + tl.exp(-y))
                g = g * s * (1 + y * (1 - s))
            dx = w[W - 1] * g
            if W > 1:
                dx += carry[W - 2]
                after = (w[0] * g,)
                for j in tl.static_range(1, W - 1):
                    after = after + (carry[j - 1] + w[j] * g,)
                carry = after
            inside = t < end
            tl.store(dx_at, dx.to(dx_ptr.dtype.element_ty), mask=mask & inside & (t >= 0))
            if (t == start) & inside:
                _put_columns(dstate_ptr, row, d, mask, D, W - 1, carry)
            g = tl.where(inside, g, 0.0)
            dbias += g
            more = (dw[0] + g * oldest,)
            for j in tl.static_range(1, W):
                more = more + (dw[j] + g * before[j - 1],)
            dw = more
            if W > 1:
                before = (oldest,) + before[: W - 2]
            x_at -= stride_t
            dy_at -= D
            dx_at -= D
    partial_ptr += tl.cast(pid // tl.cdiv(D, BD), tl.int64) * (W + 1) * D
    for j in tl.static_range(W):
        tl.store(partial_ptr + j * D + d, dw[j], mask=mask)
    tl.store(partial_ptr + W * D + d, dbias, mask=mask)


@triton.jit
def gather(partial_ptr, dweight_ptr, dbias_ptr, parts, D, W: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr):
    """The sums of the programs' parts ``(parts, W + 1, D)``: W columns of the weight's gradient, then the bias's."""
    column = tl.program_id(0) % (W + 1)
    d = tl.program_id(0) // (W + 1) * BD + tl.arange(0, BD)
    mask = d < D
    total = tl.zeros((BP, BD), partial_ptr.dtype.element_ty)
    for first in range(0, parts, BP):
        p = (first + tl.arange(0, BP)).to(tl.int64)
        at = (p[:, None] * (W + 1) + column) * D + d[None, :]
        total += tl.load(partial_ptr + at, mask=(p < parts)[:, None] & mask[None, :], other=0.0)
    found = tl.sum(total, 0)
    if column < W:
        tl.store(dweight_ptr + d * W + column, found.to(dweight_ptr.dtype.element_ty), mask=mask)
    elif dbias_ptr is not None:
        tl.store(dbias_ptr + d, found.to(dbias_ptr.dtype.element_ty), mask=mask)
