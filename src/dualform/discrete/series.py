"""What a caller gives as data: one series, series end to end, or padded rows; as rows of one tensor, and back."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.linalg import as_tensors, check_finite
from dualform.core.packing import Borders, Packing, from_lengths
from dualform.core.shapes import wide
from dualform.discrete.emission import Emission


class Part(NamedTuple):
    """Series of like length, as rows."""

    x: Tensor  # (R, L, M)
    keep: Tensor | None  # (R, L): the steps that there are, from the first on; None is all
    rows: Tensor  # (R,), which series these are
    u: Tensor | None  # (R, L, U), inputs

    def masked(self, m: Tensor) -> Tensor:
        """0 after the end of a row, of ``(R, L, ...)``."""
        return m if self.keep is None else torch.where(self.keep.view(*self.keep.shape, *[1] * (m.dim() - 2)), m, 0)


class Series(NamedTuple):
    """Observations as they came, and as rows that a model runs over."""

    parts: tuple[Part, ...]
    line: Tensor  # (N, M): all observations end to end, in the dtype of the parameters
    place: Tensor  # (N,): of each in its series
    number: int  # B
    order: Tensor | None  # (N,): where each step of the line lies among those of all parts; None is in their order
    keep: Tensor | None  # (B, T) of a batch with lengths
    layout: str  # "one" for (T, M), "line" for series end to end, "packed" for these with B = 1, "rows" for (B, T, M)

    @classmethod
    def of(
        cls, where: str, model: Any, X: Any, lengths: Any = None, cu_seqlens: Borders = None, u: Any = None
    ) -> "Series":
        """Read data.

        Args:
            where: name of the function, first word of every error.
            model: what the data come from, with its ``emission`` and number of ``inputs``.
            X: ``(T, M)``, or ``(T,)`` for M = 1: one series, or several end to end with ``lengths``; or ``(B, T, M)``,
                a batch, with ``lengths`` where rows are padded at their ends. NaN, None and masked values are missing.
            lengths: of the series end to end, summing to T; or of the rows.
            cu_seqlens: borders of series end to end in ``(1, T, M)``.
            u: inputs in the layout of X, with U in place of M; ``(T, U)`` for all rows of a batch.

        Raises:
            ArgumentError: for shapes and lengths that do not fit, and values that no state can emit.
        """
        emission: Emission = model.emission
        parameter = next(emission.parameters())
        x = as_tensors(where, model=parameter, X=X)["X"].to(wide(parameter))
        m = emission.width
        x = x[:, None] if x.dim() == 1 and m == 1 else x
        if x.dim() not in (2, 3) or x.shape[-1] != m:
            expected = f"(B, T, {m}) or (T, {m}){' or (T,)' * (m == 1)}"
            hint = "a batch of single values is X[..., None]" if m == 1 and x.dim() == 2 else ""
            raise ArgumentError(f"{where}: X has shape {tuple(x.shape)}, expected {expected}", hint=hint)
        u = inputs_of(where, model.inputs, parameter, u, tuple(x.shape[:-1]))
        x = x if u is None else torch.cat([x, u], -1)

        def check(x: Tensor) -> None:
            emission.check(where, "X", x[..., :m])
            check_finite(where, {"u": x[..., m:]}, "an input cannot be missing")

        if cu_seqlens is not None:
            if lengths is not None or x.dim() == 2:
                raise ArgumentError(f"{where}: cu_seqlens is for X of (1, T, {m}) without lengths")
            check(x)
            packing = Packing.of(where, cu_seqlens, x)
            assert packing is not None
            return cls._ragged(x[0], m, packing, None, "packed")
        if lengths is None:
            check(x)
            layout, x = ("rows", x) if x.dim() == 3 else ("one", x[None])
            (count, length, _), device = x.shape, x.device
            place = torch.arange(length, device=device).repeat(count)
            parts = (_part(x, m, None, torch.arange(count, device=device)),) if length and count else ()
            return cls(parts, x[..., :m].flatten(0, 1), place, count, None, None, layout)
        counts = _lengths(where, lengths)
        if x.dim() == 2:
            if int(counts.sum()) != len(x):
                raise ArgumentError(f"{where}: lengths sum to {int(counts.sum())}, but X has {len(x)} rows")
            check(x)
            return cls._ragged(x, m, Packing.of_host(from_lengths(counts), x.device), None, "line")
        if len(counts) != len(x) or int(counts.max()) > x.shape[1]:
            most = f"{len(counts)} lengths up to {int(counts.max())}"
            raise ArgumentError(f"{where}: {most}, but X has {len(x)} rows of {x.shape[1]} steps")
        keep = torch.arange(x.shape[1], device=x.device) < counts.to(x.device)[:, None]
        check(torch.where(keep[..., None], x, 0))
        return cls._ragged(x[keep], m, Packing.of_host(from_lengths(counts), x.device), keep, "rows")

    @classmethod
    def _ragged(cls, line: Tensor, m: int, packing: Packing, keep: Tensor | None, layout: str) -> "Series":
        groups, order = packing.groups()
        parts = tuple(_part(torch.where(k[..., None], line[steps], 0), m, k, rows) for rows, steps, k in groups)
        return cls(parts, line[:, :m], packing.places(len(line))[1], packing.rows, order, keep, layout)

    def on_line(self, each: list[Tensor]) -> Tensor:
        """What was made of the steps of each part ``(R, L, ...)``, end to end, ``(N, ...)``."""
        line = each[0].flatten(0, 1) if len(each) == 1 else torch.cat([m.flatten(0, 1) for m in each])
        return line if self.order is None else line.index_select(0, self.order)

    def back(self, each: list[Tensor], fill: float = 0) -> Tensor:
        """The same in the layout of the data, with ``fill`` after the end of a row."""
        if self.layout == "rows" and self.keep is None:
            return each[0]
        line = self.on_line(each)
        if self.keep is None:
            return line[None] if self.layout == "packed" else line
        return torch.full((*self.keep.shape, *line.shape[1:]), fill).to(line).index_put((self.keep,), line)

    def of_series(self, each: list[Tensor]) -> Tensor:
        """What was made of each series of each part ``(R,)``; 0 of an empty one; without axes of one series."""
        values = self.line.new_zeros(self.number)
        for part, made in zip(self.parts, each, strict=True):
            values = values.index_put((part.rows,), made)
        return values[0] if self.layout == "one" else values


def _part(x: Tensor, m: int, keep: Tensor | None, rows: Tensor) -> Part:
    """Rows of observations, M wide, and of the inputs behind them."""
    return Part(x[..., :m], keep, rows, x[..., m:] if x.shape[-1] > m else None)


def inputs_of(where: str, inputs: int, like: Tensor, u: Any, axes: tuple[int, ...]) -> Tensor | None:
    """Inputs ``(*axes, U)``, whatever their values.

    Raises:
        ArgumentError: for a shape that does not fit, inputs of a model that has none, and a model that has them
            without.
    """
    if u is None and not inputs:
        return None
    if u is None or not inputs:
        what = f"no inputs u, but the model has {inputs}" if u is None else "inputs u, but the model has none"
        raise ArgumentError(f"{where}: {what}", hint="HiddenMarkov(..., inputs=U) takes u with U numbers at each step")
    u = as_tensors(where, model=like, u=u)["u"].to(wide(like))
    u = u[:, None] if u.dim() == 1 and inputs == 1 else u
    if u.shape[-1:] != (inputs,) or u.shape[:-1] not in (axes, axes[-1:]):
        expected = " or ".join(str((*sizes, inputs)) for sizes in dict.fromkeys((axes, axes[-1:])))
        raise ArgumentError(f"{where}: u has shape {tuple(u.shape)}, expected {expected}")
    return u.expand(*axes, inputs)


def _lengths(where: str, lengths: Any) -> Tensor:
    counts = torch.as_tensor(lengths, device="cpu")
    if counts.dim() != 1 or counts.is_floating_point() or not len(counts) or bool((counts < 0).any()):
        raise ArgumentError(f"{where}: lengths is {lengths!r}, expected a list of whole numbers from 0")
    return counts.to(torch.int64)
