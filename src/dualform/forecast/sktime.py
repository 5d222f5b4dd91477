"""The forecaster as one of sktime's; it needs the extra ``sktime``."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd

from dualform.core.errors import DualformError
from dualform.forecast.forecaster import Forecaster
from dualform.forecast.frames import future_index, regular

try:
    from sktime.datatypes import update_data
    from sktime.forecasting.base import BaseForecaster
except ImportError as error:
    raise DualformError(
        f"dualform.forecast.sktime needs sktime, which cannot be imported: {error}",
        hint="pip install 'dualform[sktime]'",
    ) from error


class StateSpaceForecaster(BaseForecaster):
    """:class:`~dualform.forecast.forecaster.Forecaster` with sktime's interface.

    It takes what sktime's forecasters take: series, tables of several, and panels and hierarchies, whose series are
    fitted in batches. Values may be missing, and so may times: an index is filled up to a regular one. Covariates are
    numbers, and known where a forecast is asked for. Intervals, quantiles and variances are given for the steps to
    come.

    ``update`` fits again to all that was seen; with ``update_params=False`` it keeps the choice and the parameters, and
    moves on to the end of the series. After ``fit``, ``forecasters_`` holds the Forecaster of all series; with
    covariates, that of each instance of a panel.

    Args:
        model: as in Forecaster.
        season: in steps, 1 for none; None takes it from the frequency of the index.
        horizon: how many steps the choice looks ahead; None for the largest of ``fh`` where ``fit`` gets it, otherwise
            as in Forecaster.
        log: as in Forecaster.

    Raises:
        DualformError: where sktime is not installed, when this module is imported.

    Example:
        >>> from dualform.forecast.sktime import StateSpaceForecaster
        >>> from sktime.datasets import load_airline
        >>> found = StateSpaceForecaster("local_level").fit(load_airline(), fh=[1, 2, 3])
        >>> found.predict_interval(coverage=0.9).shape
        (3, 2)
    """

    _tags = {  # noqa: RUF012 - of sktime
        "authors": "the dualform authors",
        "maintainers": "the dualform authors",
        "y_inner_mtype": ["pd.DataFrame", "pd-multiindex", "pd_multiindex_hier"],
        "X_inner_mtype": ["pd.DataFrame", "pd-multiindex", "pd_multiindex_hier"],
        "requires-fh-in-fit": False,
        "capability:multivariate": True,
        "capability:exogenous": True,
        "capability:categorical_in_X": False,
        "capability:missing_values": True,
        "capability:insample": False,
        "capability:pred_int": True,
        "capability:pred_int:insample": False,
        "capability:update": True,
    }
    _config = {"remember_data": False}  # noqa: RUF012 - what it needs is in y_ and X_

    def __init__(
        self,
        model: str = "auto",
        season: int | None = None,
        horizon: int | None = None,
        log: bool | None = None,
    ):
        self.model, self.season, self.horizon, self.log = model, season, horizon, log
        super().__init__()
        self._y = self._X = None  # which sktime fills where its config asks for that

    @classmethod
    def get_test_params(cls, parameter_set: str = "default") -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Arguments with which sktime tests this class.

        Args:
            parameter_set: without effect.
        """
        return [{"model": "local_level"}, {"model": "local_level", "season": 1, "horizon": 2, "log": False}]

    def _fit(self, y: Any, X: Any, fh: Any) -> "StateSpaceForecaster":
        self.y_, self.X_, horizon = y, X, self.horizon
        if horizon is None and fh is not None:
            horizon = max(1, int(fh.to_relative(self.cutoff).to_numpy().max()))
        given: dict[str, Any] = {"season": self.season, "horizon": horizon, "log": self.log}
        self.forecasters_ = {
            key: Forecaster(self.model, **given).fit(series, past) for key, series, past in self._groups()
        }
        return self

    def _update(self, y: Any, X: Any = None, update_params: bool = True) -> "StateSpaceForecaster":
        every = update_data(self.y_, y), update_data(self.X_, X)
        if update_params:
            return self._fit(*every, self._fh)
        self.y_, self.X_ = every
        for key, series, past in self._groups():
            self.forecasters_[key].update(series, past)
        return self

    def _predict(self, fh: Any, X: Any) -> Any:
        return self._ahead(fh, X, lambda one, horizon, future: one.predict(horizon, future).mean)

    def _predict_quantiles(self, fh: Any, X: Any, alpha: list[float]) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._ahead(fh, X, lambda one, horizon, future: one.predict_quantiles(horizon, alpha, future))

    def _groups(self) -> Iterator[tuple[Any, dict[Any, Any], Any]]:
        """The series that one forecaster takes, and their covariates: all of them, or those of an instance."""
        tables, past = _instances(self.y_, fill=True), _instances(self.X_)
        if self.X_ is None:
            yield (), {name: series for key, table in tables.items() for name, series in _named(key, table)}, None
            return
        for key, table in tables.items():
            yield key, dict(_named(key, table)), past[key].reindex(table.index)

    def _ahead(self, fh: Any, X: Any, ask: Callable[[Forecaster, int, Any], dict[Any, Any]]) -> Any:
        """What the forecasters say of a horizon, in one table: a row for each step of each instance."""
        tables, future = _instances(self.y_, fill=True), _instances(X)
        steps = {key: fh.to_relative(table.index[-1:]).to_numpy().astype(int) for key, table in tables.items()}
        found: dict[Any, Any] = {}
        for key, forecaster in self.forecasters_.items():
            horizon = int(max(map(np.max, steps.values())) if self.X_ is None else steps[key].max())
            found |= ask(forecaster, horizon, None if X is None else _known(future, key, tables, steps, horizon))
        rows = {}
        for key, table in tables.items():
            columns = {name[-1] if key else name: found[name].iloc[steps[key] - 1] for name, _ in _named(key, table)}
            rows[key] = pd.concat(columns, axis=1).set_axis(fh.to_absolute_index(table.index[-1:]))
        if () in rows:
            return rows[()]
        past: Any = self.y_
        return pd.concat(rows, names=past.index.names)


