"""State space duality: the states between chunks of time, then outputs or gradients of all chunks side by side.

Within a chunk everything is a matrix product. ``x`` and ``dy`` are ``(B, T, H, P)``, ``dt`` is ``(B, T, H)`` and the
maps are ``(B, T, G, N)``, given as ``(pointer, stride of B, stride of T)``; a head has ``(P, N)`` states.

What is not finite at one step may reach every step of its chunk, through the zeros of a masked product, and the later
ones of its sequence; it never reaches another sequence or row, nor an earlier chunk.
"""

import triton
import triton.language as tl

from dualform.ops.triton.kernels.chunks import chunk, load_state, read, states_at, write
from dualform.ops.triton.kernels.pointwise import silu


@triton.jit
def _runs(ids_ptr, b, begin, inside, length):
    """Runs of equal ids in a chunk: the run of every step, and the first and the last of them.

    Run 0 goes on from the chunk before, and may have no step here. Without ids it is the only one.
    """
    number = tl.zeros(inside.shape, tl.int32)
    first, last = 0, 0
    if ids_ptr is not None:
        t = begin + tl.arange(0, inside.shape[0])
        at = ids_ptr + tl.cast(b, tl.int64) * length + t
        there = inside & (t > 0)
        begins = there & (tl.load(at, mask=there, other=0) != tl.load(at - 1, mask=there, other=0))
        number = tl.cumsum(begins.to(tl.int32), 0)
        first, last = tl.min(number, 0), tl.max(number, 0)
    return number, first, last


@triton.jit
def _of_run(ids_ptr, number, run, inside):
    """Which steps of a chunk are those of a run."""
    if ids_ptr is not None:
        inside = inside & (number == run)
    return inside


@triton.jit
def _if_only(ids_ptr, given, x):
    """What a run is given, zero unless it is given it; without ids it always is."""
    if ids_ptr is not None:
        x = tl.where(given, x, 0.0)
    return x


@triton.jit
def _add(ids_ptr, at, x, there):
    """A sum over the steps of a chunk: stored, or one run's part of it added to zero or what the runs before gave."""
    if ids_ptr is not None:
        tl.atomic_add(at, x, mask=there)
    else:
        tl.store(at, x, mask=there)


@triton.jit
def _steps(dt, A_ptr, b, begin, h, inside, dtype: tl.constexpr):
    """dt, the sums of dt A up to every step, and all of it, in units of log2.

    The sums are float64, and no step is worth more than makes an exponential 0, as the differences are what counts.
    """
    base = dt[0] + tl.cast(b, tl.int64) * dt[1] + tl.cast(begin, tl.int64) * dt[2] + h
    at = tl.arange(0, inside.shape[0]) * tl.cast(dt[2], tl.int32)
    dt = tl.load(base + at, mask=inside, other=0.0).to(dtype)
    log = dt.to(tl.float64) * tl.load(A_ptr + h).to(tl.float64) * 1.4426950408889634
    log = tl.where(log < -1e4, -1e4, log)
    return dt, tl.cumsum(log, 0), tl.sum(log, 0)


@triton.jit
def _mask(total, inside, dtype: tl.constexpr):
    """The decay from every step to every later one of a chunk, ``(t, s)``."""
    high = total.to(dtype)
    low = (total - high.to(tl.float64)).to(dtype)
    log = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    t = tl.arange(0, inside.shape[0])
    return tl.exp2(tl.where((t[:, None] >= t[None, :]) & inside[None, :], log, float("-inf")))


