"""RWKV-7's recurrence: what each chunk does to a state, states from chunk to chunk, then outputs or gradients.

What a chunk reads, ``u_t = S_{t-1}^T a_t``, solves ``(I - A_ab) U = A_ak V + A S`` for the state S that enters;
``A_ab`` holds the products of a and earlier b under the decays between them. So a chunk maps S to
``diag(d) S + M S + N``. All tensors of steps are ``(B, T, H, N)`` or, of values, ``(B, T, H, P)``, given as
``(pointer, stride of B, stride of T)``; a head has ``(N, P)`` states. Logarithms are in units of log2.

What is not finite at one step may reach every step of its chunk, through the zeros of a masked product, and the later
ones of its sequence; it never reaches another sequence or row, nor an earlier chunk.
"""

import triton
import triton.language as tl

from dualform.ops.triton.kernels.chunks import chunk, load_state, read, states_at, write


@triton.jit
def _place(number, table_ptr, length, heads, slots, Q: tl.constexpr):
    """Of a number: head, chunk and batch row, the first step of the chunk, and which of its steps there are."""
    h, rest = number % heads, number // heads
    c, b = rest % slots, rest // slots
    begin, end, _row, _first, _last = chunk(table_ptr, c, b, length, Q)
    return h, c, b, begin, begin + tl.arange(0, Q) < end


@triton.jit
def _logs(g, b, begin, first, size: tl.constexpr, inside, width, dtype: tl.constexpr):
    """Logarithms of the decays of a chunk, their sums before every step, those after it, and that of all.

    None is worth more than makes an exponential 0, as differences of sums are what counts.
    """
    log = read(g, b, begin, first, size, inside, width).to(dtype) * 1.4426950408889634
    log = tl.where(log < -160.0, -160.0, log)
    upto, total = tl.cumsum(log, 0), tl.sum(log, 0)
    return log, upto - log, total[None, :] - upto, total


@triton.jit
def _at_once(log):
    """Whether the decays of a chunk are weak enough for all products to be taken from the middle of the chunk."""
    return tl.max(tl.sum(tl.abs(log), 0), 0) < 57.0


