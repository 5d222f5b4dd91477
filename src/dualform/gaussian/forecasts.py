"""Forecasts: moments of observations to come, their quantiles and intervals."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError


class Forecast(NamedTuple):
    """Moments of the observations to come, their own noise included; each is normal."""

    mean: Any  # (..., horizon, M)
    cov: Any  # (..., horizon, M, M)

    def quantiles(self, probabilities: Sequence[float]) -> Any:
        """Quantiles of each component of each observation, of the normal distribution.

        Args:
            probabilities: Q numbers between 0 and 1.

        Returns:
            ``(Q, ..., horizon, M)``, of the kind of the mean.

        Raises:
            ArgumentError: for a probability that is not between 0 and 1.
        """
        return _as(self.mean, _normal(self.mean, self.cov, _between("quantiles", probabilities)))

    def interval(self, level: float = 0.95) -> tuple[Any, Any]:
        """The lower and the upper bound ``(..., horizon, M)`` of the central interval of a probability.

        Args:
            level: the probability, such as 0.95.

        Raises:
            ArgumentError: for a level that is not between 0 and 1.
        """
        return _interval(self.quantiles, level)


class SimulatedForecast(NamedTuple):
    """A forecast whose distribution is known by paths that were drawn from it; ``cov`` is their variance."""

    mean: Any  # (..., horizon, M)
    cov: Any  # (..., horizon, M, M)
    paths: Any  # (draws, ..., horizon, M)

    def quantiles(self, probabilities: Sequence[float]) -> Any:
        """Quantiles of each component of each observation, those of the paths.

        Args:
            probabilities: Q numbers between 0 and 1.

        Returns:
            ``(Q, ..., horizon, M)``, of the kind of the mean.

        Raises:
            ArgumentError: for a probability that is not between 0 and 1.
        """
        q, paths = _between("quantiles", probabilities), torch.as_tensor(self.paths)
        return _as(self.mean, torch.quantile(paths, q.to(paths), dim=0))

    def interval(self, level: float = 0.95) -> tuple[Any, Any]:
        """The lower and the upper bound ``(..., horizon, M)`` of the central interval of a probability.

        Args:
            level: the probability, such as 0.95.

        Raises:
            ArgumentError: for a level that is not between 0 and 1.
        """
        return _interval(self.quantiles, level)


def _normal(mean: Any, cov: Any, q: Tensor) -> Tensor:
    mean, cov = torch.as_tensor(mean), torch.as_tensor(cov)
    deviation = cov.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    return mean + torch.special.ndtri(q.to(mean)).reshape(-1, *[1] * mean.dim()) * deviation


def _between(where: str, probabilities: Sequence[float]) -> Tensor:
    q = torch.as_tensor(probabilities, dtype=torch.float64)
    if q.dim() != 1 or not ((q > 0) & (q < 1)).all():
        raise ArgumentError(f"{where}: probabilities are {probabilities}, expected a list of numbers between 0 and 1")
    return q


def _interval(quantiles: Callable[[Sequence[float]], Any], level: float) -> tuple[Any, Any]:
    if not 0 < level < 1:
        raise ArgumentError(f"interval: level is {level}, expected a probability between 0 and 1", hint="such as 0.95")
    low, high = quantiles([(1 - level) / 2, (1 + level) / 2])
    return low, high


def _as(like: Any, value: Tensor) -> Any:
    return value if isinstance(like, Tensor) else value.cpu().numpy()
