"""The diagonal state space model: a program walks along time over some channels, their modes ``(N, D)`` in registers.

States are planes: ``(2, N, D)``, the real parts first.
"""

import triton
import triton.language as tl

from dualform.ops.triton.kernels.spans import begins, ends_at


@triton.jit
def _place(D, spans, BD: tl.constexpr):
    """Channels, and whether they are there; the span and the batch row."""
    blocks = tl.cdiv(D, BD)
    d, rest = tl.program_id(0) % blocks * BD + tl.arange(0, BD), tl.program_id(0) // blocks
    return d, d < D, rest % spans, rest // spans


@triton.jit
def _load(ptr, row, d, mask, D, N: tl.constexpr, NP: tl.constexpr):
    """The planes of a row; zeros where a power of two is filled up."""
    n = tl.arange(0, NP)[:, None]
    at, there = (2 * tl.cast(row, tl.int64) * N + n) * D + d[None, :], (n < N) & mask[None, :]
    return tl.load(ptr + at, mask=there, other=0.0), tl.load(ptr + at + N * D, mask=there, other=0.0)


@triton.jit
def _store(ptr, row, d, mask, D, N: tl.constexpr, NP: tl.constexpr, re, im):
    n = tl.arange(0, NP)[:, None]
    at, there = (2 * tl.cast(row, tl.int64) * N + n) * D + d[None, :], (n < N) & mask[None, :]
    tl.store(ptr + at, re, mask=there)
    tl.store(ptr + at + N * D, im, mask=there)


@triton.jit
def _power(a, ai, exponent, BITS: tl.constexpr):
    """``a^exponent`` by squaring, so that rounding grows with the logarithm."""
    re, im = tl.zeros_like(a) + 1, tl.zeros_like(a)
    for bit in tl.static_range(BITS):
        takes = ((exponent >> bit) & 1) != 0
        re, im = tl.where(takes, re * a - im * ai, re), tl.where(takes, re * ai + im * a, im)
        a, ai = a * a - ai * ai, 2 * a * ai
    return re, im


