"""The smoother's kernel: moments of a dense Gaussian, numbers of the other forms, and what is left to them."""

import pytest
import torch

import dualform as df
from dualform.core.errors import ArgumentError
from dualform.gaussian import sarimax
from dualform.ops import backend
from dualform.ops.kalman_smoother import KalmanSmoother, has_kernel, kalman_smoother, kalman_smoother_op
from dualform.ops.native import library
from test_kalman_kernel import SIZES, arguments

pytestmark = pytest.mark.skipif(bool(library.missing), reason="there are no CPU kernels")


def model_of(*args, **options):
    return KalmanSmoother(*arguments(*args, **options)[:9])


def by(name, a):
    with backend(name):
        return kalman_smoother_op(a)


def close(got, want, tolerance):
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape
        scale = 1 + float(y.abs().max()) if y.numel() else 1.0
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance * scale)


def dense(a):
    """Of the first row: moments of all states together given all observations, by one solve."""
    length, n = a.c.shape[1:]
    eye = torch.eye(length * n, dtype=a.A.dtype)
    moves = torch.zeros_like(eye)
    mean, noise = a.c[0].reshape(-1).clone(), torch.block_diag(*a.Q[0])
    for t in range(1, length):
        moves[t * n : (t + 1) * n, (t - 1) * n : t * n] = a.A[0, t]
    first = a.A[0, 0]
    mean[:n] += first @ a.mean[0]
    noise[:n, :n] += first @ a.cov[0] @ first.mT
    inverse = torch.linalg.inv(eye - moves)
    mean, P = inverse @ mean, inverse @ noise @ inverse.mT
    seen = a.seen[0].reshape(-1)
    C, R, y = torch.block_diag(*a.C[0])[seen], torch.block_diag(*a.R[0])[seen][:, seen], a.y[0].reshape(-1)[seen]
    K = torch.linalg.solve(C @ P @ C.mT + R, C @ P).mT
    mean, P = mean + K @ (y - C @ mean), P - K @ C @ P
    blocks = P.reshape(length, n, length, n)
    cov = torch.stack([blocks[t, :, t] for t in range(length)])
    lag = torch.stack([blocks[t, :, t - 1] for t in range(1, length)])
    return mean.reshape(length, n), cov, lag


@pytest.mark.parametrize("name", ["native", "reference"])
@pytest.mark.parametrize("size", [(1, 1), (2, 1), (3, 1), (5, 1), (3, 2), (2, 3)], ids=str)
def test_the_moments_are_those_of_all_states_together(size, name):
    a = model_of(1, 7, *size, varying=True)
    _, mean, cov, lag, *_ = by(name, a)
    close((mean[0], cov[0], lag[0, 1:]), dense(a), 1e-10)


@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_kernel_equals_the_loop(size, varying, instructions, poison):
    """One series, rows that do not fill the lanes, and more; missing data, singular Q, correlated noise."""
    for rows, length, options in (
        (1, 65, {}),
        (3, 5, {"missing": 0.0}),
        (11, 2, {"shared": True}),
        (2, 3, {"diagonal": True, "missing": 1.0}),
    ):
        a = model_of(rows, length, *size, varying=varying, **options)
        close(by("native", a), by("reference", a), 1e-11)


@pytest.mark.parametrize("rows, length, size", [(0, 5, (2, 1)), (3, 0, (2, 1)), (3, 0, (5, 2))])
def test_nothing_to_do(rows, length, size):
    a = model_of(rows, length, *size)
    close(by("native", a), by("reference", a), 0.0)


@pytest.mark.parametrize("rows, size", [(70, (1, 1)), (5, (6, 1))])
def test_threads_share_the_rows(rows, size, threads):
    a = model_of(rows, 100, *size)
    threads(1)
    want = by("native", a)
    threads(3)
    close(by("native", a), want, 1e-12)


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (6, 1), (3, 2)], ids=str)
def test_scratch_memory_is_not_read_before_it_is_written(size, poison):
    a = model_of(2, 30, *size)
    first = by("native", a)
    by("native", a._replace(A=a.A * torch.nan, Q=a.Q * torch.nan, mean=a.mean * torch.nan, cov=a.cov * torch.nan))
    assert all(torch.equal(x, y) for x, y in zip(by("native", a), first, strict=True))


@pytest.mark.parametrize("size", [(1, 1), (12, 1), (3, 2)], ids=str)
def test_covariances_at_rest_are_left_again(size):
    """Many steps of one model, with a gap in between."""
    a = model_of(1, 420, *size, missing=0.0)
    seen = a.seen.clone()
    seen[:, (210, 211)] = False
    close(by("native", a._replace(seen=seen)), by("reference", a._replace(seen=seen)), 1e-11)


