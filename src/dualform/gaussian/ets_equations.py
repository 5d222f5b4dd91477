"""The equations of exponential smoothing: one-step predictions and states of a series, with exact derivatives.

The loop over time is written once, in arithmetic that all kinds of numbers share. NumPy runs it on complex ones, whose
imaginary parts are derivatives by every parameter at once, exact to rounding; for second derivatives, on dual numbers
that are complex.

References:
    Hyndman, Koehler, Ord and Snyder (2008), "Forecasting with exponential smoothing: the state space approach", table
    2.2; Squire and Trapp (1998), "Using complex variables to estimate derivatives of real functions".
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dualform.core.errors import ArgumentError
from dualform.core.options import suggestion

_WORDS = {
    "error": {"additive": "additive", "A": "additive", "multiplicative": "multiplicative", "M": "multiplicative"},
    "trend": {"none": "none", "N": "none", "additive": "additive", "A": "additive", "damped": "damped", "Ad": "damped"},
    "season": {
        "none": "none", "N": "none", "additive": "additive", "A": "additive", "multiplicative": "multiplicative",
        "M": "multiplicative",
    },
}  # fmt: skip
_STEP = 1e-30
"""The imaginary step; its square vanishes beside any real part."""


class Kind(NamedTuple):
    """Which of the classes of exponential smoothing."""

    error: Literal["additive", "multiplicative"]
    trend: Literal["none", "additive", "damped"]
    season: Literal["none", "additive", "multiplicative"]
    period: int  # 0 without a season

    @classmethod
    def named(
        cls, error: str, trend: str | None, season: str | None, period: int | None, damped: bool = False
    ) -> "Kind":
        """A class by the words or the letters of its parts.

        Raises:
            ArgumentError: for an unknown word, a season without a period of 2 steps or more and the other way round,
                and a damped trend that is none.
        """
        given = {"error": error, "trend": trend or "none", "season": season or "none"}
        found = {name: _word(name, value) for name, value in given.items()}
        if damped and found["trend"] == "none":
            raise ArgumentError("ets: damped=True without a trend", hint="trend='additive' or 'damped'")
        if (found["season"] == "none") != (period is None):
            raise ArgumentError(f"ets: season is {found['season']!r} and period {period}, expected both or none")
        if period is not None and (isinstance(period, bool) or not isinstance(period, int) or period < 2):
            raise ArgumentError(f"ets: period is {period!r}, expected a whole number, 2 or more steps")
        return cls(found["error"], "damped" if damped else found["trend"], found["season"], period or 0)

    @property
    def columns(self) -> list[int]:
        """Which of the numbers alpha, beta, gamma, phi, level, slope, season_1 .. season_m a class has."""
        trend = [] if self.trend == "none" else [1, 5]
        season = [] if self.season == "none" else [2, *range(6, 6 + self.period)]
        return sorted([0, 4, *trend, *season, *([3] if self.trend == "damped" else [])])

    @property
    def linear(self) -> bool:
        """Whether the observations are a linear function of the innovations."""
        return self.error == "additive" and self.season != "multiplicative"

    def __str__(self) -> str:
        trend = {"none": "N", "additive": "A", "damped": "Ad"}[self.trend]
        return f"ETS({self.error[0].upper()},{trend},{self.season[0].upper()})"


class Run(NamedTuple):
    """What the loop leaves behind: of each step its prediction and the states after it."""

    prediction: list[Any]
    level: list[Any]
    slope: list[Any]
    season: list[Any]  # of the period before the first step, too: m + T of them


def unfold(kind: Kind, numbers: Sequence[Any], y: Sequence[Any], seen: Sequence[Any] | None) -> Run:
    """Run the smoothing equations; r is what an observation is away from its prediction, 0 where it is missing.

        L = l + phi b,   prediction = L + s  or  L s,   r = y - prediction,   q = r  or  r / s
        l' = L + alpha q,   b' = phi b + beta q,   s' = s + gamma r  or  s + gamma r / L

    The right-hand forms are those of a multiplicative season. In terms of r, additive and multiplicative errors have
    the same equations.

    Args:
        kind: the class.
        numbers: alpha, beta, gamma, phi, level, slope, season_1 .. season_m, where season_1 is that of the first step.
        y: the observations, 0 where missing.
        seen: for each step 1, or 0 where it is missing; None where none is.
    """
    alpha, beta, gamma, phi, level, slope = numbers[:6]
    seasons, made = list(numbers[6:]), Run([], [], [], [])
    multiplied, trend = kind.season == "multiplicative", kind.trend != "none"
    for t, value in enumerate(y):
        b = phi * slope if kind.trend == "damped" else slope
        L = level + b if trend else level
        s = seasons[t] if kind.period else None
        prediction = L if s is None else L * s if multiplied else L + s
        r = value - prediction
        if seen is not None:
            r = r * seen[t]
        q = r / s if multiplied else r
        level = L + alpha * q
        slope = b + beta * q if trend else b
        if s is not None:
            seasons.append(s + gamma * (r / L if multiplied else r))
        made.prediction.append(prediction)
        made.level.append(level)
        made.slope.append(slope)
    return made._replace(season=seasons)


class _Dual:
    """A number with its derivative in one direction, both of them arrays."""

    __array_ufunc__ = None  # of an array and a dual number, the dual number decides
    __slots__ = ("slope", "value")

    def __init__(self, value: Any, slope: Any):
        self.value, self.slope = value, slope

    def __add__(self, other: "_Dual") -> "_Dual":
        return _Dual(self.value + other.value, self.slope + other.slope)

    def __rsub__(self, number: Any) -> "_Dual":
        return _Dual(number - self.value, -self.slope)

    def __mul__(self, other: Any) -> "_Dual":
        if isinstance(other, _Dual):
            return _Dual(self.value * other.value, self.value * other.slope + self.slope * other.value)
        return _Dual(self.value * other, self.slope * other)

    def __truediv__(self, other: "_Dual") -> "_Dual":
        ratio = self.value / other.value
        return _Dual(ratio, (self.slope - ratio * other.slope) / other.value)


class _Series(NamedTuple):
    """Series on the way through NumPy, a column for each step."""

    kind: Kind
    y: list[np.ndarray]  # T of (R,)
    seen: list[np.ndarray] | None

    def predicted(self, numbers: Tensor, along: Tensor | None = None, slopes: bool = True) -> tuple[Any, Any]:
        """What is predicted (T, R), and its derivatives by each column of the class (T, K', R).

        With a direction ``along`` (R, K), it is the derivative in that direction that is differentiated.
        """
        columns, given = self.kind.columns if slopes else [0], numbers.double().cpu().numpy().T
        many = np.repeat(given[:, None], len(columns), 1)
        if slopes:
            many = many.astype(np.complex128)
            many[columns, range(len(columns))] += 1j * _STEP
        inputs: list[Any] = list(many)
        if along is not None:
            directions = along.double().cpu().numpy().T[:, None]
            inputs = [_Dual(value, slope) for value, slope in zip(inputs, directions, strict=True)]
        with np.errstate(all="ignore"):  # what is not finite is found by the likelihood
            found = unfold(self.kind, inputs, self.y, self.seen).prediction
        found = [z.slope if isinstance(z, _Dual) else z for z in found]
        shape = many.shape[1:]
        made = torch.from_numpy(np.array([np.broadcast_to(z, shape) for z in found], many.dtype).reshape(-1, *shape))
        value = (made.real if slopes else made)[:, 0].to(numbers)
        slope = (made.imag / _STEP if slopes else made).to(numbers)
        return value, slope


class _Predictions(torch.autograd.Function):
    """One-step predictions ``(R, T)`` by the numbers of a class ``(R, K)``."""

    @staticmethod
    def forward(ctx: Any, series: _Series, numbers: Tensor) -> Tensor:
        value, slopes = series.predicted(numbers, slopes=ctx.needs_input_grad[1])
        ctx.series, ctx.slopes = series, slopes
        ctx.save_for_backward(numbers)
        return value.mT.contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (numbers,) = ctx.saved_tensors
        return None, _Pulled.apply(ctx.series, ctx.slopes, numbers, grads[0])


class _Pulled(torch.autograd.Function):
    """The gradient by the numbers ``(R, K)`` of predictions that have the gradient ``grad`` ``(R, T)``."""

    @staticmethod
    def forward(ctx: Any, series: _Series, slopes: Tensor, numbers: Tensor, grad: Tensor) -> Tensor:
        ctx.series = series
        ctx.save_for_backward(numbers, grad)
        made = torch.zeros_like(numbers)
        made[:, series.kind.columns] = torch.einsum("tkr,rt->rk", slopes, grad)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (along,) = grads
        numbers, grad = ctx.saved_tensors
        value, slopes = ctx.series.predicted(numbers, along)
        made = torch.zeros_like(numbers)
        made[:, ctx.series.kind.columns] = torch.einsum("tkr,rt->rk", slopes, grad)
        return None, None, made, value.mT


def predictions(kind: Kind, numbers: Tensor, y: Tensor, seen: Tensor | None) -> Tensor:
    """One-step predictions ``(R, T)`` of series ``(R, T)``, with two derivatives by the numbers ``(R, K)``.

    Args:
        kind: the class.
        numbers: as in :func:`unfold`.
        y: 0 where missing.
        seen: where not; None for everywhere.
    """
    there = None if seen is None else list(seen.double().cpu().numpy().T)
    series = _Series(kind, list(y.double().cpu().numpy().T), there)
    return _Predictions.apply(series, numbers)  # pyright: ignore[reportReturnType]


def _word(name: str, value: Any) -> Any:
    if value not in _WORDS[name]:
        known = dict.fromkeys(_WORDS[name].values())
        raise ArgumentError(f"ets: {name} is {value!r}", hint=suggestion(str(value), [*known]))
    return _WORDS[name][value]
