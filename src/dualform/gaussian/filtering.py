"""The Kalman filter over whole series: a loop or a scan over time, and the choice between the two."""

import math
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from dualform.core.elements import GaussianElement, combine_gaussian, known_state, sharpened
from dualform.core.linalg import covariance_root, half_solve, matvec, root_solve, symmetric_part
from dualform.core.scan import associative_scan
from dualform.core.tree import concat, tree_map
from dualform.gaussian.belief import Belief, Gaussian
from dualform.gaussian.diffuse import opened, update_diffuse
from dualform.gaussian.passes import Blame, Found, Pass, check_steps, directions, predicted
from dualform.gaussian.steps import Steps, cut, masked
from dualform.ops.kalman_filter import KalmanFilter, has_kernel, kalman_filter_op

Form = Literal["sequential", "parallel"]


def is_parallel_faster(batch: int, length: int, n: int, device: torch.device) -> bool:
    """Whether the scan is expected to be faster than PyTorch's loop over time; on every device but the CPU it is.

    A step of the loop takes about 0.2 ms on one core, however small its matrices are. The scan does about ten times the
    arithmetic, but for all steps at once. Measured in float64 on one core, for N from 1 to 64 and B up to 1000, the two
    are equally fast at ``B N^1.5 = 200``, if there are more than 10 steps. One series of 1000 steps with N = 1 takes
    177 ms by the loop and 6 ms by the scan; one of 300 steps with N = 13, 61 and 15 ms; 100 series of 300 steps with
    N = 3, 104 and 180 ms. With more threads the scan gains more. On an H200 it was 1.5 to 16 times as fast as the loop
    at every size tried, from one series of 10 steps to 1000 series of 300.
    """
    return device.type != "cpu" or (length >= 32 and batch * n**1.5 <= 150)


def is_kernel_faster(batch: int, length: int, n: int, device: torch.device, back: bool) -> bool:
    """Whether a kernel is expected to be faster than the scan; on a CPU it always is.

    On a GPU the filter is, which takes spans of few and long series side by side. The loop ``back`` over time, for
    gradients or the smoother, waits for one step after another, ``0.3 N`` us each, for all series at once. The scan
    takes some 12 ms for its launches, and then ``0.05 N^0.7`` us for every step of every series. Measured on an H200,
    ms by the kernel and by the scan: 2.2 and 190 for 10^4 series of 200 steps with N = 4; with gradients 5.4 and 500,
    and 3.3 and 50 for one series of 1000 steps.
    """
    return device.type == "cpu" or not back or 0.3e-3 * n * length < 12 + 0.05e-3 * batch * length * n**0.7


def run(
    steps: Steps, belief: Belief, parallel: bool | None, counted: bool, blame: Blame, moments: bool = True
) -> tuple[Pass, Belief, Form]:
    """The filter over some steps, in one form, or in the one that is faster and keeps its digits (None).

    While a direction is diffuse in any row, all rows take the steps of the exact diffuse filter. The sequential form is
    that of a kernel where there is one, see :mod:`dualform.ops.kalman_filter`.

    Args:
        steps: the model and the observations, not masked.
        belief: before the first of them; its count of steps is passed on as it is.
        parallel: whether the scan runs.
        counted: whether an observation that determines a diffuse direction counts ``-log(2 pi) / 2``.
        blame: explains what a caller gave, where a step fails.
        moments: whether the moments of each step are wanted, or only the likelihood and the last belief.

    Returns:
        What was found at each step, the belief after the last, and the form that ran but for single steps at the front.
    """
    head, rest, state = opened(steps, belief, counted, blame)
    if not rest.A.shape[1] and head:
        return concat(head, 1), state, "sequential"
    start = Gaussian(state.mean, state.cov)
    quick = None if parallel else _by_kernel(rest, start, moments, parallel)
    out, last, form = quick or _proper(masked(rest), start, parallel, blame, len(head))
    none = state.diffuse[:, None].expand(-1, out.mean.shape[1], -1, -1)
    out = Pass(out.mean, out.cov, none, out.predicted_mean, out.predicted_cov, none, out.loglik)
    return concat([*head, out], 1) if head else out, state._replace(mean=last.mean, cov=last.cov), form


def _by_kernel(
    steps: Steps, state: Gaussian, moments: bool, parallel: bool | None
) -> tuple[Found, Gaussian, Form] | None:
    """None where there is no kernel for it, or the scan is faster, or a step fails: the loop says which, and why."""
    a = KalmanFilter(steps.A, steps.c, steps.Q, steps.C, steps.R, steps.y, steps.seen, *state, moments)
    batch, length, n = steps.A.shape[:3]
    back = torch.is_grad_enabled() and any(isinstance(m, Tensor) and m.requires_grad for m in a)
    if parallel is None and not is_kernel_faster(batch, length, n, steps.A.device, back):
        return None
    if not length or not has_kernel(a):
        return None
    loglik, mean, cov, predicted_mean, predicted_cov, *last = kalman_filter_op(a, partial(_again, parallel))
    if not loglik.sum().isfinite():  # as long as each of them is, up to an overflow
        return None
    return Found(mean, cov, loglik, predicted_mean, predicted_cov), Gaussian(*last), "sequential"


