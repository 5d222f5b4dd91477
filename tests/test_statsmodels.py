"""Likelihoods equal statsmodels' at the same parameters, on the series that it brings."""

import warnings

import numpy as np
import pytest
import torch

from dualform.gaussian import (
    Autoregressive,
    Cycle,
    Irregular,
    Level,
    Regression,
    Seasonal,
    Trend,
    TrigonometricSeasonal,
)
from dualform.gaussian import sarimax as ours

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    sm = pytest.importorskip("statsmodels.api")

pytestmark = pytest.mark.filterwarnings("ignore")  # of statsmodels


def data(name):
    """A series with a scale near 1; NaN where a month is missing."""
    table = getattr(sm.datasets, name).load_pandas().data
    if name == "nile":
        return table["volume"].to_numpy() / 100
    if name == "sunspots":
        return table["SUNACTIVITY"].to_numpy()[-120:] / 10
    if name == "macrodata":
        return table["unemp"].to_numpy()[:100]
    if name == "elnino":
        return table.iloc[-8:, 1:].to_numpy().ravel()
    return table["co2"].resample("MS").mean().to_numpy()[:100]


def structural(name, theirs, make):
    """Both log-likelihoods at parameters that are none's maximum, given in the order of statsmodels' names."""
    y = data(name)
    model = sm.tsa.UnobservedComponents(y, use_exact_diffuse=True, **theirs)
    params = np.linspace(0.3, 0.9, len(model.param_names))
    for k, title in enumerate(model.param_names):
        params[k] = {"frequency.cycle": 2 * np.pi / 9, "damping.cycle": 0.8, "ar.L1": 0.5, "ar.L2": 0.2}.get(
            title, params[k]
        )
    got = make(dict(zip(model.param_names, params.tolist(), strict=True)))
    return got.log_likelihood(torch.as_tensor(y)).item(), model.loglike(params)


SERIES = np.random.default_rng(0).normal(size=(100, 2))
STRUCTURAL = {
    "level": ("nile", {"level": "llevel"}, lambda p: Level(p["sigma2.level"])),
    "trend": (
        "macrodata",
        {"level": "lltrend", "autoregressive": 2},
        lambda p: (
            Trend(p["sigma2.level"], p["sigma2.trend"])
            + Autoregressive(2, coefficients=[p["ar.L1"], p["ar.L2"]], variance=p["sigma2.ar"])
        ),
    ),
    "smooth trend": ("co2", {"level": "strend"}, lambda p: Trend(0.0, p["sigma2.trend"])),
    "season": (
        "elnino",
        {"level": "llevel", "seasonal": 12},
        lambda p: Level(p["sigma2.level"]) + Seasonal(12, p["sigma2.seasonal"]),
    ),
    "harmonics": (
        "co2",
        {"level": "lltrend", "freq_seasonal": [{"period": 12, "harmonics": 3}]},
        lambda p: (
            Trend(p["sigma2.level"], p["sigma2.trend"]) + TrigonometricSeasonal(12, 3, p["sigma2.freq_seasonal_12(3)"])
        ),
    ),
    "cycle": (
        "sunspots",
        {"level": "llevel", "cycle": True, "stochastic_cycle": True, "damped_cycle": True},
        lambda p: (
            Level(p["sigma2.level"])
            + Cycle(
                2 * np.pi / p["frequency.cycle"], damping=p["damping.cycle"], variance=p["sigma2.cycle"], diffuse=True
            )
        ),
    ),
    "regression": (
        "nile",
        {"level": "llevel", "exog": SERIES},
        lambda p: Level(p["sigma2.level"]) + Regression(SERIES, beta=[p["beta.x1"], p["beta.x2"]]),
    ),
    "regression in the state": (
        "nile",
        {"level": "llevel", "exog": SERIES, "mle_regression": False},
        lambda p: Level(p["sigma2.level"]) + Regression(SERIES),
    ),
}


@pytest.mark.parametrize("case", STRUCTURAL)
def test_structural_likelihoods(case):
    name, theirs, make = STRUCTURAL[case]
    got, want = structural(name, {"irregular": True, **theirs}, lambda p: make(p) + Irregular(p["sigma2.irregular"]))
    assert abs(got - want) < 1e-6


SARIMAX = {
    "nile": ((2, 1, 1), (0, 0, 0, 0), None, "n", {"ar": [0.3, 0.1], "ma": [-0.7]}),
    "sunspots": ((3, 0, 0), (0, 0, 0, 0), None, "c", {"ar": [1.2, -0.5, 0.1]}),
    "macrodata": ((1, 2, 2), (0, 0, 0, 0), SERIES[:, :1], "n", {"ar": [0.4], "ma": [-0.9, 0.2]}),
    "elnino": (
        (1, 0, 1),
        (1, 1, 1, 12),
        None,
        "n",
        {"ar": [0.7], "ma": [0.2], "seasonal_ar": [0.3], "seasonal_ma": [-0.6]},
    ),
    "co2": ((0, 1, 1), (0, 1, 1, 12), None, "n", {"ma": [-0.4], "seasonal_ma": [-0.5]}),
}


@pytest.mark.parametrize("start", ["exact", "approximate", "simple"])
@pytest.mark.parametrize("name", SARIMAX)
def test_sarimax_likelihoods(name, start):
    order, seasonal, exog, trend, values = SARIMAX[name]
    y = data(name)
    theirs = sm.tsa.SARIMAX(
        y,
        exog,
        order=order,
        seasonal_order=seasonal,
        trend=trend,
        use_exact_diffuse=start == "exact",
        simple_differencing=start == "simple",
    )
    more = {
        "exact": {"convention": "statsmodels"},
        "approximate": {"approximate": 1e6},
        "simple": {"simple_differencing": True},
    }[start]
    model = ours(order, seasonal, exog, intercept=trend == "c", **more)
    values = {
        **({"intercept": 0.7} if trend == "c" else {}),
        **({"beta": [0.5]} if exog is not None else {}),
        **values,
        "variance": 0.6,
    }
    params = np.concatenate([np.atleast_1d(value) for value in values.values()])
    got = model.set(**values).log_likelihood(torch.as_tensor(y)).item()
    assert abs(got - theirs.loglike(params)) < 1e-6
