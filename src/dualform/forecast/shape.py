"""What is done to a series before a model sees it: a logarithm, and a long season that is taken out."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LONGEST = 24
"""The longest season, in steps, that models have in their states; a longer one is waves by least squares."""
_WAVES = 6  # the most of them
_SLOPE = 0.5  # of log spread over log level, from which a logarithm is taken


@dataclass(frozen=True)
class Shape:
    """The way from a series to what a model sees, and back.

    With ``log``, the model is of the logarithm: its normal distributions become log-normal ones. ``beta`` are the
    coefficients of sine and cosine of the waves of a long ``season``, which are subtracted.
    """

    log: bool = False
    season: int = 1
    beta: Tensor | None = None

    @property
    def left(self) -> int:
        """The season that is left for the model, 1 for none."""
        return 1 if self.season > LONGEST else self.season

    def forth(self, y: Tensor) -> Tensor:
        """What the model sees of a series ``(T,)``."""
        z = y.log() if self.log else y
        return z if self.beta is None else z - self.effect(0, len(y))

    def effect(self, first: int, steps: int) -> Tensor:
        """The waves at the steps from ``first`` on, 0 being the beginning of the series ``(steps,)``."""
        if self.beta is None:
            return torch.zeros(steps, dtype=torch.float64)
        return _waves(first, steps, self.season, len(self.beta) // 2) @ self.beta

    def mean(self, mean: Tensor, deviation: Tensor) -> Tensor:
        """The mean of the series where that of the model is normal."""
        return (mean + deviation.square() / 2).exp() if self.log else mean

    def quantiles(self, mean: Tensor, deviation: Tensor, levels: list[float]) -> Tensor:
        """The quantiles ``(..., K)`` of the series where the model is normal with moments ``(...)``."""
        z = torch.special.ndtri(torch.tensor(levels, dtype=mean.dtype))
        found = mean.unsqueeze(-1) + deviation.unsqueeze(-1) * z
        return found.exp() if self.log else found


def shape_of(y: Tensor, season: int, log: bool | None) -> Shape:
    """The shape of a series ``(T,)``.

    Args:
        y: NaN where missing.
        season: steps, 1 for none.
        log: whether the logarithm is taken; None decides by :func:`grows`.
    """
    take = grows(y, season) if log is None else log
    if season <= LONGEST:
        return Shape(take, season)
    return Shape(take, season, _least_squares(y.log() if take else y, season))


def grows(y: Tensor, season: int) -> bool:
    """Whether the changes of a positive series grow with its level, in proportion or nearly so.

    The series is cut into groups of one season, of 8 steps or more. Over them, the logarithm of the standard deviation
    of the changes is regressed on the logarithm of the mean: the slope is 0 for changes that are always of one size and
    1 for such in per cent. It has to be above one half by more than half a standard error, and there must be 4 groups.

    References:
        Guerrero (1993), "Time-series analysis supported by power transformations".
    """
    if not (y[~y.isnan()] > 0).all():
        return False
    size = season if 8 <= season <= LONGEST else 8
    groups = y[len(y) % size :].reshape(-1, size)
    groups = groups[~groups.isnan().any(1)]
    if len(groups) < 4:
        return False
    level, spread = groups.mean(1).log(), groups.diff(dim=1).std(1)
    if not (spread > 0).all() or level.std() < 0.05:
        return False
    x, z = level - level.mean(), spread.log() - spread.log().mean()
    slope = (x @ z / (x @ x)).item()
    error = math.sqrt(((z - slope * x).square().sum() / (len(x) - 2) / (x @ x)).item())
    return slope - error / 2 > _SLOPE


def _waves(first: int, steps: int, season: int, count: int) -> Tensor:
    """Sines and cosines of 1 .. count waves per season ``(steps, 2 count)``."""
    time = torch.arange(first, first + steps, dtype=torch.float64)
    turns = 2 * math.pi / season * time[:, None] * torch.arange(1, count + 1)
    return torch.cat([turns.sin(), turns.cos()], 1)


def _least_squares(y: Tensor, season: int) -> Tensor:
    """The coefficients of the waves by least squares of the changes, with a slope; their number has the least AICc."""
    change, best = y.diff(), (math.inf, y[:0])
    rows = ~change.isnan()
    change = change[rows]
    n, slope = len(change), torch.ones(len(change), 1, dtype=y.dtype)
    for count in range(min(_WAVES, season // 2) + 1):
        X = torch.cat([slope, _waves(0, len(y), season, count).diff(dim=0)[rows]], 1)
        solution = torch.linalg.lstsq(X, change[:, None], driver="gelsd").solution[:, 0]
        variance = (change - X @ solution).square().mean().item()
        k = 2 * count + 2
        if n <= k + 1 or variance <= 0:
            break
        best = min(best, (n * math.log(variance) + 2 * k * n / (n - k - 1), solution[1:]), key=lambda pair: pair[0])
    return best[1]
