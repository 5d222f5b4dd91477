"""Exponential smoothing against statsmodels, the table of Hyndman et al. (2008), and linear-Gaussian models."""

import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch

from airline import PASSENGERS
from dualform.core.errors import ArgumentError
from dualform.gaussian import Forecast, LinearGaussian, SimulatedForecast, ets
from dualform.gaussian.ets_equations import Kind, predictions, unfold
from vectors import close, load

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    sm = pytest.importorskip("statsmodels.api")
    from statsmodels.tsa.exponential_smoothing.ets import ETSModel

pytestmark = pytest.mark.filterwarnings("ignore")  # of statsmodels
THEIRS = {"A": "add", "M": "mul", "N": None}
CLASSES = [(error, trend, season) for error in "AM" for trend in ("N", "A", "Ad") for season in "NAM"]
VALUES = {"alpha": 0.4, "beta": 0.1, "gamma": 0.15, "phi": 0.9}
NAMES = {"beta": "smoothing_trend", "gamma": "smoothing_seasonal", "phi": "damping_trend"}


def data(name):
    """Positive series; NaN nowhere."""
    table = getattr(sm.datasets, name).load_pandas().data
    if name == "nile":
        return table["volume"].to_numpy()
    if name == "sunspots":
        return table["SUNACTIVITY"].to_numpy()[-80:] + 10
    if name == "macrodata":
        return table["realgdp"].to_numpy()[:100]
    if name == "elnino":
        return table.iloc[-8:, 1:].to_numpy().ravel()
    return table["co2"].resample("MS").mean().interpolate().to_numpy()[:100]


def both(letters, y, period=12, **values):
    """Our model and statsmodels' at the same parameters, and the latter as an array."""
    error, trend, season = letters
    values = {**VALUES, **values}
    period = None if season == "N" else period
    theirs = ETSModel(
        pd.Series(y), error=THEIRS[error], trend=THEIRS[trend[0]], damped_trend=trend == "Ad", seasonal=THEIRS[season],
        seasonal_periods=period,
    )  # fmt: skip
    effects = np.linspace(0.9, 1.15, 12) ** 3 if season == "M" else np.linspace(-3, 5, 12)
    level, slope = y[:12].mean(), (y[-1] - y[0]) / len(y)
    given = {"smoothing_level": values["alpha"], "initial_level": level, "initial_trend": slope}
    given |= {NAMES[name]: values[name] for name in NAMES}
    given |= {f"initial_seasonal.{i}": effects[-1 - i] for i in range(12)}
    model = ets(error, trend, season, period)
    mine = {"alpha": values["alpha"], "level": level}
    mine |= {"beta": values["beta"], "slope": slope} if trend != "N" else {}
    mine |= {"phi": values["phi"]} if trend == "Ad" else {}
    mine |= {"gamma": values["gamma"], "season": effects} if season != "N" else {}
    return model.set(**mine), theirs, np.array([given[name] for name in theirs.param_names])


@pytest.mark.parametrize("name", ["nile", "sunspots", "macrodata", "elnino", "co2"])
@pytest.mark.parametrize("letters", CLASSES, ids="".join)
def test_likelihoods_and_forecasts_equal_statsmodels(letters, name):
    """A multiplicative season without gamma: statsmodels divides by the new level there, the literature by the old."""
    y = data(name)
    model, theirs, params = both(letters, y, gamma=1e-12 if letters[2] == "M" else 0.15)
    assert abs(model.log_likelihood(y).item() - theirs.loglike(params)) < 1e-6
    ahead, want = model.forecast(y, 15), theirs.smooth(params)
    close(torch.as_tensor(ahead.mean[:, 0]), torch.as_tensor(want.forecast(15).to_numpy()), 1e-8)
    if model.kind.linear:
        later = want.get_prediction(start=len(y), end=len(y) + 14)
        close(torch.as_tensor(ahead.cov[:, 0, 0]), torch.as_tensor(np.asarray(later.forecast_variance)), 1e-8)
        bounds = later.pred_int(alpha=0.2)
        low, high = ahead.interval(0.8)
        close(torch.as_tensor(np.stack([low[:, 0], high[:, 0]], 1)), torch.as_tensor(bounds.to_numpy()), 1e-8)


