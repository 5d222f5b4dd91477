"""What a network sees of a series: scaled values, and simple forecasts in which it puts more or less trust."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

RATES = (0.3, 0.1)
"""The rates of the two exponential averages among the simple forecasts."""
ANCHORS = 8
"""How many simple forecasts there are."""
CHANNELS = 11
"""How many numbers a network reads at each step."""
_AGO = 3  # seasons of a seasonal mean
_FLAT = 0.05  # of the deviation: the least scale of a series whose steps are small


class View(NamedTuple):
    """Series as a network sees them, from some origins.

    Attributes:
        inputs: ``(B, T, CHANNELS)``, for each step.
        anchors: ``(B, O, H, ANCHORS)``, simple forecasts from each origin, less the last value, in units of the scale.
        last: ``(B, O)``, the last value before an origin, in the unit of the series.
        scale: ``(B,)``, the mean size of a change, in the unit of the series.
    """

    inputs: Tensor
    anchors: Tensor
    last: Tensor
    scale: Tensor


def view(x: Tensor, season: Tensor, origins: Tensor, horizon: int) -> View:
    """Scale series by what is known at the first origin, and make simple forecasts from all of them.

    The simple forecasts of h steps ahead, for a season of m steps, are: the last value; the value of the same place in
    the last season; the mean of it over three seasons; the second with the drift between the last two seasons (of 4
    steps at least), and with the drift of the whole series; the second moved by the mean change over a season, averaged
    exponentially at two rates, which without a season is the exponential average of the series; and the mean of the
    series. What begins before the series counts as the last value.

    Args:
        x: ``(B, T)``; NaN where missing, as before the beginning of a shorter series.
        season: ``(B,)``, 1 for none.
        origins: ``(O,)``, the last known step of each, in increasing order.
        horizon: H.
    """
    first_origin = int(origins[0])
    filled, first = _filled(x)
    centre, deviation, scale = _scales(x[:, : first_origin + 1], season)
    z = (filled - centre[:, None]) / scale[:, None]
    lagged = _lagged(z, season, first)
    seasonal = (season > 1)[:, None]
    change = z - lagged  # over a season
    smoothed = [_averaged(torch.where(seasonal, change, z), rate) for rate in RATES]
    inputs = _inputs(x, z, change, smoothed, season, scale / deviation)
    anchors = _anchors(z, smoothed, season, first, origins, horizon)
    return View(inputs, anchors, filled[:, origins], scale)


def _filled(x: Tensor) -> tuple[Tensor, Tensor]:
    """The last value in place of each that is missing, the first one before it; and where that is ``(B,)``."""
    seen = ~x.isnan()
    time = torch.arange(x.shape[1])
    first = torch.where(seen.any(1), seen.to(torch.int64).argmax(1), 0)
    index = torch.where(seen, time, -1).cummax(1).values
    return x.nan_to_num().gather(1, torch.maximum(index, first[:, None])), first


def _scales(x: Tensor, season: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, deviation, and the mean size of a change ``(B,)``, the smaller one of those over a step and a season."""
    centre = x.nanmean(1).nan_to_num()
    deviation = (x - centre[:, None]).square().nanmean(1).sqrt()
    deviation = torch.where(deviation > 1e-9 * (1e-30 + centre.abs()), deviation, 1.0)  # also where nothing is known
    steps = torch.arange(x.shape[1])
    before = x.gather(1, (steps - season[:, None]).clamp_min(0))
    over_season = torch.where(steps >= season[:, None], x - before, torch.nan).abs().nanmean(1)
    over_step = (x[:, 1:] - x[:, :-1]).abs().nanmean(1)
    least = torch.minimum(over_season.nan_to_num(math.inf), over_step.nan_to_num(math.inf))
    scale = torch.where(least.isfinite(), least, deviation)
    return centre, deviation, torch.maximum(scale, _FLAT * deviation)


def _lagged(z: Tensor, season: Tensor, first: Tensor) -> Tensor:
    """The value of one season ago; the value itself where there was none."""
    index = torch.arange(z.shape[1]) - season[:, None]
    return torch.where(index >= first[:, None], z.gather(1, index.clamp_min(0)), z)