def _again(parallel: bool | None, a: KalmanFilter) -> list[Tensor]:
    """The outputs of the kernel in operations that PyTorch records, for derivatives of its gradient."""
    steps = masked(Steps(*a[:7]))
    out, last, _ = _proper(steps, Gaussian(a.mean, a.cov), parallel, lambda: None, 0)
    kept = slice(None if a.moments else 0)
    moments = (z[:, kept] for z in (out.mean, out.cov, out.predicted_mean, out.predicted_cov))
    return [out.loglik, *moments, *last]


def _proper(
    steps: Steps, state: Gaussian, parallel: bool | None, blame: Blame, start: int
) -> tuple[Found, Gaussian, Form]:
    """Nothing is diffuse; ``start`` is the time of the first step, for errors."""
    batch, length, n = steps.A.shape[:3]
    if not length:
        mean, cov = (z[:, None].expand(-1, 0, *z.shape[1:]) for z in state)
        return Found(mean, cov, mean.new_zeros(batch, 0), mean, cov), state, "sequential"
    out = None
    if parallel is None and is_parallel_faster(batch, length, n, steps.A.device):
        if not torch.compiler.is_compiling():
            out = _parallel_where_exact(steps, state, blame, start)
        else:  # the choice above depends on values
            parallel = steps.A.device.type != "cpu"
    if parallel:
        out = _parallel(steps, state, blame, start)
    if out is not None:
        return *out, "parallel"
    return *_sequential(steps, state, blame, start), "sequential"


def _sequential(steps: Steps, state: Gaussian, blame: Blame, start: int) -> tuple[Found, Gaussian]:
    outs, failures, now = [], [], state
    for parts in zip(*(z.unbind(1) for z in steps), strict=True):
        step = Steps(*parts)
        out, failed = _update(predicted(now, step), step)
        now = Gaussian(out.mean, out.cov)
        outs.append(out)
        failures.append(failed)
    out = tree_map(lambda *z: torch.stack(z, 1), *outs)
    check_steps(out, torch.stack(failures, 1), steps, blame, start)
    return out, now


def _parallel(steps: Steps, state: Gaussian, blame: Blame, start: int) -> tuple[Found, Gaussian] | None:
    """The states before every step by the scan, then every step at once; None where only the loop can."""
    head = _blocked(steps)
    if head and head + 1 >= steps.A.shape[1]:
        return None
    opening, middle = _opening(steps, head, state, blame, start)
    rest = cut(steps, slice(head, None))
    reached, information = _scan(rest, middle)
    if not torch.compiler.is_compiling() and sharpened(information, reached.cov).any():
        return None
    return _all_at_once(opening, reached, rest, blame, start + head)


def _parallel_where_exact(steps: Steps, state: Gaussian, blame: Blame, start: int) -> tuple[Found, Gaussian] | None:
    """The scan, at once or after N steps of the loop; None where it would lose too many digits.

    The scan combines the covariance P of the state that it starts from with the information J of the observations by a
    solve with ``I + P J``, which is ill-conditioned where the prior is vague. N observed steps of the loop first make
    P small. The condition may reach ``eps^-1/2``; results are then off by about a hundredth of ``eps^1/2``, relative to
    the greatest of them. On devices other than the CPU, where the loop is slow, the scan after N steps may have any
    condition.
    """
    length, n = steps.A.shape[1:3]
    blocked = _blocked(steps)
    if blocked > length // 2:
        return None
    for head in (blocked, blocked + n):
        if head >= length:
            break
        opening, middle = _opening(steps, head, state, blame, start)
        rest = cut(steps, slice(head, None))
        reached, information = _scan(rest, middle)
        condition = _condition(middle.cov, information)
        tried = head > blocked and condition.device.type != "cpu"
        if condition < torch.finfo(condition.dtype).eps ** -0.5 or tried:
            return _all_at_once(opening, reached, rest, blame, start + head)
    return None


def _opening(steps: Steps, head: int, state: Gaussian, blame: Blame, start: int) -> tuple[Found | None, Gaussian]:
    """The first steps by the loop, and the state after them."""
    return _sequential(cut(steps, slice(head)), state, blame, start) if head else (None, state)


@torch.no_grad()
def _blocked(steps: Steps) -> int:
    """How many steps have to be made before a scan can begin: up to the last one whose element does not exist.

    That is where an observation has no noise given the state before it, such as the first one of an autoregression.
    """
    if torch.compiler.is_compiling():
        return 0
    _, failed = own_root(cut(steps, slice(-1)))
    at = (failed != 0).any(0).nonzero()
    return int(at.max()) + 1 if len(at) else 0


