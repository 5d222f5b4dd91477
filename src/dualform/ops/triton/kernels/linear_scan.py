"""The linear recurrence: a program walks along time over some channels, tile by tile, each scanned in registers.

Positions ``i`` count in the direction of a scan: time forwards or backwards in the forward pass, the opposite way in
the backward pass. Complex numbers are pairs; of a real one only the first is there, and the second is never used.
"""

import triton
import triton.language as tl


@triton.jit
def _affine(a, b, c, d):
    return a * c, c * b + d


@triton.jit
def _affine_or_reset(a, b, c, d):
    """The same, but a decay of 0 forgets even what is not finite: what came before is another sequence."""
    return tl.where(c == 0, 0.0, a * c), tl.where(c == 0, d, c * b + d)


@triton.jit
def _complex_affine(ar, ai, br, bi, cr, ci, dr, di):
    return ar * cr - ai * ci, ar * ci + ai * cr, cr * br - ci * bi + dr, cr * bi + ci * br + di


@triton.jit
def _complex_affine_or_reset(ar, ai, br, bi, cr, ci, dr, di):
    kept = (cr != 0) | (ci != 0)
    r, i = tl.where(kept, cr * br - ci * bi, 0.0), tl.where(kept, cr * bi + ci * br, 0.0)
    decay, decay_i = tl.where(kept, ar * cr - ai * ci, 0.0), tl.where(kept, ar * ci + ai * cr, 0.0)
    return decay, decay_i, r + dr, i + di


@triton.jit
def _scan(a, b, COMPLEX: tl.constexpr, PACKED: tl.constexpr):
    """``(prod a, h)`` up to every row of a tile, from the state zero; a and b are pairs."""
    if COMPLEX:
        if PACKED:
            ar, ai, br, bi = tl.associative_scan((a[0], a[1], b[0], b[1]), 0, _complex_affine_or_reset)
        else:
            ar, ai, br, bi = tl.associative_scan((a[0], a[1], b[0], b[1]), 0, _complex_affine)
    else:
        if PACKED:
            ar, br = tl.associative_scan((a[0], b[0]), 0, _affine_or_reset)
        else:
            ar, br = tl.associative_scan((a[0], b[0]), 0, _affine)
        ai, bi = ar, br
    return (ar, ai), (br, bi)


@triton.jit
def _times(a, b, COMPLEX: tl.constexpr, CONJUGATE: tl.constexpr):
    """``a b``, or ``conj(a) b``."""
    if COMPLEX:
        ai = -a[1] if CONJUGATE else a[1]
        return a[0] * b[0] - ai * b[1], a[0] * b[1] + ai * b[0]
    return a[0] * b[0], a[0] * b[0]


@triton.jit
def _load(ptr, at, mask, other, COMPLEX: tl.constexpr, dtype: tl.constexpr):
    """Numbers as a pair; ``at`` counts numbers."""
    if COMPLEX:
        re = tl.load(ptr + 2 * at, mask=mask, other=other).to(dtype)
        return re, tl.load(ptr + 2 * at + 1, mask=mask, other=0.0).to(dtype)
    re = tl.load(ptr + at, mask=mask, other=other).to(dtype)
    return re, tl.zeros_like(re)


@triton.jit
def _store(ptr, at, x, mask, COMPLEX: tl.constexpr):
    dtype: tl.constexpr = ptr.dtype.element_ty
    if COMPLEX:
        tl.store(ptr + 2 * at, x[0].to(dtype), mask=mask)
        tl.store(ptr + 2 * at + 1, x[1].to(dtype), mask=mask)
    else:
        tl.store(ptr + at, x[0].to(dtype), mask=mask)


@triton.jit
def _row(x, rows, n):
    """Row n of a tile."""
    here = (rows == n)[:, None]
    return tl.sum(tl.where(here, x[0], 0.0), 0), tl.sum(tl.where(here, x[1], 0.0), 0)


