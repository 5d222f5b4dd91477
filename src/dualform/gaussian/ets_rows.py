"""Series under exponential smoothing as rows: where they begin, their innovations, likelihood, states and paths."""

import math
from typing import Any

import torch
from torch import Tensor

from dualform.gaussian.arrays import Door
from dualform.gaussian.ets_equations import Kind, predictions, unfold


class Rows:
    """The series of one call as rows ``(R, T)``, 0 where missing."""

    def __init__(self, kind: Kind, door: Door, full: tuple[int, ...], y: Tensor, ends: Tensor | None):
        seen = ~y.isnan()
        if ends is not None:
            seen = seen & (torch.arange(y.shape[1], device=y.device) < ends[:, None])
        self.kind, self.door, self.full, self.ends = kind, door, full, ends
        self.y, self.seen = y.nan_to_num(0.0), seen

    def predicted(self, numbers: Tensor, copies: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Innovations, 0 where missing; predictions; and which were seen; of ``copies`` of the series."""
        y, seen = (z.repeat(copies, 1) for z in (self.y, self.seen))
        mean = predictions(self.kind, numbers.expand(len(y), -1), y, None if seen.all() else seen)
        e = y - mean if self.kind.error == "additive" else (y - mean) / mean
        return torch.where(seen, e, 0), mean, seen

    def states(self, numbers: Tensor) -> Tensor:
        """The numbers with the states after each series in place of the first ones ``(R, 6 + m)``."""
        numbers, m = numbers.expand(len(self.y), -1), self.kind.period
        there = None if self.seen.all() else list(self.seen.to(numbers).unbind(-1))
        run = unfold(self.kind, list(numbers.unbind(-1)), list(self.y.unbind(-1)), there)
        kept = [[numbers[:, 4], *run.level], [numbers[:, 5], *run.slope], run.season]
        level, slope, season = (torch.stack(z, -1) if z else numbers[:, 6:] for z in kept)
        end = self.ends if self.ends is not None else torch.full_like(level[:, 0], self.y.shape[1], dtype=torch.int64)
        end = end[:, None]
        later = season.gather(1, end + torch.arange(m, device=end.device)) if m else season
        return torch.cat([numbers[:, :4], level.gather(1, end), slope.gather(1, end), later], 1)

    def out(self, *results: Tensor, timed: bool = False) -> Any:
        """Results ``(R, ...)`` with the batch axes of the call, of the kind of the series."""
        return self.door.out(*(z.reshape(*self.full, *z.shape[1:]) for z in results), timed=timed)


def variance_of(e: Tensor, seen: Tensor) -> Tensor:
    """The variance of the innovations that maximises the likelihood."""
    return e.square().sum(-1) / seen.sum(-1).clamp_min(1)


def log_likelihood(kind: Kind, e: Tensor, mean: Tensor, seen: Tensor) -> Tensor:
    """The log-likelihood of innovations at their best variance ``(R,)``."""
    n = seen.sum(-1)
    variance = torch.where(n > 0, variance_of(e, seen), 1)
    value = -(n / 2) * ((2 * math.pi * variance).log() + 1)
    if kind.error == "multiplicative":
        value = value - torch.where(seen, mean.abs(), 1).log().sum(-1)
    return value


def continued(kind: Kind, now: Tensor, e: Tensor) -> Tensor:
    """Observations after the states ``(R, 6 + m)``, with innovations ``(draws, R, horizon)``."""
    made: list[Tensor] = []
    state: list[Any] = [z.expand(e.shape[:2]) for z in now.unbind(-1)]
    for t in range(e.shape[-1]):
        prediction = unfold(kind, state, [0.0], [0.0]).prediction[0]
        shock = e[..., t] * prediction if kind.error == "multiplicative" else e[..., t]
        after = unfold(kind, state, [prediction + shock], None)
        state = [*state[:4], after.level[0], after.slope[0], *after.season[1:]]
        made.append(prediction + shock)
    return torch.stack(made, -1)


def first_states(kind: Kind, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where series ``(R, T)`` begin: level ``(R,)``, slope ``(R,)`` and season ``(R, m)``, by their first years.

    The season is the mean, over up to five periods, of what a centred moving average leaves of the series. Level and
    slope are those of a line through the first ten values, or as many as a period has, without the season; of a class
    without a trend, the level is their mean. NaN is left out.

    References:
        Hyndman et al. (2008), section 2.6.1.
    """
    m, count = kind.period, max(10, kind.period)
    season = y.new_zeros(len(y), m)
    early = y
    if m:
        multiplied = kind.season == "multiplicative"
        length = m * min(5, y.shape[1] // m)
        x = y[:, :length]
        average = x.unfold(1, m, 1).nanmean(-1)
        if m % 2 == 0:
            average = (average[:, 1:] + average[:, :-1]) / 2
        middle = x[:, m // 2 : m // 2 + average.shape[1]]
        left = middle / average if multiplied else middle - average
        left = torch.nn.functional.pad(left, (m // 2, length - m // 2 - left.shape[1]), value=torch.nan)
        season = left.reshape(len(y), -1, m).nanmean(1)
        season = season.nan_to_num(float(multiplied))
        mean = season.mean(-1, keepdim=True)
        season = season / mean if multiplied else season - mean
        whole = season.repeat(1, -(-y.shape[1] // m))[:, : y.shape[1]]
        early = y / whole if multiplied else y - whole
    # The line goes through the first values that there are, wherever a series begins.
    here = ~early.isnan()
    here = here & (here.cumsum(-1) <= count)
    time = torch.arange(1, y.shape[1] + 1, dtype=y.dtype, device=y.device).expand_as(early)
    n = here.sum(-1).clamp_min(1)
    t0, y0 = (torch.where(here, z, 0).sum(-1) / n for z in (time, early))
    dt, dy = (torch.where(here, z - z0[:, None], 0) for z, z0 in ((time, t0), (early, y0)))
    spread = dt.square().sum(-1)
    slope = (dt * dy).sum(-1) / torch.where(spread > 0, spread, 1)
    return (y0 if kind.trend == "none" else y0 - slope * t0), slope, season
