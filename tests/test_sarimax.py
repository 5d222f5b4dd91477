"""Seasonal ARIMA models against recorded results and dense algebra."""

import math

import pytest
import torch

from airline import PASSENGERS
from dualform.core.errors import ArgumentError
from dualform.gaussian import sarimax
from dualform.gaussian.constraints import Stationary, from_partial, to_partial
from vectors import close, load


def nile(**more):
    g = load("nile_arima_211")
    p = g["params_given"]
    return g, sarimax((2, 1, 1), **more).set(ar=p[:2], ma=p[2:3], variance=p[3])


def carbon(**more):
    g = load("sarima_111_011_12")
    p = g["params_given"]
    return g, sarimax((1, 1, 1), (0, 1, 1, 12), **more).set(ar=p[:1], ma=p[1:2], seasonal_ma=p[2:3], variance=p[3])


STARTS = {
    "exact": {"convention": "statsmodels"},
    "default": {"approximate": 1e6},
    "simple_diff": {"simple_differencing": True},
}


@pytest.mark.parametrize("start", STARTS)
def test_the_likelihood_of_the_nile_equals_statsmodels(start):
    g, model = nile(**STARTS[start])
    close(model.log_likelihood(g["y"])[None], g[f"loglik_{start}"], 1e-12)


@pytest.mark.parametrize("start", ["exact", "default"])
def test_a_season_with_missing_months_equals_statsmodels(start):
    """A variance of 1e6 against one of 1e-6 costs either library half of its digits.

    There the likelihood is held against that of a filter in 80 bits, 848.427105, from which statsmodels is 1.5e-3 away.
    """
    g, model = carbon(**STARTS[start])
    want = g["loglik_exact"] if start == "exact" else g["loglik_default"].new_tensor([848.4271051236])
    close(model.log_likelihood(g["y"])[None], want, 1e-12 if start == "exact" else 1e-6)
    ahead = model.forecast(g["y"], 5)
    close(ahead.mean[:, 0], g[f"forecast_mean_{start}"], 1e-8)
    close(ahead.cov[:, 0, 0], g[f"forecast_var_{start}"], 1e-6 if start == "exact" else 1e-3)


def test_the_likelihood_is_that_of_the_differenced_series():
    """With the default convention, in the state or before it; a missing last value takes the former."""
    y = PASSENGERS.log()
    model = sarimax((0, 1, 1), (0, 1, 1, 12)).set(ma=[-0.4], seasonal_ma=[-0.5], variance=0.0013)
    before, within = model.log_likelihood(y), model.filter(y)
    close(before[None], within.log_likelihood.detach()[None], 1e-11)
    assert within.convention == "kfas"
    missing = torch.cat([y, y.new_tensor([torch.nan])])
    close(model.log_likelihood(missing)[None], before[None], 1e-11)


