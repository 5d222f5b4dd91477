"""Sums of components against statsmodels' recorded results and dense algebra."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

import dualform as df
from dualform.core.errors import ArgumentError
from dualform.gaussian import (
    Autoregressive,
    Cycle,
    Irregular,
    Level,
    Regression,
    Seasonal,
    Structural,
    Trend,
    TrigonometricSeasonal,
)
from vectors import close, load

GOLDEN = {
    "uc_level_seasonal": lambda: Irregular() + Level() + Seasonal(12),
    "uc_trend_seasonal": lambda: Irregular() + Trend() + Seasonal(12),
    "uc_level_trigseasonal": lambda: Irregular() + Level() + TrigonometricSeasonal(12, harmonics=2),
}


def at(model, params):
    return model.set(**dict(zip(model.values(), params, strict=True)))


def everything(length=14):
    """Every component, with values of its own."""
    X = torch.randn(length, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return (
        Trend(0.3, 0.1, damped=True, damping=0.8)
        + Seasonal(3, 0.2)
        + TrigonometricSeasonal(4, variance=0.1)
        + Cycle(5.0, damping=0.9, variance=0.4)
        + Autoregressive(2, coefficients=[0.5, -0.3], variance=0.7)
        + Regression(X)
        + Irregular(0.6)
    )


@pytest.mark.parametrize("name", GOLDEN)
def test_likelihoods_and_forecasts_equal_statsmodels(name):
    """Mauna Loa with missing months."""
    g = load(name)
    model = at(GOLDEN[name](), g["params_given"])
    assert abs(model.log_likelihood(g["y"]) - g["loglik_given_exact"]).item() < 1e-7
    ahead = at(GOLDEN[name](), g["mle_params_exact"]).forecast(g["y"], 5)
    close(ahead.mean[:, 0], g["forecast_mean_exact"], 1e-7)
    close(ahead.cov[:, 0, 0], g["forecast_var_exact"], 1e-7)


def test_components_sum_to_the_observations():
    model, y = everything(), torch.randn(14, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 5
    y[[4, 9]] = torch.nan
    found = model.components(y)
    assert list(found) == ["trend", "seasonal", "seasonal_2", "cycle", "ar", "regression", "irregular"]
    total = sum(effect.mean for effect in found.values())
    seen = ~y.isnan()
    close(total[seen], y[seen], 1e-9)
    assert all((effect.var >= 0).all() for effect in found.values())
    close(found["irregular"].var[~seen], torch.full((2,), 0.6, dtype=torch.float64), 1e-12)


def test_the_level_of_components_is_that_of_the_smoother():
    y = load("nile_local_level")["y"]
    model = Level(1469.1) + Irregular(15099.0)
    smooth = df.LinearGaussian([[1.0]], [[1.0]], [[1469.1]], [[15099.0]], P0="diffuse", prior="first").smooth(y)
    found = model.components(y)
    close(found["level"].mean, smooth.mean[:, 0], 1e-12)
    close(found["level"].var, smooth.cov[:, 0, 0], 1e-12)
    close(found["irregular"].mean, y - smooth.mean[:, 0], 1e-12)
    arrays = model.components(y.numpy())
    assert isinstance(arrays["level"].mean, np.ndarray) and arrays["level"].mean.shape == (100,)


def test_a_regression_by_states_is_generalised_least_squares():
    """Its mean is that of the regression by parameters where those maximise the likelihood."""
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(40, 2, dtype=torch.float64, generator=generator)
    y = X @ torch.tensor([2.0, -1.0], dtype=torch.float64) + torch.randn(40, dtype=torch.float64, generator=generator)
    noise = lambda: Irregular(1.0) + Autoregressive(1, coefficients=[0.5], variance=0.3)  # noqa: E731
    by_states = (Regression(X) + noise()).smooth(y).mean[0, :2]
    model = Regression(X, diffuse=False) + noise()
    found = model.fit(y)
    assert found.converged
    close(found.values, by_states, 1e-6)
    fixed = Regression(X, beta=found.values) + noise()
    close(fixed.log_likelihood(y)[None], torch.tensor([found.log_likelihood], dtype=torch.float64), 1e-10)


def test_coefficients_that_move_are_random_walks():
    """Against a model whose emission is given for each step."""
    X, y = (torch.randn(20, k, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in (2, 1))
    model = Regression(X, moving=True, variance=[0.2, 0.05]) + Irregular(0.5)
    eye = torch.eye(2, dtype=torch.float64)
    want = df.LinearGaussian(
        eye, X[:, None], torch.diag(eye.new_tensor([0.2, 0.05])), [[0.5]], P0="diffuse", prior="first", time_varying="C"
    )
    close(model.log_likelihood(y)[None], want.log_likelihood(y)[None], 1e-12)
    close(model.components(y)["regression"].mean, (want.smooth(y).mean * X).sum(-1), 1e-12)
    trained = Regression(X, moving=True) + Irregular()
    assert trained.fit(y).names == ["regression.variance[1]", "regression.variance[2]", "irregular.variance"]


def test_batches_of_parameters_and_of_series():
    """Each row is what it is alone, in likelihood, components and gradients."""
    y = torch.randn(3, 12, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    damping = torch.tensor([0.5, 0.7, 0.9], dtype=torch.float64, requires_grad=True)
    model = Trend(0.1, 0.2, damped=True, damping=damping) + Cycle(5.0, damping=damping, variance=0.1) + Irregular(1.0)
    together, found = model.log_likelihood(y), model.components(y)
    alone = [Trend(0.1, 0.2, damped=True, damping=d) + Cycle(5.0, damping=d, variance=0.1) for d in damping]
    for row, one in enumerate(alone):
        one = one + Irregular(1.0)
        close(one.log_likelihood(y[row])[None], together[row : row + 1], 1e-12)
        for name, effect in one.components(y[row]).items():
            close(effect.mean, found[name].mean[row], 1e-10)
            close(effect.var, found[name].var[row], 1e-10)
    (gradient,) = torch.autograd.grad(together.sum(), damping)
    assert (gradient != 0).all()


def test_results_are_of_the_kind_of_the_series():
    pd = pytest.importorskip("pandas")
    y = pd.Series(load("nile_local_level")["y"].numpy(), index=pd.period_range("1871", periods=100, freq="Y"))
    model = Level() + Irregular()
    model.set(**{"level.variance": 1469.1, "irregular.variance": 15099.0})
    assert isinstance(model.components(y)["level"].mean, np.ndarray)
    smooth = model.smooth(y)
    assert isinstance(smooth.mean, pd.DataFrame) and smooth.mean.index.equals(y.index)
    assert isinstance(model.forecast(y, 3).mean, np.ndarray)
    by_table = Regression(pd.DataFrame({"x": y}), beta=[2.0]) + Irregular(1.0)
    close(by_table.build().d[:, 0], 2 * load("nile_local_level")["y"], 1e-12)
    assert model.log_likelihood(y).requires_grad
    with torch.no_grad():
        single = model.log_likelihood(load("nile_local_level")["y"].float())
    close(single[None], model.log_likelihood(y)[None], 1e-9)


def test_forecasts_see_the_covariates_to_come():
    X = torch.arange(12, dtype=torch.float64)
    model = Regression(X, beta=[3.0]) + Irregular(1.0)
    close(model.forecast(torch.zeros(10, dtype=torch.float64), 2).mean[:, 0], 3 * X[10:], 1e-12)
    with pytest.raises(ArgumentError, match="12 steps, but step 13 is needed"):
        model.forecast(torch.zeros(10, dtype=torch.float64), 3)


def test_a_trigonometric_season_of_all_harmonics_is_any_season():
    """Without noise, both kinds of season are the same model up to the scale of their diffuse start."""
    y = torch.randn(30, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    one = (Level(0.1) + Seasonal(6, 0.0) + Irregular(1.0)).forecast(y, 7)
    other = (Level(0.1) + TrigonometricSeasonal(6, variance=0.0) + Irregular(1.0)).forecast(y, 7)
    close(one.mean, other.mean, 1e-8)
    close(one.cov, other.cov, 1e-8)


def test_starts_are_diffuse_where_they_have_to_be():
    y = torch.randn(14, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start = everything().filter(y)
    diffuse = (start.predicted_diffuse[0] != 0).any(-1).tolist()
    assert diffuse == [True, False, *[True] * 2, *[True] * 3, False, False, False, False, True]
    cov = start.predicted_cov[0]
    close(cov[1:2, 1], torch.tensor([0.1 / (1 - 0.64)], dtype=torch.float64), 1e-12)
    close(cov[7:8, 7], torch.tensor([0.4 / (1 - 0.81)], dtype=torch.float64), 1e-12)
    undamped = Cycle(5.0, damping=1.0, variance=0.4) + Irregular(1.0)
    assert undamped.build().diffuse is not None


def test_parameters_train_like_any_other():
    """An optimiser of PyTorch raises the likelihood, and what it sets stays within the constraints."""
    y = load("nile_local_level")["y"] / 100
    model = Level() + Cycle(bounds=(5.0, 20.0)) + Autoregressive(2) + Irregular()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.3)
    values = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = -model.log_likelihood(y)
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < values[0] and all(p.grad is not None for p in model.parameters())
    got = model.values()
    assert 5 < got["cycle.period"] < 20 and 0 < got["cycle.damping"] < 1 and got["irregular.variance"] > 0
    again = Level() + Cycle(bounds=(5.0, 20.0)) + Autoregressive(2) + Irregular()
    again.load_state_dict(model.state_dict())
    assert again.log_likelihood(y) == model.log_likelihood(y)


def test_gradients_are_right():
    model = Trend(damped=True) + Cycle(bounds=(3.0, 9.0)) + Autoregressive(2) + Irregular()
    y = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(model.log_likelihood(y), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        for k in range(parameter.numel()):
            values = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    parameter.view(-1)[k] += step
                values.append(model.log_likelihood(y).item())
                with torch.no_grad():
                    parameter.view(-1)[k] -= step
            assert math.isclose(
                (values[0] - values[1]) / 2e-5, gradient.reshape(-1)[k].item(), rel_tol=1e-5, abs_tol=1e-7
            )


def test_noise_alone_is_a_model():
    y = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    want = torch.distributions.Normal(y.new_tensor(0.0), y.new_tensor(2.0).sqrt()).log_prob(y).sum()
    close(Structural(Irregular(2.0)).log_likelihood(y)[None], want[None], 1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Level(-1.0), "Level: variance is -1, expected 0 or more"),
        (lambda: Seasonal(1), "Seasonal: period is 1, expected a whole number, 2 or more"),
        (lambda: TrigonometricSeasonal(12, 7), "harmonics is 7, expected at most 6"),
        (lambda: Trend(damping=0.5), "the trend is not damped"),
        (lambda: Cycle(1.0), "period 1.0, .* expected 2 or more"),
        (lambda: Cycle(damping=1.5), "damping is 1.5, expected above 0 and at most 1"),
        (lambda: Autoregressive(2, coefficients=[0.5]), r"shape \(1,\), expected \(2,\)"),
        (lambda: Structural(), "no components"),
        (lambda: Structural(3), "int is not a component"),
        (lambda: Regression([1.0, float("nan")]), "NaN or infinite|cannot be missing"),
        (lambda: Regression([1.0], variance=2.0), "coefficients do not move"),
        (lambda: Regression([1.0], moving=True, beta=[1.0]), "coefficients that move are states"),
        (lambda: Regression([1.0]) + Regression([1.0, 2.0]), r"covariates of \[1, 2\] steps"),
        (lambda: (Level() + Irregular()).set(**{"level.varience": 1.0}), "is no estimated parameter"),
        (lambda: (Level() + Irregular()).set(**{"level.variance": -1.0}), "level.variance: .* expected 0 or more"),
        (lambda: (Autoregressive(1) + Irregular()).set(**{"ar.coefficients": [1.1]}), "not stationary"),
        (lambda: (Cycle(bounds=(3, 9)) + Irregular()).set(**{"cycle.period": 12.0}), "expected one between 3 and 9"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()


def test_a_component_alone_says_what_a_model_is():
    y = load("nile_local_level")["y"]
    for name in ("fit", "forecast", "components", "log_likelihood"):
        with pytest.raises(AttributeError, match=rf"component of a model, .* no '{name}' by itself\n.*Irregular"):
            getattr(Level(), name)
    assert not hasattr(Level(), "fit") and not hasattr(Level(), "nonsense")
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        Level().nonsense  # noqa: B018
    together = sum([Level(1469.1), Irregular(15099.0)])
    close(together.log_likelihood(y)[None], (Level(1469.1) + Irregular(15099.0)).log_likelihood(y)[None], 0)
    walk = Structural(Level(2000.0)).log_likelihood(y)
    steps = -(y.diff().square() / 2000 + math.log(2 * math.pi * 2000)) / 2
    close(walk[None], steps.sum()[None] - math.log(2 * math.pi) / 2, 1e-10)


def test_a_likelihood_does_not_load_symbolic_algebra():
    """Half a second, by ``torch.broadcast_shapes``."""
    code = (
        "import sys, torch; from dualform.gaussian import Irregular, Level; "
        "(Level() + Irregular()).log_likelihood(torch.arange(9.0)[:, None].sin()); assert 'sympy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
