"""Expectation and maximisation, and Adam: the likelihood that never falls, and the same maxima as L-BFGS."""

import math

import pytest
import torch
from torch import nn

import dualform as df
from dualform.core.errors import ArgumentError
from dualform.gaussian import Autoregressive, Cycle, Irregular, Level, Regression, Seasonal, Trend, sarimax
from dualform.gaussian.constraints import places
from dualform.gaussian.em import maximize_by_em
from dualform.gaussian.optimize import descend
from vectors import close, load


def numbers(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def spread(n, seed):
    L = numbers(n, n, seed=seed)
    return L @ L.mT / n + 0.3 * torch.eye(n, dtype=torch.float64)


def general(free, prior="before", missing=True):
    """A model of two states and three observations of which one component is often missing, and its series."""
    values = {
        "A": torch.tensor([[0.8, 0.2], [-0.3, 0.5]], dtype=torch.float64), "C": numbers(3, 2, seed=1),
        "Q": spread(2, 2), "R": spread(3, 3), "m0": numbers(2, seed=4), "P0": spread(2, 5),
    }  # fmt: skip
    y = df.LinearGaussian(**values, prior=prior).sample(60, generator=torch.Generator().manual_seed(0))[0][0]
    if missing:
        y[::3, 1] = math.nan
        y[5:8] = math.nan
    start = {name: nn.Parameter(value.clone() * 1.3) if name in free else value for name, value in values.items()}
    return df.LinearGaussian(**start, prior=prior, c=[0.1, -0.2], d=[1.0, 0.0, 2.0]), y


@pytest.mark.parametrize("prior", ["before", "first"])
@pytest.mark.parametrize("free", [("A", "C", "Q", "R", "m0", "P0"), ("A", "Q", "R"), ("C", "R"), ("P0",)])
def test_the_likelihood_never_falls(free, prior):
    model, y = general(free, prior)
    with torch.no_grad():
        found = maximize_by_em(model, y, places(model), {}, 60)
    steps = found.log_likelihood[:, 0].diff()
    assert (steps > -1e-9).all() and found.log_likelihood[-1, 0] > found.log_likelihood[0, 0] + 0.01
    close(model.log_likelihood(y)[None], found.log_likelihood[-1], 1e-12)


def test_an_iteration_is_the_gradient_times_a_matrix():
    """What an iteration changes, by the gradient of the likelihood (Xu and Jordan 1996), with missing components."""
    for name in ("A", "Q", "C", "R"):
        model, y = general((name,))
        smooth = model.smooth(y)
        (slope,) = torch.autograd.grad(model.log_likelihood(y), getattr(model, name))
        old, seen = getattr(model, name).detach().clone(), ~y.isnan().all(-1)
        with torch.no_grad():
            maximize_by_em(model, y, places(model), {}, 1)
            h = torch.cat([smooth.initial_mean[None], smooth.mean])
            squares = h[..., None] * h[..., None, :] + torch.cat([smooth.initial_cov[None], smooth.cov])
            slope = (slope + slope.mT) / 2 if name in "QR" else slope
            if name in "QR":
                step = 2 / (60 if name == "Q" else int(seen.sum())) * old @ slope @ old
            else:
                noise, sum_of = (model.Q, squares[:-1]) if name == "A" else (model.R, squares[1:][seen])
                step = noise @ slope @ torch.linalg.inv(sum_of.sum(0))
        close(getattr(model, name), old + step, 1e-9, name)


def test_a_regression_in_closed_form():
    """States that are seen without noise are an autoregression, whose estimate is that of least squares."""
    y = df.LinearGaussian([[0.6, 0.1], [0.2, 0.3]], torch.eye(2), torch.eye(2), torch.zeros(2, 2), P0=1.0).sample(
        50, generator=torch.Generator().manual_seed(1)
    )[0][0]
    A, Q = (nn.Parameter(0.5 * torch.eye(2, dtype=torch.float64)) for _ in range(2))
    model = df.LinearGaussian(
        A, torch.eye(2), Q, torch.zeros(2, 2, dtype=torch.float64), m0=y[0], P0=torch.eye(2) * 1e-6, prior="first"
    )
    with torch.no_grad():
        maximize_by_em(model, y, places(model), {}, 3)
    want = torch.linalg.lstsq(y[:-1], y[1:]).solution.mT
    close(model.A, want, 1e-6)
    e = y[1:] - y[:-1] @ want.mT
    close(model.Q, e.mT @ e / 49, 1e-6)


def test_the_maximum_of_the_nile():
    y = load("nile_local_level")["y"]
    found = (Level() + Irregular()).fit(y, method="em", start={"level.variance": 1460.0, "irregular.variance": 15100.0})
    assert found.converged, found.message
    assert round(found.log_likelihood, 5) == -633.46456
    close(found.values, torch.tensor([1469.2, 15098.5], dtype=torch.float64), 1e-3)
    stopped = (Level() + Irregular()).fit(y, method="em", max_iter=2)
    assert not stopped.converged and "2 iterations of EM" in stopped.message


def test_adam_finds_the_maximum_of_the_nile():
    y = load("nile_local_level")["y"]
    found = (Level() + Irregular()).fit(y, method="adam", max_iter=60)
    assert -633.4656 < found.log_likelihood < -633.4645
    stopped = (Level() + Irregular()).fit(y, method="adam", max_iter=2)
    assert not stopped.converged and "2 iterations of Adam" in stopped.message
    # What has no value is a step too far, and each row has an end of its own.
    cubic = lambda x: (torch.where(x > 0, x - x.log(), torch.inf).sum(1), (1 - 1 / x))  # noqa: E731
    ended = descend(cubic, torch.tensor([[0.05], [3.0]], dtype=torch.float64), rate=0.5, max_iter=400)
    assert ended.converged.all() and (ended.x - 1).abs().max() < 1e-4


def test_several_variances_and_series_at_once():
    y = load("uc_level_seasonal")["y"][:72]
    y = torch.stack([y, y.flip(0)])[..., None] if y.dim() == 1 else torch.stack([y, y.flip(0)])
    models = (Trend() + Seasonal(4) + Irregular()).expand(2)
    models.begin(y)
    with torch.no_grad():
        found = maximize_by_em(models, y, places(models), {}, 25)
    assert (found.log_likelihood.diff(dim=0) > -1e-9).all()
    assert (found.log_likelihood[-1] > found.log_likelihood[0] + 0.1).all()
    alone = Trend() + Seasonal(4) + Irregular()
    alone.begin(y[1])
    with torch.no_grad():
        one = maximize_by_em(alone, y[1], places(alone), {}, 25)
    close(one.log_likelihood[-1], found.log_likelihood[-1, 1:], 1e-10)


def test_fixed_parameters_stay():
    y = load("nile_local_level")["y"]
    found = (Level() + Irregular()).fit(y, method="em", fixed={"level.variance": 1000.0})
    want = (Level() + Irregular()).fit(y, fixed={"level.variance": 1000.0})
    assert found.names == ["irregular.variance"]
    close(found.values, want.values, 1e-4)
    X = numbers(100, 1, seed=8)
    moving = (Regression(X, moving=True) + Level(100.0) + Irregular()).fit(y, method="em", max_iter=5)
    assert moving.names == ["regression.variance[1]", "irregular.variance"]


def test_what_has_no_closed_form_is_refused_by_name():
    y = load("nile_local_level")["y"]
    for name, model in {
        "cycle.period": Cycle() + Irregular(1.0),
        "ar.coefficients": Autoregressive(1) + Irregular(1.0),
        "ar.variance": Autoregressive(1, coefficients=[0.5]) + Irregular(1.0),
        "irregular.variance": Irregular() + Level(1.0) + Irregular(2.0),
        "ma": sarimax((0, 1, 1)),
    }.items():
        with pytest.raises(ArgumentError, match=f"no closed form for '{name}'"):
            model.fit(y, method="em")
        assert model.log_likelihood(y).isfinite()
    model = df.LinearGaussian([[0.5]], [[1.0]], nn.Parameter(torch.ones(1, 1).double()), [[1.0]], P0="stationary")
    with pytest.raises(ArgumentError, match="no closed form for 'Q': P0='stationary' depends on it"):
        model.fit(y, method="em")
    model = df.LinearGaussian([[1.0]], [[1.0]], [[1.0]], [[1.0]], P0="diffuse", m0=nn.Parameter(torch.ones(1).double()))
    with pytest.raises(ArgumentError, match="no closed form for 'm0'"):
        model.fit(y, method="em")
    with pytest.raises(ArgumentError, match=r"no parameter to estimate\n.*torch.nn.Parameter"):
        df.LinearGaussian([[1.0]], [[1.0]], [[1.0]], [[1.0]], P0="diffuse").fit(y)
    with pytest.raises(ArgumentError, match="method is 'newton'"):
        (Level() + Irregular()).fit(y, method="newton")
