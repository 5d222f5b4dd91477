"""Maximum likelihood: published maxima, standard errors in closed form, diagnostics, and what is said of failures."""

import math

import pytest
import scipy.stats
import torch
from torch import nn
from torch.nn.utils import parametrize

import dualform as df
from airline import PASSENGERS
from dualform.core.errors import ArgumentError
from dualform.gaussian import Irregular, Level, Regression, Seasonal, Structural, Trend, fit, sarimax
from dualform.gaussian.constraints import Positive
from dualform.gaussian.diagnostics import chi2_sf, diagnose, f_sf
from dualform.gaussian.optimize import minimize
from vectors import close, load


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def nile():
    return (Level() + Irregular()).fit(load("nile_local_level")["y"])


def test_the_maximum_of_the_nile(nile):
    """Durbin and Koopman (2012), section 2.10.3, and their diagnostics of section 2.12.2."""
    assert nile.converged and nile.convention == "statsmodels"
    assert round(nile["irregular.variance"], 1) == 15098.5 and round(nile["level.variance"], 1) == 1469.2
    assert round(nile.log_likelihood, 4) == -633.4646
    found = nile.diagnostics(lags=9)
    got = [found.skewness, found.kurtosis, found.normality.value, found.heteroskedasticity.value]
    assert [round(value, 2) for value in got] == [-0.03, 3.09, 0.05, 0.61]
    assert round(found.ljung_box.value, 2) == 8.84


def test_the_maximum_of_the_airline_model():
    """R's arima, as cited by Hyndman and others: -0.4018, -0.5569, log-likelihood 244.70, AIC -483.4."""
    found = sarimax((0, 1, 1), (0, 1, 1, 12)).fit(PASSENGERS.log())
    assert found.converged and found.names == ["ma[1]", "seasonal_ma[1]", "variance"]
    assert round(found["ma[1]"], 4) == -0.4018 and round(found["seasonal_ma[1]"], 4) == -0.5569
    assert round(found.log_likelihood, 2) == 244.70 and round(found.aic, 1) == -483.4
    close(found.standard_errors[:2], torch.tensor([0.0896, 0.0731], dtype=torch.float64), 1e-3)


@pytest.mark.parametrize("start", ["exact", "default"])
def test_the_maximum_of_an_arima_model_equals_statsmodels(start):
    g = load("nile_arima_211")
    more = {"exact": {"convention": "statsmodels"}, "default": {"approximate": 1e6}}[start]
    found = sarimax((2, 1, 1), **more).fit(g["y"])
    assert found.converged
    close(found.values, g[f"mle_params_{start}"], 1e-5)
    assert found.log_likelihood > g[f"mle_loglik_{start}"].item() - 1e-8


def test_a_variance_at_zero_is_told_and_equals_statsmodels():
    g = load("uc_level_seasonal")
    found = (Irregular() + Level() + Seasonal(12)).fit(g["y"])
    assert found.converged and found.at_bound == ["seasonal.variance"]
    assert found.standard_errors.isnan().tolist() == [False, False, True]
    assert "at the bound: seasonal.variance" in found.message and "at its bound" in found.summary()
    close(found.values, g["mle_params_exact"], 1e-5)
    assert found.log_likelihood > g["mle_loglik_exact"].item() - 1e-8


def test_standard_errors_in_closed_form():
    """A regression with white noise: sigma^2 (X^T X)^-1, and 2 sigma^4 / n for the variance."""
    X, e = noise(50, 2, seed=1), noise(50, seed=2)
    y = X @ torch.tensor([3.0, -2.0], dtype=torch.float64) + 0.7 * e
    found = (Regression(X, diffuse=False) + Irregular()).fit(y)
    beta = torch.linalg.lstsq(X, y[:, None]).solution[:, 0]
    variance = (y - X @ beta).square().mean()
    assert found.names == ["regression.beta[1]", "regression.beta[2]", "irregular.variance"]
    close(found.values, torch.cat([beta, variance[None]]), 1e-6)
    cov = torch.block_diag(variance * torch.linalg.inv(X.mT @ X), 2 * variance**2 / 50)
    close(found.covariance, cov, 1e-6)
    close(found.standard_errors, cov.diagonal().sqrt(), 1e-6)
    total = -25 * (math.log(2 * math.pi * variance) + 1)
    assert math.isclose(found.aic, 6 - 2 * total, rel_tol=1e-9)
    assert math.isclose(found.bic, 3 * math.log(50) - 2 * total, rel_tol=1e-9)


def test_units_do_not_matter(nile):
    """A series a million times as large has a maximum that is moved, and as good a fit."""
    found = (Level() + Irregular()).fit(1e6 * load("nile_local_level")["y"])
    assert found.converged
    close(found.values / 1e12, nile.values, 1e-4)


