"""Forecasters: what they say, beside models fitted by hand; scores, beside numbers computed by hand; and manners."""

import math
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import norm
from sklearn.base import clone
from statsmodels.tsa.stattools import levinson_durbin

from airline import PASSENGERS
from dualform.core.errors import ArgumentError
from dualform.forecast import Forecaster, SeasonalNaive, coverage, crps, evaluate, mase
from dualform.forecast.choose import Trial, _ranked, held_back
from dualform.forecast.estimate import ahead, estimate
from dualform.forecast.families import AUTO, FAMILIES, autoregressive_order, candidates_of
from dualform.forecast.metrics import midpoints
from dualform.forecast.shape import grows, shape_of
from dualform.forecast.table import DEMO
from dualform.gaussian import Irregular, Level, Regression, ets, sarimax

NILE = torch.tensor(np.loadtxt(DEMO, delimiter=",", skiprows=1)[:, 1])


def walks(count: int, steps: int) -> torch.Tensor:
    """Local levels ``(steps, count)``, with noise as large as their steps."""
    g = torch.Generator().manual_seed(1)
    level = torch.randn(steps, count, generator=g, dtype=torch.float64).cumsum(0)
    return level + torch.randn(steps, count, generator=g, dtype=torch.float64)


# Scores.


def test_mase_is_the_error_beside_that_of_the_naive():
    args = [1.0, 2.0], [2.0, 4.0], [1.0, 3.0, 2.0, 6.0]
    assert mase(*args).item() == pytest.approx(1.5 / ((2 + 1 + 4) / 3))
    assert mase(*args, season=2).item() == pytest.approx(1.5 / ((1 + 3) / 2))
    assert mase([1.0, math.nan], [2.0, 4.0], [1.0, math.nan, 2.0, 6.0]).item() == pytest.approx(1.0 / 4.0)
    with pytest.raises(ArgumentError, match=r"shape \(2,\), and the forecast \(1,\)"):
        mase([1.0, 2.0], [2.0], [1.0, 3.0])
    with pytest.raises(ArgumentError, match="longer than a season of 4"):
        mase(*args, season=4)


def test_crps_of_few_quantiles_is_computed_by_hand():
    assert crps([3.0, math.nan], [[5.0], [1.0]]).item() == 2.0  # one quantile: the absolute error
    # X is 1 or 3: E|X - y| - E|X - X'| / 2 = 2 - 1/2 at y = 0, and 1 - 1/2 at y = 2
    assert crps(0.0, [1.0, 3.0]).item() == 1.5
    assert crps(2.0, [1.0, 3.0]).item() == 0.5


def test_crps_of_many_quantiles_is_that_of_the_distribution():
    for y in (-1.3, 0.0, 2.5):
        exact = y * (2 * norm.cdf(y) - 1) + 2 * norm.pdf(y) - 1 / math.sqrt(math.pi)  # of the standard normal
        assert crps(y, norm.ppf(midpoints(2000))).item() == pytest.approx(exact, abs=1e-3)


def test_coverage_counts_what_is_inside():
    y = [1.0, 2.0, 3.0, math.nan, 5.0]
    assert coverage(y, [0.0, 2.0, 3.5, 0.0, 0.0], [2.0, 2.0, 4.0, 9.0, 4.0]).item() == 0.5


class Fixed:
    """Says normal(last value, 1), whatever it sees; notes what was asked of it."""

    season = 2

    def __init__(self):
        self.calls = []
        Fixed.last = self

    def get_params(self):
        return {}

    def fit(self, y):
        self.calls.append(("fit", len(y)))
        self.y = y
        return self

    def update(self, y):
        self.calls.append(("update", len(y)))
        self.y = y

    def predict_quantiles(self, horizon, levels):
        return np.tile(self.y[-1] + norm.ppf(levels), (horizon, 1))


