"""What a caller gives as data: one series, series end to end, or padded rows; as rows of one tensor, and back."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.linalg import as_tensors
from dualform.core.packing import Borders, Packing, from_lengths, unpack
from dualform.core.shapes import wide
from dualform.discrete.emission import Emission


class Series(NamedTuple):
    """Observations as rows of equal length, and how they came."""

    x: Tensor  # (B, T, M), in the dtype of the parameters
    keep: Tensor | None  # (B, T): the steps that there are, from the first on; None is all
    layout: str  # "one" for (T, M), "line" for series end to end, "packed" for these with B = 1, "rows" for (B, T, M)

    @classmethod
    def of(cls, where: str, emission: Emission, X: Any, lengths: Any = None, cu_seqlens: Borders = None) -> "Series":
        """Read data.

        Args:
            where: name of the function, first word of every error.
            emission: what the data come from.
            X: ``(T, M)``, or ``(T,)`` for M = 1: one series, or several end to end with ``lengths``; or ``(B, T, M)``,
                a batch, with ``lengths`` where rows are padded at their ends. NaN, None and masked values are missing.
            lengths: of the series end to end, summing to T; or of the rows.
            cu_seqlens: borders of series end to end in ``(1, T, M)``.

        Raises:
            ArgumentError: for shapes and lengths that do not fit, and values that no state can emit.
        """
        parameter = next(emission.parameters())
        x = as_tensors(where, model=parameter, X=X)["X"].to(wide(parameter))
        m = emission.width
        x = x[:, None] if x.dim() == 1 and m == 1 else x
        if x.dim() not in (2, 3) or x.shape[-1] != m:
            also = " or (T,)" * (m == 1)
            hint = "a batch of single values is X[..., None]" if m == 1 and x.dim() == 2 else ""
            raise ArgumentError(
                f"{where}: X has shape {tuple(x.shape)}, expected (B, T, {m}) or (T, {m}){also}", hint=hint
            )
        if cu_seqlens is not None:
            if lengths is not None or x.dim() == 2:
                raise ArgumentError(f"{where}: cu_seqlens is for X of (1, T, {m}) without lengths")
            packing = Packing.of(where, cu_seqlens, x)
            assert packing is not None
            return cls(*_rows(x, packing), "packed")._checked(where, emission)
        if lengths is None:
            made = cls(x, None, "rows") if x.dim() == 3 else cls(x[None], None, "one")
            return made._checked(where, emission)
        counts = _lengths(where, lengths)
        if x.dim() == 2:
            if int(counts.sum()) != len(x):
                raise ArgumentError(f"{where}: lengths sum to {int(counts.sum())}, but X has {len(x)} rows")
            packing = Packing.of_host(from_lengths(counts), x.device)
            return cls(*_rows(x[None], packing), "line")._checked(where, emission)
        if len(counts) != len(x) or (len(counts) and int(counts.max()) > x.shape[1]):
            most = f"{len(counts)} lengths up to {int(counts.max())}"
            raise ArgumentError(f"{where}: {most}, but X has {len(x)} rows of {x.shape[1]} steps")
        keep = torch.arange(x.shape[1], device=x.device) < counts.to(x.device)[:, None]
        return cls(torch.where(keep[..., None], x, 0), keep, "rows")._checked(where, emission)

    def _checked(self, where: str, emission: Emission) -> "Series":
        emission.check(where, "X", self.back(self.x))
        return self

    def back(self, rows: Tensor) -> Tensor:
        """What was made of each step, ``(B, T, ...)``, in the layout of the data."""
        if self.layout == "rows":
            return rows
        if self.layout == "one":
            return rows[0]
        assert self.keep is not None
        line = rows[self.keep]
        return line if self.layout == "line" else line[None]

    def of_series(self, values: Tensor) -> Tensor:
        """What was made of each series ``(B,)``; without axes of one series."""
        return values[0] if self.layout == "one" else values

    def steps(self) -> Tensor:
        """The observations end to end, ``(N, M)``."""
        return self.x.flatten(0, 1) if self.keep is None else self.x[self.keep]

    def masked(self, m: Tensor) -> Tensor:
        """0 after the end of a row, of ``(B, T, ...)``."""
        return m if self.keep is None else torch.where(self.keep.view(*self.keep.shape, *[1] * (m.dim() - 2)), m, 0)


def _rows(x: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    keep = packing.keep_mask()
    return unpack(x, keep), keep


def _lengths(where: str, lengths: Any) -> Tensor:
    counts = torch.as_tensor(lengths, device="cpu")
    if counts.dim() != 1 or counts.is_floating_point() or not len(counts) or bool((counts < 0).any()):
        raise ArgumentError(f"{where}: lengths is {lengths!r}, expected a list of whole numbers from 0")
    return counts.to(torch.int64)
