"""The Kalman filter: brute force, published values, both forms as one function, missing data, bad input."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dualform as df
from dualform.core.errors import ArgumentError
from dualform.core.tree import leaves, take
from dualform.gaussian import Estimate, Gaussian
from dualform.gaussian.filtering import is_parallel_faster
from vectors import close, load

FORMS = [False, True]
NAN = float("nan")


def model(n=3, m=2, rank=None, seed=0, dtype=torch.float64):
    """A random stable model; ``rank`` below n makes Q singular."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    A, q, r, p = normal(n, n), normal(n, n if rank is None else rank), normal(m, m), normal(n, n)
    A = 0.9 * A / torch.linalg.matrix_norm(A, 2)
    eye = torch.eye(m, dtype=torch.float64)
    return df.LinearGaussian(A, normal(m, n), q @ q.mT, r @ r.mT + 0.1 * eye, normal(n), p @ p.mT).to(dtype)


def found(filtered):
    """What :meth:`forward` gives, of what :meth:`filter` does."""
    return Estimate(filtered.mean, filtered.cov, filtered.loglik)


def found_of(kf, y):
    """The same of arrays, as tensors."""
    return Estimate(*(torch.as_tensor(value) for value in found(kf.filter(y))))


def observations(batch, length, m=2, missing=0.4, seed=1, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    y = torch.randn(batch, length, m, generator=g, dtype=dtype)
    return y.masked_fill(torch.rand(batch, length, m, generator=g) < missing, NAN)


def condition(lg, y):
    """Filtered moments and log-likelihoods of one series from the joint Gaussian of all states and observations."""
    (length, m), n = y.shape, len(lg.A)
    means, covs = [], {}
    mean, cov = lg.m0, lg.P0
    for i in range(length):
        mean, cov = lg.A @ mean, lg.A @ cov @ lg.A.mT + lg.Q
        means.append(mean)
        covs[i, i] = cov
        for j in range(i + 1, length):
            covs[i, j] = covs[i, i] @ torch.linalg.matrix_power(lg.A, j - i).mT
            covs[j, i] = covs[i, j].mT
    mu = torch.cat(means)
    S = torch.cat([torch.cat([covs[i, j] for j in range(length)], 1) for i in range(length)])
    C = torch.block_diag(*[lg.C] * length)
    V = C @ S @ C.mT + torch.block_diag(*[lg.R] * length)
    out, before = [], 0.0
    for t in range(length):
        seen = torch.zeros(length, m, dtype=torch.bool)
        seen[: t + 1] = ~y[: t + 1].isnan()
        seen = seen.flatten()
        rows, cross, error = V[seen][:, seen], S @ C.mT[:, seen], y.flatten()[seen] - (C @ mu)[seen]
        gain = cross @ torch.linalg.inv(rows)
        now = slice(t * n, (t + 1) * n)
        total = -(error @ torch.linalg.inv(rows) @ error + torch.logdet(rows) + len(error) * math.log(2 * math.pi)) / 2
        total = total if seen.any() else torch.zeros_like(total)
        out.append(((mu + gain @ error)[now], (S - gain @ cross.mT)[now, now], total - before))
        before = total
    return Estimate(*(torch.stack(z) for z in zip(*out, strict=True)))


def equal(got, want, tolerance=1e-9):
    for a, b in zip(leaves(got), leaves(want), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("parallel", FORMS)
@pytest.mark.parametrize(("n", "m", "rank"), [(1, 1, None), (3, 2, None), (3, 2, 1), (2, 3, None), (4, 1, 0)])
@pytest.mark.parametrize("missing", [0.0, 0.5])
def test_filter_equals_conditioning_the_joint_gaussian(n, m, rank, missing, parallel):
    lg, y = model(n, m, rank), observations(2, 6, m, missing)
    got = found(df.KalmanFilter(lg, parallel=parallel).filter(y))
    for row in range(2):
        equal(take(got, row), condition(lg, y[row]))


@pytest.mark.parametrize("parallel", FORMS)
def test_a_step_with_nothing_observed_is_a_prediction(parallel):
    kf, y = df.KalmanFilter(model(), parallel=parallel), observations(1, 5, missing=0.0)
    y[:, 2:4] = NAN
    out, _ = kf.forward(y)
    expected = Gaussian(out.mean[:, 1], out.cov[:, 1])
    for t in (2, 3):
        expected = kf.predict(expected)
        equal((out.mean[:, t], out.cov[:, t]), tuple(expected[:2]), 1e-14)
        assert out.loglik[0, t] == 0


def local_level(y, irregular, level, first_variance, parallel):
    """Filter with h_1 ~ N(0, first_variance): an update by the first observation, then the ordinary filter."""
    lg = df.LinearGaussian([[1.0]], [[1.0]], np.array([[level]]), [[irregular]], [0.0], [[0.0]])
    kf = df.KalmanFilter(lg, parallel=parallel)
    first = Gaussian(y.new_zeros(1, 1), y.new_full((1, 1, 1), first_variance))
    head = kf.update(first, y[None, :1])
    tail, _ = kf.forward(y[None, 1:, None], head.belief)
    return head.loglik.item(), tail.loglik.sum().item()


@pytest.mark.parametrize("parallel", FORMS)
def test_nile_log_likelihoods(parallel):
    g = load("nile_local_level")
    head, tail = local_level(g["y"], 15099.0, 1469.1, 1e7, parallel)
    assert abs(head + tail - -641.5856) < 5e-5  # Durbin and Koopman's data and estimates, h_1 ~ N(0, 1e7)
    irregular, level = g["params_given"].tolist()
    _, tail = local_level(g["y"], irregular, level, 1e6, parallel)
    want = g["loglik_given_approx"].item()  # without the first observation's term
    assert abs(tail - want) < 1e-8 * abs(want)


@pytest.mark.parametrize("parallel", FORMS)
@pytest.mark.parametrize("length", [1, 2, 7])
def test_split_and_stepped_equal_the_whole(length, parallel):
    kf, y = df.KalmanFilter(model(), parallel=parallel), observations(3, length)
    state = kf.forward(observations(3, 4, seed=5))[1]
    whole = kf.forward(y, state)
    for cut in range(length + 1):
        first, middle = kf.forward(y[:, :cut], state)
        second, last = kf.forward(y[:, cut:], middle)
        joined = Estimate(*(torch.cat(pair, 1) for pair in zip(first, second, strict=True)))
        equal((joined, last), whole, 1e-11)
    now = state
    for t in range(length):
        out, now = kf.step(y[:, t], now)
        equal(out, take(whole[0], (slice(None), t)), 1e-11)
    equal(now, whole[1], 1e-11)


@pytest.mark.parametrize("parallel", FORMS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_equals_one_by_one_with_empty_series(dtype, parallel):
    kf, lengths = df.KalmanFilter(model(), parallel=parallel), [0, 3, 1, 0, 5, 0]
    y = observations(1, sum(lengths))
    borders = torch.tensor([0, *np.cumsum(lengths)], dtype=dtype)
    for state in (None, kf.forward(observations(6, 2, seed=3))[1]):
        out, last = kf.forward(y, state, cu_seqlens=borders)
        assert out.mean.shape == (1, 9, 3) and out.loglik.shape == (1, 9)
        for i, (a, b) in enumerate(pairwise(borders.tolist())):
            want = kf.forward(y[:, a:b], None if state is None else take(state, slice(i, i + 1)))
            equal((take(out, (slice(None), slice(a, b))), take(last, slice(i, i + 1))), want, 1e-11)
    nothing, last = kf.forward(y[:, :0], cu_seqlens=torch.tensor([0, 0, 0]))
    assert nothing.cov.shape == (1, 0, 3, 3) and last.mean.shape == (2, 3)


@pytest.mark.parametrize("parallel", FORMS)
def test_padding_of_an_explosive_model_stays_harmless(parallel):
    """A series of 1 beside one of 9, all observed: predicting the short one 8 steps ahead would overflow."""
    one = torch.ones(1, 1, dtype=torch.float64)
    A = (1e50 * one).requires_grad_()
    kf = df.KalmanFilter(df.LinearGaussian(A, one, one, one, one[0], one), parallel=parallel)
    out, last = kf.forward(torch.ones(1, 10, 1, dtype=torch.float64), cu_seqlens=torch.tensor([0, 1, 10]))
    (out.mean.sum() + out.loglik.sum() + last.mean.sum()).backward()
    assert A.grad.isfinite().all()


def run_for_gradients(parallel, A, C, q, R, m0, p0, y, mean, p, borders=None):
    lg = df.LinearGaussian(A, C, q @ q.mT, R @ R.mT + torch.eye(2, dtype=A.dtype), m0, p0 @ p0.mT)
    kf = df.KalmanFilter(lg, parallel=parallel)
    y = y.masked_fill(HOLES, NAN)
    given, last = kf.forward(y, Gaussian(mean, p @ p.mT), cu_seqlens=borders)
    fresh, _ = kf.forward(y, cu_seqlens=borders)
    return *given, *last[:2], fresh.mean, fresh.loglik


HOLES = torch.zeros(1, 4, 2, dtype=torch.bool)
HOLES[0, 1, 0] = HOLES[0, 2] = True


def gradient_arguments(rows):
    g = torch.Generator().manual_seed(7)
    shapes = (2, 2), (2, 2), (2, 1), (2, 2), (2,), (2, 1), (1, 4, 2), (rows, 2), (rows, 2, 2)
    return [torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("parallel", FORMS)
@pytest.mark.parametrize("borders", [None, [0, 1, 1, 4]])
def test_gradients_with_missing_data_and_singular_covariances(borders, parallel):
    borders = None if borders is None else torch.tensor(borders)
    args = gradient_arguments(1 if borders is None else 3)
    assert torch.autograd.gradcheck(lambda *a: run_for_gradients(parallel, *a, borders), args, nondet_tol=1e-12)


def test_both_forms_have_the_same_gradients_for_raw_covariances():
    """Covariances as leaves: the gradient is symmetric, whatever the form does with the two triangles."""
    lg, y = model(), observations(2, 9)
    state = df.KalmanFilter(lg).forward(observations(2, 2, seed=3))[1]
    results = []
    for parallel in FORMS:
        tensors = [z.clone().requires_grad_() for z in (lg.A, lg.C, lg.Q, lg.R, lg.m0, lg.P0, *state[:2], y)]
        kf = df.KalmanFilter(df.LinearGaussian(*tensors[:6]), parallel=parallel)
        out, last = kf.forward(tensors[8], Gaussian(*tensors[6:8]))
        fresh = kf.log_likelihood(tensors[8]).sum()
        loss = out.mean.sin().sum() + out.cov.cos().sum() + out.loglik.sum() + last.cov.exp().sum() + fresh
        results.append(torch.autograd.grad(loss, tensors))
    equal(*map(tuple, results))
    for grad in (results[0][2], results[0][3], results[0][5], results[0][7]):
        assert grad.isfinite().all() and torch.equal(grad, grad.mT)
    assert (results[0][8][y.isnan()] == 0).all()


def test_the_parallel_log_likelihood_keeps_its_digits_over_long_series():
    lg = df.LinearGaussian([[1.0]], [[1.0]], np.array([[0.3]]), [[1.0]], [0.0], [[10.0]])
    y, _ = lg.sample(20_000, generator=torch.Generator().manual_seed(0))
    m, P, total = 0.0, 10.0, 0.0
    for value in y[0, :, 0].tolist():
        P += 0.3
        S = P + 1.0
        total -= 0.5 * (math.log(2 * math.pi * S) + (value - m) ** 2 / S)
        m, P = m + P / S * (value - m), P / S
    got = df.KalmanFilter(lg, parallel=True).log_likelihood(y).item()
    assert abs(got - total) < 1e-12 * abs(total)


def seasonal(prior):
    """Level, slope and four seasons, the last noise-free in most directions: Q is singular."""
    A = torch.zeros(5, 5, dtype=torch.float64)
    A[0, :2] = A[1, 1] = A[3, 2] = A[4, 3] = 1
    A[2, 2:] = -1
    C = torch.tensor([[1.0, 0, 1, 0, 0]], dtype=torch.float64)
    Q = torch.diag(torch.tensor([0.5, 0.01, 0.1, 0, 0], dtype=torch.float64))
    eye = torch.eye(5, dtype=torch.float64)
    return df.LinearGaussian(A, C, Q, eye[:1, :1], torch.zeros(5, dtype=torch.float64), prior * eye)


@pytest.mark.parametrize(("prior", "tolerance"), [(10.0, 1e-12), (1e7, 1e-8)])
def test_the_parallel_form_takes_singular_noise_and_vague_priors(prior, tolerance):
    y, _ = seasonal(1.0).sample(200, 2, generator=torch.Generator().manual_seed(0))
    want, got = (df.KalmanFilter(seasonal(prior), parallel=parallel).filter(y) for parallel in FORMS)
    close(got.mean, want.mean, tolerance)
    close(got.cov[:, 5:], want.cov[:, 5:], tolerance)
    close(got.loglik, want.loglik, tolerance)


@pytest.mark.parametrize("parallel", FORMS)
def test_float32_follows_float64_and_the_wider_dtype_wins(parallel):
    lg, y = model(), observations(2, 30)
    want = found(df.KalmanFilter(lg, parallel=parallel).filter(y))
    kf = df.KalmanFilter(lg.to(torch.float32), parallel=parallel)
    got, state = kf.forward(y.float())
    assert {z.dtype for z in leaves((got, state[:2]))} == {torch.float32}
    for a, b in zip(got, want, strict=True):
        close(a, b, 3e-5)
    assert kf.filter(y).mean.dtype == torch.float64
    assert kf.forward(y.half())[0].mean.dtype == torch.float32
    stepped, after = kf.step(y[:, 0], kf.init_state(2))
    equal((stepped, after), (take(kf.forward(y[:, :1])[0], (slice(None), 0)), kf.forward(y[:, :1])[1]))


@pytest.mark.parametrize("parallel", FORMS)
def test_covariances_stay_symmetric_and_positive_in_float32(parallel):
    lg, y = model(4, 2, rank=1, dtype=torch.float32), observations(1, 500, missing=0.1, dtype=torch.float32)
    cov = df.KalmanFilter(lg, parallel=parallel).filter(y).cov
    assert torch.equal(cov, cov.mT)
    assert torch.linalg.eigvalsh(cov.double()).min() > -1e-7 * cov.max()


def test_arrays_lists_and_single_series_are_taken():
    lg = model(2, 1)
    kf, y = df.KalmanFilter(lg), observations(1, 6, 1)
    want = kf.forward(y)[0]
    for given in (y[0], y[0, :, 0], y[0, :, 0].tolist()):
        out = kf.filter(given)
        assert out.mean.shape == (6, 2) and out.cov.shape == (6, 2, 2)
        equal(found(out), take(want, 0), 1e-14)
    for given in (y.numpy(), y[0].numpy()):
        out = kf.filter(given)
        assert all(isinstance(value, np.ndarray | np.float64) for value in out[:-2])
        np.testing.assert_allclose(out.cov, want.cov if given.ndim == 3 else want.cov[0], rtol=1e-14)
    assert kf.log_likelihood(y).shape == (1,) and kf.log_likelihood(y[0]).shape == ()
    torch.testing.assert_close(kf.log_likelihood(y)[0], want.loglik[0].sum())
    assert kf.filter([1, 2, 3]).mean.shape == (3, 2)
    assert kf.forward(y[:0])[0].mean.shape == (0, 6, 2)


def co2(seasons=12, number=list):
    """Level, slope and monthly season for values like those of Mauna Loa, from plain numbers, with a vague prior."""
    n = seasons + 1
    A, Q, P0 = ([[0.0] * n for _ in range(n)] for _ in range(3))
    A[0][0] = A[0][1] = A[1][1] = 1.0
    A[2][2:] = [-1.0] * (n - 2)
    for i in range(3, n):
        A[i][i - 1] = 1.0
    Q[0][0], Q[1][1], Q[2][2] = 0.05, 1e-6, 1e-3
    for i in range(n):
        P0[i][i] = 1e7
    C = [[1.0, 0.0, 1.0] + [0.0] * (n - 3)]
    return df.LinearGaussian(*(number(z) for z in (A, C, Q, [[0.01]], [0.0] * n, P0)))


def test_lists_and_numbers_are_float64():
    """A season and a vague prior have a range that float32 cannot hold."""
    t = torch.arange(300, dtype=torch.float64)
    y = 315 + 0.1 * t + 3 * (2 * math.pi * t / 12).sin() + 0.1 * torch.randn(300, dtype=torch.float64)
    lg = co2()
    assert lg.A.dtype == lg.P0.dtype == torch.float64 and lg.Q[2, 2].item() == 1e-3
    for parallel in (None, False):
        out = df.KalmanFilter(lg, parallel=parallel).filter(y.tolist())
        assert out.mean.dtype == torch.float64 and (out.mean[50:, 0] - 315 - 0.1 * t[50:]).abs().max() < 1
    assert co2(number=lambda z: torch.tensor(z, dtype=torch.float32)).A.dtype == torch.float32
    assert co2(number=lambda z: np.array(z, dtype=np.float32)).A.dtype == torch.float32
    assert df.LinearGaussian([[1]], [[1]], [[2]], [[3]], [0], torch.ones(1, 1)).Q.dtype == torch.float32
    assert (
        df.LinearGaussian([[1]], [[1]], [[2]], [[3]], np.zeros(1, int), np.ones((1, 1), int)).Q.dtype == torch.float64
    )
    with pytest.raises(ArgumentError, match=r"C P C\^T \+ R.*not positive definite.*eigenvalue|compute in float64"):
        df.KalmanFilter(lg.to(torch.float32), parallel=False).filter(y.float())


def test_masked_values_are_missing():
    lg = df.LinearGaussian([[1.0]], [[1.0]], [[1.0]], [[1.0]], [0.0], [[10.0]])
    kf, u = df.KalmanFilter(lg), np.ma.masked_equal([1.0, 2.0, -9999.0, 2.5], -9999.0)
    want = found(kf.filter([1.0, 2.0, NAN, 2.5]))
    integers = np.ma.masked_equal([1, 2, -9999, 2], -9999)
    for given in (u, u[:, None], list(u), [[value] for value in u], u.astype(np.float32)):
        equal(found_of(kf, given), want, 1e-12)
    equal(found_of(kf, integers), found(kf.filter([1.0, 2.0, NAN, 2.0])), 1e-12)
    batch = found(kf.filter([[[value] for value in u], [[value] for value in u[::-1]]]))
    equal(take(batch, 0), want, 1e-12)
    equal(take(batch, 1), found(kf.filter([2.5, NAN, 2.0, 1.0])), 1e-12)
    with pytest.raises(ArgumentError, match=r"LinearGaussian: Q has values that are not finite: nan at \(0, 0\)"):
        df.LinearGaussian([[1.0]], [[1.0]], np.ma.masked_equal([[5.0]], 5.0), [[1.0]], [0.0], [[10.0]])


class Operations(TorchDispatchMode):
    """Counts the operations that are run."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(kf, y):
    """Of the forms that are there without kernels."""
    with df.backend("torch"), Operations() as counted:
        out = found(kf.filter(y))
    return out, counted.count


@pytest.mark.parametrize("prior", [1.0, 1e12])
def test_a_long_series_on_a_cpu_is_filtered_by_the_scan(prior):
    """In far fewer operations than the loop, and with its digits, even from a prior that the scan alone would lose."""
    lg = model(2, 1)
    lg = df.LinearGaussian(lg.A, lg.C, lg.Q, lg.R, lg.m0, prior * torch.eye(2, dtype=torch.float64))
    y = observations(1, 400, 1, missing=0.1)
    y[:, :2] = 1.0
    (want, loop), (got, scan) = (operations(df.KalmanFilter(lg, parallel=parallel), y) for parallel in (False, None))
    assert scan < loop / 4
    equal(got, want, 1e-11)


def test_the_form_is_chosen_by_size():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert is_parallel_faster(1, 1000, 1, cpu) and is_parallel_faster(1, 200, 13, cpu)
    assert not is_parallel_faster(1, 20, 1, cpu)  # short
    assert not is_parallel_faster(1000, 300, 3, cpu) and not is_parallel_faster(1, 100, 64, cpu)  # much at each step
    assert is_parallel_faster(1000, 300, 3, gpu)
    lg = model(2, 1)
    for length, form in ((1000, "parallel"), (20, "sequential")):
        y = observations(1, length, 1)
        with df.backend("torch"):
            assert lg.filter(y).form == lg.smooth(y).form == form
        for parallel, chosen in ((True, "parallel"), (False, "sequential")):
            assert df.KalmanFilter(lg, parallel=parallel).filter(y).form == chosen
    y = observations(200, 40, 1)
    (_, loop), (_, chosen) = (
        operations(df.KalmanFilter(model(2, 1), parallel=parallel), y) for parallel in (False, None)
    )
    assert chosen == loop


def test_what_the_scan_cannot_do_is_left_to_the_loop():
    """An observation without noise; and a prior that stays vague because nothing is seen at first."""
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    exact = df.LinearGaussian(0.5 * one, one, zero, zero, one[0], one)
    y = torch.full((1, 50, 1), NAN, dtype=torch.float64)
    y[0, 40] = 3.0
    assert df.KalmanFilter(exact).filter(y).mean[0, 40].item() == 3.0
    lg = model(2, 1)
    vague = df.LinearGaussian(lg.A, lg.C, lg.Q, lg.R, lg.m0, 1e15 * torch.eye(2, dtype=torch.float64))
    y = torch.cat([y, observations(1, 50, 1)], 1)
    want, got = (found(df.KalmanFilter(vague, parallel=parallel).filter(y)) for parallel in (False, None))
    equal(got, want, 1e-10)


def test_a_loop_of_steps_keeps_no_graph_under_inference_mode():
    lg = model()
    kf = df.KalmanFilter(df.LinearGaussian(lg.A.requires_grad_(), lg.C, lg.Q, lg.R, lg.m0, lg.P0))
    with torch.inference_mode():
        state = kf.init_state(1)
        for y in observations(1, 20).unbind(1):
            out, state = kf.step(y, state)
            assert all(z.grad_fn is None and not z.requires_grad for z in leaves((out, state)))


def test_samples_have_the_moments_of_the_model():
    lg = model(3, 2, rank=1)
    y, h = lg.sample(3, 40_000, generator=torch.Generator().manual_seed(0))
    again, _ = lg.sample(3, 40_000, generator=torch.Generator().manual_seed(0))
    assert y.shape == (40_000, 3, 2) and h.shape == (40_000, 3, 3) and torch.equal(y, again)
    mean, cov = lg.m0, lg.P0
    for _ in range(3):
        mean, cov = lg.A @ mean, lg.A @ cov @ lg.A.mT + lg.Q
    for x, m, P in ((h[:, -1], mean, cov), (y[:, -1], lg.C @ mean, lg.C @ cov @ lg.C.mT + lg.R)):
        torch.testing.assert_close(x.mean(0), m, rtol=0, atol=5 * P.diagonal().max().item() ** 0.5 / 200)
        torch.testing.assert_close(x.mT.cov(), P, rtol=0, atol=5 * 1.5 * P.diagonal().max().item() / 200)
    assert lg.sample(0)[0].shape == (1, 0, 2)


def changed(**values):
    lg = model()
    return df.LinearGaussian(*(values.get(k, getattr(lg, k)) for k in ("A", "C", "Q", "R", "m0", "P0")))


EYE = torch.eye(3, dtype=torch.float64)
FAR = torch.zeros(5, 2, dtype=torch.float64)
FAR[3, 1] = -math.inf


def wrong(value):
    state = df.KalmanFilter(model()).init_state(1)
    return Gaussian(state.mean.masked_fill(EYE[:1] == 1, value), state.cov)


def stepped(name, y, value=0.0):
    kf = df.KalmanFilter(model())
    return kf.update(wrong(value), y) if name == "update" else kf.step(y, wrong(value))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: changed(C=torch.ones(2, 4)), r"LinearGaussian: C has shape \(2, 4\), expected \(M, N\)"),
        (lambda: changed(A=torch.ones(3, 2)), r"A has shape \(3, 2\)"),
        (lambda: changed(m0=torch.ones(3, 1)), r"m0 has shape \(3, 1\)"),
        (lambda: changed(Q=EYE + EYE.roll(1, 0)), r"Q is not symmetric: it differs from its transpose by 1"),
        (lambda: changed(P0=-EYE), r"P0 is not a covariance: it has the negative eigenvalue -1[\s\S]*L @ L\.mT"),
        (lambda: changed(A=EYE * NAN), r"A has values that are not finite: nan at \(0, 0\)"),
        (lambda: changed(m0=[0.0, -math.inf, 0.0]), "m0 has values that are not finite: -inf at 1"),
        (
            lambda: df.KalmanFilter(model(2, 1)).filter([0.0, math.inf]),
            r"filter: y has infinite values: inf at 1\n.*NaN",
        ),
        (lambda: df.KalmanFilter(model()).log_likelihood(FAR), r"log_likelihood: y has infinite.*: -inf at \(3, 1\)"),
        (lambda: df.KalmanFilter(model()).forward(FAR[None]), r"forward: x has infinite values: -inf at \(0, 3, 1\)"),
        (
            lambda: df.KalmanFilter(model(), parallel=True).forward(FAR[None], cu_seqlens=torch.tensor([0, 2, 5])),
            r"forward: x has infinite values: -inf at \(0, 3, 1\)",
        ),
        (lambda: stepped("step", FAR[3:4]), r"step: x has infinite values: -inf at \(0, 1\)"),
        (lambda: stepped("update", FAR[3:4]), r"update: y has infinite values: -inf at \(0, 1\)"),
        (lambda: stepped("step", FAR[:1], NAN), r"step: state\.mean has values that are not finite: nan at \(0, 0\)"),
        (lambda: df.KalmanFilter(model()).predict(wrong(NAN)), r"predict: state\.mean has values.*: nan at \(0, 0\)"),
        (lambda: df.KalmanFilter(model()).forward(FAR[None, :2], wrong(NAN)), r"forward: state\.mean has values"),
        (
            lambda: df.KalmanFilter(changed(A=1e200 * EYE), parallel=False).filter(FAR[:3]),
            r"the prediction overflows at row 0, time [01]\n.*eigenvalue of A|the prediction overflows at row 0",
        ),
        (
            lambda: df.KalmanFilter(model()).filter(1e200 * (1 + FAR[:3])),
            "log-likelihood is not finite at row 0, time 0",
        ),
        (lambda: changed(R="noise"), "R is not a numeric array"),
        (lambda: changed(A=None), "LinearGaussian: A is None, expected numbers"),
        (lambda: df.KalmanFilter(model()).filter(["a", "b"]), r"y is not a numeric array \(it holds str"),
        (lambda: df.KalmanFilter(model()).filter([]), r"y has shape \(0,\), expected .*\(T, 2\)"),
        (
            lambda: df.KalmanFilter(model()).filter([[1, 2], [3]]),
            r"y is ragged: y\[0\] has shape \(2,\), but y\[1\] has shape \(1,\)\n.*NaN",
        ),
        (lambda: df.KalmanFilter(model()).filter([[1, 2], None]), r"y\[0\] has shape \(2,\), but y\[1\] is None"),
        (lambda: df.KalmanFilter(model()).filter([[[1, 2]], [[1, 2], [3, [4]]]]), r"y\[1\]\[1\]\[0\] is 3, but"),
        (lambda: changed(m0=[EYE[0, 0].clone().requires_grad_(), 0, 0]), "m0 is not a numeric array .*requires grad"),
        (lambda: changed(A=EYE * 1j), "complex values, expected real ones"),
        (lambda: df.KalmanFilter(model()).forward(torch.zeros(1, 5, 2) * 1j), "forward: complex values"),
        (lambda: model().sample(-1), "length -1"),
        (
            lambda: df.KalmanFilter(model()).forward(torch.zeros(1, 5, 3)),
            r"forward: x has shape \(1, 5, 3\).*\(B, T, 2\)",
        ),
        (lambda: df.KalmanFilter(model()).forward(torch.zeros(1, 5, 2, dtype=torch.int64)), r"x is torch\.int64"),
        (lambda: df.KalmanFilter(model()).forward([[1.0, 2.0]]), "x is list, expected a tensor"),
        (lambda: df.KalmanFilter(model()).filter(torch.zeros(5)), r"filter: y has shape \(5,\), expected .*\(T, 2\)"),
        (
            lambda: df.KalmanFilter(model()).filter(torch.zeros(5, 3)),
            r"filter: y has shape \(5, 3\), expected .*\(T, 2\)",
        ),
        (
            lambda: df.KalmanFilter(model()).forward(torch.zeros(4, 5, 2), df.KalmanFilter(model()).init_state(3)),
            r"mean has shape \(3, 3\), expected \(4, 3\)",
        ),
        (
            lambda: df.KalmanFilter(model()).forward(torch.zeros(1, 5, 2), cu_seqlens=torch.tensor([0, 6])),
            "must rise from 0 to the length 5",
        ),
        (lambda: df.KalmanFilter(model()).step(torch.zeros(1, 3), None), r"step: x has shape \(1, 3\)"),
    ],
)
def test_bad_input_is_explained(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()


@pytest.mark.parametrize("parallel", FORMS)
def test_an_observation_without_uncertainty_is_explained(parallel):
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    kf = df.KalmanFilter(df.LinearGaussian(one, one, zero, zero, one[0], one), parallel=parallel)
    with pytest.raises(ArgumentError, match=r"C P C\^T \+ R.*row 0, time 1"):
        kf.filter([1.0, 1.0, 1.0])


def test_repr_and_moves():
    assert repr(model()) == "LinearGaussian(N=3, M=2, float64, cpu)"
    assert model().to(torch.float32).A.dtype == torch.float32


def test_none_is_missing_and_there_may_be_nothing():
    given, like = [[1.0, 2.0], [None, 3.0], [None, None]], [[1.0, 2.0], [math.nan, 3.0], [math.nan, math.nan]]
    kf = df.KalmanFilter(model())
    torch.testing.assert_close(found(kf.filter(given)), found(kf.filter(like)))
    scalar = df.KalmanFilter(df.LinearGaussian(*[[[1.0]]] * 4, [0.0], [[1.0]]))
    torch.testing.assert_close(found(scalar.filter([1, None, 3])), found(scalar.filter([1.0, math.nan, 3.0])))
    assert scalar.filter([]).mean.shape == (0, 1) and scalar.log_likelihood([]) == 0
