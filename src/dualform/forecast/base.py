"""The manners of scikit-learn that all forecasters here have."""

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.options import suggestion
from dualform.forecast.distribution import Moments
from dualform.forecast.panel import Panel, covariates, panel_of

F = TypeVar("F", bound="BaseForecaster")

LEVELS = (0.025, 0.1, 0.25, 0.5, 0.75, 0.9, 0.975)
"""The quantiles of :meth:`BaseForecaster.predict`: the median, and the ends of the bands of 50, 80 and 95 %."""

FARTHEST = 100_000
"""The most steps that are forecast at once."""


class Prediction(NamedTuple):
    """What a forecaster says of the steps to come, of the kind of the series that it was fitted to.

    A table of pandas has the times to come as its index; quantiles have a column for each of ``levels``. Of a
    dictionary of series, both are dictionaries.
    """

    mean: Any  # (h,), or (h, S) for several series
    quantiles: Any  # (h, Q), or (h, S, Q)
    levels: tuple[float, ...]


class BaseForecaster:
    """A forecaster is made with its parameters, fitted to series, and asked for the steps that come.

    Series are ``(T,)``, several ``(T, S)``, or a dictionary of names and series of any lengths; tensors, NumPy arrays,
    or tables of pandas, in which NaN is missing. What comes out is of the kind of what went in.

    A subclass stores the arguments of its constructor under their names, and has ``_estimate`` and ``_moments``.
    """

    panel_: Panel | None = None
    X_: Tensor | None = None
    season_: int = 1

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments of the constructor by their names.

        Args:
            deep: without effect; scikit-learn gives it.
        """
        return {name: getattr(self, name) for name in self._names()}

    def set_params(self: F, **params: Any) -> F:
        """Change arguments of the constructor; what was fitted stays until the next fit.

        Args:
            params: by their names.

        Raises:
            ArgumentError: for an unknown name.
        """
        known = self._names()
        for name, value in params.items():
            if name not in known:
                raise ArgumentError(f"{self._name}: unknown parameter {name!r}", hint=suggestion(name, known))
            setattr(self, name, value)
        return self

    def fit(self: F, y: Any, X: Any = None) -> F:
        """Choose and estimate a model of each series.

        Args:
            y: the series.
            X: covariates ``(T, K)``, the same for all series, which then have the same length.

        Raises:
            ArgumentError: for series that cannot be used, with the name of the series and the row; and for parameters
                out of range.
        """
        panel = panel_of(f"{self._name}.fit", y)
        self.season_ = self._season(panel)
        self._see(panel, X, f"{self._name}.fit")
        self._estimate(panel, self.X_)
        return self

    def update(self: F, y: Any, X: Any = None) -> F:
        """Forecast from the end of these observations instead, with the parameters that were estimated.

        Args:
            y: the series from their beginning, as many as were fitted.
            X: covariates, as in :meth:`fit`.

        Raises:
            ArgumentError: as :meth:`fit`, before a fit, and for other series than were fitted.
        """
        before = self._fitted("update")
        panel = panel_of(f"{self._name}.update", y)
        if panel.names != before.names:
            raise ArgumentError(
                f"{self._name}.update: the series are {', '.join(panel.names)}, those that were fitted "
                f"{', '.join(before.names)}"
            )
        if (X is None) != (self.X_ is None):
            raise ArgumentError(f"{self._name}.update: X {'is missing' if X is None else 'was not there in the fit'}")
        self._see(panel, X, f"{self._name}.update")
        self._again(panel, self.X_)
        return self

    def predict(self, horizon: int, X: Any = None) -> Prediction:
        """Means and quantiles of the next steps.

        Args:
            horizon: how many steps, 1 or more.
            X: covariates of these steps ``(horizon, K)``, if there were some in the fit.

        Raises:
            ArgumentError: before a fit, for a horizon below 1, and for covariates that do not fit.
        """
        panel, found = self._ahead("predict", horizon, X)
        mean = panel.out([one.expected() for one in found])
        return Prediction(mean, self._quantiles(panel, found, LEVELS), LEVELS)

    def predict_quantiles(self, horizon: int, levels: Sequence[float] = LEVELS, X: Any = None) -> Any:
        """Quantiles of the next steps, ``(h, Q)``, or ``(h, S, Q)`` for several series.

        Args:
            horizon: how many steps, 1 or more.
            levels: between 0 and 1.
            X: as in :meth:`predict`.

        Raises:
            ArgumentError: as :meth:`predict`, and for levels out of range.
        """
        if not len(levels) or not all(0 < level < 1 for level in levels):
            raise ArgumentError(f"{self._name}.predict_quantiles: levels are {levels!r}, expected numbers in 0 .. 1")
        panel, found = self._ahead("predict_quantiles", horizon, X)
        return self._quantiles(panel, found, levels)

    def predict_interval(self, horizon: int, level: float = 0.95, X: Any = None) -> Any:
        """The bands with a probability, ``(h, 2)``, or ``(h, S, 2)`` for several series: lower and upper ends.

        Args:
            horizon: how many steps, 1 or more.
            level: the probability, between 0 and 1, half of the rest on each side.
            X: as in :meth:`predict`.

        Raises:
            ArgumentError: as :meth:`predict`, and for a level out of range.
        """
        if not 0 < level < 1:
            raise ArgumentError(f"{self._name}.predict_interval: level is {level!r}, expected a number in 0 .. 1")
        panel, found = self._ahead("predict_interval", horizon, X)
        ends = [(1 - level) / 2, (1 + level) / 2]
        return panel.out([one.quantiles(ends) for one in found], ["lower", "upper"])

    # What a subclass has.

    def _estimate(self, panel: Panel, X: Tensor | None) -> None:
        """Fit to all series; ``season_`` is known."""
        raise NotImplementedError

    def _again(self, panel: Panel, X: Tensor | None) -> None:
        """Keep the parameters, of other observations."""

    def _moments(self, horizon: int, X: Tensor | None) -> list[Moments]:
        """Of each series."""
        raise NotImplementedError

    # What they share.

    @property
    def _name(self) -> str:
        return type(self).__name__

    @classmethod
    def _names(cls) -> list[str]:
        return [name for name in signature(cls.__init__).parameters if name != "self"]

    def _season(self, panel: Panel) -> int:
        given = getattr(self, "season", None)
        if given is None:
            return panel.season()
        if isinstance(given, bool) or not isinstance(given, int) or given < 1:
            raise ArgumentError(f"{self._name}: season is {given!r}, expected a number of steps, 1 for none")
        for name, y in zip(panel.names, panel.series, strict=True):
            if len(y) <= given and given > 1:
                raise ArgumentError(
                    f"{self._name}: {name} has {len(y)} steps, which is no more than a season of {given}",
                    hint="a shorter season, or 1 for none",
                )
        return given

    def _see(self, panel: Panel, X: Any, where: str) -> None:
        lengths = {len(y) for y in panel.series}
        if X is not None and len(lengths) > 1:
            raise ArgumentError(f"{where}: X is given for series of different lengths", hint="one call for each")
        panel.out([y[:1] for y in panel.series])  # raises where it is not known which times come next
        self.X_ = None if X is None else covariates(where, X, lengths.pop())
        self.panel_ = panel

    def _fitted(self, method: str) -> Panel:
        if self.panel_ is None:
            raise ArgumentError(f"{self._name}.{method}: not fitted yet", hint=f"{self._name}().fit(y)")
        return self.panel_

    def _ahead(self, method: str, horizon: int, X: Any) -> tuple[Panel, list[Moments]]:
        panel, where = self._fitted(method), f"{self._name}.{method}"
        check_horizon(where, horizon)
        if (X is None) != (self.X_ is None):
            what = "is missing, of the steps to come" if X is None else "is given, but was not in the fit"
            raise ArgumentError(f"{where}: X {what}")
        future = None if X is None else covariates(where, X, horizon)
        if future is not None and self.X_ is not None and future.shape[1] != self.X_.shape[1]:
            raise ArgumentError(f"{where}: X has {future.shape[1]} columns, {self.X_.shape[1]} in the fit")
        return panel, self._moments(horizon, future)

    def _quantiles(self, panel: Panel, found: list[Moments], levels: Sequence[float]) -> Any:
        return panel.out([one.quantiles(levels) for one in found], list(levels))


def check_horizon(where: str, horizon: Any) -> None:
    """Raise an ArgumentError unless a horizon is a whole number of 1 or more, and not beyond all reason."""
    if isinstance(horizon, bool) or not isinstance(horizon, int) or horizon < 1:
        raise ArgumentError(f"{where}: horizon is {horizon!r}, expected 1 or more steps")
    if horizon > FARTHEST:
        raise ArgumentError(f"{where}: horizon is {horizon:,}, expected at most {FARTHEST:,} steps")


def by_name(panel: Panel) -> Mapping[str, Tensor]:
    """The series of a panel by their names, which are made different."""
    found: dict[str, Tensor] = {}
    for name, y in zip(panel.names, panel.series, strict=True):
        count = 1
        while (label := name if count == 1 else f"{name} ({count})") in found:
            count += 1
        found[label] = y
    return found


def last_of_season(y: Tensor, season: int, horizon: int) -> Tensor:
    """The last observation of the same place in the season, for each of the steps to come ``(h,)``."""
    found = []
    for step in range(horizon):
        place = y[(len(y) + step) % season :: season]
        seen = place[~place.isnan()]
        found.append(seen[-1] if len(seen) else y[~y.isnan()][-1])
    return torch.stack(found)
