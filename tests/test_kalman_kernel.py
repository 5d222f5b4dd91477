"""The Kalman filter's kernel: the loop's numbers at odd sizes, what it leaves to it, and covariances that stay."""

import pytest
import torch

import dualform as df
from dualform.core.errors import ArgumentError
from dualform.ops import OPS, backend
from dualform.ops.kalman_filter import KalmanFilter, has_kernel, kalman_filter_op
from dualform.ops.native import library

pytestmark = pytest.mark.skipif(bool(library.missing), reason="there are no CPU kernels")
SIZES = [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (12, 1), (17, 1), (1, 2), (3, 2), (4, 5), (9, 3), (33, 2)]


def arguments(rows, length, n, m, *, varying=False, shared=False, missing=0.3, diagonal=False, dtype=torch.float64):
    """Of stable models, constant or not, of every row or of each; NaN where nothing is seen."""
    g = torch.Generator().manual_seed(rows + 10 * length + 100 * n + m)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def covariance(*shape):
        root = normal(*shape, shape[-1])
        return root @ root.mT / shape[-1] + 0.1 * torch.eye(shape[-1], dtype=torch.float64)

    steps = (1 if shared else rows, length if varying else 1)
    A, R, q = normal(*steps, n, n), covariance(*steps, m), normal(*steps, n, max(1, n // 2))
    A = 0.95 * A / torch.linalg.matrix_norm(A, 2)[..., None, None].clamp(min=1e-9)
    R = torch.diag_embed(R.diagonal(dim1=-2, dim2=-1)) if diagonal else R
    model = (A, normal(*steps, n), q @ q.mT, normal(*steps, m, n), R)
    A, c, Q, C, R = (x.to(dtype).expand(rows, length, *x.shape[2:]) for x in model)
    seen = torch.rand(rows, length, m, generator=g) >= missing
    y = torch.where(seen, normal(rows, length, m), torch.nan).to(dtype)
    return KalmanFilter(A, c, Q, C, R, y, seen, normal(rows, n).to(dtype), covariance(rows, n).to(dtype), True)


def both(a):
    with backend("native"):
        got = kalman_filter_op(a)
    with backend("reference"):
        return got, kalman_filter_op(a)


def close(got, want, tolerance):
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape
        torch.testing.assert_close(
            x, y, rtol=tolerance, atol=tolerance * (1 + float(y.abs().max()) if y.numel() else 1)
        )


@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_kernel_equals_the_loop(size, varying, instructions, poison):
    """One series, rows that do not fill the lanes, and more; missing data, singular Q, correlated noise."""
    for rows, length, options in (
        (1, 65, {}),
        (3, 7, {"missing": 0.0}),
        (17, 3, {"shared": True}),
        (2, 66, {"diagonal": True, "missing": 1.0}),
        (9, 1, {"diagonal": True}),
    ):
        close(*both(arguments(rows, length, *size, varying=varying, **options)), 1e-11)


@pytest.mark.parametrize("rows, size", [(70, (1, 1)), (5, (6, 1)), (3, (12, 2))])
def test_threads_share_the_rows(rows, size, threads):
    """And find what one of them does."""
    a = arguments(rows, 200, *size)
    threads(1)
    want = kalman_filter_op(a)
    threads(3)
    close(kalman_filter_op(a), want, 1e-12)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_in_float32(size):
    close(*both(arguments(3, 40, *size, dtype=torch.float32)), 1e-4)


@pytest.mark.parametrize("rows, length, size", [(0, 5, (2, 1)), (3, 0, (2, 1)), (3, 0, (5, 2)), (1, 0, (1, 1))])
def test_nothing_to_do(rows, length, size):
    got, want = both(arguments(rows, length, *size))
    close(got, want, 0.0)


@pytest.mark.parametrize("size", [(1, 1), (3, 1), (12, 1), (3, 2)], ids=str)
def test_the_likelihood_alone_is_the_same(size, poison):
    a = arguments(3, 70, *size)
    got, want = kalman_filter_op(a._replace(moments=False)), kalman_filter_op(a)
    assert torch.equal(got[0], want[0]) and torch.equal(got[5], want[5]) and torch.equal(got[6], want[6])
    assert got[1].shape[1] == got[2].shape[1] == got[3].shape[1] == got[4].shape[1] == 0


@pytest.mark.parametrize("size", [(1, 1), (4, 1), (6, 1), (3, 2)], ids=str)
def test_scratch_memory_is_not_read_before_it_is_written(size, poison):
    """A call on numbers that are NaN leaves NaN in the memory that the next one finds."""
    a = arguments(2, 30, *size)
    first = kalman_filter_op(a)
    kalman_filter_op(a._replace(A=a.A * torch.nan, Q=a.Q * torch.nan, mean=a.mean * torch.nan, cov=a.cov * torch.nan))
    assert all(torch.equal(x, y) for x, y in zip(kalman_filter_op(a), first, strict=True))


@pytest.mark.parametrize("size", [(1, 1), (4, 1), (12, 1)], ids=str)
def test_a_covariance_that_has_settled_is_left_again(size):
    """Many steps of a constant model, then a missing one, and steps of another model."""
    a = arguments(1, 1200, *size, missing=0.0)
    seen = a.seen.clone()
    seen[:, (600, 800, 801)] = False
    A = a.A.clone()
    A[:, 1000:] *= 0.5
    for changed in (a._replace(seen=seen), a._replace(A=A)):
        close(*both(changed), 1e-11)


@pytest.mark.parametrize("n, m", [(1, 1), (2, 1), (6, 1), (3, 2)])
@pytest.mark.parametrize("prior", [1.0, 1e7])
def test_covariances_stay_positive_in_float32(n, m, prior):
    a = arguments(1, 20_000, n, m, dtype=torch.float32)
    a = a._replace(R=1e-3 * a.R, cov=prior * a.cov)
    loglik, _, cov, _, predicted, _, last = kalman_filter_op(a)
    assert loglik.isfinite().all()
    for P in (cov, predicted):
        assert torch.equal(P, P.mT)
        values = torch.linalg.eigvalsh(P.double())
        assert (values[..., 0] >= -1e-6 * values[..., -1]).all()
    assert torch.equal(cov[:, -1], last)


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (6, 1), (3, 2)], ids=str)
def test_an_observation_without_variance_is_nan(size):
    a = arguments(2, 9, *size, missing=0.0)
    zero = a._replace(Q=0 * a.Q, R=0 * a.R, cov=0 * a.cov)
    found = both(zero)
    got, want = (out[0] for out in found)
    assert got[:, 0].isnan().all() and want[:, 0].isnan().all()
    with pytest.raises(ArgumentError, match="is not positive definite at row 0, time 0"):
        df.KalmanFilter(df.LinearGaussian([[1.0]], [[1.0]], [[0.0]], [[0.0]], m0=[0.0], P0=[[0.0]])).filter([1.0])