def _scan(steps: Steps, state: Gaussian) -> tuple[Gaussian, Tensor]:
    """The states before every step, and J of all steps before each."""
    elements = elements_of(cut(steps, slice(-1)))
    first = tree_map(lambda z: z[:, None], state)
    products = associative_scan(combine_gaussian, elements)
    reached = combine_gaussian(known_state(*first), products)
    return concat([first, Gaussian(reached.b, reached.C)], dim=1), products.J


@torch.no_grad()
def _condition(P: Tensor, J: Tensor) -> Tensor:
    """The greatest condition number of ``I + P J`` in the 1-norm; infinite where there is no inverse."""
    system = torch.eye(P.shape[-1], dtype=P.dtype, device=P.device) + P[:, None] @ J
    inverse = torch.linalg.inv_ex(system).inverse
    large, small = (z.abs().sum(-2).amax(-1).flatten() for z in (system, inverse))
    condition = torch.cat([large * small, large.new_ones(1)])  # of one step there is no J
    return condition.nan_to_num(nan=torch.inf, posinf=torch.inf).max()


def own_root(steps: Steps) -> tuple[Tensor, Tensor]:
    """The root of ``C Q C^T + R``, and where it does not exist (not 0)."""
    return covariance_root(symmetric_part(steps.C @ steps.Q @ steps.C.mT) + steps.R)


def elements_of(steps: Steps) -> GaussianElement:
    """Each step by itself: the filter from a known state, and what its observation says about that state.

    Without meaning where :func:`own_root` does not exist.
    """
    CQ, (root, _) = steps.C @ steps.Q, own_root(steps)
    K = root_solve(CQ, root).mT
    left = torch.eye(CQ.shape[-1], dtype=CQ.dtype, device=CQ.device) - K @ steps.C
    CA = steps.C @ steps.A
    information = root_solve(CA, root).mT
    return GaussianElement(
        left @ steps.A,
        matvec(left, steps.c) + matvec(K, steps.y),
        symmetric_part(left @ steps.Q),
        matvec(information, steps.y - matvec(steps.C, steps.c)),
        symmetric_part(information @ CA),
    )


def _all_at_once(
    opening: Found | None, before: Gaussian, steps: Steps, blame: Blame, start: int
) -> tuple[Found, Gaussian]:
    """Every step from the state before it, after those that were made already."""
    out, failed = _update(predicted(before, steps), steps)
    check_steps(out, failed, steps, blame, start)
    last = Gaussian(out.mean[:, -1], out.cov[:, -1])
    return (out if opening is None else concat([opening, out], dim=1)), last


def _update(predicted: Gaussian, steps: Steps) -> tuple[Found, Tensor]:
    """The update, and where the innovation covariance is not positive definite, but for rounding (not 0)."""
    mean, cov = predicted
    C, R = steps.C, steps.R
    CP = C @ cov
    S = symmetric_part(CP @ C.mT) + R
    root, failed = covariance_root(S)
    pivots, sizes = (z.detach().diagonal(dim1=-2, dim2=-1) for z in (root, S))
    failed = failed | (pivots.square() <= 16 * torch.finfo(S.dtype).eps * sizes).any(-1)
    innovation = steps.y - matvec(C, mean)
    K = root_solve(CP, root).mT
    left = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device) - K @ C
    white = half_solve(root, innovation.unsqueeze(-1)).squeeze(-1)
    scale = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    loglik = -white.square().sum(-1) / 2 - scale - steps.seen.to(mean.dtype).sum(-1) * (math.log(2 * math.pi) / 2)
    joseph = symmetric_part(left @ cov @ left.mT) + symmetric_part(K @ R @ K.mT)
    return Found(mean + matvec(K, innovation), joseph, loglik, mean, cov), failed


def update(before: Belief, steps: Steps, counted: bool, blame: Blame, start: int | None = None) -> tuple[Pass, Belief]:
    """The observation of one step, which has a time axis of length 1, without a transition; ``start`` is its time."""
    steps = masked(steps)
    if before.diffuse.shape[-1] and (torch.compiler.is_compiling() or before.diffuse.any()):
        before = before._replace(diffuse=directions(before.diffuse))
        return update_diffuse(before, steps, counted, blame, start)
    out = observe(Gaussian(before.mean[:, None], before.cov[:, None]), steps, blame, start)
    Z = before.diffuse[:, None]
    passed = Pass(out.mean, out.cov, Z, out.predicted_mean, out.predicted_cov, Z, out.loglik)
    return passed, before._replace(mean=out.mean[:, 0], cov=out.cov[:, 0])


def observe(before: Gaussian, steps: Steps, blame: Blame, start: int | None = None) -> Found:
    """The updates of beliefs ``(B, T, N)`` that do not follow from each other, each with its masked observation.

    Raises:
        ArgumentError: names the row of a belief with an observation without variance, and its time from ``start`` on.
    """
    out, failed = _update(before, steps)
    check_steps(out, failed, steps, blame, start)
    return out