@triton.jit
def states(
    x,
    maps,
    dt,
    A_ptr,
    table_ptr,
    ids_ptr,
    start_ptr,
    entering_ptr,
    saved_ptr,
    final_ptr,
    decay_ptr,
    state_ptr,
    length,
    heads,
    per_group,
    slots,
    spans,
    steps,
    BACKWARD: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    Q: tl.constexpr,
):
    """The state that enters every chunk, over the chunks of a span; BACKWARD, the gradient of the one that leaves.

    ``h' = e^l h + (e^(l - l_t) dt_t x_t) B_t^T``, or with dy for x and C for B ``g' = e^l g + (e^(l_t) dy_t) C_t^T``.
    Without ``saved_ptr``: the decay of the span and what it adds, ``(B, spans, H, P, N)``.
    """
    dtype: tl.constexpr = start_ptr.dtype.element_ty
    blocks: tl.constexpr = (N + BN - 1) // BN
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    span, rest = rest % spans, rest // spans
    h, b = rest % heads, rest // heads
    p, n = tl.arange(0, BP), block * BN + tl.arange(0, BN)
    state = tl.zeros((BP, BN), dtype)
    if entering_ptr is not None:
        at, there = states_at(entering_ptr, b * spans + span, heads, h, p, n, P, N)
        state = tl.load(at, mask=there, other=0.0)
    forgets, logs = span < 0, tl.zeros((), tl.float64)
    for k in range(span * steps, tl.minimum(slots, (span + 1) * steps)):
        c = slots - 1 - k if BACKWARD else k
        begin, end, row, first, last = chunk(table_ptr, c, b, length, Q)
        starts = last if BACKWARD else first
        if starts:
            at, there = states_at(start_ptr, row, heads, h, p, n, P, N)
            state = tl.load(at, mask=there, other=0.0)
            forgets = starts
        if saved_ptr is not None:
            at, there = states_at(saved_ptr, b * slots + c, heads, h, p, n, P, N)
            tl.store(at, state.to(saved_ptr.dtype.element_ty), mask=there)
        inside = begin + tl.arange(0, Q) < end
        number, first_run, last_run = _runs(ids_ptr, b, begin, inside, length)
        if ids_ptr is not None:
            forgets |= last_run > 0
        for i in range(first_run, last_run + 1):
            run = first_run + last_run - i if BACKWARD else i
            mine = _of_run(ids_ptr, number, run, inside)
            if not BACKWARD:
                state = _if_only(ids_ptr, run == 0, state)
            given = read(x, b, begin, h * P, BP, mine, P)
            map = read(maps, b, begin, h // per_group * N + block * BN, BN, mine, N - block * BN)
            of, total, whole = _steps(dt, A_ptr, b, begin, h, mine, dtype)
            weight = tl.exp2(total.to(dtype)) if BACKWARD else tl.exp2((whole - total).to(dtype)) * of
            weighted = (map.to(dtype) * weight[:, None]).to(map.dtype)
            state = state * tl.exp2(whole.to(dtype)) + tl.dot(tl.trans(given), weighted)
            logs += whole
            if BACKWARD:
                state = _if_only(ids_ptr, run == 0, state)
        if saved_ptr is not None:
            stops = first if BACKWARD else last
            at, there = states_at(final_ptr, row, heads, h, p, n, P, N)
            tl.store(at, state, mask=there & stops)
    if saved_ptr is None:
        decay = tl.where(forgets, 0.0, tl.exp2(logs.to(dtype)))
        at, there = states_at(decay_ptr, b * spans + span, heads, h, p, n, P, N)
        tl.store(at, tl.zeros((BP, BN), dtype) + decay, mask=there)
        at, there = states_at(state_ptr, b * spans + span, heads, h, p, n, P, N)
        tl.store(at, state, mask=there)


@triton.jit
def _place(table_ptr, length, heads, per_group, slots, parts, Q: tl.constexpr):
    """Of a program: a part of the heads of a group, the group, the chunk and the batch row; where the chunk lies."""
    part, rest = tl.program_id(0) % parts, tl.program_id(0) // parts
    group, rest = rest % (heads // per_group), rest // (heads // per_group)
    c, b = rest % slots, rest // slots
    begin, end, _row, _first, _last = chunk(table_ptr, c, b, length, Q)
    first, last = group * per_group + per_group * part // parts, group * per_group + per_group * (part + 1) // parts
    return part, group, c, b, begin, begin + tl.arange(0, Q) < end, first, last


@triton.jit
def _products(B, C, b, begin, group, inside, N: tl.constexpr, NP: tl.constexpr):
    """B, C, and ``C B^T``, of a chunk."""
    of_b = read(B, b, begin, group * N, NP, inside, N)
    of_c = read(C, b, begin, group * N, NP, inside, N)
    return of_b, of_c, tl.dot(of_c, tl.trans(of_b))


@triton.jit
def _write_map(ptr, x, part, b, begin, group, inside, length, groups, slots, parts, N: tl.constexpr):
    """What some heads have found for B or C, to ``(parts, B, T, G, N)``."""
    rows = tl.num_programs(0) // (parts * groups * slots)
    step = (tl.cast(part, tl.int64) * rows + b) * length + begin
    write(ptr, (step * groups + group) * N, groups * N, x, inside, N)


@triton.jit
def outputs(
    x,
    B,
    C,
    dt,
    A_ptr,
    D_ptr,
    z,
    table_ptr,
    ids_ptr,
    saved_ptr,
    y_ptr,
    gated_ptr,
    length,
    heads,
    per_group,
    slots,
    parts,
    BACKWARD: tl.constexpr,
    SKIP_BY_HEAD: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BP: tl.constexpr,
    NP: tl.constexpr,
    Q: tl.constexpr,
    dtype: tl.constexpr,
):
    """One chunk, some heads of a group: ``y = ((M o C B^T) dt x + e^l C h + D x) silu(z)``, and what was gated.

    BACKWARD: ``dx = dt (M o C B^T)^T dy + dt e^(l - l_t) B g + D dy``, with the gradient dy of what was gated for x and
    the gradients g for the states.
    """
    _part, group, c, b, begin, inside, first, last = _place(table_ptr, length, heads, per_group, slots, parts, Q)
    number, first_run, last_run = _runs(ids_ptr, b, begin, inside, length)
    for run in range(first_run, last_run + 1):
        mine = _of_run(ids_ptr, number, run, inside)
        of_b, of_c, products = _products(B, C, b, begin, group, mine, N, NP)
        for h in range(first, last):
            of, total, whole = _steps(dt, A_ptr, b, begin, h, mine, dtype)
            given = read(x, b, begin, h * P, BP, mine, P)
            gate = given
            if z is not None:
                gate = read(z, b, begin, h * P, BP, mine, P)
            weights = (products * _mask(total, mine, dtype) * of[None, :]).to(given.dtype)
            state = load_state(saved_ptr, b * slots + c, heads, h, P, N, BP, NP)
            state = _if_only(ids_ptr, run == (last_run if BACKWARD else 0), state)
            if BACKWARD:
                y = tl.dot(of_b, tl.trans(state)) * (tl.exp2((whole - total).to(dtype)) * of)[:, None]
                y += tl.dot(tl.trans(weights), given)
            else:
                y = tl.dot(of_c, tl.trans(state)) * tl.exp2(total.to(dtype))[:, None]
                y += tl.dot(weights, given)
            if D_ptr is not None:
                if SKIP_BY_HEAD:
                    y += given.to(dtype) * tl.load(D_ptr + h).to(dtype)
                else:
                    p = tl.arange(0, BP)
                    y += given.to(dtype) * tl.load(D_ptr + h * P + p, mask=p < P, other=0.0).to(dtype)[None, :]
            step = (tl.cast(b, tl.int64) * length + begin) * heads + h
            if gated_ptr is not None:
                write(gated_ptr, step * P, heads * P, y, mine, P)
            if z is not None:
                y *= silu(gate.to(dtype))
            write(y_ptr, step * P, heads * P, y, mine, P)


@triton.jit
def before_gate(
    dy_ptr, z, gated_ptr, found_ptr, dz_ptr, length, width, BT: tl.constexpr, BD: tl.constexpr, dtype: tl.constexpr
):
    """Of ``(B, T, H P)``: ``dz = dy gated silu'(z)``, and the gradient of what was gated, ``dy silu(z)``."""
    columns, steps = tl.cdiv(width, BD), tl.cdiv(length, BT)
    rest = tl.program_id(0) // columns
    t, column = rest % steps * BT + tl.arange(0, BT), tl.program_id(0) % columns * BD + tl.arange(0, BD)
    b = tl.cast(rest // steps, tl.int64)
    there = (t < length)[:, None] & (column < width)[None, :]
    at = (b * length + t[:, None]) * width + column[None, :]
    gate_at = z[0] + b * z[1] + tl.cast(t, tl.int64)[:, None] * z[2] + column[None, :]
    dy = tl.load(dy_ptr + at, mask=there, other=0.0).to(dtype)
    gated = tl.load(gated_ptr + at, mask=there, other=0.0).to(dtype)
    gate = tl.load(gate_at, mask=there, other=0.0).to(dtype)
    s = 1 / (1 + tl.exp(-gate))
    tl.store(dz_ptr + at, (dy * gated * s * (1 + gate * (1 - s))).to(dz_ptr.dtype.element_ty), mask=there)
    tl.store(found_ptr + at, (dy * gate * s).to(found_ptr.dtype.element_ty), mask=there)


@triton.jit
def gradients_c(
    x,
    B,
    C,
    dt,
    A_ptr,
    table_ptr,
    ids_ptr,
    entering_ptr,
    leaving_ptr,
    dy,
    dlog_ptr,
    dC_ptr,
    dD_ptr,
    length,
    heads,
    per_group,
    slots,
    parts,
    SKIP_BY_HEAD: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BP: tl.constexpr,
    NP: tl.constexpr,
    Q: tl.constexpr,
    dtype: tl.constexpr,
):
    """One chunk, some heads of a group: what C and D get, and the sums of dt A from the state that enters.

    ``dC`` is ``(parts, B, T, G, N)``, ``dD`` ``(B, chunks, H)`` or ``(B, chunks, H, P)``, ``dlog`` ``(B, T, H)``.
    """
    part, group, c, b, begin, inside, first, last = _place(table_ptr, length, heads, per_group, slots, parts, Q)
    number, first_run, last_run = _runs(ids_ptr, b, begin, inside, length)
    for run in range(first_run, last_run + 1):
        mine = _of_run(ids_ptr, number, run, inside)
        of_c = read(C, b, begin, group * N, NP, mine, N)
        dc, dproducts = tl.zeros((Q, NP), dtype), tl.zeros((Q, Q), dtype)
        for h in range(first, last):
            of, total, whole = _steps(dt, A_ptr, b, begin, h, mine, dtype)
            given, pulled = read(x, b, begin, h * P, BP, mine, P), read(dy, b, begin, h * P, BP, mine, P)
            if dD_ptr is not None:
                skipped, p = tl.sum(pulled.to(dtype) * given.to(dtype), 0), tl.arange(0, BP)
                at = (tl.cast(b, tl.int64) * slots + c) * heads + h
                if SKIP_BY_HEAD:
                    _add(ids_ptr, dD_ptr + at, tl.sum(skipped, 0), None)
                else:
                    _add(ids_ptr, dD_ptr + at * P + p, skipped, p < P)
            dweights = tl.dot(pulled, tl.trans(given))
            dproducts += dweights * _mask(total, mine, dtype) * of[None, :]
            state = _if_only(ids_ptr, run == 0, load_state(entering_ptr, b * slots + c, heads, h, P, N, BP, NP))
            found = tl.dot(pulled, state) * tl.exp2(total.to(dtype))[:, None]
            dc += found
            dlog = tl.sum(found * of_c.to(dtype), 1)
            leaving = load_state(leaving_ptr, b * slots + c, heads, h, P, N, BP, NP)
            carried = tl.sum(state.to(dtype) * leaving.to(dtype)) * tl.exp2(whole.to(dtype))
            carried = _if_only(ids_ptr, last_run == 0, carried)
            ends = tl.arange(0, Q) == tl.sum(mine.to(tl.int32), 0) - 1
            step = (tl.cast(b, tl.int64) * length + begin) * heads + h
            tl.store(dlog_ptr + step + tl.arange(0, Q) * heads, dlog + tl.where(ends, carried, 0.0), mask=mine)
        of_b = read(B, b, begin, group * N, NP, mine, N)
        dc += tl.dot(dproducts.to(of_b.dtype), of_b)
        _write_map(dC_ptr, dc, part, b, begin, group, mine, length, heads // per_group, slots, parts, N)


@triton.jit
def gradients(
    x,
    B,
    C,
    dt,
    A_ptr,
    table_ptr,
    ids_ptr,
    leaving_ptr,
    dy,
    dlog_ptr,
    ddt_ptr,
    dA_ptr,
    dB_ptr,
    length,
    heads,
    per_group,
    slots,
    parts,
    P: tl.constexpr,
    N: tl.constexpr,
    BP: tl.constexpr,
    NP: tl.constexpr,
    Q: tl.constexpr,
    dtype: tl.constexpr,
):
    """One chunk, some heads of a group: what B, dt and A get, from the state that leaves and from ``dlog``.

    ``dB`` is ``(parts, B, T, G, N)``, ``dA`` ``(B, chunks, H)``. A decay gets a sum over the pairs of steps that it
    lies between: a difference of sums over many more, which may be far larger. They are float64, but for inputs of 16
    bits, whose own rounding is larger still.
    """
    part, group, c, b, begin, inside, first, last = _place(table_ptr, length, heads, per_group, slots, parts, Q)
    number, first_run, last_run = _runs(ids_ptr, b, begin, inside, length)
    for run in range(first_run, last_run + 1):
        mine = _of_run(ids_ptr, number, run, inside)
        of_b, _of_c, products = _products(B, C, b, begin, group, mine, N, NP)
        db, dproducts = tl.zeros((Q, NP), dtype), tl.zeros((Q, Q), dtype)
        for h in range(first, last):
            of, total, whole = _steps(dt, A_ptr, b, begin, h, mine, dtype)
            given, pulled = read(x, b, begin, h * P, BP, mine, P), read(dy, b, begin, h * P, BP, mine, P)

            # Within the chunk.
            dweights = tl.dot(pulled, tl.trans(given)) * _mask(total, mine, dtype)
            dproducts += dweights * of[None, :]
            dweights *= products
            ddt = tl.sum(dweights, 0)
            t = tl.arange(0, Q)
            pairs = tl.where(t[:, None] > t[None, :], dweights * of[None, :], 0.0)
            if given.dtype.primitive_bitwidth > 16:
                pairs = pairs.to(tl.float64)
            dlog = tl.sum(pairs, 1) - tl.sum(pairs, 0)

            # Through the state that leaves.
            leaving = _if_only(ids_ptr, run == last_run, load_state(leaving_ptr, b * slots + c, heads, h, P, N, BP, NP))
            until = tl.exp2((whole - total).to(dtype))
            found = tl.dot(given, leaving) * until[:, None]
            db += found * of[:, None]
            added = tl.sum(found * of_b.to(dtype), 1)
            ddt += added

            step = (tl.cast(b, tl.int64) * length + begin) * heads + h
            dlog = dlog.to(tl.float64) + tl.load(dlog_ptr + step + t * heads, mask=mine, other=0.0)
            earlier = (added * of).to(tl.float64)
            dlog = tl.cumsum(dlog, 0, reverse=True) + tl.cumsum(earlier, 0) - earlier
            dlog = tl.where(mine, dlog, 0.0).to(dtype)
            ddt += dlog * tl.load(A_ptr + h).to(dtype)
            tl.store(ddt_ptr + step + t * heads, ddt.to(ddt_ptr.dtype.element_ty), mask=mine)
            _add(ids_ptr, dA_ptr + (tl.cast(b, tl.int64) * slots + c) * heads + h, tl.sum(dlog * of, 0), None)
        of_c = read(C, b, begin, group * N, NP, mine, N)  # again, so that no register holds it meanwhile
        db += tl.dot(tl.trans(dproducts).to(of_c.dtype), of_c)
        _write_map(dB_ptr, db, part, b, begin, group, mine, length, heads // per_group, slots, parts, N)
