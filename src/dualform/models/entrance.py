"""The entrance of features: scaled inside the model, and what it makes of values that are missing."""

from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from dualform.core.door import other_device
from dualform.core.errors import ArgumentError, ConfigError
from dualform.core.packing import Packing
from dualform.core.shapes import check_floating, check_tensors, known, once_per_shape, wide

MISSING = ("refused", "passed", "marked", "carried")
DIFFERENCES = "differences"


class Entrance(nn.Module):
    """``(x - mean) / deviation`` of each channel, where it is standardised, without values that are missing.

    With differences each channel z has another one beside it: ``(z_t - z_{t-1}) / (slope s_t)``, where ``s_t`` is the
    time between the two in steps, 1 without intervals or a rate; 0 in the first element. What is missing has the value
    before it there, and the difference 0, as has the first value of a channel.

    Args:
        inputs: C, the channels.
        standardise: whether there is a mean and a deviation, buffers in the dtype of the model: 0 and 1 until
            :meth:`fit` computes them of data. ``"differences"``: and, in the same way, a slope, and differences.
        missing: what NaN means. ``refused`` and ``passed`` know no missing values: NaN and infinities are errors, or
            are computed with. ``marked``: NaN is missing; the mean takes its place, and each channel has another one
            beside it that is 1 there and 0 elsewhere. ``carried``: the last value of the channel takes its place, which
            is part of the state; before the first, the mean. Without standardisation the mean is 0.

    Raises:
        ConfigError: for an unknown word.
    """

    mean: Tensor
    deviation: Tensor
    slope: Tensor

    def __init__(self, inputs: int, *, standardise: bool | str = False, missing: str = "refused"):
        super().__init__()
        if missing not in MISSING:
            raise ConfigError(f"missing is {missing!r}, expected one of {', '.join(MISSING)}")
        if standardise not in (False, True, DIFFERENCES):
            raise ConfigError(f"standardise is {standardise!r}, expected True, False or {DIFFERENCES!r}")
        self.inputs, self.standardise, self.missing = inputs, standardise, missing
        self.differences = standardise == DIFFERENCES
        if standardise:
            self.register_buffer("mean", torch.zeros(inputs))
            self.register_buffer("deviation", torch.ones(inputs))
        if self.differences:
            self.register_buffer("slope", torch.ones(inputs))

    @property
    def width(self) -> int:
        """What the blocks read of each element."""
        return self.inputs * (1 + (self.missing == "marked") + self.differences)

    @property
    def carries(self) -> bool:
        """Whether there is a state: the last value of each channel, scaled; see :attr:`held`."""
        return self.missing == "carried" or self.differences

    @property
    def held(self) -> int:
        """The width of the state: the last value of each channel, and with differences whether there is one."""
        return self.inputs * (1 + self.differences)

    @property
    def options(self) -> dict[str, Any]:
        """What was given, where it is not the default."""
        given = {"standardise": self.standardise, "missing": self.missing}
        return {name: value for name, value in given.items() if value not in (False, "refused")}

    def forward(
        self,
        where: str,
        x: Tensor,
        held: Tensor | None = None,
        packing: Packing | None = None,
        elapsed: Tensor | float = 1.0,
    ) -> tuple[Tensor, Tensor | None]:
        """``x`` ``(B, T, C)`` -> ``(B, T, width)``, and the last values; ``held`` are those before, None for none.

        Args:
            where: the model, first word of every error.
            x: values in their own units; one step, ``(B, C)``, where no values are carried.
            held: the state.
            packing: the borders of sequences on a packed line.
            elapsed: ``(B, T)``, or one for all: the time since the element before, in steps.

        Raises:
            ArgumentError: for a value that is neither finite nor missing; says where it is.
        """
        self._check(where, x, packing)
        gone = x.isnan() if self.missing in ("marked", "carried") else None
        if self.standardise:
            x = (x.to(wide(x, self.mean)) - self.mean) / self.deviation
        if gone is not None:
            x = x.masked_fill(gone, 0)
        last, seen, left = self._carried(x, gone, held, packing) if self.carries else (x, x, None)
        parts = [last if self.missing == "carried" else x]
        if self.missing == "marked" and gone is not None:
            parts.append(gone.to(x.dtype))
        if self.differences:
            before, was = self._before(last, seen, held, packing)
            parts.append(self._slopes(last - before, elapsed).masked_fill(~(was & seen), 0))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1), left

    def fit(self, where: str, x: Tensor, packing: Packing | None = None, intervals: Tensor | None = None) -> None:
        """Mean and deviation of each channel over ``x`` ``(B, T, C)``, without what is NaN; and the slope.

        That is the root of the mean square of its scaled differences, each divided by its interval where there are
        ``intervals`` ``(B, T)``. A channel without values is left as it is; one that is constant has the deviation 1,
        and the slope 1.

        Raises:
            ArgumentError: where nothing is standardised, for infinities, and for NaN that is not missing.
        """
        if not self.standardise:
            raise ArgumentError(f"{where}: the model does not scale its inputs", hint="build it with standardise=True")
        self._check(where, x, None)
        rows = x.detach().double()
        x = rows.reshape(-1, self.inputs)
        there = ~x.isnan()
        count = there.sum(0)
        mean = x.nansum(0) / count.clamp(min=1)
        deviation = ((x - mean).square().nansum(0) / count.clamp(min=1)).sqrt()
        deviation = deviation.where(deviation > 1e-12 * mean.abs(), 1)
        with torch.no_grad():
            self.mean.copy_(mean.to(self.mean).where(count > 0, self.mean))
            self.deviation.copy_(deviation.to(self.deviation).where(count > 0, self.deviation))
        if self.differences:
            steps = rows.diff(dim=1) / self.deviation.double()
            if intervals is not None:
                steps = steps / intervals[:, 1:, None]
            if packing is not None:
                ids = packing.sequence_ids(rows.shape[1])
                steps = steps[:, ids[1:] == ids[:-1]]
            slope = steps.square().nanmean((0, 1)).sqrt()
            with torch.no_grad():
                self.slope.copy_(slope.where(slope > 1e-12, 1))

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
        self, x: Tensor, gone: Tensor | None, held: Tensor | None, packing: Packing | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The last value in place of each that is missing, whether there is one, and the state."""
        rows = x.shape[0] if packing is None else packing.rows
        held = x.new_zeros(rows, self.held, dtype=wide(x)) if held is None else held
        check_tensors("Entrance", x=(x, f"* * {self.inputs}"), state=(held, f"{rows} {self.held}"))
        past, was = held[:, : self.inputs], held[:, self.inputs :] > 0
        if x.shape[1] == 0:
            return x, x.bool(), held
        if not self.differences:
            was = torch.zeros_like(past, dtype=torch.bool)
        if gone is None:
            gone = torch.zeros_like(x, dtype=torch.bool)
        if packing is None and x.shape[1] == 1:
            y = torch.where(gone, past[:, None].to(x.dtype), x)
            seen = ~gone | was[:, None]
            return y, seen, self._state(y[:, 0], seen[:, 0], held)
        time = torch.arange(x.shape[1], device=x.device)[None, :, None]
        last = torch.where(gone, -1, time).cummax(1).values  # of the line, perhaps of a sequence before
        if packing is None:
            first, before, earlier = torch.zeros_like(time), past[:, None], was[:, None]
        else:
            ids = packing.sequence_ids(x.shape[1])
            first, before, earlier = packing.cu_seqlens[ids][None, :, None], past[ids][None], was[ids][None]
        there = last >= first
        y = torch.where(there, x.gather(1, last.clamp(min=0)), before.to(x.dtype))
        seen = there | earlier
        if packing is None:
            return y, seen, self._state(y[:, -1], seen[:, -1], held)
        some, ends = (packing.cu_seqlens.diff() > 0)[:, None], (packing.cu_seqlens[1:] - 1).clamp(min=0)
        return y, seen, torch.where(some, self._state(y[0, ends], seen[0, ends], held), held)

    def _state(self, last: Tensor, seen: Tensor, like: Tensor) -> Tensor:
        last = last.to(like.dtype, copy=True)
        return torch.cat([last, seen.to(like.dtype)], -1) if self.differences else last

    def _before(
        self, last: Tensor, seen: Tensor, held: Tensor | None, packing: Packing | None
    ) -> tuple[Tensor, Tensor]:
        """``last`` and ``seen`` of the element before each, from the state where that begins a sequence."""
        rows = last.shape[0] if packing is None else packing.rows
        held = last.new_zeros(rows, self.held) if held is None else held
        past, was = held[:, : self.inputs].to(last.dtype), held[:, self.inputs :] > 0
        if packing is None:
            before, earlier = (torch.cat([a[:, None], b], 1)[:, :-1] for a, b in ((past, last), (was, seen)))
            return before, earlier
        ids = packing.sequence_ids(last.shape[1])
        first = (packing.cu_seqlens[ids] == torch.arange(last.shape[1], device=last.device))[None, :, None]
        return torch.where(first, past[ids][None], last.roll(1, 1)), torch.where(first, was[ids][None], seen.roll(1, 1))

    def _slopes(self, steps: Tensor, elapsed: Tensor | float) -> Tensor:
        if isinstance(elapsed, Tensor):
            elapsed = elapsed[..., None].to(steps.dtype)
        return steps / (self.slope.to(steps.dtype) * elapsed)


@once_per_shape
def check_features(where: str, axes: str, inputs: int, x: Tensor, weight: Tensor) -> None:
    """Features by their shape, dtype and device; the weight is one of the model's.

    Raises:
        ArgumentError: names what came and what was expected.
    """
    if wrong := other_device(where, "model", weight.device, {"x": x}):
        raise wrong
    check_tensors(where, x=(x, f"{axes} {inputs}"))
    check_floating(where, x=x)