def table(letters, numbers, y):
    """Table 2.2 of Hyndman et al. (2008), class by class: the innovations and the predictions."""
    error, trend, season = letters
    alpha, beta, gamma, phi, level, slope = numbers[:6]
    s, out = list(numbers[6:]), []
    phi = {"N": 0.0, "A": 1.0, "Ad": phi}[trend]
    for value in y:
        base = level + phi * slope
        mu = {"N": base, "A": base + (s[0] if s else 0), "M": base * (s[0] if s else 1)}[season]
        e = (value - mu) / mu if error == "M" else value - mu
        out.append((e, mu))
        if error == "A":
            by = {"N": 1.0, "A": 1.0, "M": 1 / s[0] if s else 1}[season]
            new = {"N": 0.0, "A": gamma * e, "M": gamma * e / base}[season]
        else:
            by = {"N": base, "A": mu, "M": base}[season]
            new = {"N": 0.0, "A": gamma * mu * e, "M": gamma * (s[0] if s else 0) * e}[season]
        level, slope = base + alpha * by * e, phi * slope + (beta * by * e if trend != "N" else 0)
        s = [*s[1:], s[0] + new] if s else s
    return np.array(out).T


@pytest.mark.parametrize("letters", CLASSES, ids="".join)
def test_innovations_are_those_of_the_literature(letters):
    y = data("elnino")
    model, *_ = both(letters, y)
    e, mu = table(letters, model.numbers()[0].tolist(), y)
    found = model.innovations(torch.as_tensor(y))
    close(found.innovation[:, 0], torch.as_tensor(e * mu if letters[0] == "M" else e), 1e-10)
    n = len(y)
    want = -n / 2 * (math.log(2 * math.pi * (e**2).mean()) + 1) - (np.log(abs(mu)).sum() if letters[0] == "M" else 0)
    assert abs(model.log_likelihood(y).item() - want) < 1e-8
    assert abs(found.loglik.sum().item() - want) < 1e-8


def test_a_linear_class_is_a_linear_gaussian_model():
    """ETS(A,A,N) with the innovation as a third state, at the variance that is best."""
    y = torch.as_tensor(data("nile"))
    model, *_ = both(("A", "A", "N"), y.numpy())
    alpha, beta, _, _, level, slope = model.numbers()[0].tolist()
    variance = model.innovations(y).cov[0, 0, 0].item()
    A = [[1.0, 1.0, alpha], [0.0, 1.0, beta], [0.0, 0.0, 0.0]]
    Q = torch.diag(torch.tensor([0.0, 0.0, variance], dtype=torch.float64))
    # The first transition of the form y_t = (1, 1, 1) (l, b, e)_t, where l and b are those before step t.
    same = LinearGaussian(A, [[1.0, 1.0, 1.0]], Q, [[0.0]], m0=[level, slope, 0.0], P0=Q, prior="first")
    close(model.log_likelihood(y)[None], same.log_likelihood(y)[None], 1e-10)
    ahead, want = model.forecast(y, 8), same.forecast(y, 8)
    close(ahead.mean, want.mean, 1e-10)
    close(ahead.cov, want.cov, 1e-9)


def test_simulated_intervals_have_the_variance_of_the_multiplicative_class():
    """ETS(M,N,N): equation 6.5 of Hyndman et al. (2008)."""
    y = torch.as_tensor(data("nile"))
    model, *_ = both(("M", "N", "N"), y.numpy())
    ahead = model.forecast(y, 6, draws=40000)
    assert isinstance(ahead, SimulatedForecast) and ahead.paths.shape == (40000, 6, 1)
    e, mu = model.innovations(y), ahead.mean[0, 0]
    variance = (e.cov[0, 0, 0] / (y[0] - e.innovation[0, 0]) ** 2).item()
    theta = [mu**2]
    for _ in range(5):
        theta.append(mu**2 + 0.4**2 * variance * sum(theta))
    want = torch.stack([(1 + variance) * t - mu**2 for t in theta])
    close(ahead.cov[:, 0, 0], want, 0.03)
    low, high = ahead.interval(0.9)
    inside = ((ahead.paths > low) & (ahead.paths < high)).double().mean(0)
    close(inside[:, 0], torch.full((6,), 0.9, dtype=torch.float64), 1e-3)
    close(model.forecast(y, 6).paths, model.forecast(y, 6).paths, 0)


