"""The entrance of features: scaled inside the model, and what it makes of values that are missing."""

from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from dualform.core.errors import ArgumentError, ConfigError
from dualform.core.packing import Packing
from dualform.core.shapes import check_tensors, known, wide

MISSING = ("refused", "passed", "marked", "carried")


class Entrance(nn.Module):
    """``(x - mean) / deviation`` of each channel, where it is standardised, without values that are missing.

    Args:
        inputs: C, the channels.
        standardise: whether there is a mean and a deviation, buffers in the dtype of the model: 0 and 1 until
            :meth:`fit` computes them of data.
        missing: what NaN means. ``refused`` and ``passed`` know no missing values: NaN and infinities are errors, or
            are computed with. ``marked``: NaN is missing; the mean takes its place, and each channel has another one
            beside it that is 1 there and 0 elsewhere. ``carried``: the last value of the channel takes its place, which
            is part of the state; before the first, the mean. Without standardisation the mean is 0.

    Raises:
        ConfigError: for an unknown word.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, inputs: int, *, standardise: bool = False, missing: str = "refused"):
        super().__init__()
        if missing not in MISSING:
            raise ConfigError(f"missing is {missing!r}, expected one of {', '.join(MISSING)}")
        self.inputs, self.standardise, self.missing = inputs, standardise, missing
        if standardise:
            self.register_buffer("mean", torch.zeros(inputs))
            self.register_buffer("deviation", torch.ones(inputs))

    @property
    def width(self) -> int:
        """What the blocks read of each element."""
        return 2 * self.inputs if self.missing == "marked" else self.inputs

    @property
    def carries(self) -> bool:
        """Whether there is a state: the last value of each channel, scaled, ``(B, C)``."""
        return self.missing == "carried"

    @property
    def options(self) -> dict[str, Any]:
        """What was given, where it is not the default."""
        given = {"standardise": self.standardise, "missing": self.missing}
        return {name: value for name, value in given.items() if value not in (False, "refused")}

    def forward(
        self, where: str, x: Tensor, held: Tensor | None = None, packing: Packing | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """``x`` ``(B, T, C)`` -> ``(B, T, width)``, and the last values; ``held`` are those before, None for none.

        Where no values are carried, ``x`` may be one step, ``(B, C)``.

        Raises:
            ArgumentError: for a value that is neither finite nor missing; says where it is.
        """
        self._check(where, x, packing)
        gone = x.isnan() if self.missing in ("marked", "carried") else None
        if self.standardise:
            x = (x.to(wide(x, self.mean)) - self.mean) / self.deviation
        if gone is None:
            return x, None
        x = x.masked_fill(gone, 0)
        if not self.carries:
            return torch.cat([x, gone.to(x.dtype)], -1), None
        return self._carried(x, gone, held, packing)

    def fit(self, where: str, x: Tensor) -> None:
        """Mean and deviation of each channel over ``x`` ``(..., C)``, without what is NaN.

        A channel without values is left as it is; one that is constant has the deviation 1.

        Raises:
            ArgumentError: where nothing is standardised, for infinities, and for NaN that is not missing.
        """
        if not self.standardise:
            raise ArgumentError(f"{where}: the model does not scale its inputs", hint="build it with standardise=True")
        self._check(where, x, None)
        x = x.detach().reshape(-1, self.inputs).double()
        there = ~x.isnan()
        count = there.sum(0)
        mean = x.nansum(0) / count.clamp(min=1)
        deviation = ((x - mean).square().nansum(0) / count.clamp(min=1)).sqrt()
        deviation = deviation.where(deviation > 1e-12 * mean.abs(), 1)
        with torch.no_grad():
            self.mean.copy_(mean.to(self.mean).where(count > 0, self.mean))
            self.deviation.copy_(deviation.to(self.deviation).where(count > 0, self.deviation))

    def _check(self, where: str, x: Tensor, packing: Packing | None) -> None:
        """That all values are finite, or missing, where they can be read."""
        if self.missing == "passed" or not known(x) or isfinite(x.detach().sum().item()):
            return
        wrong = x.isfinite().logical_not() if self.missing == "refused" else x.isinf()
        if not wrong.any():
            return
        row, *time, channel = wrong.nonzero()[0].tolist()
        value = x[(row, *time, channel)].item()
        if packing is not None and packing.known:
            ids, places = packing.places(x.shape[1])
            row, time = int(ids[time[0]]), [int(places[time[0]])]
        place = f"row {row}{''.join(f', element {t}' for t in time)}, channel {channel}"
        hint = "build the model with missing='marked' or 'carried', where NaN is missing" if value != value else ""
        raise ArgumentError(f"{where}: x holds {value} in {place}, expected finite numbers", hint=hint)

    def _carried(
        self, x: Tensor, gone: Tensor, held: Tensor | None, packing: Packing | None
    ) -> tuple[Tensor, Tensor | None]:
        """The last value in place of each that is missing."""
        rows = x.shape[0] if packing is None else packing.rows
        held = x.new_zeros(rows, self.inputs, dtype=wide(x)) if held is None else held
        check_tensors("Entrance", x=(x, f"* * {self.inputs}"), state=(held, f"{rows} {self.inputs}"))
        if x.shape[1] == 0:
            return x, held
        if packing is None and x.shape[1] == 1:
            y = torch.where(gone, held[:, None].to(x.dtype), x)
            return y, y[:, 0].to(held.dtype, copy=True)
        time = torch.arange(x.shape[1], device=x.device)[None, :, None]
        last = torch.where(gone, -1, time).cummax(1).values  # of the line, perhaps of a sequence before
        if packing is None:
            first, before = torch.zeros_like(time), held[:, None]
        else:
            ids = packing.sequence_ids(x.shape[1])
            first, before = packing.cu_seqlens[ids][None, :, None], held[ids][None]
        there = last >= first
        y = torch.where(there, x.gather(1, last.clamp(min=0)), before.to(x.dtype))
        if packing is None:
            return y, y[:, -1].to(held.dtype, copy=True)
        some = packing.cu_seqlens.diff() > 0
        return y, torch.where(some[:, None], y[0, (packing.cu_seqlens[1:] - 1).clamp(min=0)].to(held.dtype), held)
