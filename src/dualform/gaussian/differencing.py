"""How often a series is to be differenced: a test of stationarity, and how strong its season is."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError

_KPSS = 0.463
"""The 5 % point of the KPSS statistic about a level (Kwiatkowski et al. 1992, table 1)."""
_STRONG = 0.64
"""Above this a season is differenced (Hyndman and Athanasopoulos 2021, section 9.1)."""


class Decomposition(NamedTuple):
    """A series as trend + season + remainder, each ``(T,)``."""

    trend: Tensor
    season: Tensor
    remainder: Tensor


def kpss(x: Tensor, lags: int | None = None) -> float:
    """The statistic of Kwiatkowski, Phillips, Schmidt and Shin: large where a series ``(T,)`` leaves its level.

    Args:
        x: without missing values.
        lags: of the long-run variance; ``3 sqrt(T) / 13`` by default, as in R's ndiffs.

    References:
        Kwiatkowski et al. (1992), "Testing the null hypothesis of stationarity against the alternative of a unit root".
    """
    n = len(x)
    lags = int(3 * math.sqrt(n) / 13) if lags is None else lags
    e = x - x.mean()
    variance = e.square().sum()
    for k in range(1, lags + 1):
        variance = variance + 2 * (1 - k / (lags + 1)) * (e[k:] * e[:-k]).sum()
    return (e.cumsum(0).square().sum() / n / variance).item() if variance > 0 else 0.0


def decompose(x: Tensor, period: int, window: int = 11) -> Decomposition:
    """Trend and season of a series ``(T,)`` by local regressions: STL, without its robust weights.

    Args:
        x: without missing values, two periods or more.
        period: the steps of a season.
        window: how many periods a season is smoothed over, an odd number; in each a constant is fitted.

    Raises:
        ArgumentError: for fewer than two periods.

    References:
        Cleveland et al. (1990), "STL: a seasonal-trend decomposition procedure based on loess".
    """
    n, m = len(x), period
    if n < 2 * m:
        raise ArgumentError(f"decompose: the series has {n} steps, expected {2 * m} or more, two periods")
    span = math.ceil(1.5 * m / (1 - 1.5 / window))
    span, low = span + 1 - span % 2, m + 1 - m % 2
    trend = torch.zeros_like(x)
    season = trend
    for _ in range(2):
        left = x - trend
        cycle = x.new_zeros(n + 2 * m)
        for j in range(m):
            part = left[j::m]
            cycle[j::m] = _loess(part, window, 0, beyond=True)
        level = _moving(_moving(_moving(cycle, m), m), 3)
        season = cycle[m : m + n] - _loess(level, low, 1)
        trend = _loess(x - season, span, 1)
    return Decomposition(trend, season, x - trend - season)


def seasonal_strength(x: Tensor, period: int) -> float:
    """How strong a season is, from 0 to 1: ``1 - var(remainder) / var(season + remainder)`` of :func:`decompose`.

    Args:
        x: a series ``(T,)`` without missing values.
        period: the steps of a season.

    Raises:
        ArgumentError: as :func:`decompose`.

    References:
        Wang, Smith and Hyndman (2006), "Characteristic-based clustering for time series data".
    """
    found = decompose(x, period)
    whole = (found.season + found.remainder).var()
    return max(0.0, 1 - (found.remainder.var() / whole).item()) if whole > 0 else 0.0


def differences(x: Tensor, period: int) -> tuple[int, int]:
    """How often to difference a series ``(T,)``, and how often by its season: d of 0 to 2 and D of 0 or 1.

    D is 1 where the season is strong. What is left is differenced until the KPSS test no longer rejects at 5 %. Missing
    values are interpolated for this.

    Args:
        x: NaN is missing.
        period: the steps of a season; 1 for none.

    References:
        Hyndman and Khandakar (2008), "Automatic time series forecasting: the forecast package for R"; the measure of
        the season is that of later versions of the package.
    """
    x, d, D = interpolated(x), 0, 0
    if period > 1 and len(x) >= 2 * period and seasonal_strength(x, period) > _STRONG:
        D, x = 1, x[period:] - x[:-period]
    while d < 2 and len(x) > 4 and not _constant(x) and kpss(x) > _KPSS:
        d, x = d + 1, x.diff()
    return d, D


def interpolated(x: Tensor) -> Tensor:
    """A series ``(T,)`` with lines across what is missing, and level before the first and after the last value."""
    here = (~x.isnan()).nonzero()[:, 0]
    if len(here) == len(x):
        return x
    at = torch.arange(len(x), device=x.device)
    right = torch.searchsorted(here, at).clamp_max(len(here) - 1)
    left = (torch.searchsorted(here, at, right=True) - 1).clamp_min(0)
    a, b = here[left], here[right]
    share = torch.where(b > a, (at - a).to(x) / (b - a).clamp_min(1), 0)
    return x[a] + share * (x[b] - x[a])


def _constant(x: Tensor) -> bool:
    return bool((x - x[0]).abs().max() <= 1e-12 * x.abs().max())


def _moving(x: Tensor, width: int) -> Tensor:
    return x.unfold(0, width, 1).mean(-1)


def _loess(x: Tensor, width: int, degree: int, beyond: bool = False) -> Tensor:
    """Local regressions of degree 0 or 1 on the ``width`` nearest values ``(T,)``; one step beyond each end as well."""
    n, q = len(x), min(width, len(x))
    at = torch.arange(-1 if beyond else 0, n + 1 if beyond else n, device=x.device)
    first = (at - (q - 1) // 2 if q < n else at * 0).clamp(0, n - q)
    index = first[:, None] + torch.arange(q, device=x.device)
    away = (index - at[:, None]).to(x)
    reach = away.abs().amax(1, keepdim=True) + (width - n) // 2 * (width > n)
    share = away.abs() / reach
    w = torch.where(share <= 0.001, 1.0, (1 - share**3) ** 3)
    w = torch.where(share <= 0.999, w, 0)
    w = w / w.sum(1, keepdim=True)
    if degree:
        middle = (w * away).sum(1, keepdim=True)
        spread = (w * (away - middle).square()).sum(1, keepdim=True)
        tilt = torch.where(spread.sqrt() > 0.001 * (n - 1), -middle / torch.where(spread > 0, spread, 1), 0)
        w = w * (tilt * (away - middle) + 1)
    return (w * x[index]).sum(1)
