"""How good forecasts were: errors beside those of the seasonal naive, whole distributions, and bands."""

from typing import Any

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.linalg import as_tensors


def mase(y: Any, forecast: Any, training: Any, season: int = 1) -> Tensor:
    r"""The mean absolute scaled error.

        MASE = mean_k |y_k - forecast_k| / mean_t |training_t - training_{t - season}|

    Below 1, the errors are smaller than those that the value of one season ago made, one step ahead, where the
    forecaster was trained. The median of a distribution minimises its expectation.

    Args:
        y: what was observed, of any shape; what is NaN does not count.
        forecast: of the same shape.
        training: the series ``(T,)`` before; pairs of which one is NaN do not count.
        season: steps.

    Returns:
        A number; NaN without an observation to compare with, infinite where the training series repeats itself.

    Raises:
        ArgumentError: for shapes that differ, and a training series that is no longer than the season.

    References:
        Hyndman and Koehler (2006), "Another look at measures of forecast accuracy".
    """
    seen, made = _pair("mase", y, forecast)
    before = as_tensors("mase", training=training)["training"].double()
    if before.dim() != 1 or season < 1 or len(before) <= season:
        raise ArgumentError(
            f"mase: training has shape {tuple(before.shape)}, expected (T,), longer than a season of {season}"
        )
    return (seen - made).abs().nanmean() / (before[season:] - before[:-season]).abs().nanmean()


def crps(y: Any, quantiles: Any) -> Tensor:
    r"""The continuous ranked probability score, of a distribution that is given by equally likely quantiles.

        CRPS(F, y) = int (F(x) - 1{y <= x})^2 dx = 2 int_0^1 (1{y <= q(p)} - p) (q(p) - y) dp
                   ~ 2/K sum_k (1{y <= q_k} - p_k) (q_k - y),    p_k = (k - 1/2) / K

    It is in the unit of y, and the absolute error where there is one quantile, the median.

    Args:
        y: what was observed, of any shape; what is NaN does not count.
        quantiles: those at ``p_1 .. p_K``, in the order of :func:`midpoints`, on a last axis of K.

    Returns:
        The mean over y, a number.

    Raises:
        ArgumentError: for shapes that differ.

    References:
        Gneiting and Raftery (2007), "Strictly proper scoring rules, prediction, and estimation"; Laio and Tamea (2007)
        for the second form.
    """
    made = as_tensors("crps", quantiles=quantiles)["quantiles"].double()
    if made.dim() < 1 or not made.shape[-1]:
        raise ArgumentError(f"crps: quantiles have shape {tuple(made.shape)}, expected a last axis of quantiles")
    seen, _ = _pair("crps", y, made[..., 0])
    p = torch.tensor(midpoints(made.shape[-1]), dtype=made.dtype)
    above = (seen.unsqueeze(-1) <= made).double()
    return (2 * ((above - p) * (made - seen.unsqueeze(-1))).mean(-1)).nanmean()


def coverage(y: Any, low: Any, high: Any) -> Tensor:
    """The share of observations with ``low <= y <= high``, which of a band of 80 % should be 0.8; NaN does not count.

    Args:
        y: what was observed, of any shape.
        low: the lower ends of the bands, of the same shape.
        high: the upper ends, of the same shape.

    Raises:
        ArgumentError: for shapes that differ.
    """
    seen, lower = _pair("coverage", y, low)
    _, upper = _pair("coverage", y, high)
    inside = ((lower <= seen) & (seen <= upper)).double()
    return torch.where(seen.isnan(), torch.nan, inside).nanmean()


def midpoints(count: int) -> list[float]:
    """The probabilities ``(k - 1/2) / count`` for k = 1 .. count."""
    return [(k + 0.5) / count for k in range(count)]


def _pair(where: str, y: Any, forecast: Any) -> tuple[Tensor, Tensor]:
    pair = as_tensors(where, y=y, forecast=forecast)
    seen, made = pair["y"].double(), pair["forecast"].double()
    if seen.shape != made.shape:
        raise ArgumentError(f"{where}: y has shape {tuple(seen.shape)}, and the forecast {tuple(made.shape)}")
    return seen, made
