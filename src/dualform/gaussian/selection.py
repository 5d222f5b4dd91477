"""Choosing a class of models by an information criterion."""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.gaussian.arrays import Door, lengths_of
from dualform.gaussian.fitting import Fit


class Candidate(NamedTuple):
    """A model that was tried: its name, its log-likelihood, its number of parameters, and the criterion."""

    name: str
    log_likelihood: float
    parameters: int
    aicc: float


@dataclass(frozen=True)
class Selection:
    """The best of several models of one series, by AICc, and all that were tried, the best first."""

    fit: Fit
    candidates: list[Candidate]
    notes: list[str] = field(default_factory=list)

    @property
    def model(self) -> Any:
        """The model that was chosen, with the parameters that were found."""
        return self.fit.model

    def forecast(self, horizon: int, **options: Any) -> Any:
        """Forecast what follows the series by the chosen model: :meth:`~dualform.gaussian.fitting.Fit.forecast`.

        Args:
            horizon: how many steps, 1 or more.
            options: of the model's ``forecast``.

        Raises:
            ArgumentError: as the model's ``forecast``.
        """
        return self.fit.forecast(horizon, **options)

    def summary(self) -> str:
        """A table of what was tried, and that of the model that was chosen."""
        width = max(len(candidate.name) for candidate in self.candidates)
        lines = [f"{'':{width}}  {'parameters':>10}  {'log-likelihood':>14}  {'AICc':>12}"]
        for name, value, count, aicc in self.candidates:
            lines.append(f"{name:{width}}  {count:>10}  {value:>14.4f}  {aicc:>12.3f}")
        return "\n".join([*self.notes, *lines, "", self.fit.summary()])


def candidate(name: str, log_likelihood: float, parameters: int, observations: int) -> Candidate:
    """A candidate with its AICc, which is infinite for fewer observations than parameters + 2."""
    n, k = observations, parameters
    aicc = 2 * k * n / (n - k - 1) - 2 * log_likelihood if n > k + 1 else math.inf
    return Candidate(name, log_likelihood, k, aicc if math.isfinite(log_likelihood) else math.inf)


def series_of(where: str, y: Any, lengths: Any) -> tuple[Tensor, bool, list[int]]:
    """Series ``(B, T, 1)``, NaN after their ends, whether there was an axis of a batch, and how long they are.

    Raises:
        ArgumentError: for other axes, lengths that do not fit, and a series without a number.
    """
    x = Door(where, y, torch.zeros((), dtype=torch.float64), 1).y.double()
    if x.dim() > 3:
        raise ArgumentError(f"{where}: y has shape {tuple(x.shape)}, expected (T,), (T, 1) or (B, T, 1)")
    many, x = x.dim() == 3, x.reshape(-1, *x.shape[-2:])
    ends = [x.shape[1]] * len(x)
    if lengths is not None:
        ends = lengths_of(where, lengths, tuple(x.shape[:1]), x.shape[1], x.device).tolist()
    time = torch.arange(x.shape[1], device=x.device)
    x = torch.where((time < torch.tensor(ends, device=x.device)[:, None])[..., None], x, torch.nan)
    if (empty := x.isnan().flatten(1).all(1)).any():
        row = f"row {int(empty.nonzero()[0])} of y" if many else "y"
        raise ArgumentError(f"{where}: {row} has no observation, all values are missing")
    return x, many, ends