def test_an_arma_process_has_its_covariance():
    """ARMA(1, 1): Box and Jenkins (1976), equation 3.4.5."""
    phi, theta, variance, T = 0.6, 0.3, 2.0, 6
    zero = variance * (1 + 2 * phi * theta + theta**2) / (1 - phi**2)
    one = variance * (1 + phi * theta) * (phi + theta) / (1 - phi**2)
    autocovariance = torch.tensor([zero, *(one * phi**k for k in range(T - 1))], dtype=torch.float64)
    lag = (torch.arange(T)[:, None] - torch.arange(T)).abs()
    y = torch.randn(T, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean = torch.full((T,), 1.5 / (1 - phi), dtype=torch.float64)
    want = torch.distributions.MultivariateNormal(mean, autocovariance[lag]).log_prob(y)
    model = sarimax((1, 0, 1), intercept=True).set(ar=[phi], ma=[theta], variance=variance, intercept=1.5)
    close(model.log_likelihood(y)[None], want[None], 1e-12)


def test_a_seasonal_model_is_the_product_of_its_polynomials():
    seasonal = sarimax((1, 0, 1), (1, 0, 1, 4)).set(
        ar=[0.5], ma=[0.4], seasonal_ar=[0.3], seasonal_ma=[-0.2], variance=1.0
    )
    whole = sarimax((5, 0, 5)).set(ar=[0.5, 0, 0, 0.3, -0.15], ma=[0.4, 0, 0, -0.2, -0.08], variance=1.0)
    y = torch.randn(20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    close(seasonal.log_likelihood(y)[None], whole.log_likelihood(y)[None], 1e-12)


@pytest.mark.parametrize("orders", [((0, 2, 1), (0, 0, 0, 0)), ((1, 1, 0), (0, 1, 0, 3)), ((0, 1, 1), (0, 2, 0, 3))])
def test_differencing_in_the_state_forecasts_the_sums(orders):
    """What is forecast of the differenced series, summed up again."""
    y = torch.randn(30, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).cumsum(0)
    values = {"ar": [0.5]} if orders[0][0] else {"ma": [0.4]}
    model = sarimax(*orders).set(**values, variance=1.0)
    (_, d, _), (_, D, _, s) = orders
    ahead = model.forecast(y, 6).mean[:, 0]
    series = torch.cat([y, ahead])
    for _ in range(D):
        series = series[s:] - series[:-s]
    series = series.diff(n=d)
    flat = sarimax((*orders[0][:1], 0, *orders[0][2:])).set(**values, variance=1.0)
    close(series[-6:], flat.forecast(series[:-6], 6).mean[:, 0], 1e-8)


def test_covariates_move_the_mean():
    X = torch.randn(25, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    y = torch.randn(20, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    beta = torch.tensor([1.0, -2.0], dtype=torch.float64)
    plain = sarimax((1, 1, 0)).set(ar=[0.3], variance=1.0)
    for more in ({}, {"approximate": 1e6}, {"simple_differencing": True}):
        model = sarimax((1, 1, 0), exog=X, **more).set(ar=[0.3], variance=1.0, beta=beta)
        other = sarimax((1, 1, 0), **more).set(ar=[0.3], variance=1.0)
        close(model.log_likelihood(y)[None], other.log_likelihood(y - X[:20] @ beta)[None], 1e-9)
    model = sarimax((1, 1, 0), exog=X).set(ar=[0.3], variance=1.0, beta=beta)
    want = plain.forecast(y - X[:20] @ beta, 5).mean[:, 0] + X[20:] @ beta
    close(model.forecast(y, 5).mean[:, 0], want, 1e-10)


def test_partial_autocorrelations_and_coefficients_are_inverse():
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    phi = from_partial(x.tanh())
    close(to_partial(phi).atanh(), x, 1e-9)
    for row in phi:  # stationary: the roots of the companion matrix lie within the unit circle
        companion = torch.diag(torch.ones(4, dtype=torch.float64), -1)
        companion[0] = row
        assert torch.linalg.eigvals(companion).abs().max() < 1
    close(from_partial(torch.tensor([0.7], dtype=torch.float64)), torch.tensor([0.7], dtype=torch.float64), 1e-12)
    with pytest.raises(ArgumentError, match="not invertible"):
        Stationary(-1).right_inverse(torch.tensor([2.0]))


@pytest.mark.parametrize(
    ("arguments", "more", "message"),
    [
        (((1, 0),), {}, r"order is \(1, 0\), expected \(p, d, q\)"),
        (((1, -1, 0),), {}, "whole numbers of 0 or more"),
        (((1, 0, 0), (1, 0, 0, 1)), {}, "the season has 1 steps"),
        (((1, 1, 0),), {"simple_differencing": True, "approximate": 1e6}, "expected one of both"),
        (((1, 1, 0),), {"convention": "R"}, "convention is 'R'"),
        (((1, 1, 0),), {"exog": [1.0, math.inf]}, "exog"),
    ],
)
def test_what_is_refused(arguments, more, message):
    with pytest.raises(ArgumentError, match=message):
        sarimax(*arguments, **more)
