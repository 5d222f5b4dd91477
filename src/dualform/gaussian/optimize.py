"""L-BFGS and Adam for many problems at once: each row has its own history, its own steps and its own end."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_ARMIJO, _WOLFE, _TRIES = 1e-4, 0.9, 30


class Minimum(NamedTuple):
    """Where each row of a minimisation has ended."""

    x: Tensor  # (B, K)
    value: Tensor  # (B,)
    gradient: Tensor  # (B, K)
    converged: Tensor  # (B,), bool: the last step promised a decrease below the tolerance
    iterations: int
    evaluations: int


def minimize(
    function: Callable[[Tensor], tuple[Tensor, Tensor]],
    x: Tensor,
    *,
    tolerance: float = 1e-10,
    max_iter: int = 200,
    memory: int = 20,
) -> Minimum:
    """Minimise each row of a function of x ``(B, K)``, which gives values ``(B,)`` and gradients ``(B, K)``.

    A row ends where half of ``-g^T p``, the decrease that the direction p promises, is below the tolerance. The line
    search is that of Lewis and Overton, by bisection, for the weak Wolfe conditions. A value that is not finite is
    taken for a step that was too long.

    Args:
        function: what is minimised; infinite where it has no value. Where most rows have ended, one that has a method
            ``some(rows)`` is asked for the function of the rows of that mask alone.
        x: where it begins.
        tolerance: in the unit of the values.
        max_iter: how many directions.
        memory: how many pairs of differences are kept.

    References:
        Nocedal and Wright (2006), "Numerical optimization", algorithm 7.4; Lewis and Overton (2013), "Nonsmooth
        optimization via quasi-Newton methods".
    """
    value, gradient = function(x)
    evaluations, iteration = 1, 0
    partly = _Partly(function)
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    done = torch.zeros_like(value, dtype=torch.bool)
    stuck = ~value.isfinite()
    for iteration in range(1, max_iter + 1):
        direction = -_times_inverse(gradient, pairs)
        slope = (direction * gradient).sum(-1)
        uphill = ~(slope < 0)
        direction = torch.where(uphill[:, None], -gradient, direction)
        slope = torch.where(uphill, -gradient.square().sum(-1), slope)
        done = done | ((-slope / 2 < tolerance) & ~stuck)
        if (done | stuck).all():
            iteration -= 1
            break
        fresh = uphill if not pairs else uphill | (torch.stack([rho for *_, rho in pairs]) == 0).all(0)
        first = torch.where(fresh, 1 / gradient.abs().amax(-1).clamp_min(1), 1.0)
        there, new, slopes, count, found = _search(partly, (x, value, gradient), direction, slope, first, done | stuck)
        evaluations += count
        s, q = there - x, slopes - gradient
        curvature = (s * q).sum(-1)
        usable = found & (curvature > 1e-12 * (s.norm(dim=-1) * q.norm(dim=-1)))
        rho = torch.where(usable, 1 / curvature.where(usable, torch.ones_like(curvature)), 0)
        pairs = [*pairs[1 - memory :], (s, q, rho)] if len(pairs) >= memory else [*pairs, (s, q, rho)]
        # Without a lower value along a direction, the steepest descent is tried once, then a row has ended.
        lost = ~found & ~done & ~stuck
        stuck = stuck | (lost & fresh)
        pairs = [(s, q, torch.where(lost, 0, rho)) for s, q, rho in pairs]
        x, value, gradient = there, new, slopes
    return Minimum(x, value, gradient, done, iteration, evaluations)


def descend(
    function: Callable[[Tensor], tuple[Tensor, Tensor]],
    x: Tensor,
    *,
    tolerance: float = 1e-10,
    max_iter: int = 1000,
    rate: float = 0.1,
) -> Minimum:
    """Minimise each row of a function of x ``(B, K)``, as :func:`minimize`, by Adam, whose steps shrink to nothing.

    The rate follows half a cosine from ``rate`` to 0 over the iterations. A step to where there is no value is taken
    back, and the row goes on with half the rate. The lowest point of each row is what is returned.

    Args:
        function: what is minimised; infinite where it has no value.
        x: where it begins.
        tolerance: a row has converged where its gradient is below the root of this, in each direction.
        max_iter: how many steps.
        rate: the length of the first steps in each direction.

    References:
        Kingma and Ba (2015), "Adam: a method for stochastic optimization", arXiv:1412.6980.
    """
    value, gradient = function(x)
    best = [x, value, gradient]
    first, second = torch.zeros_like(x), torch.zeros_like(x)
    rates = torch.full_like(value, rate)
    iteration = 0
    for iteration in range(1, max_iter + 1):
        if (gradient.abs().amax(-1) < tolerance**0.5).all():
            iteration -= 1
            break
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient.square()
        step = first / (1 - 0.9**iteration) / ((second / (1 - 0.999**iteration)).sqrt() + 1e-12)
        now = rates * (1 + math.cos(math.pi * iteration / max_iter)) / 2
        there = x - now[:, None] * step
        value, slopes = function(there)
        good = value.isfinite()
        rates = torch.where(good, rates, rates / 2)
        x = torch.where(good[:, None], there, best[0])
        gradient = torch.where(good[:, None], slopes, best[2])
        lower = good & (value < best[1])
        best = [
            torch.where(lower[:, None], x, best[0]),
            torch.where(lower, value, best[1]),
            torch.where(lower[:, None], gradient, best[2]),
        ]
    done = best[2].abs().amax(-1) < tolerance**0.5
    return Minimum(best[0], best[1], best[2], done, iteration, iteration + 1)


def _times_inverse(gradient: Tensor, pairs: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """The two-loop recursion; a pair with ``rho = 0`` counts for nothing."""
    q, alphas = gradient, []
    scale = torch.ones_like(gradient[:, :1])
    for s, y, rho in reversed(pairs):
        alpha = (rho * (s * q).sum(-1))[:, None]
        alphas.append(alpha)
        q = q - alpha * y
    for s, y, rho in pairs:  # the newest pair that counts gives the scale
        new = ((s * y).sum(-1) / y.square().sum(-1).clamp_min(torch.finfo(y.dtype).tiny))[:, None]
        scale = torch.where(rho[:, None] != 0, new, scale)
    q = scale * q
    for (s, y, rho), alpha in zip(pairs, reversed(alphas), strict=True):
        q = q + s * (alpha - (rho * (y * q).sum(-1))[:, None])
    return q


class _Partly:
    """A function at some of its rows: the others keep the value and the gradient that they had."""

    def __init__(self, function: Any):
        self.function, self.some = function, getattr(function, "some", None)
        self.rows, self.part = None, function  # those of the part that was asked for last, and it

    def __call__(self, x: Tensor, rows: Tensor, kept: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if self.some is None or 2 * int(rows.sum()) > len(rows):
            return self.function(x)
        if self.rows is None or not torch.equal(self.rows, rows):
            self.rows, self.part = rows, self.some(rows)
        value, gradient = self.part(x[rows])
        return kept[0].masked_scatter(rows, value), kept[1].masked_scatter(rows[:, None].expand_as(x), gradient)


def _search(
    function: _Partly,
    start: tuple[Tensor, Tensor, Tensor],
    direction: Tensor,
    slope: Tensor,
    first: Tensor,
    resting: Tensor,
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Where a step of each row leads, the values and gradients there, how many tries, and which rows moved."""
    x, value, gradient = start
    low, high, step = torch.zeros_like(value), torch.full_like(value, torch.inf), first
    best = [x, value, gradient]
    ended, moved, count = resting, torch.zeros_like(resting), 0
    rounding = 4 * torch.finfo(value.dtype).eps * value.abs()
    while count < _TRIES:
        count += 1
        at = torch.where(ended[:, None], best[0], x + step[:, None] * direction)
        new, slopes = function(at, ~ended, (best[1], best[2]))
        lower = new <= value + _ARMIJO * step * slope + rounding
        flat = (slopes * direction).sum(-1) >= _WOLFE * slope
        take = lower & ~ended
        best = [
            torch.where(take[:, None], at, best[0]),
            torch.where(take, new, best[1]),
            torch.where(take[:, None], slopes, best[2]),
        ]
        moved = moved | take
        ended = ended | (take & flat)
        high = torch.where(lower, high, step)
        low = torch.where(lower, step, low)
        step = torch.where(high.isfinite(), (low + high) / 2, 2 * step)
        if ended.all():
            break
    return best[0], best[1], best[2], count, moved
