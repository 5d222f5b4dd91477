"""A direct forecaster as a candidate of a family: trained on the series that it is fitted to, or before, on others."""

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.forecast.deep.network import BACKBONES, LEVELS, QuantileNetwork
from dualform.forecast.distribution import Table

_STEPS = 400
_LEAST, _MOST, _SEASONS = 32, 192, 6  # steps that it reads of a series


class Trained(NamedTuple):
    """What fitting has found for one series, in the words of a :class:`~dualform.gaussian.fitting.Fit`."""

    model: "Direct"
    message: str
    names: list[str]
    values: Tensor
    standard_errors: Tensor
    log_likelihood: float = math.nan
    converged: bool = True


class Direct:
    """A network for the next steps of series, all of which it shares.

    Without weights, ``fit`` trains it on windows of the series that it is given; with them it is what they are, and a
    fit changes nothing.

    Args:
        season: of the series, 1 for none.
        backbone: ``"s4d"``, ``"s5"`` or ``"mamba"``; of a network that is trained here.
        horizon: how many steps it looks ahead at once; None for a season, or 8.
        steps: of training, at most.
        seed: of the initial weights and of the windows.
        weights: a folder of :func:`~dualform.forecast.deep.training.pretrain`; None for a network that is trained here.
    """

    shared = True
    """One network has been fitted to all series: what is estimated has no parameters of a series."""

    def __init__(
        self,
        season: int,
        *,
        backbone: str = "s4d",
        horizon: int | None = None,
        steps: int = _STEPS,
        seed: int = 0,
        weights: str | os.PathLike[str] | None = None,
    ):
        if backbone not in BACKBONES or steps < 1:
            raise ArgumentError(
                f"deep: backbone {backbone!r}, {steps} steps, expected {', '.join(BACKBONES)}, and 1 or more"
            )
        self.season, self.backbone, self.steps, self.seed = season, backbone, steps, seed
        self.horizon = (season if season > 1 else 8) if horizon is None else horizon
        self.network = None if weights is None else QuantileNetwork.load(weights)

    def expand(self, rows: int) -> "Direct":
        """The same for several series."""
        return self

    def fit(
        self,
        y: Tensor,
        lengths: Sequence[int] | None = None,
        max_iter: int | None = None,
    ) -> Any:
        """Train on series.

        Args:
            y: ``(T,)``, or ``(S, T, 1)``; NaN where missing.
            lengths: of each of several series.
            max_iter: without effect; optimisers of other models take it.

        Returns:
            What was found, a list of them for several series.

        Raises:
            DualformError: where the loss is not finite.
        """
        series = _series(y, lengths)
        if self.network is None:
            from dualform.forecast.deep.training import train_on  # which loads what else forecasts do without

            longest = max(map(len, series))
            context = max(_LEAST, min(_MOST, longest, max(64, _SEASONS * self.season)))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                network = QuantileNetwork.build(self.backbone, self.horizon, context)
            learned = train_on(network, series, self.season, self.steps, self.seed)
            what = "held-out" if learned.held_out else "training"
            message = f"The network of {learned.steps} steps is kept, with a {what} loss of {learned.loss:.3f}"
            self.network = network
        else:
            message = "The network was trained before, on other series"
        none = torch.empty(0, dtype=torch.float64)
        found = [Trained(self, message, [], none, none) for _ in series]
        return found if y.dim() == 3 else found[0]

    def forecast(self, y: Tensor, horizon: int, lengths: Sequence[int] | None = None) -> Table:
        """Quantiles ``(S, horizon, Q)`` of the steps after series.

        Args:
            y: as in :meth:`fit`.
            horizon: how many steps, 1 or more.
            lengths: of each of several series.

        Raises:
            ArgumentError: before a fit, without weights.
        """
        if self.network is None:
            raise ArgumentError("deep: the network is not trained yet", hint="call fit")
        table = self.network.forecast(_series(y, lengths), self.season, horizon)
        return Table(table, LEVELS)


def _series(y: Tensor, lengths: Sequence[int] | None) -> list[Tensor]:
    if y.dim() == 1:
        return [y.detach().double()]
    rows = y.detach().double()[..., 0]
    return [row if lengths is None else row[: lengths[at]] for at, row in enumerate(rows)]
