"""The families of models that a forecaster chooses from: each says which candidates a series has.

A family is one entry of :data:`FAMILIES`: a function of a series and its season that gives :class:`Candidate` models.
What a candidate makes is a module like a :class:`~dualform.gaussian.built.Built`: ``fit(y)`` estimates its parameters
and says how, ``forecast(y, horizon)`` has a mean and a covariance, and ``expand(S)`` makes one model of S series, which
takes their ``lengths`` in both. One with ``components(y)`` has a table and a picture of them. A forecast may also be a
:class:`~dualform.forecast.distribution.Table` of quantiles, and a model that is ``shared`` is kept for all series
that it was fitted to.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.forecast.deep.direct import Direct
from dualform.gaussian.components import (
    Cycle,
    Irregular,
    Level,
    Regression,
    Seasonal,
    Trend,
)
from dualform.gaussian.ets import Ets, ets
from dualform.gaussian.sarimax import Sarimax, sarimax
from dualform.gaussian.structural import Component, Structural

_LONG = 40  # observations from which a cycle is looked for
_MOST = 12  # the highest order of an autoregression


@dataclass(frozen=True)
class Candidate:
    """A model that may suit a series: ``make(X)`` builds it, X being covariates ``(T, K)`` or None.

    ``label`` says what it is, and no two candidates of a series have the same. ``needs`` is how many observations it
    takes to estimate it. ``default`` marks what is taken of a series that is too short for a choice.
    """

    family: str
    label: str
    make: Callable[[Tensor | None], Any]
    needs: int
    default: bool = False


Family = Callable[[Tensor, int], list[Candidate]]


def local_level(y: Tensor, season: int) -> list[Candidate]:
    """A level that moves, and noise; no season."""
    return [Candidate("local_level", "local level", partial(_sum, (Level, Irregular)), 5)]


def structural(y: Tensor, season: int) -> list[Candidate]:
    """Levels and trends, damped ones too, each with the season; without one, a cycle where the series is long.

    Args:
        y: the series ``(T,)``, NaN where missing.
        season: steps, 1 for none.
    """
    damped = partial(Trend, damped=True)
    parts: dict[str, tuple[Callable[[], Component], ...]] = {
        "local level": (Level,),
        "local linear trend": (Trend,),
        "damped trend": (damped,),
    }
    suffix, states = "", 1
    if season > 1:
        parts = {name: (*group, partial(Seasonal, season)) for name, group in parts.items()}
        suffix, states = f" + season of {season}", season
    elif (count := int((~y.isnan()).sum())) >= _LONG:
        parts["cycle"] = (Level, partial(Cycle, bounds=(3.0, count / 3)))
    return [
        Candidate(
            "structural",
            f"{name}{suffix}",
            partial(_sum, (*group, Irregular)),
            _enough(season, states + 6),
            name == "damped trend",
        )
        for name, group in parts.items()
    ]


def seasonal_arima(y: Tensor, season: int) -> list[Candidate]:
    """Few orders that suit most series; without a season, also the autoregression that suits this one best.

    Args:
        y: the series ``(T,)``, NaN where missing.
        season: steps, 1 for none.
    """
    if season > 1:
        s = season
        orders: list[Any] = [
            ((0, 1, 1), (0, 1, 1, s), False),
            ((2, 1, 0), (0, 1, 1, s), False),
            ((1, 0, 0), (0, 1, 1, s), True),
        ]
    else:
        none = (0, 0, 0, 0)
        orders = [((0, 1, 1), none, True), ((1, 1, 1), none, False), ((0, 2, 2), none, False)]
        orders.append(((autoregressive_order(y), 0, 0), none, True))
    found = []
    for order, seasonal, intercept in orders:
        tail = f"({seasonal[0]},{seasonal[1]},{seasonal[2]})[{season}]" if season > 1 else ""
        label = f"{'S' * (season > 1)}ARIMA{str(order).replace(' ', '')}{tail}{' with intercept' if intercept else ''}"
        make = partial(_sarimax, order, seasonal, intercept)
        needs = _enough(season, 2 * order[0] + order[1] + 6)
        found.append(Candidate("sarimax", label, make, needs))
    return found


def smoothing(y: Tensor, season: int) -> list[Candidate]:
    """Exponential smoothing where everything adds, whose bands are exact: no trend, a trend, a damped one.

    Args:
        y: the series ``(T,)``, NaN where missing.
        season: steps, 1 for none.
    """
    found = []
    for trend, letters, states in (("none", "N", 1), ("additive", "A", 2), ("damped", "Ad", 2)):
        label = f"ETS(A,{letters},{'A' if season > 1 else 'N'})" + (f"[{season}]" if season > 1 else "")
        needs = _enough(season, states + (season if season > 1 else 0) + 6)
        found.append(Candidate("ets", label, partial(_ets, trend, season), needs, trend == "damped"))
    return found


def deep(
    y: Tensor,
    season: int,
    *,
    backbone: str = "s4d",
    horizon: int | None = None,
    steps: int = 400,
    seed: int = 0,
    weights: str | os.PathLike[str] | None = None,
) -> list[Candidate]:
    """A network that says quantiles of the next steps, of all series the same one.

    It is trained on the series that are fitted, or, with ``weights``, it was trained before, on synthetic ones.
    ``Forecaster(partial(deep, weights=folder))`` forecasts with such a network.

    Args:
        y: the series ``(T,)``, NaN where missing.
        season: steps, 1 for none.
        backbone: as in :class:`~dualform.forecast.deep.direct.Direct`, with all that follows.
        horizon: how many steps the network looks ahead at once.
        steps: of training, at most.
        seed: of all that is random.
        weights: a folder of a network that was trained before.
    """
    label = "deep" if weights is None else f"deep, {Path(weights).name}"
    label += f", season of {season}" if season > 1 else ""
    options = {"backbone": backbone, "horizon": horizon, "steps": steps, "seed": seed, "weights": weights}
    return [Candidate("deep", label, partial(_direct, season, options), 5)]


FAMILIES: dict[str, Family] = {
    "local_level": local_level,
    "structural": structural,
    "sarimax": seasonal_arima,
    "ets": smoothing,
    "deep": deep,
}
"""The families by name. A new one is an entry here, and, if ``auto`` is to choose from it, in :data:`AUTO`."""

AUTO = ("local_level", "structural", "sarimax")
"""The families that ``auto`` chooses from."""


def called(family: str | Family) -> str:
    """The name of a family, or of the function that it is."""
    return family if isinstance(family, str) else getattr(getattr(family, "func", family), "__name__", "a family")


def candidates_of(names: tuple[str | Family, ...], y: Tensor, season: int) -> list[Candidate]:
    """The candidates of some families for a series, those that it is long enough for; each label once.

    Args:
        names: of the families, or families themselves.
        y: the series ``(T,)``, NaN where missing.
        season: steps, 1 for none.
    """
    count, found = int((~y.isnan()).sum()), {}
    for name in names:
        for candidate in (FAMILIES[name] if isinstance(name, str) else name)(y, season):
            if count >= candidate.needs:
                found.setdefault(candidate.label, candidate)
    return list(found.values())


def autoregressive_order(y: Tensor) -> int:
    """The order, 1 to 12, of the autoregression with the least AICc, by the recursion of Levinson and Durbin.

    Args:
        y: the series ``(T,)``; missing values count as the mean.

    References:
        Brockwell and Davis (1991), "Time series: theory and methods", sections 8.2 and 9.3.
    """
    seen = ~y.isnan()
    n, z = int(seen.sum()), torch.where(seen, y - y[seen].mean(), 0.0)
    most = max(1, min(_MOST, n // 8))
    r = [(z[k:] * z[: len(z) - k]).sum().item() / n for k in range(most + 1)]
    phi: list[float] = []
    variance, best = r[0], (float("inf"), 1)
    for p in range(1, most + 1):
        if variance <= 0:
            break
        last = (r[p] - sum(f * r[p - 1 - i] for i, f in enumerate(phi))) / variance
        phi = [f - last * phi[-1 - i] for i, f in enumerate(phi)] + [last]
        variance *= 1 - last**2
        if variance > 0 and n > p + 3:
            k = p + 2
            aicc = n * torch.tensor(variance).log().item() + 2 * k * n / (n - k - 1)
            best = min(best, (aicc, p))
    return best[1]


def _enough(season: int, states: int) -> int:
    """Observations: two seasons of a model that has one, and more than there are states."""
    return max(states, 2 * season if season > 1 else 0)


def _sum(parts: tuple[Callable[[], Component], ...], X: Tensor | None) -> Structural:
    return Structural(*(part() for part in parts), *([] if X is None else [Regression(X)]))


def _ets(trend: str, season: int, X: Tensor | None) -> Ets:
    if X is not None:
        raise ArgumentError("ets: exponential smoothing takes no covariates", hint="use structural or sarimax")
    return ets("additive", trend, "additive" if season > 1 else "none", season if season > 1 else None)


def _direct(season: int, options: dict[str, Any], X: Tensor | None) -> Direct:
    if X is not None:
        raise ArgumentError("deep: the network takes no covariates", hint="use structural or sarimax")
    return Direct(season, **options)


def _sarimax(order: Any, seasonal: Any = (0, 0, 0, 0), intercept: bool = False, X: Tensor | None = None) -> Sarimax:
    return sarimax(order, seasonal, X, intercept=intercept)