def test_criteria_count_diffuse_states_with_their_convention(nile):
    """Durbin and Koopman (2012), section 7.4; R and statsmodels leave out the differenced observations instead."""
    assert math.isclose(nile.aic, 2 * 633.46456 + 2 * 3, rel_tol=1e-7)
    assert math.isclose(nile.bic, 2 * 633.46456 + 3 * math.log(100), rel_tol=1e-7)
    exact, simple = (
        sarimax((0, 1, 1), simple_differencing=simple).fit(load("nile_local_level")["y"]) for simple in (False, True)
    )
    assert exact.n_diffuse == 1 and simple.n_diffuse == 0
    assert math.isclose(exact.aic, simple.aic, rel_tol=1e-9) and math.isclose(exact.bic, simple.bic, rel_tol=1e-9)


def test_parameters_are_fixed_and_started():
    y = load("nile_local_level")["y"]
    model = Level() + Irregular()
    found = model.fit(y, fixed={"level.variance": 1000.0})
    assert found.names == ["irregular.variance"] and model.values()["level.variance"].item() == pytest.approx(1000.0)
    kept = model.fit(y, fixed=["irregular.variance"], start={"level.variance": 1300.0})
    assert kept.names == ["level.variance"]
    assert model.values()["irregular.variance"].item() == pytest.approx(found["irregular.variance"], rel=1e-12)
    again = (Level(1000.0) + Irregular()).fit(y)
    assert again.names == found.names and math.isclose(again.log_likelihood, found.log_likelihood, rel_tol=1e-9)
    before = kept.evaluations
    assert model.fit(y, fixed=["irregular.variance"], start="current").evaluations < before


def test_any_module_with_a_likelihood_is_fitted(nile):
    """A LinearGaussian whose matrices are parameters."""
    one = torch.ones(1, 1, dtype=torch.float64)
    model = df.LinearGaussian(one, one, nn.Parameter(1e3 * one), nn.Parameter(1e4 * one), P0="diffuse", prior="first")
    for name in "QR":
        parametrize.register_parametrization(model, name, Positive())
    found = fit(model, load("nile_local_level")["y"])
    assert found.converged and found.names == ["Q[1, 1]", "R[1, 1]"]
    close(found.values, nile.values, 1e-5)


def test_a_series_that_begins_with_missing_values_is_fitted(nile):
    """Moved in time, as a NumPy array, it has the same maximum."""
    y = torch.cat([torch.full((3,), torch.nan, dtype=torch.float64), load("nile_local_level")["y"]])
    found = (Level() + Irregular()).fit(y.numpy())
    assert found.n_obs == 100
    close(found.values, nile.values, 1e-4)


def test_every_other_value_may_be_missing():
    """No two neighbours are there, so that no difference is."""
    y = 100 * noise(40, seed=3).cumsum(0)
    y[1::2] = torch.nan
    found = (Level() + Irregular(0.0)).fit(y)
    steps = y[::2].diff()  # of two years each
    close(found.values, steps.square().mean()[None] / 2, 1e-5)
    same = sarimax((0, 1, 0)).fit(y)
    close(same.values, found.values, 1e-5)


@pytest.mark.parametrize("kind", ["structural", "sarimax"])
def test_many_series_are_fitted_at_once(kind):
    """Each as by itself, with lengths and missing values of its own, also where one is done long before another."""
    y = torch.stack([load("nile_local_level")["y"][:24] / 100, noise(24, seed=1).cumsum(0), 5 * noise(24, seed=2)])
    y[1, 7], lengths = torch.nan, [24, 24, 18]
    make = {"structural": lambda: Level() + Irregular(), "sarimax": lambda: sarimax((1, 0, 0), intercept=True)}[kind]
    model = make().expand(3)
    found = model.fit(y[..., None], lengths=lengths)
    for row, one, length in ((1, found[1], 24), (2, found[2], 18)):
        alone = make().fit(y[row, :length])
        assert one.converged and one.names == alone.names and one.n_obs == alone.n_obs
        assert math.isclose(one.log_likelihood, alone.log_likelihood, abs_tol=1e-7)
        free = ~alone.standard_errors.isnan()
        close(one.values[free], alone.values[free], 1e-3)
        close(one.standard_errors[free], alone.standard_errors[free], 1e-3)
        assert one.at_bound == alone.at_bound
        if length == 24:
            assert one.summary().splitlines()[-3:] == alone.summary().splitlines()[-3:] or free.sum() < len(free)
    ahead = model.forecast(y[..., None], 2, lengths=lengths)
    close(ahead.mean[2], found[2].model.forecast(y[2, :18], 2).mean, 1e-9)


# What is said of failures.


def test_an_optimiser_that_was_stopped_says_so():
    found = (Level() + Irregular()).fit(load("nile_local_level")["y"], max_iter=1)
    assert not found.converged and "after 1 iterations" in found.message
    assert "NOT CONVERGED" in found.summary()


def test_parameters_that_are_not_determined_are_told():
    """Two noises of which only the sum matters."""
    found = Structural(Irregular(), Irregular()).fit(noise(30))
    assert not found.converged and "not negative definite" in found.message
    assert found.standard_errors.isnan().all()


