"""Forecasters: one that chooses a state space model, and the seasonal naive, which it is compared with."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dualform.core.calls import explained
from dualform.core.errors import ArgumentError
from dualform.core.options import suggestion
from dualform.forecast.base import BaseForecaster, by_name, check_horizon, last_of_season
from dualform.forecast.choose import Choice, choose
from dualform.forecast.distribution import Moments
from dualform.forecast.estimate import ahead, parts_of
from dualform.forecast.families import AUTO, FAMILIES, Family, deep
from dualform.forecast.panel import Panel, covariates
from dualform.forecast.shape import Shape


@explained
class Forecaster(BaseForecaster):
    """Chooses a state space model of a series and forecasts with it; of many series, in batches.

    ``"auto"`` chooses among local levels, trends with and without damping, cycles, and seasonal ARIMA models, by their
    mean CRPS on origins that are held back (:func:`~dualform.forecast.choose.choose`). Of a series whose changes grow
    with its level, the logarithm is modelled. A season of more than 24 steps is taken out before, as waves by least
    squares. Missing values stay missing.

    After ``fit``, ``choices_`` holds what was chosen for each series: ``choices_[0].found.candidate.label``, its
    parameters, whether the optimiser converged, and the scores of all candidates.

    Args:
        model: ``"auto"``, or one family: ``"local_level"``, ``"structural"``, ``"sarimax"``, ``"ets"`` or ``"deep"``,
            which trains one network on all series; or a function like those in
            :data:`~dualform.forecast.families.FAMILIES`.
        season: in steps, 1 for none; None takes it from the frequency of a table of pandas, and 1 for what has none.
        horizon: how many steps the choice looks ahead; None for a season, or 8 steps.
        log: whether logarithms are modelled; None decides for each series.

    Example:
        >>> from dualform.forecast import Forecaster
        >>> found = Forecaster("local_level").fit([3.0, 4.0, 2.0, 5.0, 4.0, 3.0, 4.0, 5.0, 3.0, 4.0])
        >>> found.predict(3).mean.shape
        torch.Size([3])
    """

    choices_: list[Choice]
    _tell: Callable[[int, int], None] | None = None

    def __init__(
        self,
        model: str | Family = "auto",
        season: int | None = None,
        horizon: int | None = None,
        log: bool | None = None,
    ):
        self.model, self.season, self.horizon, self.log = model, season, horizon, log

    def fit(self, y: Any, X: Any = None, *, tell: Callable[[int, int], None] | None = None) -> "Forecaster":
        """Choose and estimate a model of each series.

        Args:
            y: the series.
            X: covariates ``(T, K)``, the same for all series, which then have the same length.
            tell: is called with how many batches of fits are done, of how many.

        Raises:
            ArgumentError: for series that cannot be used, with the name of the series and the row; for parameters out
                of range; and for a series to which no model can be fitted.
        """
        self._tell = tell
        try:
            return super().fit(y, X)
        finally:
            self._tell = None

    def _estimate(self, panel: Panel, X: Tensor | None) -> None:
        horizon = self.horizon
        if horizon is None:
            horizon = self.season_ if self.season_ > 1 else 8
        check_horizon("Forecaster", horizon)
        names = self._families(horizon)
        series = dict(by_name(panel))
        if self.log and (bad := [name for name, y in series.items() if (y <= 0).any()]):
            raise ArgumentError(f"Forecaster: log is True, but {bad[0]} has values that are not positive")
        tell = self._tell or (lambda done, whole: None)
        self.choices_ = choose(series, names, self.season_, horizon, log=self.log, X=X, tell=tell)

    def _families(self, horizon: int) -> tuple[str | Family, ...]:
        if callable(self.model):
            return (self.model,)
        if self.model not in ("auto", *FAMILIES):
            hint = suggestion(str(self.model), ["auto", *FAMILIES])
            raise ArgumentError(f"Forecaster: model is {self.model!r}", hint=hint)
        if self.model == "deep":
            return (partial(deep, horizon=horizon),)
        return AUTO if self.model == "auto" else (self.model,)

    def components(self, horizon: int, X: Any = None) -> list[dict[str, tuple[Tensor, Tensor]]]:
        """The parts of each series, of which structural models are the sum: means and standard deviations by name.

        Args:
            horizon: so many steps beyond the end.
            X: covariates of them, as in :meth:`predict`.

        Returns:
            For each series a dictionary, empty where the model has no parts; tensors ``(T + horizon,)``, of the
            logarithm of the series where one was taken.

        Raises:
            ArgumentError: as :meth:`predict`.
        """
        self._fitted("components")
        check_horizon("Forecaster.components", horizon)
        future = None if X is None else covariates("Forecaster.components", X, horizon)
        return [parts_of(choice.found, horizon, future) for choice in self.choices_]

    def _again(self, panel: Panel, X: Tensor | None) -> None:
        pairs = zip(self.choices_, panel.series, strict=True)
        self.choices_ = [choice._replace(found=choice.found.again(y, X)) for choice, y in pairs]

    def _moments(self, horizon: int, X: Tensor | None) -> list[Moments]:
        return ahead([choice.found for choice in self.choices_], horizon, X)


@explained
class SeasonalNaive(BaseForecaster):
    """The value of one season ago, the measure that a forecaster has to beat.

    Its error is normal, with the variance of the seasonal differences, times the number of seasons since the value that
    is repeated: the model ``y_t = y_{t - season} + eps_t``.

    Args:
        season: in steps, 1 for the last value; None as in :class:`Forecaster`.
    """

    deviations_: list[float]

    def __init__(self, season: int | None = None):
        self.season = season

    def _estimate(self, panel: Panel, X: Tensor | None) -> None:
        if X is not None:
            raise ArgumentError("SeasonalNaive.fit: it takes no covariates")
        m = self.season_
        for name, y in zip(panel.names, panel.series, strict=True):
            if not len(y) > m or (y[m:] - y[:-m]).isnan().all():
                raise ArgumentError(f"SeasonalNaive.fit: {name} has no two values that are a season of {m} steps apart")
        self.deviations_ = [math.sqrt((y[m:] - y[:-m]).square().nanmean().item()) for y in panel.series]

    def _moments(self, horizon: int, X: Tensor | None) -> list[Moments]:
        m, panel = self.season_, self._fitted("predict")
        growth = torch.tensor([math.sqrt(1 + step // m) for step in range(horizon)], dtype=torch.float64)
        pairs = zip(panel.series, self.deviations_, strict=True)
        return [Moments(last_of_season(y, m, horizon), growth * deviation, Shape()) for y, deviation in pairs]
