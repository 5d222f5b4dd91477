"""Borders: where packed sequences begin and end, and what enters every span of time."""

import triton
import triton.language as tl


@triton.jit
def begins(owner_ptr, t, length, row):
    """Whether a sequence begins at time t, and which sequence has it."""
    if owner_ptr is not None:
        row = tl.load(owner_ptr + t, mask=t < length, other=0)
        return row, row != tl.load(owner_ptr + t - 1, mask=(t > 0) & (t < length), other=-1)
    return row, t == 0


@triton.jit
def ends_at(owner_ptr, t, length, row):
    """Whether a sequence ends at time t, and which sequence has it."""
    if owner_ptr is not None:
        row = tl.load(owner_ptr + t, mask=t < length, other=0)
        return row, row != tl.load(owner_ptr + t + 1, mask=t + 1 < length, other=-1)
    return row, t == length - 1


@triton.jit
def enter(
    decay_ptr,
    state_ptr,
    start_ptr,
    entering_ptr,
    spans,
    D,
    step,
    apart,
    COMPLEX: tl.constexpr,
    START: tl.constexpr,
    PACKED: tl.constexpr,
    BD: tl.constexpr,
):
    """``h_{c+1} = decay_c h_c + state_c`` over spans: ``(B, spans, D)``, from ``start`` ``(B, D)`` or from zero.

    Numbers are ``step`` apart, and an imaginary part is ``apart`` behind its real one. ``PACKED``: a decay of 0 forgets
    even what is not finite, as a sequence began in the span.
    """
    dtype: tl.constexpr = state_ptr.dtype.element_ty
    blocks = tl.cdiv(D, BD)
    d = (tl.program_id(0) % blocks * BD + tl.arange(0, BD)).to(tl.int64)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    mask, n = d < D, 2 if COMPLEX else 1
    h, hi = tl.zeros((BD,), dtype), tl.zeros((BD,), dtype)
    if START:
        h = tl.load(start_ptr + n * b * D + step * d, mask=mask, other=0.0)
        if COMPLEX:
            hi = tl.load(start_ptr + n * b * D + step * d + apart, mask=mask, other=0.0)
    for c in range(spans):
        at = n * (b * spans + c) * D + step * d
        tl.store(entering_ptr + at, h, mask=mask)
        a = tl.load(decay_ptr + at, mask=mask, other=0.0)
        s = tl.load(state_ptr + at, mask=mask, other=0.0)
        if COMPLEX:
            tl.store(entering_ptr + at + apart, hi, mask=mask)
            ai = tl.load(decay_ptr + at + apart, mask=mask, other=0.0)
            si = tl.load(state_ptr + at + apart, mask=mask, other=0.0)
            more, more_i = a * h - ai * hi, a * hi + ai * h
            if PACKED:
                forgets = (a == 0) & (ai == 0)
                more, more_i = tl.where(forgets, 0.0, more), tl.where(forgets, 0.0, more_i)
            h, hi = more + s, more_i + si
        else:
            more = a * h
            if PACKED:
                more = tl.where(a == 0, 0.0, more)
            h = more + s
