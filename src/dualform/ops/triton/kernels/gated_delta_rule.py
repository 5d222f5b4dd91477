"""The gated delta rule: an inverse for each chunk, states from chunk to chunk, then all chunks side by side.

Within a chunk of Q steps, for the state S that enters, ``l_t`` the sum of logarithms up to step t and
``D_ts = e^(l_t - l_s)``:

    (I + A) U = beta (V - e^l K S),  A_ts = beta_t k_t . k_s D_ts below the diagonal,
    y = scale (e^l Q S + (Q K^T o D) U),  S' = e^l_Q S + (e^(l_Q - l) K)^T U.

``q`` and ``k`` are ``(B, T, G, N)``, ``v``, ``dy`` and what is as large ``(B, T, H, P)``, ``beta`` and ``log``
``(B, T, H)``, given as ``(pointer, stride of B, stride of T)`` or contiguous; a head has ``(N, P)`` states.

What is not finite at one step may reach every step of its chunk, through the zeros of a masked product, and the later
ones of its sequence; it never reaches another sequence or row, nor an earlier chunk.
"""

import triton
import triton.language as tl

from dualform.ops.triton.kernels.chunks import chunk, read, states_at, write


@triton.jit
def _column(tensor, b, begin, h, inside):
    """One number of every step of a chunk."""
    base = tensor[0] + tl.cast(b, tl.int64) * tensor[1] + tl.cast(begin, tl.int64) * tensor[2] + h
    return tl.load(base + tl.arange(0, inside.shape[0]) * tl.cast(tensor[2], tl.int32), mask=inside, other=0.0)


@triton.jit
def _place(table_ptr, length, heads, slots, Q: tl.constexpr):
    """Of a program that has one head of one chunk: both, the batch row, and where the chunk lies."""
    h, rest = tl.program_id(0) % heads, tl.program_id(0) // heads
    c, b = rest % slots, rest // slots
    begin, end, _row, _first, _last = chunk(table_ptr, c, b, length, Q)
    return h, b, tl.cast(b * slots + c, tl.int64) * heads + h, begin, end, begin + tl.arange(0, Q) < end


@triton.jit
def _between(logs_ptr, row, column, Q: tl.constexpr, size: tl.constexpr):
    """The decay from the steps that begin at ``column`` to those at ``row``, ``(t, s)``; 0 to earlier ones."""
    t, s = row + tl.arange(0, size), column + tl.arange(0, size)
    log = tl.load(logs_ptr + t)[:, None] - tl.load(logs_ptr + s)[None, :]
    log += tl.load(logs_ptr + Q + t)[:, None] - tl.load(logs_ptr + Q + s)[None, :]
    return tl.exp2(tl.where(t[:, None] >= s[None, :], log, float("-inf")))


@triton.jit
def _ends(logs_ptr, Q: tl.constexpr):
    """The decays since the chunk began and until it ends, of every step, and that of the whole chunk."""
    t = tl.arange(0, Q)
    high, low = tl.load(logs_ptr + t), tl.load(logs_ptr + Q + t)
    last, rest = tl.load(logs_ptr + Q - 1), tl.load(logs_ptr + 2 * Q - 1)
    return tl.exp2(high + low), tl.exp2((last - high) + (rest - low)), tl.exp2(last + rest)