@triton.jit
def _from_middle(log, before, Q: tl.constexpr):
    """The decays of rows from the middle of a chunk, and of columns to it, of which either may be above 1."""
    t = tl.arange(0, Q)[:, None]
    middle = tl.sum(tl.where(t < Q // 2, log, 0.0), 0)[None, :]
    return tl.exp2(before - middle), tl.exp2(middle - before - log)


@triton.jit
def _row(x, j, Q: tl.constexpr):
    """Row j of a matrix."""
    return tl.sum(tl.where(tl.arange(0, Q)[:, None] == j, x, 0.0), 0)[None, :]


@triton.jit
def _column(x, j, Q: tl.constexpr):
    """Column j of a matrix."""
    return tl.sum(tl.where(tl.arange(0, Q)[None, :] == j, x, 0.0), 1)[:, None]


@triton.jit
def _reached(log, before, j, Q: tl.constexpr):
    """The decays between step j and the later ones, zero for the others."""
    later = tl.arange(0, Q)[:, None] > j
    return tl.exp2(tl.where(later, before - _row(before + log, j, Q), float("-inf")))


@triton.jit
def _products(a, seen, b, k, log, before, Q: tl.constexpr, dtype: tl.constexpr):
    """The products of a and of r with earlier b and k, under the decays between them, ``(Q, Q)``."""
    i, t = tl.arange(0, Q)[:, None], tl.arange(0, Q)[None, :]
    ab, ak = tl.zeros((Q, Q), dtype), tl.zeros((Q, Q), dtype)
    rb, rk = tl.zeros((Q, Q), dtype), tl.zeros((Q, Q), dtype)
    if _at_once(log):
        since, until = _from_middle(log, before, Q)
        of_a, of_r, of_b, of_k = a * since, seen * since, tl.trans(b * until), tl.trans(k * until)
        ab = tl.where(i > t, tl.dot(of_a, of_b), 0.0)
        ak = tl.where(i > t, tl.dot(of_a, of_k), 0.0)
        rb = tl.where(i > t, tl.dot(of_r, of_b), 0.0)
        rk = tl.where(i > t, tl.dot(of_r, of_k), 0.0)
    else:
        for j in range(0, Q):
            reached = _reached(log, before, j, Q)
            of_b, of_k = _row(b, j, Q) * reached, _row(k, j, Q) * reached
            ab = tl.where(t == j, tl.sum(a * of_b, 1)[:, None], ab)
            ak = tl.where(t == j, tl.sum(a * of_k, 1)[:, None], ak)
            rb = tl.where(t == j, tl.sum(seen * of_b, 1)[:, None], rb)
            rk = tl.where(t == j, tl.sum(seen * of_k, 1)[:, None], rk)
    return ab, ak, rb, rk


@triton.jit
def _inverse(x, Q: tl.constexpr, LEVELS: tl.constexpr, EXACT: tl.constexpr, dtype: tl.constexpr):
    """``(I - x)^-1`` of a matrix that is zero on the diagonal and above: inverses of blocks, then of larger ones."""
    i, t = tl.arange(0, Q)[:, None], tl.arange(0, Q)[None, :]
    found = (i == t).to(dtype)
    for level in tl.static_range(LEVELS):
        reach = (i // (2 << level) == t // (2 << level)) & (i // (1 << level) > t // (1 << level))
        across = tl.where(reach, x, 0.0)
        if level == 0:
            found += across
        else:
            across = tl.dot(across, found, input_precision=EXACT)
            found += tl.dot(found, across, input_precision=EXACT)
    return found


@triton.jit
def _with_diagonal(x, diagonal, Q: tl.constexpr):
    i, t = tl.arange(0, Q)[:, None], tl.arange(0, Q)[None, :]
    return tl.where(i == t, diagonal[:, None], x)


@triton.jit
def _of_chunk(
    r, k, a, b, row, begin, h, inside, log, before, N: tl.constexpr, NP: tl.constexpr, Q: tl.constexpr,
    low: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """:func:`_products` of what lies in memory, those of r with the b and k of its own step among them."""
    of_r = read(r, row, begin, h * N, NP, inside, N).to(dtype)
    of_k = read(k, row, begin, h * N, NP, inside, N).to(dtype)
    of_a = read(a, row, begin, h * N, NP, inside, N).to(dtype)
    of_b = read(b, row, begin, h * N, NP, inside, N).to(dtype)
    ab, ak, rb, rk = _products(of_a, of_r * tl.exp2(log), of_b, of_k, log, before, Q, dtype)
    rb = _with_diagonal(rb, tl.sum(of_r * of_b, 1), Q).to(low)
    rk = _with_diagonal(rk, tl.sum(of_r * of_k, 1), Q).to(low)
    return ab, ak.to(low), rb, rk


@triton.jit
def prepare(
    r,
    g,
    k,
    v,
    a,
    b,
    table_ptr,
    decay_ptr,
    matrix_ptr,
    added_ptr,
    seen_ptr,
    own_ptr,
    length,
    heads,
    slots,
    N: tl.constexpr,
    P: tl.constexpr,
    NP: tl.constexpr,
    BP: tl.constexpr,
    Q: tl.constexpr,
    LEVELS: tl.constexpr,
    EXACT: tl.constexpr,
    dtype: tl.constexpr,
):
    """One chunk of a head: d, M and N of ``diag(d) S + M S + N``, and its outputs ``own + seen S``.

    ``d`` is ``(B, chunks, H, N)``, M and N are ``(B, chunks, H, N, N or P)``, ``own`` and ``seen`` lie as v and r do.
    """
    h, c, row, begin, inside = _place(tl.program_id(0), table_ptr, length, heads, slots, Q)
    low: tl.constexpr = matrix_ptr.dtype.element_ty
    log, before, after, total = _logs(g, row, begin, h * N, NP, inside, N, dtype)
    ab, ak, rb, rk = _of_chunk(r, k, a, b, row, begin, h, inside, log, before, N, NP, Q, low, dtype)
    inverse = _inverse(ab, Q, LEVELS, EXACT, dtype).to(low)
    value = read(v, row, begin, h * P, BP, inside, P)

    since, until = tl.exp2(before), tl.exp2(after)
    of_state = tl.dot(inverse, (read(a, row, begin, h * N, NP, inside, N).to(dtype) * since).to(low)).to(low)
    solved = tl.dot(inverse, tl.dot(ak, value).to(low)).to(low)
    step = (tl.cast(row, tl.int64) * length + begin) * heads + h
    seen = read(r, row, begin, h * N, NP, inside, N).to(dtype) * tl.exp2(log) * since
    write(seen_ptr, step * N, heads * N, seen + tl.dot(rb, of_state), inside, N)
    write(own_ptr, step * P, heads * P, tl.dot(rb, solved) + tl.dot(rk, value), inside, P)

    kept = tl.trans((read(b, row, begin, h * N, NP, inside, N).to(dtype) * until).to(low))
    n, p, place = tl.arange(0, NP), tl.arange(0, BP), tl.cast(row, tl.int64) * slots + c
    tl.store(decay_ptr + (place * heads + h) * N + n, tl.exp2(total), mask=n < N)
    at, there = states_at(matrix_ptr, place, heads, h, n, n, N, N)
    tl.store(at, tl.dot(kept, of_state).to(low), mask=there)
    added = tl.dot(kept, solved)
    kept = tl.trans((read(k, row, begin, h * N, NP, inside, N).to(dtype) * until).to(low))
    at, there = states_at(added_ptr, place, heads, h, n, p, N, P)
    tl.store(at, (added + tl.dot(kept, value)).to(low), mask=there)


@triton.jit
def states(
    decay_ptr,
    matrix_ptr,
    added_ptr,
    seen_ptr,
    dy,
    table_ptr,
    start_ptr,
    saved_ptr,
    final_ptr,
    length,
    heads,
    slots,
    BACKWARD: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    NP: tl.constexpr,
    BP: tl.constexpr,
    Q: tl.constexpr,
):
    """The state that enters every chunk, ``S' = diag(d) S + M S + N``, for some value channels of a head.

    BACKWARD, the gradient of the state that leaves every chunk, ``G' = diag(d) G + M^T G + seen^T dy``.
    """
    dtype: tl.constexpr = start_ptr.dtype.element_ty
    low: tl.constexpr = matrix_ptr.dtype.element_ty
    blocks: tl.constexpr = (P + BP - 1) // BP
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    h, b = rest % heads, rest // heads
    n, p = tl.arange(0, NP), block * BP + tl.arange(0, BP)
    state = tl.zeros((NP, BP), dtype)
    for i in range(0, slots):
        c = slots - 1 - i if BACKWARD else i
        begin, end, row, first, last = chunk(table_ptr, c, b, length, Q)
        place = tl.cast(b, tl.int64) * slots + c
        starts, stops = last if BACKWARD else first, first if BACKWARD else last
        if starts:
            at, there = states_at(start_ptr, row, heads, h, n, p, N, P)
            state = tl.load(at, mask=there, other=0.0)
        at, there = states_at(saved_ptr, place, heads, h, n, p, N, P)
        tl.store(at, state.to(low), mask=there)
        decay = tl.load(decay_ptr + (place * heads + h) * N + n, mask=n < N, other=0.0)
        at, there = states_at(matrix_ptr, place, heads, h, n, n, N, N)
        matrix = tl.load(at, mask=there, other=0.0)
        if BACKWARD:
            inside = begin + tl.arange(0, Q) < end
            seen = read((seen_ptr, length * heads * N, heads * N), b, begin, h * N, NP, inside, N)
            pulled = read(dy, b, begin, h * P + block * BP, BP, inside, P - block * BP)
            added = tl.dot(tl.trans(seen), pulled).to(dtype)
            matrix = tl.trans(matrix)
        else:
            at, there = states_at(added_ptr, place, heads, h, n, p, N, P)
            added = tl.load(at, mask=there, other=0.0).to(dtype)
        state = decay[:, None] * state + (tl.dot(matrix, state.to(low)).to(dtype) + added)
        at, there = states_at(final_ptr, row, heads, h, n, p, N, P)
        tl.store(at, state, mask=there & stops)


@triton.jit
def outputs(
    seen_ptr,
    own_ptr,
    table_ptr,
    entering_ptr,
    y_ptr,
    length,
    heads,
    slots,
    N: tl.constexpr,
    P: tl.constexpr,
    NP: tl.constexpr,
    BP: tl.constexpr,
    Q: tl.constexpr,
):
    """One chunk of a head: ``y = own + seen S``."""
    h, c, b, begin, inside = _place(tl.program_id(0), table_ptr, length, heads, slots, Q)
    seen = read((seen_ptr, length * heads * N, heads * N), b, begin, h * N, NP, inside, N)
    own = read((own_ptr, length * heads * P, heads * P), b, begin, h * P, BP, inside, P)
    state = load_state(entering_ptr, tl.cast(b, tl.int64) * slots + c, heads, h, N, P, NP, BP)
    step = (tl.cast(b, tl.int64) * length + begin) * heads + h
    write(y_ptr, step * P, heads * P, own + tl.dot(seen, state), inside, P)


@triton.jit
def read_gradients(
    r,
    g,
    k,
    v,
    a,
    b,
    dy,
    table_ptr,
    entering_ptr,
    leaving_ptr,
    read_ptr,
    dread_ptr,
    dv_ptr,
    length,
    heads,
    slots,
    N: tl.constexpr,
    P: tl.constexpr,
    NP: tl.constexpr,
    BP: tl.constexpr,
    Q: tl.constexpr,
    LEVELS: tl.constexpr,
    EXACT: tl.constexpr,
    dtype: tl.constexpr,
):
    """One chunk of a head: what was read, U, the gradient of what it solves for, and that of v; all lie as v does.

    They follow from the state that enters the chunk and the gradient of the one that leaves it.
    """
    h, c, row, begin, inside = _place(tl.program_id(0), table_ptr, length, heads, slots, Q)
    low: tl.constexpr = entering_ptr.dtype.element_ty
    log, before, after, _total = _logs(g, row, begin, h * N, NP, inside, N, dtype)
    ab, ak, rb, rk = _of_chunk(r, k, a, b, row, begin, h, inside, log, before, N, NP, Q, low, dtype)
    inverse = _inverse(ab, Q, LEVELS, EXACT, dtype).to(low)
    place = tl.cast(row, tl.int64) * slots + c
    step = (tl.cast(row, tl.int64) * length + begin) * heads + h
    value = read(v, row, begin, h * P, BP, inside, P)

    of_state = (read(a, row, begin, h * N, NP, inside, N).to(dtype) * tl.exp2(before)).to(low)
    sides = tl.dot(ak, value) + tl.dot(of_state, load_state(entering_ptr, place, heads, h, N, P, NP, BP))
    write(read_ptr, step * P, heads * P, tl.dot(inverse, sides.to(low)), inside, P)

    pulled = read(dy, row, begin, h * P, BP, inside, P)
    leaving = load_state(leaving_ptr, place, heads, h, N, P, NP, BP)
    kept = (read(b, row, begin, h * N, NP, inside, N).to(dtype) * tl.exp2(after)).to(low)
    dread = tl.dot(tl.trans(rb), pulled) + tl.dot(kept, leaving)
    dread = tl.dot(tl.trans(inverse), dread.to(low)).to(low)
    write(dread_ptr, step * P, heads * P, dread, inside, P)
    kept = (read(k, row, begin, h * N, NP, inside, N).to(dtype) * tl.exp2(after)).to(low)
    dv = tl.dot(tl.trans(rk), pulled) + tl.dot(kept, leaving) + tl.dot(tl.trans(ak), dread)
    write(dv_ptr, step * P, heads * P, dv, inside, P)


@triton.jit
def gradients(
    r,
    g,
    k,
    v,
    a,
    b,
    dy,
    table_ptr,
    entering_ptr,
    leaving_ptr,
    read_ptr,
    dread_ptr,
    dr_ptr,
    dg_ptr,
    dk_ptr,
    da_ptr,
    db_ptr,
    length,
    heads,
    slots,
    N: tl.constexpr,
    P: tl.constexpr,
    NP: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
    Q: tl.constexpr,
    dtype: tl.constexpr,
):
    """One chunk of a head, some of its key channels: the gradients of all but v, from :func:`read_gradients`."""
    block, number = tl.program_id(0) % (NP // BN), tl.program_id(0) // (NP // BN)
    h, c, row, begin, inside = _place(number, table_ptr, length, heads, slots, Q)
    first, width = h * N + block * BN, N - block * BN
    n, p = block * BN + tl.arange(0, BN), tl.arange(0, BP)
    i, t = tl.arange(0, Q)[:, None], tl.arange(0, Q)[None, :]
    place = tl.cast(row, tl.int64) * slots + c
    step = (tl.cast(row, tl.int64) * length + begin) * heads + h
    value = read(v, row, begin, h * P, BP, inside, P)
    pulled = read(dy, row, begin, h * P, BP, inside, P)
    of_read = read((read_ptr, length * heads * P, heads * P), row, begin, h * P, BP, inside, P)
    dread = read((dread_ptr, length * heads * P, heads * P), row, begin, h * P, BP, inside, P)

    # The gradients of products within the chunk.
    dab, dak = tl.dot(dread, tl.trans(of_read)).to(dtype), tl.dot(dread, tl.trans(value)).to(dtype)
    drb, drk = tl.dot(pulled, tl.trans(of_read)).to(dtype), tl.dot(pulled, tl.trans(value)).to(dtype)
    own_b, own_k = tl.sum(tl.where(i == t, drb, 0.0), 1)[:, None], tl.sum(tl.where(i == t, drk, 0.0), 1)[:, None]
    dab, dak = tl.where(i > t, dab, 0.0), tl.where(i > t, dak, 0.0)
    drb, drk = tl.where(i > t, drb, 0.0), tl.where(i > t, drk, 0.0)

    # Through the states that enter and leave. A decay has a share in all that passes its step.
    log, before, after, total = _logs(g, row, begin, first, BN, inside, width, dtype)
    since, until = tl.exp2(before), tl.exp2(after)
    of_k = read(k, row, begin, first, BN, inside, width).to(dtype)
    of_b = read(b, row, begin, first, BN, inside, width).to(dtype)
    at, there = states_at(leaving_ptr, place, heads, h, n, p, N, P)
    leaving = tl.load(at, mask=there, other=0.0)
    dk, db = tl.dot(value, tl.trans(leaving)) * until, tl.dot(of_read, tl.trans(leaving)) * until
    columns = of_k * dk + of_b * db
    dlog = tl.cumsum(columns, 0) - columns
    of_a = read(a, row, begin, first, BN, inside, width).to(dtype)
    seen = read(r, row, begin, first, BN, inside, width).to(dtype) * tl.exp2(log)
    at, there = states_at(entering_ptr, place, heads, h, n, p, N, P)
    state = tl.load(at, mask=there, other=0.0)
    dlog += (tl.exp2(total) * tl.sum(state.to(dtype) * leaving.to(dtype), 1))[None, :]
    da, dseen = tl.dot(dread, tl.trans(state)) * since, tl.dot(pulled, tl.trans(state)) * since

    # Within the chunk.
    if _at_once(log):
        since, until = _from_middle(log, before, Q)
        from_b, from_k = of_b * until, of_k * until
        more_a = (tl.dot(dab, from_b) + tl.dot(dak, from_k)) * since
        more_r = (tl.dot(drb, from_b) + tl.dot(drk, from_k)) * since
        from_a, from_r = of_a * since, seen * since
        more_b = (tl.dot(tl.trans(dab), from_a) + tl.dot(tl.trans(drb), from_r)) * until
        more_k = (tl.dot(tl.trans(dak), from_a) + tl.dot(tl.trans(drk), from_r)) * until
    else:
        more_a, more_r = tl.zeros((Q, BN), dtype), tl.zeros((Q, BN), dtype)
        more_b, more_k = tl.zeros((Q, BN), dtype), tl.zeros((Q, BN), dtype)
        for j in range(0, Q):
            reached = _reached(log, before, j, Q)
            from_b, from_k = _row(of_b, j, Q) * reached, _row(of_k, j, Q) * reached
            to_b, to_k = _column(dab, j, Q), _column(dak, j, Q)
            more_a += to_b * from_b + to_k * from_k
            from_a, from_r = of_a * reached, seen * reached
            here = i == j
            of_b_from_a, of_k_from_a = tl.sum(to_b * from_a, 0), tl.sum(to_k * from_a, 0)
            to_b, to_k = _column(drb, j, Q), _column(drk, j, Q)
            more_r += to_b * from_b + to_k * from_k
            more_b += tl.where(here, (of_b_from_a + tl.sum(to_b * from_r, 0))[None, :], 0.0)
            more_k += tl.where(here, (of_k_from_a + tl.sum(to_k * from_r, 0))[None, :], 0.0)
    columns = of_b * more_b + of_k * more_k
    da, dseen, db, dk = da + more_a, dseen + more_r, db + more_b, dk + more_k
    rows = of_a * da + seen * dseen
    dlog += tl.cumsum(rows - columns, 0, reverse=True) - rows
    of_r = read(r, row, begin, first, BN, inside, width).to(dtype)
    start = step * N + block * BN
    write(dg_ptr, start, heads * N, dlog + seen * dseen, inside, width)
    write(dr_ptr, start, heads * N, dseen * tl.exp2(log) + own_b * of_b + own_k * of_k, inside, width)
    write(da_ptr, start, heads * N, da, inside, width)
    write(db_ptr, start, heads * N, db + own_b * of_r, inside, width)
    write(dk_ptr, start, heads * N, dk + own_k * of_r, inside, width)