def _averaged(z: Tensor, rate: float) -> Tensor:
    """``e_t = (1 - rate) e_{t-1} + rate z_t`` from ``e_0 = z_0``."""
    T = z.shape[1]
    ago = torch.arange(T)[:, None] - torch.arange(T)
    weights = torch.where(ago >= 0, rate * (1 - rate) ** ago.clamp_min(0), 0.0)
    weights[:, 0] = (1 - rate) ** torch.arange(T)
    return z @ weights.to(z.dtype).mT


def _inputs(x: Tensor, z: Tensor, change: Tensor, smoothed: list[Tensor], season: Tensor, ratio: Tensor) -> Tensor:
    step = torch.cat([torch.zeros_like(z[:, :1]), z.diff(dim=1)], 1)
    turns = 2 * math.pi * torch.arange(z.shape[1]) / season[:, None]
    seasonal = (season > 1)[:, None].to(z.dtype).expand_as(z)
    target = torch.where(seasonal > 0, change, z)
    parts = [
        z.asinh(),
        z * ratio[:, None],
        step.asinh(),
        change.asinh(),
        *((target - part).asinh() for part in smoothed),
        x.isnan().to(z.dtype),
        ratio.log()[:, None].expand_as(z),
        seasonal,
        seasonal * torch.sin(turns),
        seasonal * season.log()[:, None] / 3,
    ]
    return torch.stack(parts, -1)


def _anchors(z: Tensor, smoothed: list[Tensor], season: Tensor, first: Tensor, origins: Tensor, horizon: int) -> Tensor:
    """See :func:`view`."""
    ahead, m = torch.arange(1, horizon + 1), season[:, None, None]
    seasons = -(-ahead // m)  # (B, 1, H), how many of them ago the same place was seen
    last = z[:, origins, None]  # (B, O, 1)

    def value(index: Tensor) -> tuple[Tensor, Tensor]:
        """Values at steps ``(B, O, H)``, and whether the series has begun there."""
        there = index >= first[:, None, None]
        found = z.gather(1, index.clamp_min(0).flatten(1)).view(index.shape)
        return torch.where(there, found, last), there

    same = origins[:, None] + ahead - m * seasons
    naive, _ = value(same)
    ago, known = zip(*(value(same - k * m) for k in range(_AGO)), strict=True)
    weight = torch.stack(known).to(z.dtype)
    weight[0] = 1
    mean = (torch.stack(ago) * weight).sum(0) / weight.sum(0)
    drift = _drift(z, season.clamp_min(4), first, origins)[..., None]
    passed = torch.where(m > 1, m * seasons, ahead)
    whole = origins - first[:, None]
    begin = z.gather(1, first[:, None])
    overall = (z[:, origins] - begin) / whole.clamp_min(1)
    moved = [torch.where(m > 1, naive + e[:, origins, None], e[:, origins, None]) for e in smoothed]
    sums = torch.cat([torch.zeros_like(z[:, :1]), z.cumsum(1)], 1)
    centre = (sums[:, origins + 1] - sums.gather(1, first[:, None])) / (whole + 1).clamp_min(1)
    centre = torch.where(whole >= 0, centre, z[:, origins])
    found = [
        last.expand_as(naive),
        naive,
        mean,
        naive + passed * drift,
        naive + passed * overall[..., None],
        *moved,
        centre[..., None].expand_as(naive),
    ]
    return torch.stack(found, -1) - last[..., None]


def _drift(z: Tensor, width: Tensor, first: Tensor, origins: Tensor) -> Tensor:
    """The mean of the last ``width`` steps less that of as many before, per step ``(B, O)``; 0 before there are any."""
    sums = torch.cat([torch.zeros_like(z[:, :1]), z.cumsum(1)], 1)
    end = (origins + 1).expand(len(z), -1)
    start, middle = end - 2 * width[:, None], end - width[:, None]
    at = [sums.gather(1, place.clamp_min(0)) for place in (start, middle, end)]
    drift = (at[2] - 2 * at[1] + at[0]) / width[:, None] ** 2
    return torch.where(start >= first[:, None], drift, 0.0)