@triton.jit
def _tile(
    a_ptr,
    b_ptr,
    end_ptr,
    owner_ptr,
    i,
    there,
    d,
    mask,
    T,
    D,
    a_t,
    a_d,
    b_t,
    b_d,
    DOWN: tl.constexpr,
    BACKWARD: tl.constexpr,
    COMPLEX: tl.constexpr,
    A_COMPLEX: tl.constexpr,
    B_COMPLEX: tl.constexpr,
    dtype: tl.constexpr,
):
    """Decays and inputs of a tile, that of a position before it the decay of this one; identities behind the end.

    ``DOWN``: positions run against time. ``BACKWARD``: b is the gradient of the states, a belongs one position back,
    and is conjugate. ``end_ptr`` ``(rows, D)`` is what enters every packed sequence: its initial state, or the
    gradient of its final state. Then a sequence's first decay is zero.
    """
    t = T - 1 - i if DOWN else i
    back = t + 1 if DOWN else t - 1  # the position before, in time
    inner, whole = (i > 0) & there, there[:, None] & mask[None, :]
    from_t = back if BACKWARD else t
    valid = inner[:, None] & mask[None, :] if BACKWARD else whole
    at = from_t[:, None].to(tl.int64) * a_t + d[None, :].to(tl.int64) * a_d
    a = _load(a_ptr, at, valid, 1.0, A_COMPLEX, dtype)
    if BACKWARD and COMPLEX:
        a = (a[0], -a[1])
    b = _load(b_ptr, t[:, None].to(tl.int64) * b_t + d[None, :].to(tl.int64) * b_d, whole, 0.0, B_COMPLEX, dtype)
    if owner_ptr is not None:
        owner = tl.load(owner_ptr + t, mask=there, other=0)
        first = (there & (owner != tl.load(owner_ptr + back, mask=inner, other=-1)))[:, None]
        at = owner[:, None].to(tl.int64) * D + d[None, :]
        enters = _load(end_ptr, at, first & mask[None, :], 0.0, COMPLEX, dtype)
        more = enters if BACKWARD else _times(a, enters, COMPLEX, False)
        b = (tl.where(first, b[0] + more[0], b[0]), tl.where(first, b[1] + more[1], b[1]))
        a = (tl.where(first, 0.0, a[0]), tl.where(first, 0.0, a[1]))
    return a, b


@triton.jit
def _enter(a, b, carry, rows, COMPLEX: tl.constexpr, PACKED: tl.constexpr):
    """The inputs of a tile, with the state before it in the first."""
    more = _times(a, (carry[0][None, :], carry[1][None, :]), COMPLEX, False)
    first = (rows == 0)[:, None]
    if PACKED:
        first = first & ((a[0] != 0) | (a[1] != 0))
    return tl.where(first, b[0] + more[0], b[0]), tl.where(first, b[1] + more[1], b[1])


