"""The distribution of the steps to come of one series: normal, log-normal, or given by quantiles."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dualform.forecast.metrics import midpoints
from dualform.forecast.shape import Shape

_FINE = midpoints(200)


class Table(NamedTuple):
    """Quantiles of a distribution ``(..., Q)`` and the Q probabilities that they are of, 2 or more, increasing."""

    quantiles: Tensor
    levels: tuple[float, ...]

    def at(self, levels: Sequence[float]) -> Tensor:
        """Quantiles ``(..., P)`` at other levels, linear in normal scores between those of the table.

        Beyond the outer ones a tail goes on as that of a normal distribution, so that a table of normal quantiles gives
        normal quantiles at every level.

        Args:
            levels: P numbers between 0 and 1.
        """
        like = self.quantiles
        known, z = (torch.special.ndtri(torch.tensor([*p], dtype=like.dtype)) for p in (self.levels, levels))
        right = torch.searchsorted(known, z).clamp(1, len(known) - 1)
        share = (z - known[right - 1]) / (known[right] - known[right - 1])
        return torch.lerp(like[..., right - 1], like[..., right], share)


class Moments(NamedTuple):
    """The steps to come of one series: what is normal, or what a table has, is the series or the logarithm of it."""

    mean: Tensor  # (h,)
    deviation: Tensor  # (h,)
    shape: Shape
    table: Table | None = None  # (h, Q), in place of a normal distribution

    @classmethod
    def of_table(cls, table: Table, shape: Shape) -> "Moments":
        """A distribution by its quantiles."""
        fine = table.at(_FINE)
        return cls(fine.mean(-1), fine.std(-1), shape, table)

    def expected(self) -> Tensor:
        """The mean of the series ``(h,)``."""
        if self.table is not None and self.shape.log:
            return self.table.at(_FINE).exp().mean(-1)
        return self.mean if self.table is not None else self.shape.mean(self.mean, self.deviation)

    def quantiles(self, levels: Sequence[float]) -> Tensor:
        """Quantiles of the series ``(h, K)`` at K levels."""
        if self.table is None:
            return self.shape.quantiles(self.mean, self.deviation, [*levels])
        found = self.table.at(levels)
        return found.exp() if self.shape.log else found
