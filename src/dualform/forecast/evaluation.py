"""How a forecaster does on origins that are held back."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dualform.core.calls import explained
from dualform.core.errors import ArgumentError
from dualform.forecast.base import by_name, check_horizon
from dualform.forecast.metrics import coverage, crps, mase, midpoints
from dualform.forecast.panel import Panel, panel_of

BANDS = (0.5, 0.8, 0.95)
_GRID = midpoints(100)
_ENDS = [(1 + sign * band) / 2 for band in BANDS for sign in (-1, 1)]


class Evaluation(NamedTuple):
    """Scores of each series, means over all origins and steps ahead.

    The forecast of ``mase`` is the median. ``coverage`` has a column for each of ``bands``.
    """

    names: list[str]
    mase: Tensor  # (S,)
    crps: Tensor  # (S,)
    coverage: Tensor  # (S, 3)
    bands: tuple[float, ...]
    origins: list[int]  # steps before the end of a series
    horizon: int


@explained
def evaluate(
    forecaster: Any,
    y: Any,
    horizon: int,
    *,
    origins: int = 3,
    apart: int | None = None,
    refit: bool = False,
    X: Any = None,
) -> Evaluation:
    """Forecast the end of series from several origins, and compare with what came.

    At the first origin the forecaster is fitted, with all that it chooses; at the later ones it sees the observations
    up to there, and keeps its parameters, unless ``refit``. Nothing after an origin is known at it.

    Args:
        forecaster: with ``fit(y, X)``, ``update(y, X)`` and ``predict_quantiles(horizon, levels, X)``, such as
            :class:`~dualform.forecast.forecaster.Forecaster`. A copy of it is fitted, by its ``get_params``.
        y: the series, as a forecaster takes them; with a season by their frequency, or by ``forecaster.season``.
        horizon: how many steps are forecast, 1 or more.
        origins: how many; the last is ``horizon`` steps before the end.
        apart: how many steps are between them; None for half a horizon.
        refit: whether the forecaster is fitted at each origin.
        X: covariates of all steps of y ``(T, K)``.

    Raises:
        ArgumentError: for a horizon or a number of origins below 1, series that are too short for them, and as ``fit``.
    """
    check_horizon("evaluate", horizon)
    between = (horizon + 1) // 2 if apart is None else apart
    if origins < 1 or between < 1:
        raise ArgumentError(f"evaluate: origins is {origins}, {between} steps apart, expected 1 or more of both")
    panel = panel_of("evaluate", y)
    back = [horizon + k * between for k in reversed(range(origins))]
    for name, series in zip(panel.names, panel.series, strict=True):
        if len(series) - back[0] < 5:
            raise ArgumentError(
                f"evaluate: {name} has {len(series)} steps, and the first of {origins} origins is {back[0]} steps "
                "before its end",
                hint="a shorter horizon, or fewer origins",
            )
    made = type(forecaster)(**forecaster.get_params())
    season = getattr(forecaster, "season", None) or panel.season()
    seen: list[list[Tensor]] = [[] for _ in panel.names]
    quantiles: list[list[Tensor]] = [[] for _ in panel.names]
    for number, steps in enumerate(back):
        first = len(panel.series[0]) - steps
        past, future = ({}, {}) if X is None else ({"X": X[:first]}, {"X": X[first : first + horizon]})
        (made.fit if refit or not number else made.update)(panel.without_last(steps), **past)
        out = _tensors(panel, made.predict_quantiles(horizon, [*_GRID, 0.5, *_ENDS], **future), horizon)
        for row, series in enumerate(panel.series):
            first = len(series) - steps
            seen[row].append(series[first : first + horizon])
            quantiles[row].append(out[row])
    rows = []
    for row, series in enumerate(panel.series):
        true, found = torch.cat(seen[row]), torch.cat(quantiles[row])
        grid, median, ends = found.split([len(_GRID), 1, len(_ENDS)], 1)
        training = series[: len(series) - back[0]]
        m = season if len(training) > season else 1
        bands = [coverage(true, ends[:, 2 * k], ends[:, 2 * k + 1]) for k in range(len(BANDS))]
        rows.append(torch.stack([mase(true, median[:, 0], training, m), crps(true, grid), *bands]))
    table = torch.stack(rows)
    return Evaluation([*by_name(panel)], table[:, 0], table[:, 1], table[:, 2:], BANDS, back, horizon)


def _tensors(panel: Panel, found: Any, horizon: int) -> list[Tensor]:
    """Quantiles ``(h, Q)`` of each series."""
    if isinstance(found, Mapping):
        return [torch.as_tensor(np.asarray(part)).double().reshape(horizon, -1) for part in found.values()]
    value = torch.as_tensor(np.asarray(found)).double().reshape(horizon, len(panel.names), -1)
    return list(value.unbind(1))
