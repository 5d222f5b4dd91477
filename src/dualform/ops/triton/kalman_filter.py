"""The Kalman filter in Triton and its gradient: a program walks along time with a few series."""

from typing import Any

import torch
from torch import Tensor

from dualform.ops.kalman_filter import KalmanFilter, Moments, kalman_filter_op
from dualform.ops.kalman_loops import Loops, why_none
from dualform.ops.layout import whole_steps
from dualform.ops.triton.support import INTERPRETED, add_backend, blocks, kernels, on_amd, power_of_two

_MOST, _MOST_OBSERVED = 16, 8  # states and observations, whose matrices lie in registers
_SERIES = {1: 32, 2: 8}  # of a program, by states; 1 where there are more
_MARGIN = 16  # units in the last place: a pivot below them is rounding


def _least_states() -> int:
    """AMD's compiler fails at the gradient of matrices of one number."""
    from triton.runtime import driver

    return 2 if not INTERPRETED and on_amd(driver.active) else 1


class Plan:
    """What every kernel is told: strides of what varies, sizes, and how many series a program has."""

    def __init__(self, a: KalmanFilter):
        rows, length, observed = a.y.shape
        n = max(power_of_two(a.mean.shape[-1]), _least_states())
        series = min(power_of_two(rows), _SERIES.get(n, 1))
        views = {"a": a.A, "shift": a.c, "q": a.Q, "c": a.C, "r": a.R, "y": a.y, "seen": a.seen.view(torch.uint8)}
        self.views = {name: whole_steps(x) for name, x in views.items()}
        self.grid = (blocks(rows, series),)
        self.sizes = rows, length, a.mean.shape[-1], observed
        self.flags = {
            "BB": series,
            "BN": n,
            "BM": power_of_two(observed),
            # Of 16 states one puts some numbers into memory, and is still twice as fast as two that exchange them.
            "num_warps": 2 if n == 16 and a.cov.dtype == torch.float64 else 1,
        }

    def read(self, *names: str) -> tuple[list[Tensor], list[int]]:
        """Some of what varies, and the strides of series and steps."""
        found = [self.views[name] for name in names]
        return found, [x.stride(axis) if x.shape[axis] > 1 else 0 for x in found for axis in (0, 1)]


def _forward(a: KalmanFilter, found: Moments) -> None:
    plan = Plan(a)
    views, strides = plan.read("a", "shift", "q", "c", "r", "y", "seen")
    loglik, *moments, mean, cov = found
    kernels("kalman_filter").forward[plan.grid](
        *views, a.mean.contiguous(), a.cov.contiguous(), loglik, *(m if a.moments else None for m in moments),
        mean, cov, *plan.sizes, *strides, _MARGIN * torch.finfo(cov.dtype).eps,
        CONSTANT=not any(strides[1:6:2]), **plan.flags,
    )  # fmt: skip


def _backward(a: KalmanFilter, moments: dict[str, Tensor], grads: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    plan = Plan(a)
    views, strides = plan.read("a", "c", "r", "y", "seen")
    start = [found.get(name, torch.empty_like(m)) for name, m in (("mean", a.mean), ("cov", a.cov))]
    kernels("kalman_filter").backward[plan.grid](
        *views, a.mean.contiguous(), a.cov.contiguous(), *moments.values(),
        *(grads.get(name) for name in Moments._fields),
        *(found.get(name) for name in ("A", "c", "Q", "C", "R", "y")), *start, *plan.sizes, *strides, **plan.flags,
    )  # fmt: skip


def refuses(a: Any) -> str | None:
    """Why no kernel runs a call, or None."""
    if a.y.shape[-1] > _MOST_OBSERVED:
        return f"it takes {_MOST_OBSERVED} observations"
    return why_none(a, _MOST)


LOOPS = Loops(_forward, _backward)
add_backend(kalman_filter_op, refuses=refuses, **LOOPS.functions())
