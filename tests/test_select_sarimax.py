"""Choosing the orders of seasonal ARIMA models: the differences, the steps, and R's choice."""

import math
import warnings

import numpy as np
import pytest
import torch

from airline import PASSENGERS
from dualform.core.errors import ArgumentError
from dualform.gaussian import sarimax, select_sarimax
from dualform.gaussian.differencing import decompose, differences, interpolated, kpss, seasonal_strength
from dualform.gaussian.sarimax_selection import _roots, _way
from dualform.gaussian.selection import candidate
from vectors import close, load

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("statsmodels.api")
    from statsmodels.tsa.seasonal import STL
    from statsmodels.tsa.stattools import kpss as their_kpss

pytestmark = pytest.mark.filterwarnings("ignore")  # of statsmodels
NILE = load("nile_local_level")["y"]


@pytest.mark.parametrize(("y", "m"), [(PASSENGERS.log(), 12), (PASSENGERS[:30], 4), (PASSENGERS[:27], 12)])
def test_the_decomposition_equals_statsmodels(y, m):
    """Of even periods: for odd ones statsmodels does not take the paper's window of the low-pass filter."""
    want = STL(y.numpy(), period=m, seasonal=11, seasonal_deg=0, low_pass=m + 1).fit(inner_iter=2, outer_iter=0)
    got = decompose(y, m)
    close(got.trend, torch.as_tensor(want.trend), 1e-12)
    close(got.season, torch.as_tensor(want.seasonal), 1e-11)
    close(got.remainder, torch.as_tensor(want.resid), 1e-10)
    strength = 1 - np.var(want.resid) / np.var(want.resid + want.seasonal)
    assert abs(seasonal_strength(y, m) - max(0, strength)) < 1e-10


@pytest.mark.parametrize("lags", [0, 3, 7])
def test_the_statistic_equals_statsmodels(lags):
    assert abs(kpss(NILE, lags) - their_kpss(NILE.numpy(), nlags=lags)[0]) < 1e-12


def test_differences():
    """As R's nsdiffs and ndiffs have them."""
    assert differences(PASSENGERS.log(), 12) == (1, 1)
    assert differences(NILE, 1) == (1, 0)
    noise = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert differences(noise, 4) == (0, 0) and differences(noise.cumsum(0).cumsum(0), 1) == (2, 0)
    assert differences(torch.ones(20, dtype=torch.float64), 4) == (0, 0)
    gaps = torch.tensor([math.nan, 1.0, math.nan, math.nan, 4.0, 2.0, math.nan], dtype=torch.float64)
    close(interpolated(gaps), torch.tensor([1.0, 1.0, 2.0, 3.0, 4.0, 2.0, 2.0], dtype=torch.float64), 0)


@pytest.mark.parametrize(("d", "s"), [(0, 12), (1, 12), (2, 12), (0, 1)])
def test_steps_lead_to_the_best_within_the_bounds(d, s):
    """With a criterion that has one minimum."""
    tried, best = {}, (3, 1, 2 * (s > 1), 1 * (s > 1))
    way = _way(d, 0, s, (5, 5, 2, 2), tried)
    for spec in way:
        assert spec not in tried and spec.d == d and 0 <= spec.p <= 5 and 0 <= spec.q <= 5 and max(spec.P, spec.Q) <= 2
        assert d < 2 or not spec.intercept
        away = sum((a - b) ** 2 for a, b in zip((spec.p, spec.q, spec.P, spec.Q), best, strict=True)) + spec.intercept
        tried[spec] = candidate(str(spec), -float(away), 1, 10**6), {}
    found = min(tried, key=lambda spec: tried[spec][0].aicc)
    assert (found.p, found.q, found.P, found.Q) == best and not found.intercept
    assert len(tried) < 60


def test_the_root_that_is_closest_to_the_unit_circle():
    model = sarimax((2, 0, 1), (0, 0, 1, 4)).set(ar=[0.5, 0.3], ma=[0.4], seasonal_ma=[-0.6])
    whole = [np.roots([-0.3, -0.5, 1]), np.roots([0.4, 1]), np.roots([-0.6, 0, 0, 0, 1])]
    assert abs(_roots(model) - min(abs(np.concatenate(whole)))) < 1e-10


def test_the_choice_of_r_and_series_of_a_batch():
    """auto.arima(Nile): ARIMA(1,1,1), AICc 1267.51. Another unit has the same orders."""
    found, other = select_sarimax(torch.stack([NILE, NILE / 100])[..., None], most=(1, 1, 0, 0))
    assert found.model.orders[:3] == other.model.orders[:3] == (1, 1, 1)
    assert round(found.fit.aicc, 2) == 1267.51 and found.fit.converged
    assert abs(found.fit.aicc - found.candidates[0].aicc) < 1e-2
    assert abs(other.fit.aicc - found.fit.aicc + 2 * 99 * math.log(100)) < 1e-4
    assert found.summary().startswith("differenced d = 1\n")
    close(found.forecast(3).mean, found.model.forecast(NILE, 3).mean, 1e-12)


def test_missing_values_and_given_differences():
    y = NILE[:20].clone()
    y[7] = math.nan
    found = select_sarimax(y, d=0, most=(1, 0, 0, 0))
    assert found.fit.n_obs == 19 and all(name.startswith("SARIMA(") for name, *_ in found.candidates)
    assert len(found.candidates) == 3


def test_errors():
    for message, call in {
        "period is 0": lambda: select_sarimax(NILE, 0),
        "d is -1": lambda: select_sarimax(NILE, d=-1),
        "most is": lambda: select_sarimax(NILE, most=(5, 5)),
        "D is 1 without a season": lambda: select_sarimax(NILE, D=1),
        "too few for any model": lambda: select_sarimax(NILE[:2]),
        "8 or more, two periods": lambda: decompose(NILE[:7], 4),
    }.items():
        with pytest.raises(ArgumentError, match=message):
            call()
