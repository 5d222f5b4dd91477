"""What every model does whose linear-Gaussian form is made of its parameters."""

import copy
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from dualform.core.errors import ArgumentError
from dualform.core.options import suggestion
from dualform.gaussian.constraints import kind, places
from dualform.gaussian.fitting import fit
from dualform.gaussian.model import LinearGaussian
from dualform.gaussian.recurrent import Innovation
from dualform.gaussian.series import Filtered, Forecast, Smoothed

B = TypeVar("B", bound="Built")


class Built(nn.Module):
    """A model whose linear-Gaussian form is made of its parameters, with their gradients: ``build()``.

    Its log-likelihood has gradients. What else is asked of it has none, so that it can be shown and is of the kind of
    the series; the same methods of ``build()`` have them.
    """

    rows: int | None = None

    def build(self) -> LinearGaussian:
        """The linear-Gaussian model of the values that the parameters have now.

        Raises:
            ArgumentError: where they have none, such as a stationary start of an autoregression at its bound.
        """
        raise NotImplementedError

    def _begin(self, y: Any) -> None:
        """Set the parameters of one series."""

    def prepared(self, y: Any) -> Any:
        """The series as it is filtered: y itself, unless a model transforms it."""
        return y

    def log_likelihood(self, y: Any, **options: Any) -> Tensor:
        """:meth:`~dualform.gaussian.series.Series.log_likelihood` of the model, with gradients to its parameters."""
        return self.build().log_likelihood(self.prepared(y), **options)

    @torch.no_grad()
    def filter(self, y: Any, **options: Any) -> Filtered:
        """:meth:`~dualform.gaussian.series.Series.filter` of the model."""
        return self.build().filter(self.prepared(y), **options)

    @torch.no_grad()
    def smooth(self, y: Any, **options: Any) -> Smoothed:
        """:meth:`~dualform.gaussian.series.Series.smooth` of the model."""
        return self.build().smooth(self.prepared(y), **options)

    @torch.no_grad()
    def innovations(self, y: Any, **options: Any) -> Innovation:
        """:meth:`~dualform.gaussian.series.Series.innovations` of the model."""
        return self.build().innovations(self.prepared(y), **options)

    @torch.no_grad()
    def forecast(self, y: Any, horizon: int, **options: Any) -> Forecast:
        """:meth:`~dualform.gaussian.series.Series.forecast` of the model."""
        return self.build().forecast(self.prepared(y), horizon, **options)

    @torch.no_grad()
    def simulate_posterior(self, y: Any, draws: int = 1, **options: Any) -> Any:
        """:meth:`~dualform.gaussian.series.Series.simulate_posterior` of the model."""
        return self.build().simulate_posterior(self.prepared(y), draws, **options)

    def sample(self, length: int, batch: int = 1, **options: Any) -> tuple[Tensor, Tensor]:
        """:meth:`~dualform.gaussian.model.LinearGaussian.sample` of the model."""
        return self.build().sample(length, batch, **options)

    def fit(self, y: Any, method: Literal["lbfgs"] = "lbfgs", **options: Any) -> Any:
        """Maximise the likelihood of a series: :func:`~dualform.gaussian.fitting.fit`, with its arguments."""
        return fit(self, y, method, **options)

    def expand(self: B, rows: int) -> B:
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

    def row(self: B, row: int) -> B:
        """The model of one series, a copy, of a model that was expanded.

        Raises:
            ArgumentError: for a row that there is not.
        """
        if self.rows is None or not 0 <= row < self.rows:
            raise ArgumentError(f"{kind(self)}.row: row is {row}, expected one of {self.rows or 'an expanded model'}")
        made = copy.deepcopy(self)
        made.rows = None
        for place in places(made):
            place.free.data = place.free.data[row].clone()
        return made

    @torch.no_grad()
    def begin(self, y: Any) -> None:
        """Set the estimated parameters to where an optimiser may begin, by the series; each row by its own."""
        if self.rows is None:
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
    def set(self, **values: Any) -> "Built":
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