def test_what_the_kernel_does_not_take_is_left_to_the_loop():
    a = arguments(1, 2, 3, 1)
    for name in ("torch", "reference"):
        with backend(name):
            assert not has_kernel(a)
    assert not has_kernel(arguments(1, 2, 129, 1))
    assert not torch.func.vmap(lambda y: torch.tensor(has_kernel(a)) & (y == y))(torch.ones(2)).any()


@pytest.mark.parametrize("start", ["diffuse", 1e6])
def test_the_filter_of_a_model_is_the_same_with_and_without(start):
    """An exactly diffuse start takes its own steps first; ragged batches, inputs, and both priors."""
    for prior in ("before", "first"):
        P0 = start if start == "diffuse" else start * torch.eye(2, dtype=torch.float64)
        model = df.LinearGaussian(
            [[1.0, 1.0], [0.0, 1.0]], [[1.0, 0.0]], 0.1 * torch.eye(2), [[2.0]], P0=P0, prior=prior
        )
        y = torch.randn(5, 30, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        y[1, 4:9] = torch.nan
        lengths = [30, 20, 5, 30, 29]
        got, value = model.filter(y, lengths=lengths), model.log_likelihood(y, lengths=lengths, burn=2)
        with backend("torch"):
            kf = df.KalmanFilter(model, parallel=False)
            want, known = kf.filter(y, lengths=lengths), kf.log_likelihood(y, lengths=lengths, burn=2)
        for x, z in zip((*got[:8], value), (*want[:8], known), strict=True):
            torch.testing.assert_close(x, z, rtol=1e-9, atol=1e-9, equal_nan=True)


def test_the_operator_is_registered_with_its_kernel():
    assert [b.name for b in OPS["kalman_filter"].backends] == ["native", "triton", "torch"]
