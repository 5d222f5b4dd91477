"""The Kalman filter and its gradient: a program walks along time with some series, whose matrices lie in registers.

Matrices are ``(series, row, column)``, filled up with zeros to powers of two; of R, with ones on the diagonal. So are
the components that are missing, which leaves the others as they are.
"""

import triton
import triton.language as tl

_LOG_2PI = tl.constexpr(1.8378770664093453)


@triton.jit
def _mm(a, b):
    """``a b``."""
    return tl.sum(a[:, :, :, None] * b[:, None, :, :], 2)


@triton.jit
def _mt(a, b):
    """``a b^T``."""
    return tl.sum(a[:, :, None, :] * b[:, None, :, :], 3)


@triton.jit
def _tm(a, b):
    """``a^T b``."""
    return tl.sum(a[:, :, :, None] * b[:, :, None, :], 1)


@triton.jit
def _mv(a, x):
    """``a x``."""
    return tl.sum(a * x[:, None, :], 2)


@triton.jit
def _tv(a, x):
    """``a^T x``."""
    return tl.sum(a * x[:, :, None], 1)


@triton.jit
def _symmetric(a):
    return 0.5 * (a + tl.permute(a, (0, 2, 1)))


@triton.jit
def _matrix(b, n, m, rows, N, M):
    """Where the numbers of matrices ``(B, N, M)`` lie, those of a series side by side, and which of them are there."""
    there = (b < rows)[:, None, None] & (n < N)[None, :, None] & (m < M)[None, None, :]
    return n[None, :, None] * M + m[None, None, :], there


@triton.jit
def _places(rows, N, M, BB: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr):
    """Of a program: its series, states and observations; where matrices lie, A, C and R, and what of all is there."""
    b, n, m = tl.program_id(0) * BB + tl.arange(0, BB), tl.arange(0, BN), tl.arange(0, BM)
    at_a, has_a = _matrix(b, n, n, rows, N, N)
    at_c, has_c = _matrix(b, m, n, rows, M, N)
    at_r, has_r = _matrix(b, m, m, rows, M, M)
    has_n, has_y = (b < rows)[:, None] & (n < N)[None, :], (b < rows)[:, None] & (m < M)[None, :]
    return b, n, m, at_a, has_a, at_c, has_c, at_r, has_r, has_n, has_y


@triton.jit
def _eye(n, dtype: tl.constexpr, BB: tl.constexpr):
    """The identity, of every series."""
    one = tl.where(n[None, :, None] == n[None, None, :], 1.0, 0.0).to(dtype)
    return tl.broadcast_to(one, (BB, n.shape[0], n.shape[0]))


@triton.jit
def _observation(c_ptr, r_ptr, y_ptr, seen_ptr, c_t, r_t, y_t, seen_t, at_c, has_c, at_r, has_r, has_y, eye, t, dtype):
    """C, R, y and what is seen at time t, uninformative where it is not."""
    seen = tl.load(seen_ptr + t * seen_t, mask=has_y, other=0) != 0
    both = seen[:, :, None] & seen[:, None, :]
    c = tl.where(seen[:, :, None], tl.load(c_ptr + t * c_t + at_c, mask=has_c, other=0.0), 0.0)
    r = tl.where(both, tl.load(r_ptr + t * r_t + at_r, mask=has_r, other=0.0), eye)
    y = tl.where(seen, tl.load(y_ptr + t * y_t, mask=has_y, other=0.0), 0.0)
    return c.to(dtype), r.to(dtype), y.to(dtype), seen


