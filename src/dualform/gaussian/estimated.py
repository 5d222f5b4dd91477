"""What every model does whose parameters are estimated by maximum likelihood."""

import copy
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from dualform.core.errors import ArgumentError
from dualform.core.options import suggestion
from dualform.gaussian.constraints import kind, places
from dualform.gaussian.fitting import fit

E = TypeVar("E", bound="Estimated")


class Estimated(nn.Module):
    """A model with ``log_likelihood(y)``, whose parameters are found by maximising it."""

    rows: int | None = None
    begins_at_once = False  # whether `_begin` takes the series of all rows

    def _begin(self, y: Any) -> None:
        """Set the parameters of one series."""

    def fit(self, y: Any, method: Literal["lbfgs", "em", "adam"] = "lbfgs", **options: Any) -> Any:
        """Maximise the likelihood of a series: :func:`~dualform.gaussian.fitting.fit`, with its arguments."""
        return fit(self, y, method, **options)

    def expand(self: E, rows: int) -> E:
        """A copy whose estimated parameters each have an axis of ``rows`` in front, for as many series.

        Raises:
            ArgumentError: for a model that was expanded, and fewer than one row.
        """
        if self.rows is not None or rows < 1:
            raise ArgumentError(f"{kind(self)}.expand: rows is {rows}, of a model with {self.rows}, expected 1 or more")
        made = copy.deepcopy(self)
        made.rows = rows
        for place in places(made):
            place.free.data = place.free.data.expand(rows, *place.free.shape).clone()
        return made

    def row(self: E, row: int) -> E:
        """The model of one series, a copy, of a model that was expanded.

        Raises:
            ArgumentError: for a row that there is not.
        """
        if self.rows is None or not 0 <= row < self.rows:
            raise ArgumentError(f"{kind(self)}.row: row is {row}, expected one of {self.rows or 'an expanded model'}")
        return self._of(row, None)

    def all_rows(self: E) -> E:
        """A copy of a model that was expanded, with parameters of its own."""
        return self._of(slice(None), self.rows)

    def some(self: E, rows: Tensor) -> E:
        """The model of the rows of a mask ``(R,)``, a copy, of a model that was expanded."""
        return self._of(rows, int(rows.sum()))

    def _of(self: E, at: Any, rows: int | None) -> E:
        made = _twin(self)
        made.rows = rows
        for place in places(made):
            place.free.data = place.free.data[at].clone()
        return made

    @torch.no_grad()
    def begin(self, y: Any) -> None:
        """Set the estimated parameters to where an optimiser may begin, by the series; each row by its own."""
        if self.rows is None or self.begins_at_once:
            return self._begin(y)
        one = self.row(0)
        for row in range(self.rows):
            one._begin(y[row])
            for mine, its in zip(places(self), places(one), strict=True):
                mine.free[row] = its.free

    def values(self) -> dict[str, Tensor]:
        """The estimated parameters by name, as constrained values."""
        return {place.name: place.value.detach().clone() for place in places(self)}

    @torch.no_grad()
    def set(self, **values: Any) -> "Estimated":
        """Set estimated parameters to values, such as ``set(**{"level.variance": 1469.1})``; returns the model.

        Raises:
            ArgumentError: for a name that is no estimated parameter, another shape, or a value out of bounds.
        """
        known = {place.name: place for place in places(self)}
        for name, value in values.items():
            if name not in known:
                raise ArgumentError(
                    f"{kind(self)}.set: {name!r} is no estimated parameter", hint=suggestion(name, [*known])
                )
            known[name].assign(value)
        return self


def _twin(module: Any) -> Any:
    """A copy of a module with parameters of its own; it shares what is never written to, which the buffers are."""
    if next(module.parameters(), None) is None:
        return module
    made = module.__class__.__new__(module.__class__)
    made.__dict__ = {name: v.copy() if isinstance(v, dict) else v for name, v in module.__dict__.items()}
    made._modules = {name: None if child is None else _twin(child) for name, child in module._modules.items()}
    made._parameters = {
        name: None if p is None else nn.Parameter(p.data, requires_grad=p.requires_grad)
        for name, p in module._parameters.items()
    }
    return made
