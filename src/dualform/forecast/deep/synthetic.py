"""Series of many kinds, drawn at random: what a forecaster learns from that is to forecast series it has never seen."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from dualform.core.errors import ArgumentError
from dualform.core.linalg import matvec
from dualform.gaussian.constraints import from_partial

SEASONS = (1, 1, 1, 4, 6, 7, 12, 12, 24)
"""The seasons that are drawn, each as likely as it is often here; 1 is none."""
_ORDER = 6  # the highest order of an autoregression
_JITTER = 1e-6


class Synthetic(NamedTuple):
    """Series that were drawn, and what they are.

    Attributes:
        y: ``(count, length)``, float64; NaN where a value is missing.
        season: ``(count,)``, in steps; 1 for none.
        kind: of each, a key of :data:`KINDS`.
    """

    y: Tensor
    season: Tensor
    kind: list[str]


def synthetic(count: int, length: int, generator: Generator) -> Synthetic:
    """Draw series: Gaussian processes, structural models, autoregressions, and changes of regime, as many of each.

    A quarter of them is the exponential of what was drawn, so that changes grow with the level; some have outliers, a
    tenth is rounded to counts, and a fifth has values that are missing, in blocks or here and there.

    Args:
        count: how many.
        length: T, 2 steps or more.
        generator: source of randomness; the same one gives the same series.

    Raises:
        ArgumentError: for a count below 1, or a length below 2.
    """
    if count < 1 or length < 2:
        raise ArgumentError(f"synthetic: count {count} and length {length}, expected 1 and 2 or more")
    draw = _Draw(generator)
    season = torch.tensor(SEASONS)[draw.whole(len(SEASONS), count)]
    numbers = draw.whole(len(KINDS), count)
    y = torch.empty(count, length, dtype=torch.float64)
    for number, make in enumerate(KINDS.values()):
        rows = (numbers == number).nonzero()[:, 0]
        if len(rows):
            y[rows] = standard(make(season[rows], length, draw))
    names = [*KINDS]
    return Synthetic(_observed(y, draw), season, [names[number] for number in numbers.tolist()])


def standard(y: Tensor) -> Tensor:
    """Each series ``(B, T)`` with mean 0 and deviation 1; one that does not change is 0."""
    centred = y - y.mean(1, keepdim=True)
    return centred / centred.std(1, keepdim=True).clamp_min(1e-9)


class _Draw:
    """Random numbers of one generator, in float64."""

    def __init__(self, generator: Generator):
        self.generator = generator

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=self.generator, dtype=torch.float64)

    def scale(self, low: float, high: float, *shape: int) -> Tensor:
        """Numbers that are uniform in their logarithm."""
        return self.uniform(math.log(low), math.log(high), *shape).exp()

    def some(self, share: float, *shape: int) -> Tensor:
        """True with a probability."""
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64) < share

    def whole(self, below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=self.generator)


def gaussian_processes(season: Tensor, length: int, draw: _Draw) -> Tensor:
    """Sums of Gaussian processes: smooth, rough, periodic with the season, a cycle that loses its phase, and a line.

    Args:
        season: ``(B,)``.
        length: T.
        draw: random numbers.

    Returns:
        ``(B, T)``.
    """
    B, lag = len(season), torch.arange(length, dtype=torch.float64)

    def a(value: Tensor) -> Tensor:
        return value[:, None]

    smooth = torch.exp(-((lag / a(draw.scale(3, length, B))) ** 2) / 2)
    rough = torch.exp(-lag / a(draw.scale(3, 4 * length, B)))
    decay = torch.exp(-((lag / a(draw.scale(2 * length, 50 * length, B))) ** 2) / 2)
    periodic = decay * torch.exp(-2 * (torch.sin(math.pi * lag / a(season)) / a(draw.uniform(0.4, 2.0, B))) ** 2)
    cycle = torch.cos(2 * math.pi * lag / a(draw.scale(4, 40, B))) * torch.exp(-lag / a(draw.scale(20, 20 * length, B)))
    seasonal = season > 1
    weights = draw.scale(0.1, 3.0, B, 5) * draw.some(0.5, B, 5)
    weights[:, 2] = torch.where(seasonal, draw.scale(0.3, 4.0, B), 0.0)
    weights[:, 3] = torch.where(seasonal, 0.0, weights[:, 3])
    noise = draw.scale(1e-3, 1.0, B) * draw.some(0.8, B)
    kernels = (smooth, rough, periodic, cycle)
    by_lag = sum((a(w**2) * k for w, k in zip(weights.unbind(1), kernels, strict=False)), torch.zeros_like(rough))
    by_lag[:, 0] += noise**2 + _JITTER * (1 + weights.square().sum(1))
    step = torch.arange(length)
    cov = by_lag[:, (step[:, None] - step).abs()]
    slope = weights[:, 4] * draw.normal(B) / length
    return matvec(torch.linalg.cholesky(cov), draw.normal(B, length)) + a(slope) * lag


def structural_models(season: Tensor, length: int, draw: _Draw) -> Tensor:
    """A level, a slope that may be damped, a season that may move, and noise; some variances are 0.

    Args:
        season: ``(B,)``.
        length: T.
        draw: random numbers.

    Returns:
        ``(B, T)``.
    """
    B, most = len(season), max(SEASONS)
    scale = draw.scale(1e-2, 1.0, B, 4) * draw.some(0.7, B, 4)  # of level, slope, season and noise
    level, slope = torch.zeros(B, dtype=torch.float64), 0.3 * draw.normal(B) * draw.some(0.5, B)
    damping = torch.where(draw.some(0.5, B), draw.uniform(0.8, 1.0, B), 1.0)
    places = torch.arange(most) < season[:, None]
    pattern = _pattern(season, places, draw)
    shocks, rows, found = draw.normal(length, 4, B), torch.arange(B), []
    for t in range(length):
        at = t % season
        found.append(level + pattern[rows, at] + scale[:, 3] * shocks[t, 3])
        pattern[rows, at] += 0.3 * scale[:, 2] * shocks[t, 2] * (season > 1)
        level = level + slope + scale[:, 0] * shocks[t, 0]
        slope = damping * slope + 0.05 * scale[:, 1] * shocks[t, 1]
    return torch.stack(found, 1)


def _pattern(season: Tensor, places: Tensor, draw: _Draw) -> Tensor:
    """A season ``(B, most)`` without a mean: waves in some, any values in others, single peaks in the rest."""
    B, most = places.shape
    turns = 2 * math.pi * torch.arange(most) / season[:, None]
    phases = draw.uniform(0, 2 * math.pi, B, 2)
    waves = torch.cos(turns + phases[:, :1]) + draw.uniform(0, 1, B, 1) * torch.cos(2 * turns + phases[:, 1:])
    peaks = draw.normal(B, most).abs() * draw.some(0.25, B, most)
    which = draw.whole(3, B)[:, None]
    chosen = torch.where(which == 0, waves, torch.where(which == 1, draw.normal(B, most), peaks)) * places
    chosen = (chosen - chosen.sum(1, keepdim=True) / season[:, None]) * places
    return chosen * draw.scale(0.3, 5.0, B, 1) * (season > 1)[:, None]


def autoregressions(season: Tensor, length: int, draw: _Draw) -> Tensor:
    """Autoregressions of orders 1 to 6 with a moving average, with a factor of the season, summed up once in half.

    Args:
        season: ``(B,)``.
        length: T.
        draw: random numbers.

    Returns:
        ``(B, T)``.
    """
    B, start = len(season), 2 * max(SEASONS)
    order = 1 + draw.whole(_ORDER, B)
    partial = torch.where(torch.arange(_ORDER) < order[:, None], draw.uniform(-0.95, 0.95, B, _ORDER), 0.0)
    phi, theta = from_partial(partial), draw.uniform(-0.8, 0.8, B) * draw.some(0.5, B)
    seasonal = draw.uniform(0.5, 1.0, B) * (season > 1)
    shocks, rows = draw.normal(B, start + length + 1), torch.arange(B)
    shocks = torch.where(draw.some(0.2, B)[:, None], shocks**3 / 4, shocks)  # some with heavy tails
    shocks = shocks[:, 1:] + theta[:, None] * shocks[:, :-1]
    z = torch.zeros(B, _ORDER + start + length, dtype=torch.float64)  # without the season
    y = torch.zeros(B, start + start + length, dtype=torch.float64)
    for t in range(start + length):
        z[:, _ORDER + t] = (phi * z[:, t : t + _ORDER].flip(1)).sum(1) + shocks[:, t]
        y[:, start + t] = seasonal * y[rows, start + t - season] + z[:, _ORDER + t]
    y = y[:, -length:]
    slope = 0.2 * draw.normal(B, 1) * draw.some(0.3, B, 1)
    return torch.where(draw.some(0.5, B)[:, None], (standard(y) + slope).cumsum(1), y)


def regimes(season: Tensor, length: int, draw: _Draw) -> Tensor:
    """Series whose level, slope, noise and season change at up to three times, or that alternate between two states.

    Args:
        season: ``(B,)``.
        length: T.
        draw: random numbers.

    Returns:
        ``(B, T)``.
    """
    B, most = len(season), max(SEASONS)
    breaks = torch.where(draw.some(0.7, B, 3), draw.whole(length, B, 3), length)
    time = torch.arange(length)
    part = (time[:, None] >= breaks[:, None]).sum(-1)  # (B, T), 0 .. 3
    chance = draw.scale(0.01, 0.1, B, 1)
    flips = (draw.uniform(0, 1, B, length) < chance).cumsum(1) % 2
    part = torch.where(draw.some(0.4, B, 1), flips, part)

    def per_part(values: Tensor) -> Tensor:
        return values.gather(1, part)

    level, slope = per_part(2 * draw.normal(B, 4)), per_part(0.05 * draw.normal(B, 4) * draw.some(0.4, B, 4))
    rough = torch.where(draw.some(0.5, B, 1), per_part(draw.scale(0.1, 1.0, B, 4)), draw.scale(0.1, 1.0, B, 1))
    memory = draw.uniform(0.0, 0.95, B)
    shocks, state, noise = draw.normal(B, length), torch.zeros(B, dtype=torch.float64), []
    for t in range(length):
        state = memory * state + shocks[:, t]
        noise.append(state)
    pattern = _pattern(season, torch.arange(most) < season[:, None], draw)
    seasonal = pattern.gather(1, time % season[:, None]) * per_part(draw.uniform(0.5, 1.5, B, 4))
    return level + slope.cumsum(1) + seasonal + rough * torch.stack(noise, 1)


KINDS: dict[str, Callable[[Tensor, int, _Draw], Tensor]] = {
    "gaussian process": gaussian_processes,
    "structural": structural_models,
    "autoregression": autoregressions,
    "regimes": regimes,
}
"""What draws series ``(B, T)`` of each kind."""


def _observed(y: Tensor, draw: _Draw) -> Tensor:
    """Levels and scales, exponentials, outliers, counts, and values that are missing, of series of deviation 1."""
    B, T = y.shape
    grown = torch.exp(y * draw.uniform(0.1, 1.0, B, 1))
    y = torch.where(draw.some(0.25, B, 1), standard(grown), y)
    outliers = draw.some(0.02, B, T) & draw.some(0.15, B, 1)
    y = torch.where(outliers, y + 4 * draw.normal(B, T), y)
    steps = draw.scale(1.0, 10.0, B, 1)
    y = torch.where(draw.some(0.1, B, 1), (y * steps).round() / steps, y)
    first, long = draw.whole(T, B, 1), 1 + draw.whole(max(1, T // 8), B, 1)
    block = (torch.arange(T) >= first) & (torch.arange(T) < first + long) & draw.some(0.1, B, 1)
    here = draw.some(0.1, B, T) & draw.some(0.1, B, 1)
    level, scale = 3 * draw.normal(B, 1), draw.scale(0.1, 10.0, B, 1)
    return torch.where(block | here, torch.nan, (level + y) * scale)