@triton.jit
def forward(
    u_ptr,
    A_ptr,
    C_ptr,
    start_ptr,
    owner_ptr,
    entering_ptr,
    y_ptr,
    final_ptr,
    saved_ptr,
    decay_ptr,
    state_ptr,
    length,
    D,
    stride_b,
    stride_t,
    spans,
    steps,
    N: tl.constexpr,
    NP: tl.constexpr,
    K: tl.constexpr,
    BD: tl.constexpr,
):
    """A span of time from the state that enters it: y, the final states, and, for a backward, every K-th state.

    Without ``y_ptr``: the decay of the span and its last state from zero, ``(B, spans, 2, N, D)``.
    """
    dtype: tl.constexpr = start_ptr.dtype.element_ty
    d, mask, span, b = _place(D, spans, BD)
    begin = span * steps
    end = tl.minimum(length, begin + steps)
    a, ai = _load(A_ptr, 0, d, mask, D, N, NP)
    c, ci = _load(C_ptr, 0, d, mask, D, N, NP)
    row, fresh = begins(owner_ptr, begin, length, b)
    h, hi = _load(start_ptr, row, d, mask & fresh, D, N, NP)
    if entering_ptr is not None:
        e, ei = _load(entering_ptr, b * spans + span, d, mask & (fresh == 0), D, N, NP)
        h, hi = h + e, hi + ei
    forgets = fresh
    u_ptr += tl.cast(b, tl.int64) * stride_b + d
    later = tl.load(u_ptr + tl.cast(begin, tl.int64) * stride_t, mask=mask, other=0.0)
    for tile in range(begin, end, K):
        if saved_ptr is not None:
            _store(saved_ptr, b * tl.cdiv(length, K) + tile // K, d, mask, D, N, NP, h, hi)
        for t in range(tile, tl.minimum(end, tile + K)):
            u = later.to(dtype)
            later = tl.load(u_ptr + (tl.cast(t, tl.int64) + 1) * stride_t, mask=mask & (t + 1 < end), other=0.0)
            if owner_ptr is not None:
                row, fresh = begins(owner_ptr, t, length, row)
                if fresh:
                    h, hi = _load(start_ptr, row, d, mask, D, N, NP)
                    forgets = fresh
            h, hi = a * h - ai * hi + u[None, :], a * hi + ai * h
            if y_ptr is not None:
                y = 2 * tl.sum(c * h - ci * hi, 0)
                step = (tl.cast(b, tl.int64) * length + t) * D + d
                tl.store(y_ptr + step, y.to(y_ptr.dtype.element_ty), mask=mask)
                if owner_ptr is not None:
                    _, ends = ends_at(owner_ptr, t, length, row)
                    if ends:
                        _store(final_ptr, row, d, mask, D, N, NP, h, hi)
    if y_ptr is None:
        p, pi = _power(a, ai, end - begin, 31)
        p, pi = tl.where(forgets, 0.0, p), tl.where(forgets, 0.0, pi)
        _store(decay_ptr, b * spans + span, d, mask, D, N, NP, p, pi)
        _store(state_ptr, b * spans + span, d, mask, D, N, NP, h, hi)
    elif owner_ptr is None:
        _store(final_ptr, b, d, mask & (end == length), D, N, NP, h, hi)


@triton.jit
def adjoint(
    A_ptr,
    C_ptr,
    owner_ptr,
    dy_ptr,
    dfinal_ptr,
    decay_ptr,
    state_ptr,
    length,
    D,
    spans,
    steps,
    N: tl.constexpr,
    NP: tl.constexpr,
    BD: tl.constexpr,
):
    """The decay of every span, and the gradient of the state before it from zero behind it; last span first."""
    dtype: tl.constexpr = dfinal_ptr.dtype.element_ty
    d, mask, span, b = _place(D, spans, BD)
    begin = (spans - 1 - span) * steps
    end = tl.minimum(length, begin + steps)
    a, ai = _load(A_ptr, 0, d, mask, D, N, NP)
    c, ci = _load(C_ptr, 0, d, mask, D, N, NP)
    forgets, g, gi = end < begin, tl.zeros((NP, BD), dtype), tl.zeros((NP, BD), dtype)
    for t in range(end - 1, begin - 1, -1):
        dy = tl.load(dy_ptr + (tl.cast(b, tl.int64) * length + t) * D + d, mask=mask, other=0.0).to(dtype)
        row, ends = ends_at(owner_ptr, t, length, b)
        if ends:
            g, gi = _load(dfinal_ptr, row, d, mask, D, N, NP)
            forgets = ends
        g, gi = g + 2 * c * dy[None, :], gi - 2 * ci * dy[None, :]
        g, gi = a * g + ai * gi, a * gi - ai * g
    p, pi = _power(a, -ai, end - begin, 31)
    p, pi = tl.where(forgets, 0.0, p), tl.where(forgets, 0.0, pi)
    _store(decay_ptr, b * spans + span, d, mask, D, N, NP, p, pi)
    _store(state_ptr, b * spans + span, d, mask, D, N, NP, g, gi)


@triton.jit
def _again(
    h, hi, a, ai, u_ptr, start_ptr, owner_ptr, t, end, d, mask, length, D, stride_t,
    N: tl.constexpr, NP: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """One step forward: the states before and after it."""
    inside = t < end
    u = tl.load(u_ptr + tl.cast(t, tl.int64) * stride_t, mask=mask & inside, other=0.0).to(dtype)
    if owner_ptr is not None:
        row, fresh = begins(owner_ptr, t, length, 0)
        if fresh & inside:
            h, hi = _load(start_ptr, row, d, mask, D, N, NP)
    return h, hi, a * h - ai * hi + u[None, :], a * hi + ai * h


@triton.jit
def backward(
    u_ptr,
    A_ptr,
    C_ptr,
    start_ptr,
    owner_ptr,
    entering_ptr,
    saved_ptr,
    scratch_ptr,
    dy_ptr,
    dfinal_ptr,
    du_ptr,
    partial_ptr,
    dstart_ptr,
    length,
    D,
    stride_b,
    stride_t,
    spans,
    steps,
    N: tl.constexpr,
    NP: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    BD: tl.constexpr,
):
    """A span of time, last step first; the gradients of A and C by span, ``(B, spans, 2, 2, N, D)``.

    The states of a tile of K steps are found twice: once to put every S-th into scratch memory, and then, S steps
    at a time, in registers.
    """
    dtype: tl.constexpr = start_ptr.dtype.element_ty
    d, mask, span, b = _place(D, spans, BD)
    begin = (spans - 1 - span) * steps
    end = tl.minimum(length, begin + steps)
    a, ai = _load(A_ptr, 0, d, mask, D, N, NP)
    c, ci = _load(C_ptr, 0, d, mask, D, N, NP)
    dA, dAi = tl.zeros((NP, BD), dtype), tl.zeros((NP, BD), dtype)
    dC, dCi, g, gi = dA, dA, dA, dA
    if entering_ptr is not None:
        g, gi = _load(entering_ptr, b * spans + span, d, mask, D, N, NP)
    u_ptr += tl.cast(b, tl.int64) * stride_b + d
    scratch_ptr += tl.cast(tl.program_id(0), tl.int64) * (K // S * 2 * NP * BD)
    lane = tl.arange(0, BD)
    for tile in range((end - 1) // K * K, begin - 1, -K):
        h, hi = _load(saved_ptr, b * tl.cdiv(length, K) + tile // K, d, mask, D, N, NP)
        parts = tl.cdiv(tl.minimum(end - tile, K), S)
        for part in range(parts):
            _store(scratch_ptr, part, lane, lane < BD, BD, NP, NP, h, hi)
            for i in tl.static_range(S):
                t = tile + part * S + i
                _, _, h, hi = _again(
                    h, hi, a, ai, u_ptr, start_ptr, owner_ptr, t, end, d, mask, length, D, stride_t, N, NP, dtype
                )
        tl.debug_barrier()
        for back in range(parts):
            part = parts - 1 - back
            h, hi = _load(scratch_ptr, part, lane, lane < BD, BD, NP, NP)
            kept = ()
            for i in tl.static_range(S):
                t = tile + part * S + i
                before, beforei, h, hi = _again(
                    h, hi, a, ai, u_ptr, start_ptr, owner_ptr, t, end, d, mask, length, D, stride_t, N, NP, dtype
                )
                kept = kept + ((before, beforei, h, hi),)
            for i in tl.static_range(S - 1, -1, -1):
                t = tile + part * S + i
                inside = t < end
                step = (tl.cast(b, tl.int64) * length + t) * D + d
                dy = 2 * tl.load(dy_ptr + step, mask=mask & inside, other=0.0).to(dtype)[None, :]
                before, beforei, h, hi = kept[i]
                row, ends = ends_at(owner_ptr, t, length, b)
                if ends:
                    g, gi = _load(dfinal_ptr, row, d, mask, D, N, NP)
                if inside:
                    dC, dCi = dC + dy * h, dCi - dy * hi
                    g, gi = g + c * dy, gi - ci * dy  # the gradient of the state after this step
                    du = tl.sum(g, 0)
                    tl.store(du_ptr + step, du.to(du_ptr.dtype.element_ty), mask=mask)
                    dA, dAi = dA + g * before + gi * beforei, dAi + gi * before - g * beforei
                    g, gi = a * g + ai * gi, a * gi - ai * g
                row, fresh = begins(owner_ptr, t, length, b)
                if fresh & inside:
                    _store(dstart_ptr, row, d, mask, D, N, NP, g, gi)
        tl.debug_barrier()
    rest = 2 * (b * spans + span)
    _store(partial_ptr, rest, d, mask, D, N, NP, dA, dAi)
    _store(partial_ptr, rest + 1, d, mask, D, N, NP, dC, dCi)