@triton.jit
def _solved(f, x, v, m, margin, BM: tl.constexpr):
    """``F^-1 x``, ``F^-1 v``, ``v^T F^-1 v``, ``log |F|``, and whether F is positive definite, but for rounding."""
    square, log = tl.sum(v, 1) * 0, tl.sum(v, 1) * 0
    fine = square == 0
    size = tl.sum(tl.where(m[None, :, None] == m[None, None, :], f, 0.0), 2)
    for i in tl.static_range(BM):
        here = m == i
        line = tl.sum(tl.where(here[None, :, None], f, 0.0), 1)
        column = tl.sum(tl.where(here[None, None, :], f, 0.0), 2)
        pivot = tl.sum(tl.where(here[None, :], line, 0.0), 1)
        good = pivot > margin * tl.sum(tl.where(here[None, :], size, 0.0), 1)
        fine, pivot = fine & good, tl.where(good, pivot, 1.0)
        of_v = tl.sum(tl.where(here[None, :], v, 0.0), 1)
        square += of_v * of_v / pivot
        log += tl.log(pivot)
        column = tl.where(here[None, :], 0.0, column)
        f_row, x_row, v_row = line / pivot[:, None], tl.sum(tl.where(here[None, :, None], x, 0.0), 1), of_v / pivot
        x_row = x_row / pivot[:, None]
        f = tl.where(here[None, :, None], f_row[:, None, :], f - column[:, :, None] * f_row[:, None, :])
        x = tl.where(here[None, :, None], x_row[:, None, :], x - column[:, :, None] * x_row[:, None, :])
        v = tl.where(here[None, :], v_row[:, None], v - column * v_row[:, None])
    return x, v, square, log, fine


@triton.jit
def _updated(mean, cov, c, r, gain, v, eye):
    """The moments given an observation, by K^T: in Joseph's form, a sum of squares."""
    left = eye - _tm(gain, c)
    return mean + _tv(gain, v), _symmetric(_mt(_mm(left, cov), left) + _tm(gain, _mm(r, gain)))


@triton.jit
def _before(means_ptr, covs_ptr, mean_ptr, cov_ptr, at_m, at_p, first_m, first_p, has_n, has_a, t, N):
    """The moments of the state before time t, which are those of the start at the first."""
    mean = tl.load(means_ptr + at_m - N, mask=has_n & (t > 0), other=0.0)
    mean += tl.load(mean_ptr + first_m, mask=has_n & (t == 0), other=0.0)
    cov = tl.load(covs_ptr + at_p - N * N, mask=has_a & (t > 0), other=0.0)
    return mean, cov + tl.load(cov_ptr + first_p, mask=has_a & (t == 0), other=0.0)


