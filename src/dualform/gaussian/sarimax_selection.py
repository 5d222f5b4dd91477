"""Choosing the orders of a seasonal ARIMA model."""

import math
from collections.abc import Generator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualform.core.calls import explained
from dualform.core.errors import ArgumentError
from dualform.gaussian.constraints import places
from dualform.gaussian.differencing import differences
from dualform.gaussian.objective import Objective
from dualform.gaussian.optimize import minimize
from dualform.gaussian.progress import shown
from dualform.gaussian.sarimax import Sarimax
from dualform.gaussian.selection import Candidate, Selection, candidate, series_of
from dualform.gaussian.structural import companion

_ROOT = 1.01
"""No root of a polynomial may be closer to the unit circle."""
_NEAR = [
    *((0, 0, a, b) for a, b in ((-1, 0), (0, -1), (1, 0), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1))),
    *((a, b, 0, 0) for a, b in ((-1, 0), (0, -1), (1, 0), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1))),
]
"""Steps from one (p, q, P, Q) to its neighbours, in the order in which they are tried."""


class _Spec(NamedTuple):
    """A model that may be tried."""

    p: int
    d: int
    q: int
    P: int
    D: int
    Q: int
    s: int
    intercept: bool

    def model(self) -> Sarimax:
        season = (self.P, self.D, self.Q, self.s) if self.s > 1 else (0, 0, 0, 0)
        return Sarimax((self.p, self.d, self.q), season, intercept=self.intercept)

    @property
    def parameters(self) -> int:
        return self.p + self.q + self.P + self.Q + self.intercept + 1

    def __str__(self) -> str:
        season = f"({self.P},{self.D},{self.Q}){self.s}" if self.s > 1 else ""
        return f"SARIMA({self.p},{self.d},{self.q}){season}{' with an intercept' if self.intercept else ''}"


_Tried = dict[_Spec, tuple[Candidate, dict[str, Tensor]]]