def test_evaluate_holds_back_what_it_compares_with():
    y = np.array([0.0, 1.0, 0.0, 2.0, 0.0, 3.0, 1.0, 4.0, 0.5, 9.0])
    found = evaluate(Fixed(), y, 2, origins=2, apart=1)
    assert Fixed.last.calls == [("fit", 7), ("update", 8)] and found.origins == [3, 2]
    # from 1 to (4, 0.5), from 4 to (0.5, 9); scale: differences of two steps before the first origin
    assert found.mase.item() == pytest.approx((3 + 0.5 + 3.5 + 5) / 4 / np.mean([0, 1, 0, 1, 1]))
    assert found.coverage.tolist() == [[0.25, 0.25, 0.25]] and found.bands == (0.5, 0.8, 0.95)
    assert found.crps.item() == pytest.approx(
        np.mean([z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi) for z in (3, -0.5, -3.5, 5)]),
        rel=5e-3,
    )
    evaluate(Fixed(), y, 2, origins=2, refit=True)
    assert [call for call, _ in Fixed.last.calls] == ["fit", "fit"]
    with pytest.raises(ArgumentError, match=r"y has 10 steps, and the first of 3 origins is 12 steps before"):
        evaluate(Fixed(), y, 6)


# Forecasts, beside models that are fitted by hand.


def test_exponential_smoothing_is_a_family():
    """Its forecasts are those of the class that was chosen; it takes no covariates."""
    f = Forecaster("ets").fit(NILE)
    label = f.choices_[0].found.candidate.label
    trend = {"ETS(A,N,N)": "none", "ETS(A,A,N)": "additive", "ETS(A,Ad,N)": "damped"}[label]
    want = ets("additive", trend).fit(NILE).forecast(3)
    torch.testing.assert_close(f.predict(3).mean, want.mean[:, 0], rtol=1e-4, atol=0)
    with pytest.raises(ArgumentError, match="takes no covariates"):
        Forecaster("ets").fit(NILE, torch.randn(len(NILE), 1, dtype=torch.float64))