@triton.jit
def forward(
    a_ptr,
    shift_ptr,
    q_ptr,
    c_ptr,
    r_ptr,
    y_ptr,
    seen_ptr,
    mean_ptr,
    cov_ptr,
    loglik_ptr,
    means_ptr,
    covs_ptr,
    predicted_means_ptr,
    predicted_covs_ptr,
    last_mean_ptr,
    last_cov_ptr,
    rows,
    T,
    N,
    M,
    spans,
    steps,
    a_b,
    a_t,
    shift_b,
    shift_t,
    q_b,
    q_t,
    c_b,
    c_t,
    r_b,
    r_t,
    y_b,
    y_t,
    seen_b,
    seen_t,
    margin: tl.constexpr,
    CONSTANT: tl.constexpr,
    SPLIT: tl.constexpr,
    BB: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
):
    """Every step; ``CONSTANT``: A, the shift and Q are read once.

    ``SPLIT``: a program has one of the spans of a series, each of so many steps, and ``mean_ptr`` and ``cov_ptr`` have
    what enters each of them.
    """
    dtype: tl.constexpr = mean_ptr.dtype.element_ty
    b, n, m, at_a, has_a, at_c, has_c, at_r, has_r, has_n, has_y = _places(rows, N, M, BB, BN, BM)
    own, row, begin, count = b.to(tl.int64), b.to(tl.int64), 0, T
    if SPLIT:
        row, begin = own // spans, tl.program_id(0) % spans * steps
        count = tl.minimum(steps, T - begin)
    full, lines = row[:, None, None], row[:, None]
    eye_m, eye_n = _eye(m, dtype, BB), _eye(n, dtype, BB)
    a_ptr, q_ptr, c_ptr, r_ptr = a_ptr + full * a_b, q_ptr + full * q_b, c_ptr + full * c_b, r_ptr + full * r_b
    shift_ptr, y_ptr = shift_ptr + lines * shift_b + n[None, :], y_ptr + lines * y_b + m[None, :]
    seen_ptr += lines * seen_b + m[None, :]
    mean = tl.load(mean_ptr + own[:, None] * N + n[None, :], mask=has_n, other=0.0)
    cov = tl.load(cov_ptr + own[:, None, None] * N * N + at_a, mask=has_a, other=0.0)
    a = tl.load(a_ptr + at_a, mask=has_a, other=0.0)
    shift = tl.load(shift_ptr, mask=has_n, other=0.0)
    q = tl.load(q_ptr + at_a, mask=has_a, other=0.0)
    for step in range(count):
        t = tl.full((), begin + step, tl.int64)
        if not CONSTANT:
            a = tl.load(a_ptr + t * a_t + at_a, mask=has_a, other=0.0)
            shift = tl.load(shift_ptr + t * shift_t, mask=has_n, other=0.0)
            q = tl.load(q_ptr + t * q_t + at_a, mask=has_a, other=0.0)
        c, r, y, seen = _observation(
            c_ptr, r_ptr, y_ptr, seen_ptr, c_t, r_t, y_t, seen_t, at_c, has_c, at_r, has_r, has_y, eye_m, t, dtype
        )
        mean = _mv(a, mean) + shift
        cov = _symmetric(_mt(_mm(a, cov), a)) + q
        at = row * T + t
        if predicted_means_ptr is not None:
            tl.store(predicted_means_ptr + at[:, None] * N + n[None, :], mean, mask=has_n)
            tl.store(predicted_covs_ptr + at[:, None, None] * N * N + at_a, cov, mask=has_a)
        cp, v = _mm(c, cov), y - _mv(c, mean)
        gain, _, square, log, fine = _solved(_symmetric(_mt(cp, c)) + r, cp, v, m, margin, BM)
        mean, cov = _updated(mean, cov, c, r, gain, v, eye_n)
        observed = tl.sum(seen.to(dtype), 1)
        term = -0.5 * (square + log + observed * _LOG_2PI)
        tl.store(loglik_ptr + at, tl.where(fine, term, float("nan")).to(dtype), mask=b < rows)
        if means_ptr is not None:
            tl.store(means_ptr + at[:, None] * N + n[None, :], mean, mask=has_n)
            tl.store(covs_ptr + at[:, None, None] * N * N + at_a, cov, mask=has_a)
    if SPLIT:
        has_n, has_a = has_n & (begin + count == T), has_a & (begin + count == T)
    tl.store(last_mean_ptr + lines * N + n[None, :], mean, mask=has_n)
    tl.store(last_cov_ptr + full * N * N + at_a, cov, mask=has_a)