@explained
def select_sarimax(
    y: Any,
    period: int | None = None,
    *,
    d: int | None = None,
    D: int | None = None,
    most: tuple[int, int, int, int] = (5, 5, 2, 2),
    lengths: Any = None,
    progress: bool | None = None,
) -> Any:
    """Choose the orders of a seasonal ARIMA model stepwise, by the least AICc, as R's ``auto.arima`` does.

    The season decides about D, and a test about d: :func:`~dualform.gaussian.differencing.differences`. The first
    models are (2,d,2)(1,D,1), (0,d,0)(0,D,0), (1,d,0)(1,D,0) and (0,d,1)(0,D,1). From the best, steps go to a neighbour
    that is better, until there is none: its p, q, P or Q differ by one, or it has an intercept in place of none. There
    is an intercept only if d + D is below 2. A model with a root that is closer to the unit circle than 1.01 is not
    taken. Likelihoods are exact, where ``auto.arima`` approximates those of long series.

    Series of a batch go their own ways; those that try the same model in a round are fitted together.

    Args:
        y: a series ``(T,)`` or ``(T, 1)``, or a batch ``(B, T, 1)``; NaN is missing.
        period: the steps of a season; None or 1 for none.
        d: how often to difference, where that is known.
        D: how often to difference by the season, where that is known.
        most: the highest p, q, P and Q that are tried; lower ones take less time.
        lengths: how many steps each series of a batch has.
        progress: whether to show what is being tried; None shows it on a terminal.

    Returns:
        A :class:`~dualform.gaussian.selection.Selection`, or a list of them for a batch.

    Raises:
        ArgumentError: for a period, d or D that is not a whole number or too small, a D without a period, and a series
            that is too short for any model.

    References:
        Hyndman and Khandakar (2008), "Automatic time series forecasting: the forecast package for R".
    """
    for name, value, least in (("period", period, 1), ("d", d, 0), ("D", D, 0)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ArgumentError(f"select_sarimax: {name} is {value!r}, expected a whole number, {least} or more")
    s = period or 1
    if len(most) != 4 or any(isinstance(k, bool) or not isinstance(k, int) or k < 0 for k in most):
        raise ArgumentError(f"select_sarimax: most is {most!r}, expected four whole numbers, such as (5, 5, 2, 2)")
    if D and s == 1:
        raise ArgumentError(f"select_sarimax: D is {D} without a season", hint="period=12")
    x, many, ends = series_of("select_sarimax", y, lengths)
    tried: list[_Tried] = [{} for _ in ends]
    notes, ways, asked = [], [], []
    for row, n in enumerate(ends):
        found = differences(x[row, :n, 0], s)
        orders = (found[0] if d is None else d, found[1] if D is None else D)
        notes.append(f"differenced d = {orders[0]}" + (f", D = {orders[1]} of period {s}" if s > 1 else ""))
        ways.append(_way(*orders, s, most, tried[row]))
        asked.append(next(ways[-1], None))
    with shown("select_sarimax", progress) as begin:
        while any(spec is not None for spec in asked):
            for spec in dict.fromkeys(spec for spec in asked if spec is not None):
                rows = [row for row, other in enumerate(asked) if other == spec]
                begin(str(spec))
                for row, result in zip(rows, _maximised(spec, x[rows], [ends[row] for row in rows]), strict=True):
                    tried[row][spec] = result
                    asked[row] = next(ways[row], None)
    found = []
    for row, n in enumerate(ends):
        best = min(tried[row], key=lambda spec: tried[row][spec][0].aicc)
        if not math.isfinite(tried[row][best][0].aicc):
            raise ArgumentError(f"select_sarimax: row {row} of y has {n} steps, too few for any model that was tried")
        fit = best.model().fit(x[row, :n], start=tried[row][best][1])
        candidates = sorted((each for each, _ in tried[row].values()), key=lambda each: each.aicc)
        found.append(Selection(fit, candidates, [notes[row]]))
    return found if many else found[0]


def _way(d: int, D: int, s: int, most: tuple[int, ...], tried: _Tried) -> Generator[_Spec, None, None]:
    """The models that one series tries: each is in ``tried`` when the next is asked for."""
    allowed, most = d + D < 2, most if s > 1 else (*most[:2], 0, 0)

    def spec(orders: tuple[int, ...], intercept: bool) -> _Spec:
        p, q, P, Q = orders
        return _Spec(p, d, q, P, D, Q, s, intercept)

    def fits(orders: tuple[int, ...]) -> bool:
        return all(0 <= k <= m for k, m in zip(orders, most, strict=True))

    starts = [((2, 2, 1, 1), allowed), ((0, 0, 0, 0), allowed), ((1, 0, 1, 0), allowed), ((0, 1, 0, 1), allowed)]
    for orders, intercept in [*starts, ((0, 0, 0, 0), False)]:
        first = spec(tuple(map(min, orders, most)), intercept)
        if first not in tried:
            yield first
    while True:
        now = min(tried, key=lambda each: tried[each][0].aicc)
        at = (now.p, now.q, now.P, now.Q)
        near = [(tuple(a + b for a, b in zip(at, step, strict=True)), now.intercept) for step in _NEAR]
        near = [each for each in near if fits(each[0])] + ([(at, not now.intercept)] if allowed else [])
        better = False
        for orders, intercept in near:
            other = spec(orders, intercept)
            if other in tried:
                continue
            yield other
            if better := tried[other][0].aicc < tried[now][0].aicc:
                break
        if not better:
            return


def _maximised(spec: _Spec, x: Tensor, ends: list[int]) -> list[tuple[Candidate, dict[str, Tensor]]]:
    """A model at the maxima of the likelihoods of several series ``(R, T, 1)``: criteria and parameters."""
    x = x[:, : max(ends)]
    numbers = [int((~series.isnan()).sum()) - spec.d - spec.s * spec.D for series in x]
    enough = [row for row, n in enumerate(numbers) if n > spec.parameters + 1]
    nothing = candidate(str(spec), -math.inf, spec.parameters, 0), {}
    found = [nothing for _ in numbers]
    if not enough:
        return found
    models = spec.model().expand(len(enough))
    models.begin(x[enough])
    problem = Objective(models, x[enough], places(models), {})
    start = torch.ones_like(problem.point())
    if len(enough) > 1 and not problem(start)[0].isfinite().all():  # one that cannot be evaluated stops all
        return [_maximised(spec, x[row : row + 1], ends[row : row + 1])[0] for row in range(len(x))]
    problem.move(start)
    reached = minimize(problem, start, tolerance=1e-4, max_iter=60)
    problem.move(reached.x)
    for index, row in enumerate(enough):
        value = -reached.value[index].item()
        model = models.row(index)
        usable = math.isfinite(value) and _roots(model) > _ROOT
        made = candidate(str(spec), value if usable else -math.inf, spec.parameters, numbers[row])
        found[row] = made, {name: value.clone() for name, value in model.values().items()}
    return found


def _roots(model: Sarimax) -> float:
    """The root of the four polynomials, in powers of one step, that is closest to the unit circle."""
    least = math.inf
    for name, count in model.groups.items():
        if count:
            phi = getattr(model, name).detach() * (-1 if name.endswith("ma") else 1)
            size = torch.linalg.eigvals(companion(phi[:, None, None])).abs().max().item()
            power = 1 / model.orders.s if name.startswith("seasonal") else 1
            least = min(least, (1 / max(size, 1e-12)) ** power)
    return least