@pytest.mark.parametrize("letters", ["AAdM", "MNA", "AAN"])
def test_gradients(letters):
    """Of two orders, where a value is missing."""
    kind = Kind.named(letters[0], letters[1:-1], letters[-1], 3 if letters[-1] != "N" else None)
    y = 5 + torch.rand(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen = torch.ones_like(y, dtype=torch.bool)
    seen[0, 4] = False
    numbers = torch.tensor([[0.4, 0.2, 0.1, 0.9, 5.0, 0.1, *[1.1, 0.8, 1.1][: kind.period]]], dtype=torch.float64)
    numbers = numbers.repeat(2, 1).requires_grad_()
    plain = unfold(kind, list(numbers.unbind(-1)), list(y.unbind(-1)), list(seen.double().unbind(-1))).prediction
    close(predictions(kind, numbers, y, seen), torch.stack(plain, -1), 1e-14)
    call = lambda x: predictions(kind, x, y, seen)  # noqa: E731
    assert torch.autograd.gradcheck(call, (numbers,))
    assert torch.autograd.gradgradcheck(call, (numbers,))


def test_the_maximum_is_at_least_that_of_statsmodels():
    """The airline passengers, where most starts lead to lower maxima; at the bounds of statsmodels."""
    for letters in (("A", "N", "A"), ("A", "A", "M")):
        theirs = ETSModel(
            PASSENGERS.numpy(), error="add", trend=THEIRS[letters[1]], seasonal=THEIRS[letters[2]], seasonal_periods=12
        )
        found = ets(*letters, 12).fit(PASSENGERS)
        assert found.converged, found.message
        assert found.log_likelihood > theirs.fit(disp=False).llf - 1e-3


def test_what_was_fitted_is_forecast_and_counted():
    y = load("nile_local_level")["y"]
    model = ets()
    found = model.fit(y)
    assert found.converged and found.names == ["alpha", "level"]
    assert math.isclose(found.aic, 6 - 2 * found.log_likelihood)  # with the variance
    assert math.isclose(found.aicc, found.aic + 2 * 3 * 4 / 96)
    assert "ETS" in found.summary().splitlines()[0] and "Ljung-Box" in found.summary()
    ahead = found.forecast(3)
    assert isinstance(ahead, Forecast)
    close(ahead.mean, model.forecast(y, 3).mean, 1e-12)
    # Without a parameter that is free the likelihood is what it is at the estimates.
    again = ets().fit(y, fixed={"alpha": found["alpha"]})
    assert again.names == ["level"] and abs(again.log_likelihood - found.log_likelihood) < 1e-6


def test_heuristic_states_are_not_estimated():
    found = ets("M", "A", "M", 12, initial="heuristic").fit(PASSENGERS)
    assert found.names == ["alpha", "beta_star", "gamma_star"]
    parts = sm.tsa.seasonal_decompose(PASSENGERS[:60].numpy(), "multiplicative", period=12)
    season = torch.as_tensor(parts.seasonal[:12])
    line = np.polyfit(np.arange(1, 13), PASSENGERS[:12].numpy() / parts.seasonal[:12], 1)
    close(found.model.numbers()[0, 6:], season, 1e-12)
    close(found.model.numbers()[0, 4:6], torch.as_tensor(line[::-1].copy()), 1e-10)


def test_series_together_are_what_they_are_alone():
    y = torch.stack([PASSENGERS[:40], PASSENGERS[40:80], PASSENGERS[84:124]])[..., None].clone()
    y[1, 20] = math.nan
    lengths = [40, 40, 33]
    models = ets("A", "A", "A", 4).expand(3)
    together = models.fit(y, lengths=lengths)
    ahead = models.forecast(y, 5, lengths=lengths)
    assert ahead.mean.shape == (3, 5, 1) and ahead.cov.shape == (3, 5, 1, 1)
    for row, n in enumerate(lengths):
        alone = ets("A", "A", "A", 4).fit(y[row, :n])
        assert abs(alone.log_likelihood - together[row].log_likelihood) < 1e-5
        one = together[row].model
        close(one.forecast(y[row, :n], 5).mean, ahead.mean[row], 1e-10)
        close(one.log_likelihood(y[row, :n])[None], models.log_likelihood(y, lengths=lengths)[row, None], 1e-12)
        close(together[row].forecast(5).mean, ahead.mean[row], 1e-10)


def test_a_missing_value_has_no_innovation():
    y = torch.as_tensor(data("nile")).clone()
    y[10:13] = math.nan
    model = both(("A", "A", "N"), data("nile"))[0]
    found = model.innovations(y)
    assert found.innovation[10:13].isnan().all() and (found.loglik[10:13] == 0).all()
    # Had the values been those expected, the states would be the same.
    filled = y.clone()
    filled[10:13] = model.forecast(y[:10], 3).mean[:, 0]
    close(model.forecast(filled, 2).mean, model.forecast(y, 2).mean, 1e-12)


def test_what_follows_a_series_is_not_looked_at():
    """Zeros of padding, of which a class that multiplies takes none; and a series of no steps."""
    y = torch.nn.functional.pad(torch.as_tensor(data("nile"))[:30], (0, 5)).expand(2, -1)[..., None]
    model = both(("M", "A", "N"), data("nile"))[0]
    close(model.forecast(y, 2, lengths=[30, 20]).mean[0], model.forecast(y[0, :30], 2).mean, 1e-12)
    found = model.log_likelihood(y, lengths=[30, 0])
    close(found, torch.stack([model.log_likelihood(y[0, :30]).detach(), torch.zeros((), dtype=torch.float64)]), 1e-12)


def test_a_parameter_that_is_fixed_stays_as_it_is():
    model = ets(initial="heuristic").set(alpha=0.15)
    with pytest.raises(ArgumentError, match="no parameter to estimate"):
        model.fit(load("nile_local_level")["y"], fixed=["alpha"])
    model = ets("A", "A", initial="heuristic").set(alpha=0.15)
    found = model.fit(load("nile_local_level")["y"], fixed=["alpha"])
    assert found.names == ["beta_star"] and abs(model.alpha.item() - 0.15) < 1e-12
    with pytest.raises(ArgumentError, match="'gamma_star' is no estimated parameter"):
        model.fit(load("nile_local_level")["y"], fixed=["gamma_star"])


def test_a_season_of_other_sum_is_the_same_model():
    y = data("elnino")
    for letters in (("A", "A", "M"), ("M", "A", "A")):
        one, other = (both(letters, y)[0] for _ in range(2))
        season = one.numbers()[0, 6:]
        if letters[2] == "M":
            other.set(level=one.level / 2, slope=one.slope / 2, season=2 * season)
        else:
            other.set(level=one.level - 7, season=season + 7)
        close(one.numbers(), other.numbers(), 1e-12)


def test_errors():
    y = load("nile_local_level")["y"]
    for message, call in {
        "error is 'B'": lambda: ets("B"),
        "both or none": lambda: ets(season="additive"),
        "2 or more steps": lambda: ets(season="A", period=1),
        "without a trend": lambda: ets(damped=True),
        "expected 'estimated' or 'heuristic'": lambda: ets(initial="known"),
        "expected positive ones for ETS": lambda: ets("M").fit(y - 1000),
        "does not change": lambda: ets().fit(torch.ones(20)),
        "expected 24 or more": lambda: ets("A", "N", "A", 12).fit(y[:23]),
        "has no observation": lambda: ets().forecast([math.nan] * 4, 2),
        "horizon is 0": lambda: ets().forecast(y, 0),
        "beta is given": lambda: ets().set(beta=0.1),
        "infinite": lambda: ets().fit([1.0, 2.0, math.inf, 3.0]),
    }.items():
        with pytest.raises(ArgumentError, match=message):
            call()