def test_a_local_level_is_the_model_of_that_name():
    f = Forecaster("local_level").fit(NILE)
    model = Level() + Irregular()
    fit = model.fit(NILE)
    future = model.forecast(NILE, 6)
    mean, quantiles, levels = f.predict(6)
    torch.testing.assert_close(mean, future.mean[:, 0], rtol=1e-6, atol=0)
    exact = future.mean[:, 0, None] + future.cov[:, 0].sqrt() * torch.tensor(norm.ppf(levels))
    torch.testing.assert_close(quantiles, exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(f.predict_interval(6, 0.95), quantiles[:, [0, -1]])
    found = f.choices_[0].found
    assert found.converged and found.names == fit.names and found.log_likelihood == pytest.approx(-633.4646, abs=1e-4)
    level, irregular = f.components(3)[0].values()
    torch.testing.assert_close((level[0] + irregular[0])[:100], NILE)
    torch.testing.assert_close(level[0][100:], mean[:3])


def test_a_logarithm_makes_distributions_log_normal():
    y = PASSENGERS[:60]
    f = Forecaster("local_level", log=True).fit(y)
    model = Level() + Irregular()
    model.fit(y.log())
    future = model.forecast(y.log(), 3)
    mean, var = future.mean[:, 0], future.cov[:, 0, 0]
    torch.testing.assert_close(f.predict(3).mean, (mean + var / 2).exp(), rtol=1e-5, atol=0)
    torch.testing.assert_close(f.predict_quantiles(3, [0.5])[:, 0], mean.exp(), rtol=1e-5, atol=0)
    with pytest.raises(ArgumentError, match="log is True, but y has values that are not positive"):
        Forecaster("local_level", log=True).fit(y - 200)


def test_the_logarithm_is_taken_where_changes_grow():
    assert grows(PASSENGERS, 12) and not grows(PASSENGERS.log(), 12) and not grows(NILE, 1)
    assert not grows(walks(1, 100)[:, 0], 1)


def test_a_long_season_is_taken_out_as_waves():
    time = torch.arange(230, dtype=torch.float64)
    wave = 3 * torch.sin(2 * math.pi * time / 52) - torch.cos(4 * math.pi * time / 52)
    shape = shape_of(wave[:200] + 0.1 * time[:200], 52, False)
    assert shape.left == 1
    torch.testing.assert_close(shape.effect(200, 30), wave[200:], atol=1e-6, rtol=0)
    noisy = wave + walks(1, 230)[:, 0] / 20
    mean = Forecaster("local_level", season=52).fit(noisy[:200]).predict(30).mean
    assert (mean - noisy[200:]).abs().mean() < 0.5 < (noisy[199] - noisy[200:]).abs().mean()


def test_covariates_are_those_of_the_model():
    X = torch.arange(65, dtype=torch.float64).remainder(7).unsqueeze(1)
    y = walks(1, 65)[:, 0] + 5 * X[:, 0]
    f = Forecaster("local_level").fit(y[:60], X[:60])
    model = Level() + Irregular() + Regression(X)
    model.fit(y[:60])
    torch.testing.assert_close(f.predict(5, X[60:]).mean, model.forecast(y[:60], 5).mean[:, 0], rtol=1e-4, atol=0)
    arima = next(c for c in FAMILIES["sarimax"](y, 1) if c.label == "ARIMA(0,1,1) with intercept")
    (found,) = estimate(arima, [y[:60]], [shape_of(y, 1, False)], X[:60])
    mean = ahead([found], 5, X[60:])[0].mean
    model = sarimax((0, 1, 1), exog=X, intercept=True)
    model.fit(y[:60])
    torch.testing.assert_close(mean, model.forecast(y[:60], 5).mean[:, 0], rtol=1e-4, atol=0)
    plain = Forecaster("local_level")
    known = evaluate(plain, y, 5, X=X, origins=2, apart=3)
    assert known.mase < 0.5 * evaluate(plain, y, 5, origins=2, apart=3).mase


def test_the_seasonal_naive_is_its_model():
    y = torch.tensor([1.0, 5.0, 2.0, 7.0, 4.0])
    f = SeasonalNaive(2).fit(y)
    mean, _, _ = f.predict(4)
    assert mean.tolist() == [7.0, 4.0, 7.0, 4.0]
    model = sarimax((0, 0, 0), (0, 1, 0, 2)).set(variance=(1 + 4 + 4) / 3)
    future = model.forecast(y.double(), 4)
    band = f.predict_interval(4, 0.8)
    exact = future.mean + future.cov[:, 0].sqrt() * norm.ppf(0.9)
    torch.testing.assert_close(band[:, 1], exact[:, 0])
    gap = SeasonalNaive(2).fit([1.0, 5.0, 2.0, 7.0, math.nan, 8.0])
    assert gap.predict(2).mean.tolist() == [2.0, 8.0]  # the last one that was seen


def test_bands_of_500_series_cover_what_comes():
    y = walks(500, 34)
    f = Forecaster("local_level").fit(y[:30])
    low, high = f.predict_interval(4, 0.95).unbind(-1)
    assert low.shape == (4, 500) and 0.90 <= coverage(y[30:], low, high) <= 0.98
    low, high = f.predict_interval(4, 0.5).unbind(-1)
    assert 0.42 <= coverage(y[30:], low, high) <= 0.58


# The choice.


def test_the_choice_finds_a_season():
    g = torch.Generator().manual_seed(2)
    season = torch.tensor([0.0, 4.0, -3.0, -1.0]).repeat(10)
    y = season + torch.randn(40, generator=g, dtype=torch.float64).cumsum(0) / 4 + torch.randn(40, generator=g) / 3
    f = Forecaster("structural", season=4, horizon=4).fit(y[:36])
    choice = f.choices_[0]
    seasonal = [c.label for c in candidates_of(("structural",), y[:36], 4)]
    assert all("season of 4" in label for label in seasonal) and set(choice.trials) == set(seasonal)
    assert {c.family for c in candidates_of(AUTO, y[:36], 4)} == set(AUTO)
    best = min(trial.score for trial in choice.trials.values())
    assert choice.trials[choice.found.candidate.label].score <= 1.02 * best
    assert (f.predict(4).mean - y[36:]).abs().mean() < (y[35] - y[36:]).abs().mean()


def test_a_season_takes_two_of_its_periods():
    y = walks(1, 26)[:, 0]
    assert "season" in Forecaster("structural", season=12, horizon=1).fit(y).choices_[0].found.candidate.label
    y = torch.where(torch.arange(26) % 12 == 3, torch.nan, y)  # a place of the season that is never seen
    found = Forecaster("structural", season=12, horizon=1).fit(y).choices_[0]
    assert "season" not in found.found.candidate.label and found.found.converged


def test_a_short_series_does_not_take_the_season_of_the_others():
    season = np.tile([0.0, 4.0, -3.0, -1.0], 6) + NILE[:24].numpy() / 1e3
    long = pd.Series(season, index=pd.date_range("2001-01", periods=24, freq="QS"))
    f = Forecaster("structural", horizon=1).fit({"long": long, "short": long[:8] * 2})
    labels = [choice.found.candidate.label for choice in f.choices_]
    assert f.season_ == 4 and "season" in labels[0] and "season" not in labels[1]


def test_a_short_series_has_no_choice_but_a_default():
    choice = Forecaster("structural").fit(NILE[:13]).choices_[0]
    assert choice.found.candidate.label == "damped trend" and not choice.trials
    assert choice.why == "Fewer than 10 steps can be held back, too few for a choice: it is the default."
    assert _ranked(FAMILIES["ets"](NILE, 1), {})[0].label == "ETS(A,Ad,N)"


def test_of_candidates_that_are_as_good_the_smallest_is_taken():
    options = FAMILIES["structural"](NILE, 1)
    labels = [c.label for c in options]
    trials = dict(zip(labels, [Trial(1.01, 2), Trial(1.0, 3), Trial(math.nan, 0), Trial(1.5, 1)], strict=True))
    assert [c.label for c in _ranked(options, trials)] == [labels[0], labels[1], labels[3], labels[2]]


def test_origins_leave_two_seasons_before_and_a_horizon_behind():
    assert held_back(144, 12, 12) == ([*range(90, 133, 6)], 12)
    assert held_back(100, 50, 1) == ([50, 60, 70, 80], 20)  # a fifth at most
    assert held_back(36, 12, 12) == ([25, 29], 7)
    assert held_back(11, 4, 1) == ([], 2)


def test_the_order_of_an_autoregression_is_that_of_the_least_aicc():
    g = torch.Generator().manual_seed(3)
    e, y = torch.randn(300, generator=g, dtype=torch.float64), [0.0, 0.0, 0.0]
    for value in e.tolist():
        y.append(0.5 * y[-1] - 0.3 * y[-2] + 0.4 * y[-3] + value)
    z = torch.tensor(y[3:])
    scores = []
    for p in range(1, 13):
        centred = (z - z.mean()).numpy()
        k = p + 2
        scores.append(300 * math.log(levinson_durbin(centred, p)[0]) + 2 * k * 300 / (300 - k - 1))
    assert autoregressive_order(z) == 1 + int(np.argmin(scores)) == 3


# Manners.


def test_what_comes_out_is_of_the_kind_of_what_went_in():
    f = SeasonalNaive()
    array = f.fit(NILE.numpy()).predict(3)
    assert isinstance(array.mean, np.ndarray) and array.mean.shape == (3,) and array.quantiles.shape == (3, 7)
    assert isinstance(f.fit(NILE).predict(3).quantiles, torch.Tensor)
    index = pd.date_range("2001-01", periods=100, freq="MS", name="month")
    series = pd.Series(NILE.numpy(), index=index, name="flow")
    mean, quantiles, levels = f.fit(series).predict(3)
    assert f.season_ == 12 and np.array_equal(mean, NILE[88:91])
    assert list(mean.index) == list(pd.date_range("2009-05", periods=3, freq="MS")) and mean.name == "flow"
    assert list(quantiles.columns) == list(levels) and np.array_equal(quantiles[0.5], mean)
    assert list(f.predict_interval(2).columns) == ["lower", "upper"]
    years = series.set_axis(pd.RangeIndex(1871, 1971))
    assert list(f.fit(years).predict(2).mean.index) == [1971, 1972] and f.season_ == 1
    periods = series.set_axis(pd.period_range("2001Q1", periods=100, freq="Q"))
    assert str(f.fit(periods).predict(1).mean.index[0]) == "2026Q1" and f.season_ == 4
    frame = pd.DataFrame({"a": series, "b": series * 2})
    mean, quantiles, _ = f.fit(frame).predict(2)
    assert list(mean.columns) == ["a", "b"] and quantiles["b"].shape == (2, 7)
    assert Forecaster("local_level").fit(series).predict(1).mean.index[0] == index[-1] + index.freq
    with pytest.raises(ArgumentError, match="no regular frequency"):
        f.fit(series.drop(index[4]))
    with pytest.raises(ArgumentError, match="does not say what comes next"):
        f.fit(years.drop(1900))


def test_series_of_any_lengths_in_a_dictionary_are_those_alone():
    given = {"long": NILE, "short": NILE[20:70].numpy()}
    mean, quantiles, _ = Forecaster("local_level").fit(given).predict(4)
    assert isinstance(mean["short"], np.ndarray) and isinstance(quantiles["long"], torch.Tensor)
    for name, y in given.items():
        alone = Forecaster("local_level").fit(y).predict(4)
        np.testing.assert_allclose(mean[name], alone.mean, rtol=1e-4)
        np.testing.assert_allclose(quantiles[name], alone.quantiles, rtol=1e-4)


def test_update_moves_the_end_and_keeps_the_parameters():
    f = Forecaster("local_level").fit(NILE[:80])
    values = f.choices_[0].found.values
    f.update(NILE)
    model = (Level() + Irregular()).set(**{"level.variance": values[0], "irregular.variance": values[1]})
    torch.testing.assert_close(f.predict(2).mean, model.forecast(NILE, 2).mean[:, 0])
    assert torch.equal(f.choices_[0].found.values, values)
    with pytest.raises(ArgumentError, match="the series are a, those that were fitted y"):
        f.update({"a": NILE})


def test_a_forecaster_has_the_manners_of_scikit_learn():
    f = Forecaster("sarimax", season=12)
    assert clone(f).get_params() == f.get_params() == {"model": "sarimax", "season": 12, "horizon": None, "log": None}
    assert f.set_params(model="local_level", season=1) is f and f.model == "local_level"
    f.fit(NILE)
    again = pickle.loads(pickle.dumps(f))
    assert torch.equal(again.predict(5).quantiles, f.predict(5).quantiles)
    assert torch.equal(again.update(NILE[:90]).predict(1).mean, f.update(NILE[:90]).predict(1).mean)
    with pytest.raises(ArgumentError, match="did you mean 'season'"):
        f.set_params(saeson=1)


BAD = [
    ({}, [math.nan] * 8, r"y has no observation: all of its 8 values are missing"),
    ({}, [1.0, 2.0, math.inf, 3.0, 4.0], r"y has an infinite value in row 2"),
    ({}, [5.0] * 9, r"y is constant: all of its 9 observations are 5"),
    ({}, [1.0, 2.0, math.nan, 3.0], r"y has 3 observations, expected 5 or more"),
    ({}, np.ones((2, 3, 4)), r"shape \(2, 3, 4\), expected \(T,\), or \(T, S\)"),
    ({}, {"a": NILE, "b": [1.0] * 9}, r"fit: b is constant"),
    ({}, {"a": NILE, "b": [[1.0], [2.0]]}, r"series 'b' has shape \(2, 1\), expected \(T,\)"),
    ({}, {}, r"empty dictionary"),
    ({}, ["a", "b"], r"y is not a numeric array"),
    ({"model": "local-level"}, NILE, r"did you mean 'local_level'"),
    ({"season": 120}, NILE, r"y has 100 steps, which is no more than a season of 120"),
    ({"season": 0}, NILE, r"season is 0, expected a number of steps"),
    ({"horizon": 0}, NILE, r"horizon is 0, expected 1 or more steps"),
    ({"model": "structural", "season": 12}, NILE[:11], r"no more than a season of 12"),
]


@pytest.mark.parametrize("options, y, message", BAD)
def test_series_and_parameters_that_do_not_fit_are_refused_in_a_sentence(options, y, message):
    with pytest.raises(ArgumentError, match=message):
        Forecaster(**options).fit(y)


def test_questions_that_do_not_fit_are_refused_in_a_sentence():
    f = Forecaster("local_level")
    with pytest.raises(ArgumentError, match="not fitted yet"):
        f.predict(1)
    f.fit(NILE)
    for horizon in (0, -1, 2.5, True, 10**9):
        with pytest.raises(ArgumentError, match=r"horizon is .*, expected (1 or more|at most 100,000) steps"):
            f.predict(horizon)
    with pytest.raises(ArgumentError, match=r"level is 95, expected a number in 0 \.\. 1"):
        f.predict_interval(1, 95)
    with pytest.raises(ArgumentError, match="X is given, but was not in the fit"):
        f.predict(1, [[1.0]])
    with pytest.raises(ArgumentError, match=r"X has shape \(3, 1\), expected \(100, K\)"):
        f.fit(NILE, [1.0, 2.0, 3.0])
    with pytest.raises(ArgumentError, match="row 7 that is missing"):
        f.fit(NILE, torch.where(torch.arange(100) == 7, torch.nan, 1.0))
