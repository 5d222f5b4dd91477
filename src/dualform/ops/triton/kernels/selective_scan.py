"""The selective scan: a program walks along time over some channels, their states ``(N, D)`` in registers.

Tensors ``(B, T, ...)`` come as ``(pointer, stride of B, stride of T)``, the maps B and C with the stride of groups
too; the channels of a program share a group of B and one of C. ``A2`` is ``A / log 2``: decays are powers of two.
"""

import triton
import triton.language as tl

from dualform.ops.triton.kernels.pointwise import silu, softplus
from dualform.ops.triton.kernels.spans import begins, ends_at


@triton.jit
def _place(width, per_both, spans, BD: tl.constexpr):
    """Channels, whether they are there, their block and the first of their per_both; the span and the batch row."""
    of_both = tl.cdiv(per_both, BD)
    blocks = width // per_both * of_both
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    first = block // of_both * per_both
    d = first + block % of_both * BD + tl.arange(0, BD)
    return d, d < first + per_both, block, first, rest % spans, rest // spans


@triton.jit
def _at(tensor, b, t):
    """Where row b has time t."""
    return tensor[0] + tl.cast(b, tl.int64) * tensor[1] + tl.cast(t, tl.int64) * tensor[2]


@triton.jit
def _group(tensor, first, per_group):
    """The tensor, as the group of a channel sees it."""
    return tensor[0] + tl.cast(first // per_group, tl.int64) * tensor[3], tensor[1], tensor[2]


@triton.jit
def _states(ptr, row, d, mask, width, N: tl.constexpr, NP: tl.constexpr):
    """The states of a row ``(N, D)``: pointers and mask."""
    n = tl.arange(0, NP)[:, None]
    return ptr + (tl.cast(row, tl.int64) * N + n) * width + d[None, :], (n < N) & mask[None, :]


@triton.jit
def _given(ptr, row, d, mask, width, N: tl.constexpr, NP: tl.constexpr):
    """The states of a row ``(D, N)``, as the caller has them: pointers and mask."""
    n = tl.arange(0, NP)[:, None]
    return ptr + (tl.cast(row, tl.int64) * width + d[None, :]) * N + n, (n < N) & mask[None, :]


@triton.jit
def _rates(A_ptr, d, mask, width, N: tl.constexpr, NP: tl.constexpr, dtype: tl.constexpr):
    """A2; the states that fill up a power of two do not move."""
    at, there = _states(A_ptr, 0, d, mask, width, N, NP)
    return tl.load(at, mask=there, other=0.0).to(dtype) * 1.4426950408889634


@triton.jit
def _map(tensor, b, t, inside, N: tl.constexpr, NP: tl.constexpr, dtype: tl.constexpr):
    """A column of B or C."""
    n = tl.arange(0, NP)
    return tl.load(_at(tensor, b, t) + n, mask=(n < N) & inside, other=0.0).to(dtype)[:, None]


@triton.jit
def _channel(tensor, b, t, d, mask):
    """One step of u, delta or z."""
    return tl.load(_at(tensor, b, t) + d, mask=mask, other=0.0)


@triton.jit
def _vector(ptr, d, mask, dtype: tl.constexpr):
    """One number a channel, zeros where there is no vector."""
    found = tl.zeros(d.shape, dtype)
    if ptr is not None:
        found = tl.load(ptr + d, mask=mask, other=0.0).to(dtype)
    return found


@triton.jit
def _decay(dt, rates):
    """``exp2(dt rates)`` as ``exp2(x + 1) / 2``: near zero, where slow states are, NVIDIA's unit is biased."""
    return 0.5 * tl.exp2(dt[None, :] * rates + 1)


@triton.jit
def forward(
    u,
    delta,
    z,
    B,
    C,
    A_ptr,
    D_ptr,
    bias_ptr,
    start_ptr,
    owner_ptr,
    entering_ptr,
    y_ptr,
    final_ptr,
    saved_ptr,
    decay_ptr,
    state_ptr,
    length,
    width,
    per_both,
    per_b,
    per_c,
    spans,
    steps,
    SOFTPLUS: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    K: tl.constexpr,
    BD: tl.constexpr,
):
    """A span of time from the state that enters it: y, the final states, and, for a backward, every K-th state.

    Without ``y_ptr``: the decay of the span and its last state from zero, ``(B, spans, N, D)``.
    """
    dtype: tl.constexpr = start_ptr.dtype.element_ty
    d, mask, _, first, span, b = _place(width, per_both, spans, BD)
    begin = span * steps
    end = tl.minimum(length, begin + steps)
    B = _group(B, first, per_b)
    C = _group(C, first, per_c)
    rates = _rates(A_ptr, d, mask, width, N, NP, dtype)
    bias = _vector(bias_ptr, d, mask, dtype)
    skip = _vector(D_ptr, d, mask, dtype)
    row, fresh = begins(owner_ptr, begin, length, b)
    at, there = _given(start_ptr, row, d, mask & fresh, width, N, NP)
    h = tl.load(at, mask=there, other=0.0)
    if entering_ptr is not None:
        at, there = _states(entering_ptr, b * spans + span, d, mask & (fresh == 0), width, N, NP)
        h += tl.load(at, mask=there, other=0.0)
    forgets, total = fresh, tl.zeros((BD,), dtype)
    next_u, next_delta = _channel(u, b, begin, d, mask), _channel(delta, b, begin, d, mask)
    for tile in range(begin, end, K):
        if saved_ptr is not None:
            at, there = _states(saved_ptr, b * tl.cdiv(length, K) + tile // K, d, mask, width, N, NP)
            tl.store(at, h, mask=there)
        for t in range(tile, tl.minimum(end, tile + K)):
            x, dt = next_u.to(dtype), next_delta.to(dtype) + bias
            next_u = _channel(u, b, t + 1, d, mask & (t + 1 < end))
            next_delta = _channel(delta, b, t + 1, d, mask & (t + 1 < end))
            if SOFTPLUS:
                dt = softplus(dt)
            if owner_ptr is not None:
                row, fresh = begins(owner_ptr, t, length, row)
                if fresh:
                    at, there = _given(start_ptr, row, d, mask, width, N, NP)
                    h = tl.load(at, mask=there, other=0.0)
                    forgets = fresh
            h = _decay(dt, rates) * h + (dt * x)[None, :] * _map(B, b, t, True, N, NP, dtype)
            if y_ptr is None:
                total += dt
            else:
                y = tl.sum(_map(C, b, t, True, N, NP, dtype) * h, 0) + skip * x
                if z is not None:
                    y *= silu(_channel(z, b, t, d, mask).to(dtype))
                step = (tl.cast(b, tl.int64) * length + t) * width + d
                tl.store(y_ptr + step, y.to(y_ptr.dtype.element_ty), mask=mask)
                if owner_ptr is not None:
                    _, ends = ends_at(owner_ptr, t, length, row)
                    if ends:
                        at, there = _given(final_ptr, row, d, mask, width, N, NP)
                        tl.store(at, h, mask=there)
    if y_ptr is None:
        decay = tl.where(forgets, 0.0, _decay(total, rates))
        at, there = _states(decay_ptr, b * spans + span, d, mask, width, N, NP)
        tl.store(at, decay, mask=there)
        at, there = _states(state_ptr, b * spans + span, d, mask, width, N, NP)
        tl.store(at, h, mask=there)
    elif owner_ptr is None:
        at, there = _given(final_ptr, b, d, mask & (end == length), width, N, NP)
        tl.store(at, h, mask=there)


@triton.jit
def adjoint(
    delta,
    z,
    C,
    A_ptr,
    bias_ptr,
    owner_ptr,
    dy_ptr,
    dfinal_ptr,
    decay_ptr,
    state_ptr,
    length,
    width,
    per_both,
    per_c,
    spans,
    steps,
    SOFTPLUS: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    BD: tl.constexpr,
):
    """The decay of every span, and the gradient of the state before it from zero behind it; last span first."""
    dtype: tl.constexpr = dfinal_ptr.dtype.element_ty
    d, mask, _, first, span, b = _place(width, per_both, spans, BD)
    begin = (spans - 1 - span) * steps
    end = tl.minimum(length, begin + steps)
    C = _group(C, first, per_c)
    rates = _rates(A_ptr, d, mask, width, N, NP, dtype)
    bias = _vector(bias_ptr, d, mask, dtype)
    forgets, total, g = end < begin, tl.zeros((BD,), dtype), tl.zeros((NP, BD), dtype)
    for t in range(end - 1, begin - 1, -1):
        dt = _channel(delta, b, t, d, mask).to(dtype) + bias
        if SOFTPLUS:
            dt = softplus(dt)
        dy = tl.load(dy_ptr + (tl.cast(b, tl.int64) * length + t) * width + d, mask=mask, other=0.0).to(dtype)
        if z is not None:
            dy *= silu(_channel(z, b, t, d, mask).to(dtype))
        row, ends = ends_at(owner_ptr, t, length, b)
        if ends:
            at, there = _given(dfinal_ptr, row, d, mask, width, N, NP)
            g = tl.load(at, mask=there, other=0.0)
            forgets = ends
        g = _decay(dt, rates) * (g + dy[None, :] * _map(C, b, t, True, N, NP, dtype))
        total += dt
    decay = tl.where(forgets, 0.0, _decay(total, rates))
    at, there = _states(decay_ptr, b * spans + span, d, mask, width, N, NP)
    tl.store(at, decay, mask=there)
    at, there = _states(state_ptr, b * spans + span, d, mask, width, N, NP)
    tl.store(at, g, mask=there)


@triton.jit
def _again(
    h, u, delta, B, rates, bias, start_ptr, owner_ptr, b, t, end, d, mask, length, width,
    SOFTPLUS: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """One step forward: the states before and after it, the decays, u, and the step size before and after softplus."""
    inside = t < end
    x = _channel(u, b, t, d, mask & inside).to(dtype)
    raw = _channel(delta, b, t, d, mask & inside).to(dtype) + bias
    dt = raw
    if SOFTPLUS:
        dt = softplus(raw)
    if owner_ptr is not None:
        row, fresh = begins(owner_ptr, t, length, 0)
        if fresh & inside:
            at, there = _given(start_ptr, row, d, mask, width, N, NP)
            h = tl.load(at, mask=there, other=0.0)
    a = _decay(dt, rates)
    after = a * h + (dt * x)[None, :] * _map(B, b, t, inside, N, NP, dtype)
    return h, after, a, x, raw, dt


@triton.jit
def backward(
    u,
    delta,
    z,
    B,
    C,
    A_ptr,
    D_ptr,
    bias_ptr,
    start_ptr,
    owner_ptr,
    entering_ptr,
    saved_ptr,
    scratch_ptr,
    dy_ptr,
    dfinal_ptr,
    du_ptr,
    ddelta_ptr,
    dz_ptr,
    dB_ptr,
    dC_ptr,
    partial_ptr,
    dstart_ptr,
    length,
    width,
    per_both,
    per_b,
    per_c,
    spans,
    steps,
    SOFTPLUS: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    BD: tl.constexpr,
):
    """A span of time, last step first; the maps' gradients by block of channels, those of A, D and the bias by span.

    The states of a tile of K steps are found twice: once to put every S-th into scratch memory, and then, S steps
    at a time, in registers.
    """
    dtype: tl.constexpr = start_ptr.dtype.element_ty
    d, mask, block, first, span, b = _place(width, per_both, spans, BD)
    blocks = width // per_both * tl.cdiv(per_both, BD)
    begin = (spans - 1 - span) * steps
    end = tl.minimum(length, begin + steps)
    B = _group(B, first, per_b)
    C = _group(C, first, per_c)
    rates = _rates(A_ptr, d, mask, width, N, NP, dtype)
    bias = _vector(bias_ptr, d, mask, dtype)
    skip = _vector(D_ptr, d, mask, dtype)
    n, lane = tl.arange(0, NP), tl.arange(0, BD)
    dbias, dskip = tl.zeros((BD,), dtype), tl.zeros((BD,), dtype)
    dA, g = tl.zeros((NP, BD), dtype), tl.zeros((NP, BD), dtype)
    if entering_ptr is not None:
        at, there = _states(entering_ptr, b * spans + span, d, mask, width, N, NP)
        g = tl.load(at, mask=there, other=0.0)
    scratch_ptr += tl.cast(tl.program_id(0), tl.int64) * (K // S * NP * BD) + n[:, None] * BD + lane[None, :]
    for tile in range((end - 1) // K * K, begin - 1, -K):
        at, there = _states(saved_ptr, b * tl.cdiv(length, K) + tile // K, d, mask, width, N, NP)
        h = tl.load(at, mask=there, other=0.0)
        parts = tl.cdiv(tl.minimum(end - tile, K), S)
        for part in range(parts):
            tl.store(scratch_ptr + part * (NP * BD), h)
            for i in tl.static_range(S):
                t = tile + part * S + i
                _, h, _, _, _, _ = _again(
                    h, u, delta, B, rates, bias, start_ptr, owner_ptr, b, t, end, d, mask, length, width,
                    SOFTPLUS, N, NP, dtype,
                )  # fmt: skip
        tl.debug_barrier()
        for back in range(parts):
            part = parts - 1 - back
            h = tl.load(scratch_ptr + part * (NP * BD))
            kept = ()
            for i in tl.static_range(S):
                t = tile + part * S + i
                before, h, a, x, raw, dt = _again(
                    h, u, delta, B, rates, bias, start_ptr, owner_ptr, b, t, end, d, mask, length, width,
                    SOFTPLUS, N, NP, dtype,
                )  # fmt: skip
                kept = kept + ((before, h, a, x, raw, dt),)
            for i in tl.static_range(S - 1, -1, -1):
                t = tile + part * S + i
                inside = t < end
                on = mask & inside
                before, h, a, x, raw, dt = kept[i]
                step = (tl.cast(b, tl.int64) * length + t) * width + d
                dy = tl.load(dy_ptr + step, mask=on, other=0.0).to(dtype)
                row, ends = ends_at(owner_ptr, t, length, b)
                if ends:
                    at, there = _given(dfinal_ptr, row, d, mask, width, N, NP)
                    g = tl.load(at, mask=there, other=0.0)
                c, into = _map(C, b, t, inside, N, NP, dtype), _map(B, b, t, inside, N, NP, dtype)
                if z is not None:
                    gate = _channel(z, b, t, d, on).to(dtype)
                    s = 1 / (1 + tl.exp(-gate))
                    dz = dy * (tl.sum(c * h, 0) + skip * x) * s * (1 + gate * (1 - s))
                    tl.store(dz_ptr + step, dz.to(dz_ptr.dtype.element_ty), mask=on)
                    dy *= gate * s
                place = ((tl.cast(b, tl.int64) * length + t) * blocks + block) * N + n
                full = g + c * dy[None, :]  # the gradient of the state after this step
                tl.store(dC_ptr + place, tl.sum(h * dy[None, :], 1), mask=(n < N) & inside)
                dB = tl.where(on[None, :], full * (dt * x)[None, :], 0.0)
                tl.store(dB_ptr + place, tl.sum(dB, 1), mask=(n < N) & inside)
                dx, log = tl.sum(full * into, 0), tl.where(on[None, :], full * a * before, 0.0)
                g = tl.where(inside, full * a, g)
                dA += log * dt[None, :]
                ddelta = tl.sum(log * rates, 0) * 0.6931471805599453 + x * dx
                if SOFTPLUS:
                    ddelta *= tl.where(raw > 20, 1.0, 1 / (1 + tl.exp(-raw)))
                dbias += tl.where(on, ddelta, 0.0)
                dskip += dy * x
                tl.store(du_ptr + step, (skip * dy + dt * dx).to(du_ptr.dtype.element_ty), mask=on)
                tl.store(ddelta_ptr + step, ddelta.to(ddelta_ptr.dtype.element_ty), mask=on)
                row, fresh = begins(owner_ptr, t, length, b)
                if fresh & inside:
                    at, there = _given(dstart_ptr, row, d, mask, width, N, NP)
                    tl.store(at, g, mask=there)
        tl.debug_barrier()
    at, there = _states(partial_ptr, 0, d, mask, width, N, NP)
    offset = tl.cast(b * spans + span, tl.int64) * (N + 2) * width
    tl.store(at + offset, dA, mask=there)
    tl.store(partial_ptr + offset + N * width + d, dskip, mask=mask)
    tl.store(partial_ptr + offset + (N + 1) * width + d, dbias, mask=mask)