@triton.jit
def summarize(
    a_ptr,
    shift_ptr,
    q_ptr,
    c_ptr,
    r_ptr,
    y_ptr,
    seen_ptr,
    over_ptr,
    mean_ptr,
    cov_ptr,
    eta_ptr,
    information_ptr,
    fine_ptr,
    rows,
    T,
    N,
    M,
    spans,
    steps,
    a_b,
    a_t,
    shift_b,
    shift_t,
    q_b,
    q_t,
    c_b,
    c_t,
    r_b,
    r_t,
    y_b,
    y_t,
    seen_b,
    seen_t,
    margin: tl.constexpr,
    BB: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
):
    """The element of every span ``(B, spans, ...)``, and whether it exists; a program has one span.

    It is the filter from a known state h: the last state is ``N(A h + b, C)``, and the observations have the likelihood
    ``exp(eta^T h - h^T J h / 2)`` by h, but for a factor.
    """
    dtype: tl.constexpr = mean_ptr.dtype.element_ty
    b, n, m, at_a, has_a, at_c, has_c, at_r, has_r, has_n, has_y = _places(rows, N, M, BB, BN, BM)
    own = b.to(tl.int64)
    begin = tl.program_id(0) % spans * steps
    full, lines = (own // spans)[:, None, None], (own // spans)[:, None]
    eye_m, eye_n = _eye(m, dtype, BB), _eye(n, dtype, BB)
    a_ptr, q_ptr, c_ptr, r_ptr = a_ptr + full * a_b, q_ptr + full * q_b, c_ptr + full * c_b, r_ptr + full * r_b
    shift_ptr, y_ptr = shift_ptr + lines * shift_b + n[None, :], y_ptr + lines * y_b + m[None, :]
    seen_ptr += lines * seen_b + m[None, :]
    over, cov, information = eye_n, tl.zeros((BB, BN, BN), dtype), tl.zeros((BB, BN, BN), dtype)
    mean, eta = tl.zeros((BB, BN), dtype), tl.zeros((BB, BN), dtype)
    fine = tl.full((BB,), 1, tl.int32)
    for step in range(tl.minimum(steps, T - begin)):
        t = tl.full((), begin + step, tl.int64)
        a = tl.load(a_ptr + t * a_t + at_a, mask=has_a, other=0.0)
        q = tl.load(q_ptr + t * q_t + at_a, mask=has_a, other=0.0)
        c, r, y, _ = _observation(
            c_ptr, r_ptr, y_ptr, seen_ptr, c_t, r_t, y_t, seen_t, at_c, has_c, at_r, has_r, has_y, eye_m, t, dtype
        )
        over = _mm(a, over)
        mean = _mv(a, mean) + tl.load(shift_ptr + t * shift_t, mask=has_n, other=0.0)
        cov = _symmetric(_mt(_mm(a, cov), a)) + q
        cp, through, v = _mm(c, cov), _mm(c, over), y - _mv(c, mean)
        inverse, white, _, _, good = _solved(_symmetric(_mt(cp, c)) + r, eye_m, v, m, margin, BM)
        gain = _mm(inverse, cp)
        fine = fine & good.to(tl.int32)
        eta += _tv(through, white)
        information += _symmetric(_tm(through, _mm(inverse, through)))
        over -= _tm(gain, through)
        mean, cov = _updated(mean, cov, c, r, gain, v, eye_n)
    own_matrix, own_line = own[:, None, None] * N * N + at_a, own[:, None] * N + n[None, :]
    tl.store(over_ptr + own_matrix, over, mask=has_a)
    tl.store(mean_ptr + own_line, mean, mask=has_n)
    tl.store(cov_ptr + own_matrix, cov, mask=has_a)
    tl.store(eta_ptr + own_line, eta, mask=has_n)
    tl.store(information_ptr + own_matrix, information, mask=has_a)
    tl.store(fine_ptr + own, fine, mask=b < rows)


@triton.jit
def backward(
    a_ptr,
    c_ptr,
    r_ptr,
    y_ptr,
    seen_ptr,
    mean_ptr,
    cov_ptr,
    means_ptr,
    covs_ptr,
    predicted_means_ptr,
    predicted_covs_ptr,
    dloglik_ptr,
    dmeans_ptr,
    dcovs_ptr,
    dpredicted_means_ptr,
    dpredicted_covs_ptr,
    dlast_mean_ptr,
    dlast_cov_ptr,
    da_ptr,
    dshift_ptr,
    dq_ptr,
    dc_ptr,
    dr_ptr,
    dy_ptr,
    dmean_ptr,
    dcov_ptr,
    rows,
    T,
    N,
    M,
    a_b,
    a_t,
    c_b,
    c_t,
    r_b,
    r_t,
    y_b,
    y_t,
    seen_b,
    seen_t,
    BB: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
):
    """The gradients, from the last step back.

    With W = F^-1 and K = P C^T W, of the prediction m, P, and with w = W v,

        dv = K^T dm - dl w
        dF = dl (w w^T - W) / 2 + K^T dP K - (K^T dm w^T + w dm^T K) / 2
        dP += sym(dB C) + C^T dF C,   dB = dm w^T - 2 dP K,   dm -= C^T dv.

    What follows for C, R and y, and from the prediction for A, the shift and Q, is in the body.
    """
    dtype: tl.constexpr = mean_ptr.dtype.element_ty
    b, n, m, at_a, has_a, at_c, has_c, at_r, has_r, has_n, has_y = _places(rows, N, M, BB, BN, BM)
    row = b.to(tl.int64)
    full, lines = row[:, None, None], row[:, None]
    eye = _eye(m, dtype, BB)
    a_ptr, c_ptr, r_ptr = a_ptr + full * a_b + at_a, c_ptr + full * c_b, r_ptr + full * r_b
    y_ptr, seen_ptr = y_ptr + lines * y_b + m[None, :], seen_ptr + lines * seen_b + m[None, :]
    dm = tl.load(dlast_mean_ptr + lines * N + n[None, :], mask=has_n, other=0.0)
    dp = _symmetric(tl.load(dlast_cov_ptr + full * N * N + at_a, mask=has_a, other=0.0))
    for step in range(T):
        t = tl.full((), T - 1 - step, tl.int64)
        at = row * T + t
        at_m, at_p = at[:, None] * N + n[None, :], at[:, None, None] * N * N + at_a
        if dmeans_ptr is not None:
            dm += tl.load(dmeans_ptr + at_m, mask=has_n, other=0.0)
            dp += _symmetric(tl.load(dcovs_ptr + at_p, mask=has_a, other=0.0))
        c, r, y, seen = _observation(
            c_ptr, r_ptr, y_ptr, seen_ptr, c_t, r_t, y_t, seen_t, at_c, has_c, at_r, has_r, has_y, eye, t, dtype
        )
        mean = tl.load(predicted_means_ptr + at_m, mask=has_n, other=0.0)
        cov = tl.load(predicted_covs_ptr + at_p, mask=has_a, other=0.0)
        cp = _mm(c, cov)
        inverse, w, _, _, _ = _solved(_symmetric(_mt(cp, c)) + r, eye, y - _mv(c, mean), m, 0.0, BM)
        gain = _mm(inverse, cp)
        dl = tl.load(dloglik_ptr + at, mask=b < rows, other=0.0)[:, None]
        gm, gp = _mv(gain, dm), _mm(gain, dp)
        dv = gm - dl * w
        df = 0.5 * dl[:, :, None] * (w[:, :, None] * w[:, None, :] - inverse) + _mt(gp, gain)
        df = _symmetric(df - gm[:, :, None] * w[:, None, :])
        db = w[:, :, None] * dm[:, None, :] - 2 * gp
        if dc_ptr is not None:
            dc = _mm(db, cov) + 2 * _mm(df, cp) - dv[:, :, None] * mean[:, None, :]
            dc = tl.where(seen[:, :, None], dc, 0.0)
            tl.store(dc_ptr + at[:, None, None] * M * N + at_c, dc, mask=has_c)
        if dr_ptr is not None:
            dr = tl.where(seen[:, :, None] & seen[:, None, :], df, 0.0)
            tl.store(dr_ptr + at[:, None, None] * M * M + at_r, dr, mask=has_r)
        if dy_ptr is not None:
            tl.store(dy_ptr + at[:, None] * M + m[None, :], tl.where(seen, dv, 0.0), mask=has_y)
        dm -= _tv(c, dv)
        dp += _symmetric(_tm(db, c)) + _tm(c, _mm(df, c))
        if dpredicted_means_ptr is not None:
            dm += tl.load(dpredicted_means_ptr + at_m, mask=has_n, other=0.0)
            dp += tl.load(dpredicted_covs_ptr + at_p, mask=has_a, other=0.0)
        if dshift_ptr is not None:
            tl.store(dshift_ptr + at_m, dm, mask=has_n)
        if dq_ptr is not None:
            tl.store(dq_ptr + at_p, dp, mask=has_a)
        dp = _symmetric(dp)
        a = tl.load(a_ptr + t * a_t, mask=has_a, other=0.0)
        pa = _mm(dp, a)
        if da_ptr is not None:
            mean, cov = _before(
                means_ptr, covs_ptr, mean_ptr, cov_ptr, at_m, at_p, lines * N + n[None, :], full * N * N + at_a,
                has_n, has_a, t, N,
            )  # fmt: skip
            tl.store(da_ptr + at_p, dm[:, :, None] * mean[:, None, :] + 2 * _mm(pa, cov), mask=has_a)
        dm = _tv(a, dm)
        dp = _symmetric(_tm(a, pa))
    tl.store(dmean_ptr + lines * N + n[None, :], dm, mask=has_n)
    tl.store(dcov_ptr + full * N * N + at_a, dp, mask=has_a)


@triton.jit
def smooth(
    a_ptr,
    c_ptr,
    r_ptr,
    y_ptr,
    seen_ptr,
    mean_ptr,
    cov_ptr,
    means_ptr,
    covs_ptr,
    predicted_means_ptr,
    predicted_covs_ptr,
    smoothed_means_ptr,
    smoothed_covs_ptr,
    lags_ptr,
    first_mean_ptr,
    first_cov_ptr,
    lost_ptr,
    rows,
    T,
    N,
    M,
    a_b,
    a_t,
    c_b,
    c_t,
    r_b,
    r_t,
    y_b,
    y_t,
    seen_b,
    seen_t,
    LOSS: tl.constexpr,
    BB: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
):
    """The states given all observations, from the last step back; and which series have lost digits by it."""
    dtype: tl.constexpr = mean_ptr.dtype.element_ty
    b, n, m, at_a, has_a, at_c, has_c, at_r, has_r, has_n, has_y = _places(rows, N, M, BB, BN, BM)
    row = b.to(tl.int64)
    full, lines = row[:, None, None], row[:, None]
    eye_m, eye_n = _eye(m, dtype, BB), _eye(n, dtype, BB)
    a_ptr, c_ptr, r_ptr = a_ptr + full * a_b + at_a, c_ptr + full * c_b, r_ptr + full * r_b
    y_ptr, seen_ptr = y_ptr + lines * y_b + m[None, :], seen_ptr + lines * seen_b + m[None, :]
    score = tl.zeros((BB, BN), dtype)  # r
    information = tl.zeros((BB, BN, BN), dtype)  # N
    lost = tl.zeros((BB,), tl.int32)
    at = row * T + T - 1
    mean = tl.load(means_ptr + at[:, None] * N + n[None, :], mask=has_n, other=0.0)
    cov = tl.load(covs_ptr + at[:, None, None] * N * N + at_a, mask=has_a, other=0.0)
    tl.store(smoothed_means_ptr + at[:, None] * N + n[None, :], mean, mask=has_n)
    tl.store(smoothed_covs_ptr + at[:, None, None] * N * N + at_a, cov, mask=has_a)
    for step in range(T):
        t = tl.full((), T - 1 - step, tl.int64)
        at = row * T + t
        at_m, at_p = at[:, None] * N + n[None, :], at[:, None, None] * N * N + at_a
        c, r, y, _ = _observation(
            c_ptr, r_ptr, y_ptr, seen_ptr, c_t, r_t, y_t, seen_t, at_c, has_c, at_r, has_r, has_y, eye_m, t, dtype
        )
        predicted = tl.load(predicted_covs_ptr + at_p, mask=has_a, other=0.0)
        v = y - _mv(c, tl.load(predicted_means_ptr + at_m, mask=has_n, other=0.0))
        cp = _mm(c, predicted)
        inverse, white, _, _, _ = _solved(_symmetric(_mt(cp, c)) + r, eye_m, v, m, 0.0, BM)
        left = eye_n - _tm(_mm(inverse, cp), c)
        score = _tv(c, white) + _tv(left, score)
        information = _symmetric(_tm(c, _mm(inverse, c)) + _tm(left, _mm(information, left)))
        earlier = t > 0
        mean, cov = _before(
            means_ptr, covs_ptr, mean_ptr, cov_ptr, at_m, at_p, lines * N + n[None, :], full * N * N + at_a,
            has_n, has_a, t, N,
        )  # fmt: skip
        a = tl.load(a_ptr + t * a_t, mask=has_a, other=0.0)
        moved = _mm(a, cov)
        weighed = _mm(information, moved)
        tl.store(lags_ptr + at_p, moved - _mm(predicted, weighed), mask=has_a)
        smoothed = cov - _symmetric(_tm(moved, weighed))
        score, information = _tv(a, score), _symmetric(_tm(a, _mm(information, a)))
        mean += _mv(cov, score)
        little = (eye_n != 0) & (smoothed * LOSS < cov)
        lost = lost | tl.max(tl.max(little.to(tl.int32), 2), 1)
        tl.store(smoothed_means_ptr + at_m - N, mean, mask=has_n & earlier)
        tl.store(smoothed_covs_ptr + at_p - N * N, smoothed, mask=has_a & earlier)
        tl.store(first_mean_ptr + lines * N + n[None, :], mean, mask=has_n & (t == 0))
        tl.store(first_cov_ptr + full * N * N + at_a, smoothed, mask=has_a & (t == 0))
    tl.store(lost_ptr + row, lost, mask=b < rows)
