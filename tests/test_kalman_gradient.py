"""The gradient of the Kalman filter's kernel: that of the loop, at odd sizes, and what differentiates it again."""

import pytest
import torch

import dualform as df
from dualform.core.errors import ArgumentError
from dualform.ops import backend
from dualform.ops.kalman_filter import KalmanFilter, has_kernel, kalman_filter, kalman_filter_op
from dualform.ops.native import library
from test_kalman_kernel import SIZES, arguments

pytestmark = pytest.mark.skipif(bool(library.missing), reason="there are no CPU kernels")
NAMES = [name for name in KalmanFilter._fields if name not in ("seen", "moments")]


def gradients(a, name, weights=None):
    """By every argument, of a weighted sum of every output."""
    given = {k: getattr(a, k).nan_to_num().clone().requires_grad_() for k in NAMES}
    with backend(name):
        out = kalman_filter(seen=a.seen, moments=a.moments, **given)
    g = torch.Generator().manual_seed(1)
    weights = weights or [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype) for x in out]
    total = torch.stack([(x * w).sum() for x, w in zip(out, weights, strict=True)]).sum()
    return dict(zip(given, torch.autograd.grad(total, list(given.values())), strict=True))


def agree(a, tolerance, **options):
    got, want = (gradients(a, name, **options) for name in ("native", "reference"))
    for name in NAMES:
        error, size = (got[name] - want[name]).abs().max(), want[name].abs().max()
        assert error <= tolerance * (size + 1e-3), f"{name} is off by {float(error):.2g} of {float(size):.2g}"


@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_gradient_is_that_of_the_loop(size, moments, instructions, poison):
    """One series, and rows that do not fill the lanes; models that vary in time, missing data, a singular Q."""
    for rows, length, options in (
        (1, 9, {}),
        (11, 2, {"varying": True}),
        (3, 4, {"varying": True, "missing": 0.6}),
        (2, 3, {"shared": True, "missing": 1.0}),
    ):
        agree(arguments(rows, length, *size, **options)._replace(moments=moments), 1e-11)


@pytest.mark.parametrize("size", [(1, 1), (4, 1), (12, 1), (3, 2)], ids=str)
def test_in_float32(size):
    agree(arguments(3, 20, *size, dtype=torch.float32), 1e-3)


@pytest.mark.parametrize("rows, size", [(70, (1, 1)), (5, (6, 1))])
def test_threads_share_the_rows(rows, size, threads):
    a = arguments(rows, 60, *size)
    threads(1)
    want = gradients(a, "native")
    threads(3)
    got = gradients(a, "native")
    assert all(torch.allclose(got[name], want[name], rtol=1e-12, atol=1e-12) for name in NAMES)


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (6, 1)], ids=str)
def test_gradcheck_and_gradgradcheck(size):
    a = arguments(2, 3, *size, missing=0.2)
    given = [getattr(a, k).nan_to_num().clone().requires_grad_() for k in NAMES]

    def run(*values):
        found = kalman_filter(seen=a.seen, moments=False, **dict(zip(NAMES, values, strict=True)))
        return found.loglik, found.last_mean, found.last_cov

    assert has_kernel(a._replace(**dict(zip(NAMES, given, strict=True))))
    assert torch.autograd.gradcheck(run, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, given, fast_mode=True)


def test_one_tensor_in_two_places_and_functional_transforms():
    """The same tensor is Q and the first covariance; a transform of torch.func runs through the loop."""
    a = arguments(1, 4, 2, 1, missing=0.0)

    def total(P):
        Q = P.expand(1, 4, 2, 2)
        return kalman_filter(*a[:2], Q, *a[3:8], P.expand(1, 2, 2), moments=False).loglik.sum()

    P = (a.cov[0] / 2).clone().requires_grad_()
    (got,) = torch.autograd.grad(total(P), P, create_graph=True)
    with backend("reference"):
        (want,) = torch.autograd.grad(total(P), P, create_graph=True)
    (again,) = torch.autograd.grad(got.sum(), P)
    (known,) = torch.autograd.grad(want.sum(), P)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(again, known, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.func.grad(total)(P.detach()), want.detach(), rtol=1e-10, atol=1e-12)


def test_a_vague_start_and_a_covariance_at_rest():
    """A prior of 1e7, many steps of a model that does not change, a gap, and weights that leave out the first steps."""
    a = arguments(1, 400, 3, 1, missing=0.0)
    seen = a.seen.clone()
    seen[:, 200:230] = False
    a = a._replace(seen=seen, cov=1e7 * a.cov, moments=False)
    weights = [torch.ones(1, 400, dtype=torch.float64), *[torch.zeros(1, dtype=torch.float64)] * 6]
    weights[0][:, :5] = 0
    weights[1:5] = [torch.zeros(1, 0, *[1] * k, dtype=torch.float64) for k in (1, 2, 1, 2)]
    agree(a, 1e-9, weights=weights)


@pytest.mark.parametrize("start", ["diffuse", 1e6])
def test_a_model_has_the_same_gradients_and_hessian_with_and_without(start):
    """Ragged rows with missing data; an exactly diffuse start takes its own steps first."""
    P0 = start if start == "diffuse" else start * torch.eye(2, dtype=torch.float64)
    R, q = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in ([[2.0]], 0.1))
    model = df.LinearGaussian([[1.0, 1.0], [0.0, 1.0]], [[1.0, 0.0]], torch.eye(2).double(), R, P0=P0)
    y = torch.randn(5, 30, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y[1, 4:9] = torch.nan

    def value(R, q):
        model.R, model.Q = R, q * torch.eye(2, dtype=torch.float64)
        return model.log_likelihood(y, lengths=[30, 20, 5, 30, 29], burn=1).sum()

    found = []
    for name in ("", "torch"):
        with backend(name):
            first = torch.autograd.grad(value(R, q), (R, q))
            again = torch.autograd.functional.hessian(value, (R.detach(), q.detach()))
            found.append([*first, *again[0], *again[1]])
    for x, z in zip(*found, strict=True):
        torch.testing.assert_close(x, z, rtol=1e-9, atol=1e-9)


def test_moments_that_were_not_saved_are_refused():
    """The operator's own backward, as a compiled program calls it."""
    a = arguments(2, 3, 2, 1)._replace(moments=False)
    run = torch.ops.dualform.kalman_filter
    out = run("native", True, *a)
    grads, kept = [torch.ones_like(x) for x in out[:7]], [*out[1:5], *out[7:]]
    found = torch.ops.dualform.kalman_filter_backward("native", grads, kept, *a)
    assert [x.shape for x in found] == [getattr(a, name).shape for name in NAMES]
    for wrong in (kept[:4], [*kept[:7], kept[7][:1]], [*kept[:7], kept[7].float()]):
        with pytest.raises(ArgumentError, match="the saved moments are"):
            torch.ops.dualform.kalman_filter_backward("native", grads, wrong, *a)
    with torch.no_grad():
        assert len(kalman_filter_op(a)) == 7
