"""A network that says quantiles of the next steps of any series: its outputs, its loss, and its folder."""

import copy
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.core.errors import ArgumentError, CheckpointError
from dualform.core.json_file import entry, read_table, to_json
from dualform.core.options import suggestion
from dualform.forecast.deep.view import ANCHORS, CHANNELS, View, view
from dualform.layers.mamba import MambaConfig
from dualform.layers.s4d import S4DConfig
from dualform.layers.s5 import S5Config
from dualform.models.config import ModelConfig
from dualform.models.heads import StepRegressor
from dualform.models.saving.files import current, replacing
from dualform.models.saving.model import load, write

LEVELS = (0.025, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.975)
"""The quantiles that a network says; the median is in the middle."""
BACKBONES: dict[str, Any] = {
    "s4d": S4DConfig(d_state=32),
    "s5": S5Config(d_state=32),
    "mamba": MambaConfig(d_state=8),
}
"""The mixers by name."""
FORMAT, ABOUT_FILE = 1, "forecast.json"
_MIDDLE = len(LEVELS) // 2
_LONGEST = 2**16  # steps that a network reads
_WIDEST = 4.0  # of the logarithm of a width, in either direction


@dataclass
class QuantileNetwork:
    """Quantiles of the next H steps, from a mixer that reads a series.

        q_p(h) = last + scale (sum_k w_k(h) a_k(h) + exp(g(h)) (r(h) + sum of softplus from the median out to p))

    ``a_k`` are the simple forecasts of :func:`~dualform.forecast.deep.view.view`, and the weights w, which sum to 1,
    the width g, the shift r and what is under the softplus are linear in what the mixer says at the origin. So
    quantiles never cross, and a series in another unit has the same forecast in that unit. Nothing that is scaled with
    is known only after the first origin.

    Args:
        model: ``StepRegressor`` of :data:`~dualform.forecast.deep.view.CHANNELS` inputs, with ``H (ANCHORS + Q + 1)``
            targets.
        horizon: H.
        context: how many steps it reads.
    """

    model: StepRegressor
    horizon: int
    context: int

    @classmethod
    def build(cls, backbone: str, horizon: int, context: int, width: int = 48, layers: int = 2) -> "QuantileNetwork":
        """A network that has learned nothing.

        Args:
            backbone: a key of :data:`BACKBONES`.
            horizon: H.
            context: how many steps it reads.
            width: of the stream.
            layers: how many.

        Raises:
            ArgumentError: for an unknown backbone, and sizes below 1.
        """
        if backbone not in BACKBONES:
            raise ArgumentError(f"deep: backbone is {backbone!r}", hint=suggestion(str(backbone), [*BACKBONES]))
        for name, size in (("horizon", horizon), ("context", context)):
            if size < 1:
                raise ArgumentError(f"deep: {name} is {size}, expected 1 or more")
        config = ModelConfig(0, width, {"M": (BACKBONES[backbone],)}, "M" * layers)
        model = StepRegressor(config, horizon * (ANCHORS + len(LEVELS) + 1), inputs=CHANNELS)
        torch.nn.init.normal_(model.head.weight, std=0.02)
        return cls(model, horizon, context)

    def quantiles(self, x: Tensor, season: Tensor, origins: Tensor) -> Tensor:
        """Quantiles ``(B, O, H, Q)`` of the steps after some origins, in the unit of the series, with gradients.

        Args:
            x: ``(B, T)``, float64, NaN where missing.
            season: ``(B,)``, 1 for none.
            origins: ``(O,)``, increasing.
        """
        seen = view(x, season, origins, self.horizon)
        return seen.last[..., None, None] + seen.scale[:, None, None, None] * self._scaled(seen, origins)

    def loss(self, x: Tensor, season: Tensor, origins: Tensor) -> Tensor:
        """The mean pinball loss over origins and levels, in units of the scale of each series.

        Args:
            x: ``(B, T + H)``, with what followed the origins; what is missing there does not count.
            season: ``(B,)``.
            origins: ``(O,)``, all before T.

        References:
            Koenker and Bassett (1978), equation 3.1.
        """
        seen = view(x[:, : int(origins[-1]) + 1], season, origins, self.horizon)
        q = self._scaled(seen, origins)
        ahead = origins[:, None] + torch.arange(1, self.horizon + 1)
        y = (x[:, ahead] - seen.last[..., None]) / seen.scale[:, None, None]  # (B, O, H)
        there = ~y.isnan()
        error = torch.where(there, y, 0.0).to(q.dtype)[..., None] - q
        p = torch.tensor(LEVELS, dtype=q.dtype)
        losses = torch.maximum(p * error, (p - 1) * error).mean(-1)
        return (losses * there).sum() / there.sum().clamp_min(1)

    def _scaled(self, seen: View, origins: Tensor) -> Tensor:
        weight = self.model.head.weight
        h, _ = self.model.features(seen.inputs.to(weight.dtype))
        out = self.model.head(h[:, origins]).unflatten(-1, (self.horizon, -1))
        trust, shape, width = out.split([ANCHORS, len(LEVELS), 1], -1)
        centre = (trust.softmax(-1) * seen.anchors.to(weight.dtype)).sum(-1, keepdim=True)
        low, shift, high = shape.split([_MIDDLE, 1, _MIDDLE], -1)
        up, down = F.softplus(high).cumsum(-1), F.softplus(low.flip(-1)).cumsum(-1).flip(-1)
        around = torch.cat([shift - down, shift, shift + up], -1)
        return centre + (_WIDEST * torch.tanh(width / _WIDEST)).exp() * around

    @torch.no_grad()
    def forecast(self, series: Sequence[Tensor], season: int | Sequence[int], horizon: int) -> Tensor:
        """Quantiles ``(S, horizon, Q)`` of the steps after each series, in float64.

        Beyond H steps a series is continued by each of its quantiles, a path at that level throughout, and what
        follows is the mixture of what these paths lead to.

        Args:
            series: each ``(T,)``, NaN where missing.
            season: of all, or of each.
            horizon: how many steps.
        """
        m = torch.tensor([season] * len(series) if isinstance(season, int) else [*season])
        exact = copy.copy(self)
        exact.model = copy.deepcopy(self.model).double().eval()
        x = torch.stack([_ending(y, self.context) for y in series]).double()
        origin = torch.tensor([self.context - 1])
        table = exact.quantiles(x, m, origin)[:, 0]
        weights = _weights()
        while table.shape[1] < horizon:
            ends = torch.cat([x[:, None].expand(-1, len(LEVELS), -1), table.mT], 2)[..., -self.context :]
            more = exact.quantiles(ends.flatten(0, 1), m.repeat_interleave(len(LEVELS)), origin)[:, 0]
            table = torch.cat([table, _mixed(more.unflatten(0, (len(x), -1)), weights)], 1)
        return table[:, :horizon]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a folder: what ``dualform.save`` writes of the model, and ``forecast.json``.

        Raises:
            CheckpointError: when the disk refuses.
        """
        with replacing(folder) as new:
            self.write(new)

    def write(self, folder: Path) -> None:
        """The files of :meth:`save`, into a folder that its caller makes complete."""
        write(self.model, folder)
        about = {"format": FORMAT, "horizon": self.horizon, "context": self.context, "levels": list(LEVELS)}
        (folder / ABOUT_FILE).write_text(to_json(about), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "QuantileNetwork":
        """The network of a folder that :meth:`save` wrote.

        Raises:
            CheckpointError: for a folder without one; says what is missing or wrong.
        """
        path = current(Path(folder), ABOUT_FILE)
        if not path.exists():
            raise CheckpointError(
                f"{folder}: no network that forecasts, there is no {ABOUT_FILE}",
                hint="dualform forecast --pretrain FOLDER makes one",
            )
        about = read_table(path)
        if (version := entry(about, "format", int, path)) != FORMAT:
            raise CheckpointError(f"{path}: format {version}, expected {FORMAT}")
        if tuple(entry(about, "levels", list, path)) != LEVELS:
            raise CheckpointError(f"{path}: other levels than this version has", hint="train a network with it")
        horizon, context = entry(about, "horizon", int, path), entry(about, "context", int, path)
        model = load(folder, kind=StepRegressor)
        wanted = horizon * (ANCHORS + len(LEVELS) + 1)
        if (model.inputs, model.outputs) != (CHANNELS, wanted) or not 1 <= context <= _LONGEST:
            raise CheckpointError(f"{path}: it does not belong to the model beside it")
        return cls(model.eval(), horizon, context)


def _ending(y: Tensor, steps: int) -> Tensor:
    """The last steps of a series, with missing ones before it where it is shorter."""
    end = y[-steps:]
    return F.pad(end, (steps - len(end), 0), value=math.nan)


def _weights() -> Tensor:
    """How much of the distribution is nearest to each level."""
    p = torch.tensor(LEVELS, dtype=torch.float64)
    borders = torch.cat([p.new_zeros(1), (p[1:] + p[:-1]) / 2, p.new_ones(1)])
    return borders.diff()


def _mixed(tables: Tensor, weights: Tensor) -> Tensor:
    """The quantiles ``(S, H, Q)`` of mixtures of distributions ``(S, Q, H, Q)``, each with its weight."""
    values = tables.transpose(1, 2).flatten(2)  # (S, H, Q Q)
    both = (weights[:, None] * weights).flatten().expand_as(values)
    order = values.argsort(-1)
    values, both = values.gather(-1, order), both.gather(-1, order)
    reached = both.cumsum(-1) - both / 2
    p = torch.tensor(LEVELS, dtype=values.dtype).expand(*values.shape[:-1], -1)
    right = torch.searchsorted(reached.contiguous(), p.contiguous()).clamp(1, values.shape[-1] - 1)
    below, above = reached.gather(-1, right - 1), reached.gather(-1, right)
    share = ((p - below) / (above - below).clamp_min(1e-12)).clamp(0, 1)
    return torch.lerp(values.gather(-1, right - 1), values.gather(-1, right), share)