def random_model(seed, n, m):
    """Constant, with a noise that is singular half of the time, inputs, and a start that is known, vague or diffuse."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    A, S = normal(n, n), normal(n, 1 + seed % n)
    A = A / torch.linalg.matrix_norm(A, 2)
    start = ("diffuse", 1e7 * torch.eye(n, dtype=torch.float64), torch.eye(n, dtype=torch.float64))[seed % 3]
    R = normal(m, m)
    model = df.LinearGaussian(
        A,
        normal(m, n),
        S @ S.mT,
        R @ R.mT + 0.5 * torch.eye(m, dtype=torch.float64),
        P0=start,
        B=normal(n, 2),
        d=normal(m),
        prior=("before", "first")[seed % 2],
    )
    y = 3 * normal(4, 40, m)
    y[torch.rand(y.shape, generator=g) < 0.2] = torch.nan
    return model, y, normal(4, 40, 2)


@pytest.mark.parametrize("seed", range(18))
def test_a_model_is_smoothed_as_by_the_other_forms(seed):
    """Ragged batches with missing numbers, inputs, both priors, and every kind of start."""
    n, m = ((1, 1), (2, 1), (3, 2), (5, 1), (4, 3))[seed % 5]
    model, y, u = random_model(seed, n, m)
    options = {"u": u, "lengths": [40, 31, 12, 39]}
    with torch.no_grad():
        got = model.smooth(y, **options)
        with backend("torch"):
            wants = [df.KalmanFilter(model, parallel=form).smooth(y, **options) for form in (False, True)]
    for want, name in zip(wants, ("loop", "scan"), strict=True):
        for part in got._fields[:6]:
            x, z = getattr(got, part), getattr(want, part)
            size = z.nan_to_num().abs().max()
            error = (x - z).nan_to_num().abs().max()
            assert torch.equal(x.isnan(), z.isnan()) and error <= 1e-9 * (1 + size), f"{part} of the {name}: {error}"


@pytest.mark.parametrize("order", [(2, 0, 0), (0, 0, 2), (1, 1, 1)])
def test_states_that_are_observed_without_noise(order):
    model = sarimax(order)
    y = torch.randn(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(0)
    with torch.no_grad():
        got = model.smooth(y)
        with backend("torch"):
            want = model.smooth(y)
    close(got[:6], want[:6], 1e-9)


@pytest.mark.parametrize("n, m", [(1, 1), (2, 1), (6, 1), (3, 2)])
@pytest.mark.parametrize("prior", [1.0, 1e7])
def test_covariances_stay_positive_in_float32(n, m, prior):
    a = model_of(1, 20_000, n, m, dtype=torch.float32)
    a = a._replace(R=1e-3 * a.R, cov=prior * a.cov)
    _, _, cov, _, first_mean, first_cov = by("native", a)
    assert cov.dtype == torch.float32 and first_mean.isfinite().all()
    for P in (cov, first_cov):
        assert torch.equal(P, P.mT)
        values = torch.linalg.eigvalsh(P.double())
        assert (values[..., 0] >= -3e-7 * values[..., -1]).all()


@pytest.mark.parametrize("prior", [1e3, 1e9, 1e12])
def test_a_vague_start_costs_no_digits(prior):
    """Of a local level, by its kernel for one series and for several; the oracle is the loop on numbers of 80 bits."""
    numpy = pytest.importorskip("numpy")
    y = torch.randn(3, 30, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = df.LinearGaussian([[1.0]], [[1.0]], [[0.3]], [[2.0]], m0=[0.0], P0=[[prior]]).smooth(y)
    for row in range(3):
        P, m, past = numpy.longdouble(prior), numpy.longdouble(0), []
        for value in y[row, :, 0].tolist():
            P = P + numpy.longdouble(0.3)
            m, P = m + P / (P + 2) * (value - m), 2 * P / (P + 2)
            past.append((m, P))
        (mean, cov), want = past[-1], [past[-1]]
        for m, P in reversed([(numpy.longdouble(0), numpy.longdouble(prior)), *past[:-1]]):
            gain = P / (P + numpy.longdouble(0.3))
            mean, cov = m + gain * (mean - m), gain * numpy.longdouble(0.3) + gain * gain * cov
            want.append((mean, cov))
        means, covs = (torch.tensor([float(x[i]) for x in want[::-1]], dtype=torch.float64) for i in (0, 1))
        states = torch.cat([found.initial_mean[row, None], found.mean[row]])[:, 0]
        close((states, torch.cat([found.initial_cov[row, None], found.cov[row]])[:, 0, 0]), (means, covs), 1e-12)


def test_gradients_and_large_models_are_left_to_the_other_forms():
    a = model_of(1, 3, 2, 1)
    assert has_kernel(a) and not has_kernel(a._replace(Q=a.Q.clone().requires_grad_()))
    assert not has_kernel(model_of(1, 1, 129, 1))
    for name in ("torch", "reference"):
        with backend(name):
            assert not has_kernel(a)
    R = torch.tensor([[2.0]], dtype=torch.float64, requires_grad=True)
    y = torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = df.LinearGaussian([[1.0]], [[1.0]], [[0.5]], R, m0=[0.0], P0=[[1.0]])

    def run(R):
        model.R = R
        found = model.smooth(y)
        return found.mean, found.cov, found.lag_one_cov

    assert torch.autograd.gradcheck(run, (R,))
    given = [x.nan_to_num().clone().requires_grad_() if x.dtype != torch.bool else x for x in a]
    first = torch.autograd.grad(kalman_smoother(*given).cov.sum(), given[2])
    with backend("reference"):
        want = torch.autograd.grad(kalman_smoother(*given).cov.sum(), given[2])
    assert torch.equal(first[0], want[0])


def test_what_the_kernel_cannot_do_is_said():
    level = [[1.0]], [[1.0]], [[0.0]], [[0.0]]
    with pytest.raises(ArgumentError, match="is not positive definite at row 0, time 0"):
        df.KalmanFilter(df.LinearGaussian(*level, m0=[0.0], P0=[[0.0]])).smooth([1.0])
    with pytest.raises(ArgumentError, match="leave 1 diffuse directions of the state undetermined"):
        df.LinearGaussian([[1.0, 1.0], [0.0, 1.0]], [[1.0, 0.0]], torch.eye(2), [[1.0]], P0="diffuse").smooth([1.0])