def test_a_start_at_a_bound_that_is_no_maximum_is_told():
    """The derivative by a square is zero at zero, so that an optimiser stays there."""
    found = (Level() + Irregular()).fit(load("nile_local_level")["y"], start={"level.variance": 0.0})
    assert not found.converged and "rises where a parameter leaves its bound" in found.message


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"method": "newton"}, "method is 'newton'"),
        ({"start": "zero"}, "start is 'zero'"),
        (
            {"fixed": ["level.varience"]},
            "(?s)'level.varience' is no estimated parameter.*did you mean 'level.variance'",
        ),
        ({"fixed": ["level.variance", "irregular.variance"]}, "no parameter to estimate"),
        ({"start": {"level.variance": -1.0}}, "level.variance: .* expected 0 or more"),
        ({"max_itre": 3}, "max_itre"),
    ],
)
def test_what_is_refused(more, message):
    with pytest.raises(ArgumentError, match=message):
        (Level() + Irregular()).fit(noise(10), **more)


def test_series_that_are_refused():
    with pytest.raises(ArgumentError, match="all values are missing"):
        (Level() + Irregular()).fit([None, None])
    with pytest.raises(ArgumentError, match="expected one series"):
        (Level() + Irregular()).fit(noise(2, 10, 1))
    with pytest.raises(ArgumentError, match="infinite"):
        (Level() + Irregular()).fit([1.0, math.inf])
    batch = (Level() + Irregular()).expand(2)
    with pytest.raises(ArgumentError, match=r"expected \(2, T, M\), a series for each row"):
        batch.fit(noise(3, 10, 1))
    with pytest.raises(ArgumentError, match="row 1 of y has no observation"):
        batch.fit(noise(2, 10, 1), lengths=[10, 0])
    with pytest.raises(ArgumentError, match="expand: rows is 2, of a model with 2"):
        batch.expand(2)
    with pytest.raises(ArgumentError, match="row: row is 2, expected one of 2"):
        batch.row(2)


# Its parts.


def test_the_minimum_of_many_rows():
    """Rosenbrock's function from several starts, of which each ends by itself; infinite beyond a wall."""
    calls = []

    def function(z):
        x = z.detach().requires_grad_()
        value = (1 - x[:, 0]) ** 2 + 100 * (x[:, 1] - x[:, 0] ** 2) ** 2
        (gradient,) = torch.autograd.grad(value.sum(), x)
        calls.append(1)
        return torch.where(x.detach()[:, 1] > 4, torch.inf, value.detach()), gradient

    start = torch.tensor([[-1.2, 1.0], [1.0, 1.0], [2.0, 3.9], [-1.9, 3.0]], dtype=torch.float64)
    found = minimize(function, start)
    assert found.converged.all() and found.evaluations == len(calls) < 120
    close(found.x, torch.ones_like(start), 1e-4)
    for row in start:
        alone = minimize(function, row[None])
        close(alone.x, torch.ones(1, 2, dtype=torch.float64), 1e-4)


@pytest.mark.parametrize("df1", [1, 7, 33, 250])
def test_tail_probabilities_equal_scipy(df1):
    for x in (1e-3, 0.4, 1.0, 2.7, 40.0):
        assert math.isclose(chi2_sf(x * df1, df1), scipy.stats.chi2.sf(x * df1, df1), rel_tol=1e-9, abs_tol=1e-15)
        for df2 in (2, 33, 100):
            assert math.isclose(f_sf(x, df1, df2), scipy.stats.f.sf(x, df1, df2), rel_tol=1e-9, abs_tol=1e-13)


def test_diagnostics_see_what_is_wrong():
    e = noise(300, seed=1)
    good = diagnose(e)
    assert min(good.ljung_box.p_value, good.normality.p_value, good.heteroskedasticity.p_value) > 0.01
    want = scipy.stats.jarque_bera(e.numpy())
    assert math.isclose(good.normality.value, want.statistic, rel_tol=1e-9)
    assert diagnose(e[1:] + 0.5 * e[:-1]).ljung_box.p_value < 1e-6
    assert diagnose(e**3).normality.p_value < 1e-6
    assert diagnose(e * torch.linspace(1, 3, 300, dtype=torch.float64)).heteroskedasticity.p_value < 1e-6
    holed = e.clone()
    holed[::7] = torch.nan
    assert diagnose(holed).ljung_box.p_value > 0.01
    with pytest.raises(ArgumentError, match="there are 4 innovations"):
        diagnose(e[:4])
    with pytest.raises(ArgumentError, match="lags is 300"):
        diagnose(e, 300)


def test_a_summary_has_a_line_for_each_parameter(nile):
    lines = nile.summary().splitlines()
    assert lines[0] == "Structural, 100 observations, 1 diffuse states"
    assert any(line.startswith("level.variance") and "1469.1" in line for line in lines)
    assert any(line.startswith("Ljung-Box, 10 lags") for line in lines)
    trend = (Trend() + Irregular()).fit(noise(4))
    assert "Ljung-Box" not in trend.summary()  # too few innovations