@triton.jit
def _place(T, D, spans, steps, BD: tl.constexpr):
    """Of a program: its span of which row, its channels and which of them are there, and its steps."""
    blocks = tl.cdiv(D, BD)
    rest = tl.program_id(0) // blocks
    d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    begin = (rest % spans) * steps
    return rest, (rest // spans).to(tl.int64), d, d < D, begin, tl.minimum(T, begin + steps)


@triton.jit
def summarize(
    a_ptr,
    b_ptr,
    end_ptr,
    owner_ptr,
    decay_ptr,
    state_ptr,
    T,
    D,
    spans,
    steps,
    a_b,
    a_t,
    a_d,
    b_b,
    b_t,
    b_d,
    DOWN: tl.constexpr,
    BACKWARD: tl.constexpr,
    COMPLEX: tl.constexpr,
    A_COMPLEX: tl.constexpr,
    B_COMPLEX: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """Every span's decay and its last state from zero, ``(B, spans, D)``."""
    dtype: tl.constexpr = state_ptr.dtype.element_ty
    rest, b64, d, mask, begin, end = _place(T, D, spans, steps, BD)
    rows = tl.arange(0, BT)
    a_ptr += b64 * a_b * (2 if A_COMPLEX else 1)
    b_ptr += b64 * b_b * (2 if B_COMPLEX else 1)
    decay = (tl.full((BD,), 1.0, dtype), tl.zeros((BD,), dtype))
    state = (tl.zeros((BD,), dtype), tl.zeros((BD,), dtype))
    for first in range(begin, end, BT):
        i = first + rows
        a, b = _tile(
            a_ptr, b_ptr, end_ptr, owner_ptr, i, i < end, d, mask, T, D, a_t, a_d, b_t, b_d,
            DOWN, BACKWARD, COMPLEX, A_COMPLEX, B_COMPLEX, dtype,
        )  # fmt: skip
        b = _enter(a, b, state, rows, COMPLEX, owner_ptr is not None)
        a, b = _scan(a, b, COMPLEX, owner_ptr is not None)
        state, last = _row(b, rows, BT - 1), _row(a, rows, BT - 1)
        more = _times(last, decay, COMPLEX, False)
        if owner_ptr is not None:
            kept = (last[0] != 0) | (last[1] != 0)
            more = (tl.where(kept, more[0], 0.0), tl.where(kept, more[1], 0.0))
        decay = more
    _store(decay_ptr, rest.to(tl.int64) * D + d, decay, mask, COMPLEX)
    _store(state_ptr, rest.to(tl.int64) * D + d, state, mask, COMPLEX)


@triton.jit
def forward(
    a_ptr,
    b_ptr,
    start_ptr,
    owner_ptr,
    entering_ptr,
    h_ptr,
    final_ptr,
    T,
    D,
    spans,
    steps,
    a_b,
    a_t,
    a_d,
    b_b,
    b_t,
    b_d,
    DOWN: tl.constexpr,
    COMPLEX: tl.constexpr,
    A_COMPLEX: tl.constexpr,
    B_COMPLEX: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """The states ``(B, T, D)``, from those that enter every span ``(B, spans, D)``, and the final ones."""
    dtype: tl.constexpr = start_ptr.dtype.element_ty
    rest, b64, d, mask, begin, end = _place(T, D, spans, steps, BD)
    rows = tl.arange(0, BT)
    a_ptr += b64 * a_b * (2 if A_COMPLEX else 1)
    b_ptr += b64 * b_b * (2 if B_COMPLEX else 1)
    carry = _load(entering_ptr, rest.to(tl.int64) * D + d, mask, 0.0, COMPLEX, dtype)
    i = begin + rows
    next_a, next_b = _tile(
        a_ptr, b_ptr, start_ptr, owner_ptr, i, i < end, d, mask, T, D, a_t, a_d, b_t, b_d,
        DOWN, False, COMPLEX, A_COMPLEX, B_COMPLEX, dtype,
    )  # fmt: skip
    for first in range(begin, end, BT):
        a, b, i = next_a, next_b, first + rows
        later = i + BT  # requested before this tile is computed
        next_a, next_b = _tile(
            a_ptr, b_ptr, start_ptr, owner_ptr, later, later < end, d, mask, T, D, a_t, a_d, b_t, b_d,
            DOWN, False, COMPLEX, A_COMPLEX, B_COMPLEX, dtype,
        )  # fmt: skip
        b = _enter(a, b, carry, rows, COMPLEX, owner_ptr is not None)
        _, h = _scan(a, b, COMPLEX, owner_ptr is not None)
        carry = _row(h, rows, BT - 1)
        t = T - 1 - i if DOWN else i
        whole = (i < end)[:, None] & mask[None, :]
        _store(h_ptr, (b64 * T + t[:, None]) * D + d[None, :], h, whole, COMPLEX)
        if owner_ptr is not None:
            owner = tl.load(owner_ptr + t, mask=i < end, other=0)
            after = tl.load(owner_ptr + (t - 1 if DOWN else t + 1), mask=i + 1 < T, other=-1)
            last = ((i < end) & (owner != after))[:, None] & mask[None, :]
            _store(final_ptr, owner[:, None].to(tl.int64) * D + d[None, :], h, last, COMPLEX)
    if (owner_ptr is None) & (end == T):
        _store(final_ptr, b64 * D + d, carry, mask, COMPLEX)


@triton.jit
def backward(
    a_ptr,
    h_ptr,
    start_ptr,
    owner_ptr,
    entering_ptr,
    dh_ptr,
    dfinal_ptr,
    da_ptr,
    db_ptr,
    dstart_ptr,
    T,
    D,
    spans,
    steps,
    a_b,
    a_t,
    a_d,
    DOWN: tl.constexpr,
    COMPLEX: tl.constexpr,
    A_COMPLEX: tl.constexpr,
    B_COMPLEX: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """With ``g`` the gradient of the states in full: ``db_t = g_t``, ``da_t = g_t conj(h_{t-1})``."""
    dtype: tl.constexpr = start_ptr.dtype.element_ty
    rest, b64, d, mask, begin, end = _place(T, D, spans, steps, BD)
    rows = tl.arange(0, BT)
    a_ptr += b64 * a_b * (2 if A_COMPLEX else 1)
    dh_ptr += b64 * T * D * (2 if COMPLEX else 1)
    carry = _load(entering_ptr, rest.to(tl.int64) * D + d, mask, 0.0, COMPLEX, dtype)
    i = begin + rows
    next_a, next_g = _tile(
        a_ptr, dh_ptr, dfinal_ptr, owner_ptr, i, i < end, d, mask, T, D, a_t, a_d, D, 1,
        DOWN, True, COMPLEX, A_COMPLEX, COMPLEX, dtype,
    )  # fmt: skip
    for first in range(begin, end, BT):
        a, g, i = next_a, next_g, first + rows
        later = i + BT
        next_a, next_g = _tile(
            a_ptr, dh_ptr, dfinal_ptr, owner_ptr, later, later < end, d, mask, T, D, a_t, a_d, D, 1,
            DOWN, True, COMPLEX, A_COMPLEX, COMPLEX, dtype,
        )  # fmt: skip
        t = T - 1 - i if DOWN else i
        there, after = i < end, t - 1 if DOWN else t + 1  # in the direction of this pass; before, for the recurrence
        row, starts = tl.full((BT,), 0, tl.int64) + b64, there & (i + 1 == T)
        if owner_ptr is not None:
            row = tl.load(owner_ptr + t, mask=there, other=0).to(tl.int64)
            starts = there & (row != tl.load(owner_ptr + after, mask=there & (i + 1 < T), other=-1))
        starts, inner = starts[:, None] & mask[None, :], (there[:, None] & mask[None, :]) & (starts == 0)[:, None]
        before = _load(h_ptr, (b64 * T + after[:, None]) * D + d[None, :], inner, 0.0, COMPLEX, dtype)
        at_row = row[:, None] * D + d[None, :]
        initial = _load(start_ptr, at_row, starts, 0.0, COMPLEX, dtype)
        before = (before[0] + initial[0], before[1] + initial[1])
        g = _enter(a, g, carry, rows, COMPLEX, owner_ptr is not None)
        _, g = _scan(a, g, COMPLEX, owner_ptr is not None)
        carry = _row(g, rows, BT - 1)
        at, whole = (b64 * T + t[:, None]) * D + d[None, :], there[:, None] & mask[None, :]
        _store(db_ptr, at, g, whole, B_COMPLEX)
        _store(da_ptr, at, _times(before, g, COMPLEX, True), whole, A_COMPLEX)
        own = t[:, None].to(tl.int64) * a_t + d[None, :].to(tl.int64) * a_d
        decay = _load(a_ptr, own, starts, 0.0, A_COMPLEX, dtype)
        _store(dstart_ptr, at_row, _times(decay, g, COMPLEX, True), starts, COMPLEX)