@triton.jit
def _inverse(A, Q: tl.constexpr, dtype: tl.constexpr):
    """``(I + A)^-1`` of a matrix that is zero on the diagonal and above it, in blocks that double.

    ``[[a, 0], [c, d]]^-1 = [[a^-1, 0], [-d^-1 c a^-1, d^-1]]``.
    """
    t = tl.arange(0, Q)
    row, column = t[:, None], t[None, :]
    found = tl.where(row == column, 1.0, tl.where(row // 2 == column // 2, -A, 0.0)).to(dtype)
    for level in tl.static_range(1, 8):
        if (2 << level) <= Q:
            below = (row // (2 << level) == column // (2 << level)) & (row // (1 << level) != column // (1 << level))
            found -= tl.dot(found, tl.dot(tl.where(below, A, 0.0).to(dtype), found).to(dtype)).to(dtype)
    return found


@triton.jit
def inverses(
    k,
    beta,
    log,
    table_ptr,
    inverse_ptr,
    logs_ptr,
    length,
    heads,
    per_group,
    slots,
    N: tl.constexpr,
    NP: tl.constexpr,
    Q: tl.constexpr,
    dtype: tl.constexpr,
):
    """One head of a chunk: ``(I + A)^-1``, ``(B, chunks, H, Q, Q)``, and the sums of logarithms to the base of 2.

    Those are float64, and stored as a number and the rest, ``(B, chunks, H, 2, Q)``. No step is worth more than makes
    an exponential 0, as their differences are what counts.
    """
    h, b, place, begin, end, inside = _place(table_ptr, length, heads, slots, Q)
    each = _column(log, b, begin, h, inside).to(tl.float64) * 1.4426950408889634
    total = tl.cumsum(tl.where(each < -1e4, -1e4, each), 0)
    high = total.to(dtype)
    tl.store(logs_ptr + place * 2 * Q + tl.arange(0, Q), high)
    tl.store(logs_ptr + place * 2 * Q + Q + tl.arange(0, Q), (total - high.to(tl.float64)).to(dtype))
    tl.debug_barrier()  # other threads read what these wrote

    half: tl.constexpr = Q // 2
    later, t = begin + half, tl.arange(0, half)
    first, second = begin + t < end, later + t < end
    keys = read(k, b, begin, h // per_group * N, NP, first, N)
    below = t[:, None] > t[None, :]
    A = tl.dot(keys, tl.trans(keys)).to(dtype) * _between(logs_ptr + place * 2 * Q, 0, 0, Q, half)
    upper = _inverse(tl.where(below, A, 0.0) * _column(beta, b, begin, h, first).to(dtype)[:, None], half, dtype)
    rest = read(k, b, later, h // per_group * N, NP, second, N)
    strength = _column(beta, b, later, h, second).to(dtype)
    A = tl.dot(rest, tl.trans(rest)).to(dtype) * _between(logs_ptr + place * 2 * Q, half, half, Q, half)
    lower = _inverse(tl.where(below, A, 0.0) * strength[:, None], half, dtype)
    A = tl.dot(rest, tl.trans(keys)).to(dtype) * _between(logs_ptr + place * 2 * Q, half, 0, Q, half)
    across = -tl.dot(lower, tl.dot(A * strength[:, None], upper).to(dtype)).to(dtype)

    at = inverse_ptr + place * Q * Q + t[:, None] * Q + t[None, :]
    tl.store(at, upper.to(inverse_ptr.dtype.element_ty))
    tl.store(at + half, tl.zeros((half, half), inverse_ptr.dtype.element_ty))
    tl.store(at + half * Q, across.to(inverse_ptr.dtype.element_ty))
    tl.store(at + half * Q + half, lower.to(inverse_ptr.dtype.element_ty))


@triton.jit
def _row(chunks_ptr, slots, heads, blocks):
    """Of a program that has one head of one sequence: block of P, head, sequence, batch row, and its chunks."""
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    h, row = rest % heads, rest // heads
    b, first, last = row, 0, slots
    if chunks_ptr is not None:
        b = 0
        first, last = tl.load(chunks_ptr + row).to(tl.int32), tl.load(chunks_ptr + row + 1).to(tl.int32)
    return block, h, row, b, first, last


@triton.jit
def states(
    k,
    v,
    beta,
    table_ptr,
    chunks_ptr,
    inverse_ptr,
    logs_ptr,
    start_ptr,
    saved_ptr,
    written_ptr,
    final_ptr,
    length,
    heads,
    per_group,
    slots,
    N: tl.constexpr,
    P: tl.constexpr,
    NP: tl.constexpr,
    BP: tl.constexpr,
    Q: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One head of a sequence, some columns: the states that enter its chunks, U of all its steps, its final state."""
    dtype: tl.constexpr = start_ptr.dtype.element_ty
    block, h, row, b, first, last = _row(chunks_ptr, slots, heads, (P + BP - 1) // BP)
    n, p, t = tl.arange(0, NP), block * BP + tl.arange(0, BP), tl.arange(0, Q)
    at, there = states_at(start_ptr, row, heads, h, n, p, N, P)
    state = tl.load(at, mask=there, other=0.0)
    for c in tl.range(first, last, num_stages=STAGES):
        begin, end, _sequence, _first, _last = chunk(table_ptr, c, b, length, Q)
        inside, place = begin + t < end, tl.cast(b * slots + c, tl.int64) * heads + h
        into, known = states_at(saved_ptr, b * slots + c, heads, h, n, p, N, P)
        tl.store(into, state.to(saved_ptr.dtype.element_ty), mask=known)
        since, until, whole = _ends(logs_ptr + place * 2 * Q, Q)
        keys = read(k, b, begin, h // per_group * N, NP, inside, N)
        held = tl.dot(keys, state.to(keys.dtype)).to(dtype) * since[:, None]
        values = read(v, b, begin, h * P + block * BP, BP, inside, P - block * BP)
        new = (values.to(dtype) - held) * _column(beta, b, begin, h, inside).to(dtype)[:, None]
        inverse = tl.load(inverse_ptr + place * Q * Q + t[:, None] * Q + t[None, :])
        written = tl.dot(inverse, new.to(inverse.dtype)).to(dtype)
        step = (tl.cast(b, tl.int64) * length + begin) * heads + h
        write(written_ptr, step * P + block * BP, heads * P, written, inside, P - block * BP)
        state = tl.dot(tl.trans(keys), (written * until[:, None]).to(keys.dtype), acc=state * whole, out_dtype=dtype)
    at, there = states_at(final_ptr, row, heads, h, n, p, N, P)
    tl.store(at, state, mask=there)


@triton.jit
def outputs(
    q,
    k,
    written,
    table_ptr,
    logs_ptr,
    saved_ptr,
    y_ptr,
    weights_ptr,
    length,
    heads,
    per_group,
    slots,
    N: tl.constexpr,
    P: tl.constexpr,
    NP: tl.constexpr,
    BP: tl.constexpr,
    Q: tl.constexpr,
    scale: tl.constexpr,
    dtype: tl.constexpr,
):
    """One head of a chunk: y, and what every step adds to later ones, ``scale Q K^T o D``, ``(B, chunks, H, Q, Q)``."""
    h, b, place, begin, _end, inside = _place(table_ptr, length, heads, slots, Q)
    queries = read(q, b, begin, h // per_group * N, NP, inside, N)
    keys = read(k, b, begin, h // per_group * N, NP, inside, N)
    weights = tl.dot(queries, tl.trans(keys)).to(dtype) * (_between(logs_ptr + place * 2 * Q, 0, 0, Q, Q) * scale)
    weights = weights.to(keys.dtype)
    if weights_ptr is not None:
        t = tl.arange(0, Q)
        tl.store(weights_ptr + place * Q * Q + t[:, None] * Q + t[None, :], weights)
    since, _until, _whole = _ends(logs_ptr + place * 2 * Q, Q)
    step = (tl.cast(b, tl.int64) * length + begin) * heads + h
    for first in range(0, P, BP):
        at, there = states_at(saved_ptr, place // heads, heads, h, tl.arange(0, NP), first + tl.arange(0, BP), N, P)
        state = tl.load(at, mask=there, other=0.0)
        new = read(written, b, begin, h * P + first, BP, inside, P - first)
        y = tl.dot(queries, state).to(dtype) * (since * scale)[:, None]
        write(y_ptr, step * P + first, heads * P, tl.dot(weights, new, acc=y, out_dtype=dtype), inside, P - first)


@triton.jit
def adjoint(
    q,
    k,
    dy,
    beta,
    table_ptr,
    chunks_ptr,
    inverse_ptr,
    weights_ptr,
    logs_ptr,
    dfinal_ptr,
    leaving_ptr,
    solved_ptr,
    dstart_ptr,
    length,
    heads,
    per_group,
    slots,
    N: tl.constexpr,
    P: tl.constexpr,
    NP: tl.constexpr,
    BP: tl.constexpr,
    Q: tl.constexpr,
    scale: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One head of a sequence, some columns, backwards: gradients of the states that leave its chunks, and of its start.

    And R, the solution of ``(I + A)^T R = dU``, for all steps.
    """
    dtype: tl.constexpr = dfinal_ptr.dtype.element_ty
    block, h, row, b, first, last = _row(chunks_ptr, slots, heads, (P + BP - 1) // BP)
    n, p, t = tl.arange(0, NP), block * BP + tl.arange(0, BP), tl.arange(0, Q)
    at, there = states_at(dfinal_ptr, row, heads, h, n, p, N, P)
    state = tl.load(at, mask=there, other=0.0)
    for i in tl.range(0, last - first, num_stages=STAGES):
        c = last - 1 - i
        begin, end, _sequence, _first, _last = chunk(table_ptr, c, b, length, Q)
        inside, place = begin + t < end, tl.cast(b * slots + c, tl.int64) * heads + h
        into, known = states_at(leaving_ptr, b * slots + c, heads, h, n, p, N, P)
        tl.store(into, state.to(leaving_ptr.dtype.element_ty), mask=known)
        since, until, whole = _ends(logs_ptr + place * 2 * Q, Q)
        keys = read(k, b, begin, h // per_group * N, NP, inside, N)
        dnew = tl.dot(keys, state.to(keys.dtype)).to(dtype) * until[:, None]
        weights = tl.load(weights_ptr + place * Q * Q + t[:, None] * Q + t[None, :])
        pulled = read(dy, b, begin, h * P + block * BP, BP, inside, P - block * BP)
        dnew = tl.dot(tl.trans(weights), pulled, acc=dnew, out_dtype=dtype)
        inverse = tl.load(inverse_ptr + place * Q * Q + t[:, None] * Q + t[None, :])
        solved = tl.dot(tl.trans(inverse), dnew.to(inverse.dtype)).to(dtype)
        step = (tl.cast(b, tl.int64) * length + begin) * heads + h
        write(solved_ptr, step * P + block * BP, heads * P, solved, inside, P - block * BP)
        strength = _column(beta, b, begin, h, inside).to(dtype)
        queries = read(q, b, begin, h // per_group * N, NP, inside, N)
        state = tl.dot(
            tl.trans(queries),
            (pulled.to(dtype) * (since * scale)[:, None]).to(queries.dtype),
            acc=state * whole,
            out_dtype=dtype,
        )
        state = tl.dot(
            tl.trans(keys), (solved * (since * -strength)[:, None]).to(keys.dtype), acc=state, out_dtype=dtype
        )
    at, there = states_at(dstart_ptr, row, heads, h, n, p, N, P)
    tl.store(at, state, mask=there)


@triton.jit
def gradients(
    q,
    k,
    v,
    beta,
    written,
    dy,
    solved,
    table_ptr,
    logs_ptr,
    saved_ptr,
    leaving_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    dbeta_ptr,
    dlog_ptr,
    length,
    heads,
    per_group,
    slots,
    N: tl.constexpr,
    P: tl.constexpr,
    NP: tl.constexpr,
    BP: tl.constexpr,
    Q: tl.constexpr,
    scale: tl.constexpr,
    dtype: tl.constexpr,
):
    """One head of a chunk: what q, k, v, beta and the logarithms get; dq and dk are ``(B, T, H, N)``.

    A logarithm gets a sum over the pairs of steps that it lies between: a difference of sums over many more, which are
    float64, as they may be far larger.
    """
    h, b, place, begin, _end, inside = _place(table_ptr, length, heads, slots, Q)
    step = (tl.cast(b, tl.int64) * length + begin) * heads + h
    strength = _column(beta, b, begin, h, inside).to(dtype)
    since, until, whole = _ends(logs_ptr + place * 2 * Q, Q)
    t, column = tl.arange(0, Q), tl.arange(0, BP)
    below = t[:, None] > t[None, :]

    # What q gets, from the state that enters and from the steps of the chunk.
    dweights, through = tl.zeros((Q, Q), dtype), tl.zeros((Q, NP), dtype)
    for first in range(0, P, BP):
        at, there = states_at(saved_ptr, place // heads, heads, h, tl.arange(0, NP), first + column, N, P)
        state = tl.load(at, mask=there, other=0.0)
        new = read(written, b, begin, h * P + first, BP, inside, P - first)
        pulled = read(dy, b, begin, h * P + first, BP, inside, P - first)
        dweights = tl.dot(pulled, tl.trans(new), acc=dweights, out_dtype=dtype)
        through = tl.dot(pulled, tl.trans(state), acc=through, out_dtype=dtype)
    queries = read(q, b, begin, h // per_group * N, NP, inside, N)
    keys = read(k, b, begin, h // per_group * N, NP, inside, N)
    through *= (since * scale)[:, None]
    dlog = tl.sum(through * queries.to(dtype), 1).to(tl.float64)
    dweights *= _between(logs_ptr + place * 2 * Q, 0, 0, Q, Q) * scale
    low = dweights.to(keys.dtype)
    write(dq_ptr, step * N, heads * N, tl.dot(low, keys, acc=through, out_dtype=dtype), inside, N)
    pairs = tl.where(below, dweights * tl.dot(queries, tl.trans(keys)).to(dtype), 0.0).to(tl.float64)
    dlog += tl.sum(pairs, 1) - tl.sum(pairs, 0)
    dk = tl.dot(tl.trans(low), queries).to(dtype)

    # What k gets, from the states that enter and leave and from the steps of the chunk.
    rn, dbeta, carried = tl.zeros((Q, Q), dtype), tl.zeros((Q,), dtype), tl.zeros((), dtype)
    erased, kept = tl.zeros((Q, NP), dtype), tl.zeros((Q, NP), dtype)
    for first in range(0, P, BP):
        at, there = states_at(saved_ptr, place // heads, heads, h, tl.arange(0, NP), first + column, N, P)
        state = tl.load(at, mask=there, other=0.0)
        at, there = states_at(leaving_ptr, place // heads, heads, h, tl.arange(0, NP), first + column, N, P)
        leaving = tl.load(at, mask=there, other=0.0)
        new = read(written, b, begin, h * P + first, BP, inside, P - first)
        of = read(solved, b, begin, h * P + first, BP, inside, P - first)
        values = read(v, b, begin, h * P + first, BP, inside, P - first)
        write(dv_ptr, step * P + first, heads * P, of.to(dtype) * strength[:, None], inside, P - first)
        dbeta += tl.sum(of.to(dtype) * values.to(dtype), 1)
        carried += tl.sum(state.to(dtype) * leaving.to(dtype))
        rn = tl.dot(of, tl.trans(new), acc=rn, out_dtype=dtype)
        erased = tl.dot(of, tl.trans(state), acc=erased, out_dtype=dtype)
        kept = tl.dot(new, tl.trans(leaving), acc=kept, out_dtype=dtype)
    erased *= since[:, None]
    kept *= until[:, None]
    earlier, seen = tl.sum(kept * keys.to(dtype), 1), tl.sum(erased * keys.to(dtype), 1)
    dk += kept - erased * strength[:, None]
    rn = tl.where(below, rn * _between(logs_ptr + place * 2 * Q, 0, 0, Q, Q), 0.0)
    products = rn * tl.dot(keys, tl.trans(keys)).to(dtype)
    low = (rn * -strength[:, None]).to(keys.dtype)
    dk = tl.dot(tl.trans(low), keys, acc=tl.dot(low, keys, acc=dk, out_dtype=dtype), out_dtype=dtype)
    write(dk_ptr, step * N, heads * N, dk, inside, N)

    # What beta and the logarithms get.
    pairs = (products * strength[:, None]).to(tl.float64)
    dlog += tl.sum(pairs, 0) - tl.sum(pairs, 1) - (seen * strength).to(tl.float64)
    earlier = earlier.to(tl.float64)
    dlog = tl.cumsum(dlog, 0, reverse=True) + tl.cumsum(earlier, 0) - earlier + (carried * whole).to(tl.float64)
    tl.store(dlog_ptr + step + t * heads, dlog.to(dlog_ptr.dtype.element_ty), mask=inside)
    dbeta -= tl.sum(products, 1) + seen
    tl.store(dbeta_ptr + step + t * heads, dbeta.to(dbeta_ptr.dtype.element_ty), mask=inside)
