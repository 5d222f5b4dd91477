"""The likelihood of stationary series: dense algebra, the Kalman filter, and what the kernel makes of either."""

import pytest
import torch

from airline import PASSENGERS
from dualform.core.errors import ArgumentError, BackendError
from dualform.gaussian import sarimax
from dualform.gaussian.constraints import from_partial
from dualform.ops import arma_likelihood, backend
from dualform.ops.arma_likelihood import ArmaLikelihood, autocovariances, has_kernel
from dualform.ops.native import library

kernels = pytest.mark.skipif(bool(library.missing), reason="there are no CPU kernels")
SIZES = [(1, 0, 0, 5), (1, 1, 0, 1), (5, 0, 1, 9), (3, 2, 3, 40), (7, 13, 13, 70), (9, 5, 14, 33), (2, 0, 13, 130)]


def arguments(rows, p, q, length, dtype=torch.float64):
    g = torch.Generator().manual_seed(rows + 10 * p + 100 * q)
    ar, ma = (from_partial((0.4 * torch.randn(rows, k, generator=g).double()).tanh()) for k in (p, q))
    variance, y = torch.rand(rows, generator=g).double() + 0.5, torch.randn(rows, length, generator=g).double()
    return ArmaLikelihood(ar, ma, variance, y)._make(x.to(dtype) for x in (ar, ma, variance, y))


def derivatives(a, name):
    """The values, gradients of a weighted sum, and a combination of second derivatives."""
    given = [x.clone().requires_grad_() for x in a]
    with backend(name):
        value = arma_likelihood(*given)
        total = (value * torch.arange(1, len(value) + 1)).sum()
        whole = {"allow_unused": True, "materialize_grads": True}
        first = torch.autograd.grad(total, given, create_graph=True, **whole)
        second = torch.autograd.grad(sum((x * x.detach().cos()).sum() for x in first), given, **whole)
    return [value.detach(), *(x.detach() for x in first), *second]


@pytest.mark.parametrize("name", ["", "reference"])
def test_the_likelihood_is_that_of_a_normal_vector(name):
    ar, ma, variance, y = arguments(3, 2, 3, 40)
    gamma, steps = autocovariances(ar, ma, 39), torch.arange(40)
    cov = gamma[:, (steps[:, None] - steps).abs()] * variance[:, None, None]
    want = torch.distributions.MultivariateNormal(torch.zeros(40).double(), cov).log_prob(y)
    with backend(name):
        torch.testing.assert_close(arma_likelihood(ar, ma, variance, y), want, rtol=1e-12, atol=0)


def test_autocovariances_are_sums_over_the_shocks():
    """y_t is a sum of psi_j e_{t-j}; of a process that forgets soon, 400 of them are enough."""
    ar, ma, *_ = arguments(1, 2, 3, 1)
    psi, theta = [], [1.0, *ma[0].tolist()]
    for j in range(400):
        before = sum(phi * psi[j - i - 1] for i, phi in enumerate(ar[0].tolist()) if j > i)
        psi.append((theta[j] if j < len(theta) else 0.0) + before)
    psi = torch.tensor(psi, dtype=torch.float64)
    want = torch.stack([(psi[k:] * psi[: 400 - k]).sum() for k in range(8)])
    torch.testing.assert_close(autocovariances(ar, ma, 7)[0], want, rtol=1e-12, atol=1e-13)


@kernels
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_kernel_and_its_derivatives_are_those_of_the_definition(size, instructions, poison):
    for got, want in zip(*(derivatives(arguments(*size), name) for name in ("native", "reference")), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9 * float(want.abs().max()) if want.numel() else 0)


@kernels
def test_in_float32():
    for got, want in zip(
        derivatives(arguments(5, 2, 3, 60, torch.float32), "native")[:5],
        derivatives(arguments(5, 2, 3, 60), "reference")[:5],
        strict=True,
    ):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@kernels
@pytest.mark.parametrize("rows", [1, 70])
def test_threads_share_the_rows(rows, threads):
    a, found = arguments(rows, 2, 13, 400), []
    for count in (1, 3):
        threads(count)
        found.append(derivatives(a, "native"))
    assert all(torch.equal(x, z) for x, z in zip(*found, strict=True))


@kernels
def test_gradcheck_and_gradgradcheck():
    given = [x.clone().requires_grad_() for x in arguments(2, 2, 3, 7)]
    assert has_kernel(ArmaLikelihood(*given))
    assert torch.autograd.gradcheck(arma_likelihood, given)
    assert torch.autograd.gradgradcheck(arma_likelihood, given)


@kernels
def test_a_third_derivative_is_refused():
    a = [x.clone().requires_grad_() for x in arguments(1, 1, 1, 5)]
    (first,) = torch.autograd.grad(arma_likelihood(*a).sum(), a[0], create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), a[0], create_graph=True)
    with pytest.raises(BackendError, match="cannot be differentiated a second time"):
        torch.autograd.grad(second.sum(), a[0])


@pytest.mark.parametrize("name", ["", "reference"])
def test_a_row_without_a_stationary_distribution_has_no_likelihood(name):
    ar, ma, variance, y = arguments(5, 2, 1, 9)
    ar[1], ar[3] = torch.tensor([0.7, 0.4]), torch.tensor([2.5, -1.0])
    with backend(name):
        found = arma_likelihood(ar, ma, variance, y)
    assert found.isnan().tolist() == [False, True, False, True, False]


def test_what_does_not_fit_is_refused():
    ar, ma, variance, y = arguments(3, 1, 1, 4)
    for wrong in ((ar[:2], ma, variance, y), (ar, ma[0], variance, y), (ar, ma, variance[:, None], y)):
        with pytest.raises(ArgumentError, match="arma_likelihood: "):
            arma_likelihood(*wrong)
    with pytest.raises(ArgumentError, match="complex"):
        arma_likelihood(ar, ma, variance, y.to(torch.complex128))


MODELS = {
    "airline": (((0, 1, 1), (0, 1, 1, 12)), {}),
    "both": (((1, 1, 1), (1, 0, 1, 12)), {"intercept": True}),
    "regression": (((2, 0, 1), (0, 1, 0, 12)), {"exog": torch.sin(torch.arange(150.0).double() ** 2)}),
    "simple": (((1, 1, 0),), {"simple_differencing": True}),
}


@kernels
@pytest.mark.parametrize("which", MODELS)
def test_a_model_has_the_likelihood_of_its_kalman_filter(which):
    """Its gradients and its Hessian, too; the filter is what runs where the kernel is not wanted."""
    orders, more = MODELS[which]
    model, found = sarimax(*orders, **more), []
    model.begin(PASSENGERS.log())
    tensors = [*model.parameters()]
    for name in ("", "torch"):
        with backend(name):
            value = model.log_likelihood(PASSENGERS.log())
            first = torch.autograd.grad(value, tensors, create_graph=True)
            second = torch.autograd.grad(sum(x.sum() for x in first), tensors)
        found.append([value, *first, *second])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7 * float(want.detach().abs().max()))


@kernels
def test_a_row_at_the_bound_of_an_expanded_model_leaves_the_others_alone():
    y = PASSENGERS.log()[:60, None].expand(2, -1, -1)
    models = sarimax((1, 1, 0)).expand(2)
    with torch.no_grad():
        models.parametrizations.ar.original[1] = 100.0  # a partial autocorrelation of 1
    found = models.log_likelihood(y)
    assert found[0].isfinite() and found[1].isnan()
    with pytest.raises(ArgumentError, match="not stationary"):
        models.row(1).log_likelihood(y[1])