def _instances(data: Any, fill: bool = False) -> dict[tuple[Any, ...], Any]:
    """The table of each instance of a panel by its key; of one series, by no key. None has none."""
    if data is None:
        return {}
    if isinstance(data.index, pd.MultiIndex):
        levels = list(range(data.index.nlevels - 1))
        groups = data.groupby(level=levels if len(levels) > 1 else 0, sort=False)
        found = {key if isinstance(key, tuple) else (key,): table.droplevel(levels) for key, table in groups}
    else:
        found = {(): data}
    return {key: table.reindex(_filled(table.index)) for key, table in found.items()} if fill else found


def _filled(index: Any) -> Any:
    """All times from the first to the last."""
    if isinstance(index, pd.PeriodIndex):
        return pd.period_range(index[0], index[-1], freq=index.freq, name=index.name)
    if isinstance(index, pd.DatetimeIndex):
        return index if index.freq else regular("StateSpaceForecaster", index, None).rename(index.name)
    return pd.RangeIndex(int(index[0]), int(index[-1]) + 1, name=index.name)


def _named(key: tuple[Any, ...], table: Any) -> list[tuple[Any, Any]]:
    """The columns of an instance, and names of them that no other series has."""
    return [((*key, column) if key else column, table[column]) for column in table]


def _known(future: dict[Any, Any], key: Any, tables: Any, steps: Any, horizon: int) -> Any:
    """The covariates of all steps to come; those of steps that nobody asked for do not matter, and may be missing."""
    index = future_index("StateSpaceForecaster", tables[key].index, horizon)
    made = future[key].reindex(index)
    others = ~np.isin(np.arange(horizon), steps[key] - 1)
    made[others] = made[others].fillna(0)
    return made
