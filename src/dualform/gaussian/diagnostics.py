"""Tests of standardised innovations, which are independent standard normal numbers if a model is right."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError


class Statistic(NamedTuple):
    """The statistic of a test, and how probable one as extreme is if the model is right."""

    value: float
    p_value: float


class Diagnostics(NamedTuple):
    """Three tests of standardised innovations."""

    innovations: Tensor  # (T,), NaN where missing or before the state is determined
    ljung_box: Statistic  # no autocorrelation up to `lags`
    lags: int
    normality: Statistic  # of Jarque and Bera
    skewness: float
    kurtosis: float
    heteroskedasticity: Statistic  # the same variance in the last third as in the first


def diagnose(innovations: Tensor, lags: int | None = None, parameters: int = 0) -> Diagnostics:
    """Test standardised innovations ``(T,)``.

    Args:
        innovations: NaN is left out: at the start, and where observations are missing.
        lags: of the Ljung-Box test; 10 by default, or a fifth of their number.
        parameters: how many degrees of freedom the Ljung-Box test gives up, for those that were estimated.

    Raises:
        ArgumentError: for fewer than 5 innovations, and lags that are not between the parameters and their number.

    References:
        Ljung and Box (1978), "On a measure of lack of fit in time series models"; Jarque and Bera (1987), "A test for
        normality of observations and regression residuals"; Harvey (1989), section 5.4.2, for the last.
    """
    seen = (~innovations.isnan()).nonzero()[:, 0]
    e = innovations[int(seen[0]) :] if len(seen) else innovations[:0]
    here = ~e.isnan()
    n = int(here.sum())
    if n < 5:
        raise ArgumentError(f"diagnose: there are {n} innovations, expected 5 or more")
    lags = min(10, n // 5) if lags is None else lags
    if not parameters < lags < n:
        raise ArgumentError(f"diagnose: lags is {lags}, expected more than {parameters} and less than {n}")
    mean = e[here].mean()
    z = torch.where(here, e - mean, 0)
    variance = z.square().sum()
    correlation = torch.stack([(z[k:] * z[: len(z) - k]).sum() / variance for k in range(1, lags + 1)])
    weights = torch.tensor([n - k for k in range(1, lags + 1)], dtype=e.dtype, device=e.device)
    q = n * (n + 2) * (correlation.square() / weights).sum().item()
    box = Statistic(q, chi2_sf(q, lags - parameters))
    c = e[here] - mean
    m2 = c.square().mean()
    skew, kurt = (c**3).mean().div(m2**1.5).item(), (c**4).mean().div(m2**2).item()
    jb = n / 6 * (skew**2 + (kurt - 3) ** 2 / 4)
    third = round(len(e) / 3)
    ends = [part[~part.isnan()] for part in (e[:third], e[-third:])]
    first, last = (part.square().sum().item() for part in ends)
    ratio = last / first if first else math.inf
    upper = f_sf(ratio, len(ends[1]), len(ends[0])) if len(ends[0]) and len(ends[1]) else math.nan
    two_sided = Statistic(ratio, 2 * min(upper, 1 - upper))
    return Diagnostics(innovations, box, lags, Statistic(jb, chi2_sf(jb, 2)), skew, kurt, two_sided)


def chi2_sf(x: float, df: float) -> float:
    """The probability of more than x under the chi-squared distribution."""
    both = torch.tensor([df / 2, x / 2], dtype=torch.float64)
    return torch.special.gammaincc(both[0], both[1]).item()


def f_sf(x: float, df1: float, df2: float) -> float:
    """The probability of more than x under the F distribution."""
    if math.isinf(x):
        return 0.0
    return _beta(df2 / 2, df1 / 2, df2 / (df2 + df1 * x))


def _beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function, by its continued fraction (Press et al., "Numerical recipes", 6.4)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _beta(b, a, 1 - x)
    front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    tiny, c = 1e-300, 1.0
    d = 1 - (a + b) * x / (a + 1)
    d = 1 / (d or tiny)
    h = d
    for m in range(1, 500):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / ((1 + term * d) or tiny)
            c = (1 + term / c) or tiny
            h *= d * c
        if abs(d * c - 1) < 1e-15:
            break
    return math.exp(front) / a * h
