"""The Kalman filter in Triton and its gradient: a program walks along time with a few series."""

from copy import copy
from typing import Any

import torch
from torch import Tensor

from dualform.core.elements import GaussianElement, combine_gaussian, known_state, sharpened
from dualform.core.scan import associative_scan
from dualform.ops.kalman_filter import KalmanFilter, Moments, kalman_filter_op
from dualform.ops.kalman_loops import Loops, why_none
from dualform.ops.layout import whole_steps
from dualform.ops.triton.support import INTERPRETED, add_backend, blocks, kernels, on_amd, power_of_two

_MOST, _MOST_OBSERVED = 16, 8  # states and observations, whose matrices lie in registers
_SERIES = {1: 32, 2: 8}  # of a program, by states; 1 where there are more
_READ = ("a", "shift", "q", "c", "r", "y", "seen")
_WORTH = 15  # ms of a loop from which on spans of time are taken side by side: to find what enters them takes about 12
_SHORTEST, _PROGRAMS = 256, 1024  # steps of a span, and spans of all series
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
        self.spans, self.steps = 1, length

    def split(self, spans: int) -> "Plan":
        """The same where every program has one span of one series."""
        rows, length, *sizes = self.sizes
        made = copy(self)
        made.spans, made.steps, made.flags = spans, blocks(length, spans), self.flags | {"BB": 1}
        made.sizes, made.grid = (rows * spans, length, *sizes), (rows * spans,)
        return made

    def read(self, *names: str) -> tuple[list[Tensor], list[int]]:
        """Some of what varies, and the strides of series and steps."""
        found = [self.views[name] for name in names]
        return found, [x.stride(axis) if x.shape[axis] > 1 else 0 for x in found for axis in (0, 1)]


def _forward(a: KalmanFilter, found: Moments) -> None:
    plan, start = Plan(a), (a.mean, a.cov)
    if spans := _spans(a):
        split = plan.split(spans)
        entering = _entering(a, split)
        if entering is not None:
            plan, start = split, entering
    views, strides = plan.read(*_READ)
    loglik, *moments, mean, cov = found
    kernels("kalman_filter").forward[plan.grid](
        *views, *(m.contiguous() for m in start), loglik, *(m if a.moments else None for m in moments), mean, cov,
        *plan.sizes, plan.spans, plan.steps, *strides, _MARGIN * torch.finfo(cov.dtype).eps,
        CONSTANT=not any(strides[1:6:2]), SPLIT=plan.spans > 1, **plan.flags,
    )  # fmt: skip


def _spans(a: KalmanFilter) -> int:
    """Into how many spans few and long series are cut, which run side by side; 0 for none."""
    rows, length, _ = a.y.shape
    spans = min(length // _SHORTEST, _PROGRAMS // max(rows, 1))
    worth = 0.3e-3 * a.mean.shape[-1] * length > _WORTH and spans >= 4
    if not worth or (a.y.is_cuda and torch.cuda.is_current_stream_capturing()):
        return 0
    return blocks(length, blocks(length, spans))  # none is empty


def _entering(a: KalmanFilter, plan: Plan) -> tuple[Tensor, Tensor] | None:
    """The moments that enter every span ``(B spans, ...)``; None where they would lose too many digits.

    The first span is filtered as it is, which makes a vague start precise. Those behind it become elements, of which a
    scan makes the states between them.
    """
    head = a._replace(moments=False, **{name: getattr(a, name)[:, : plan.steps] for name in KalmanFilter._fields[:7]})
    first = Moments(*LOOPS.filtered(head))
    like = a.cov.new_empty(len(a.y), plan.spans, *a.cov.shape[1:])
    over, cov, information = (torch.empty_like(like) for _ in range(3))
    mean, eta = (torch.empty_like(like[..., 0]) for _ in range(2))
    fine = torch.empty(like.shape[:2], dtype=torch.int32, device=like.device)
    views, strides = plan.read(*_READ)
    kernels("kalman_filter").summarize[plan.grid](
        *views, over, mean, cov, eta, information, fine, *plan.sizes, plan.spans, plan.steps, *strides,
        _MARGIN * torch.finfo(cov.dtype).eps, **plan.flags,
    )  # fmt: skip
    within = slice(1, -1)
    found = GaussianElement(*(m[:, within] for m in (over, mean, cov, eta, information)))
    products = associative_scan(combine_gaussian, found)
    reached = combine_gaussian(known_state(first.last_mean[:, None], first.last_cov[:, None]), products)
    if sharpened(products.J, reached.C).any() or not fine[:, within].all():
        return None
    pairs = ((a.mean, first.last_mean, reached.b), (a.cov, first.last_cov, reached.C))
    means, covs = (torch.cat([start[:, None], one[:, None], more], 1).flatten(0, 1) for start, one, more in pairs)
    return means, covs


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
