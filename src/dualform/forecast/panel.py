"""One series or several, in tensors, arrays, tables of pandas or dictionaries; and results of the same kind."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.linalg import as_tensors

LEAST = 5
"""Observations of which a series has to have so many."""


@dataclass(frozen=True)
class Panel:
    """Series with names; made by :func:`panel_of`.

    ``given`` is what they came as, ``table`` says whether several were the columns of a table.
    """

    where: str
    given: Any
    names: list[str]
    series: list[Tensor]  # of each, (T,), float64
    table: bool

    @property
    def framed(self) -> bool:
        """Whether this came as a Series or a DataFrame of pandas."""
        return is_frame(self.given)

    def season(self) -> int:
        """The season that the times of a table of pandas have, in steps; 1 where there is none, or are none."""
        if isinstance(self.given, Mapping):
            found = {panel_of(self.where, part).season() for part in self.given.values()}
            return found.pop() if len(found) == 1 else 1
        if not self.framed:
            return 1
        from dualform.forecast.frames import season_of_index  # pandas is there, as the series is of it

        return season_of_index(self.given.index)

    def without_last(self, steps: int) -> Any:
        """What was given without its last steps."""
        return self._each(lambda part: part.iloc[: len(part) - steps] if is_frame(part) else part[: len(part) - steps])

    def _each(self, change: Any) -> Any:
        if isinstance(self.given, Mapping):
            return {name: change(part) for name, part in self.given.items()}
        return change(self.given)

    def out(self, found: list[Tensor], levels: list[Any] | None = None) -> Any:
        """Results of each series, ``(h,)`` or ``(h, K)``, in the form of what was given.

        Args:
            found: in the order of the series.
            levels: names of the K columns.
        """
        if isinstance(self.given, Mapping):
            parts = zip(self.given.items(), found, strict=True)
            return {name: panel_of(self.where, part).out([value], levels) for (name, part), value in parts}
        if self.framed:
            from dualform.forecast.frames import future_table

            values = [value.numpy() for value in found]
            return future_table(self.where, self.given, values, levels)
        value = torch.stack(found, 1) if self.table else found[0]
        return value.numpy() if isinstance(self.given, np.ndarray) else value


def panel_of(where: str, y: Any) -> Panel:
    """Series as they come: ``(T,)``, several as the columns of ``(T, S)``, or a dictionary of names and series.

    Args:
        where: the first word of an error.
        y: a tensor, an array, a list, or a Series or DataFrame of pandas, in which NaN is missing; or a mapping of
            names to such series, each of its own length.

    Raises:
        ArgumentError: for other shapes, values that are infinite or no numbers, and a series that is too short, that is
            missing as a whole, or that never changes; it names the series.
    """
    if isinstance(y, Mapping):
        if not y:
            raise ArgumentError(f"{where}: y is an empty dictionary, expected one series or more")
        parts = [_numbers(where, f"series {name!r}", part) for name, part in y.items()]
        for name, part in zip(y, parts, strict=True):
            if part.dim() != 1:
                raise ArgumentError(f"{where}: series {name!r} has shape {tuple(part.shape)}, expected (T,)")
        made = Panel(where, y, [str(name) for name in y], parts, False)
    else:
        values = _numbers(where, "y", y)
        if values.dim() not in (1, 2) or not values.shape[-1]:
            raise ArgumentError(f"{where}: y has shape {tuple(values.shape)}, expected (T,), or (T, S) for S series")
        table = values.dim() == 2
        names = [str(name) for name in y.columns] if is_frame(y) and table else _named(y, values.shape[-1], table)
        made = Panel(where, y, names, list(values.unbind(1)) if table else [values], table)
    for name, series in zip(made.names, made.series, strict=True):
        _check(f"{where}: {name}", series)
    return made


def covariates(where: str, X: Any, steps: int) -> Tensor:
    """Covariates ``(steps, K)``, or ``(steps,)`` for one, as a tensor ``(steps, K)``.

    Raises:
        ArgumentError: for other shapes, and values that are missing or infinite.
    """
    made = _numbers(where, "X", X)
    made = made[:, None] if made.dim() == 1 else made
    if made.dim() != 2 or len(made) != steps:
        raise ArgumentError(f"{where}: X has shape {tuple(made.shape)}, expected ({steps}, K), a row for each step")
    if not made.isfinite().all():
        row = int((~made.isfinite()).any(1).nonzero()[0])
        raise ArgumentError(f"{where}: X has a value in row {row} that is missing or infinite, expected numbers")
    return made


def is_frame(value: Any) -> bool:
    """Whether a value is a Series or a DataFrame of pandas, without an import of it."""
    return hasattr(value, "iloc") and hasattr(value, "to_numpy")


def _named(y: Any, count: int, table: bool) -> list[str]:
    name = getattr(y, "name", None) if is_frame(y) else None
    return [f"series {k}" for k in range(count)] if table else [str(name) if name is not None else "y"]


def _numbers(where: str, what: str, value: Any) -> Tensor:
    """Float64 numbers, NaN where one is missing."""
    if is_frame(value):
        try:
            value = value.to_numpy(dtype=np.float64, na_value=np.nan)
        except (TypeError, ValueError) as error:
            raise ArgumentError(f"{where}: {what} has values that are no numbers ({error})") from error
    made = as_tensors(where, **{what: value})[what].detach().cpu()
    if made.is_complex():
        raise ArgumentError(f"{where}: {what} has complex values, expected real ones")
    if made.dim() and made.isinf().any():
        row = int(made.isinf().reshape(len(made), -1).any(1).nonzero()[0])
        raise ArgumentError(f"{where}: {what} has an infinite value in row {row}", hint="NaN stands for a missing one")
    return made.double()


def _check(what: str, series: Tensor) -> None:
    seen = series[~series.isnan()]
    if not len(seen):
        raise ArgumentError(f"{what} has no observation: all of its {len(series)} values are missing")
    if len(seen) < LEAST:
        raise ArgumentError(f"{what} has {len(seen)} observations, expected {LEAST} or more")
    if (seen == seen[0]).all():
        raise ArgumentError(
            f"{what} is constant: all of its {len(seen)} observations are {seen[0].item():g}",
            hint="there is nothing to estimate; leave it out",
        )
