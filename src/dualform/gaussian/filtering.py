"""The Kalman filter over whole series: a loop or a scan over time, and the choice between the two."""

import math
from collections.abc import Callable
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from dualform.core.elements import GaussianElement, combine_gaussian
from dualform.core.errors import ArgumentError
from dualform.core.linalg import matvec, symmetric_part
from dualform.core.scan import associative_scan
from dualform.core.tree import concat, tree_map
from dualform.gaussian.model import Gaussian


class Filtered(NamedTuple):
    """Moments of ``p(h_t | y_1 .. y_t)``, and ``log p(y_t | y_1 .. y_{t-1})``."""

    mean: Tensor  # (B, T, N)
    cov: Tensor  # (B, T, N, N)
    loglik: Tensor  # (B, T)


class Steps(NamedTuple):
    """The model at each step, with missing components made uninformative and padding made the identity."""

    A: Tensor  # (B, T, N, N)
    Q: Tensor  # (B, T, N, N)
    C: Tensor  # (B, T, M, N), zero rows where missing
    R: Tensor  # (B, T, M, M), rows and columns of the identity where missing
    y: Tensor  # (B, T, M), zero where missing
    seen: Tensor  # (B, T, M), bool


Blame = Callable[[], None]  # raises if the caller's observations are infinite or the caller's state is not finite


def is_parallel_faster(batch: int, length: int, n: int, device: torch.device) -> bool:
    """Whether the scan is expected to be faster than the loop over time; on every device but the CPU it is.

    A step of the loop takes about 0.2 ms on one core, however small its matrices are. The scan does about ten times the
    arithmetic, but for all steps at once. Measured in float64 on one core, for N from 1 to 64 and B up to 1000, the two
    are equally fast at ``B N^1.5 = 200``, if there are more than 10 steps. One series of 1000 steps with N = 1 takes
    177 ms by the loop and 6 ms by the scan; one of 300 steps with N = 13, 61 and 15 ms; 100 series of 300 steps with
    N = 3, 104 and 180 ms. With more threads the scan gains more. On an H200 it was 1.5 to 16 times as fast as the loop
    at every size tried, from one series of 10 steps to 1000 series of 300.
    """
    return device.type != "cpu" or (length >= 32 and batch * n**1.5 <= 150)


def run(steps: Steps, state: Gaussian, parallel: bool | None, blame: Blame) -> tuple[Filtered, Gaussian]:
    """The filter over at least one step, in one form, or in the one that is faster and keeps its digits (None)."""
    if parallel:
        return _parallel(steps, state, blame)
    batch, length, n = steps.A.shape[:3]
    if parallel is None and is_parallel_faster(batch, length, n, steps.A.device):
        if torch.compiler.is_compiling():  # the choice below depends on values
            return (_sequential if steps.A.device.type == "cpu" else _parallel)(steps, state, blame)
        return _parallel_where_exact(steps, state, blame)
    return _sequential(steps, state, blame)


def predict(state: Gaussian, steps: Steps) -> Gaussian:
    """The transition, of every step given."""
    return Gaussian(matvec(steps.A, state.mean), symmetric_part(steps.A @ state.cov @ steps.A.mT) + steps.Q)


def update(predicted: Gaussian, steps: Steps, blame: Blame) -> tuple[Filtered, Gaussian]:
    """The observation, of every step given: the filtered moments, and the same as a state."""
    out, failed = _update(predicted, steps)
    return _finish(out, failed, steps, lambda: predicted, blame)


def _sequential(steps: Steps, state: Gaussian, blame: Blame) -> tuple[Filtered, Gaussian]:
    outs, failures, now = [], [], state
    for step in zip(*(z.unbind(1) for z in steps), strict=True):
        step = Steps(*step)
        out, failed = _update(predict(now, step), step)
        now = Gaussian(out.mean, out.cov)
        outs.append(out)
        failures.append(failed)
    out = tree_map(lambda *z: torch.stack(z, 1), *outs)
    out, _ = _finish(out, torch.stack(failures, 1), steps, lambda: predict(_before(state, out), steps), blame)
    return out, now


def _parallel(steps: Steps, state: Gaussian, blame: Blame) -> tuple[Filtered, Gaussian]:
    """The states before every step by the scan, then every step at once."""
    reached, failed, _ = _scan(steps, state)
    if not torch.compiler.is_compiling() and failed.any():
        at = tuple(failed.nonzero()[0].tolist())
        _refuse_step(at, "C Q C^T + R is not positive definite", "use parallel=False, or add noise to R or Q")
    return _all_at_once(reached, steps, blame)


def _parallel_where_exact(steps: Steps, state: Gaussian, blame: Blame) -> tuple[Filtered, Gaussian]:
    """The scan, from the first step or after N steps of the loop; the loop where the scan would lose too many digits.

    The scan combines the covariance P of the state that it starts from with the information J of the observations by a
    solve with ``I + P J``, which is ill-conditioned where the prior is vague. N observed steps of the loop first make
    P small. The condition may reach ``eps^-1/2``; results are then off by about a hundredth of ``eps^1/2``, relative to
    the greatest of them. On devices other than the CPU, where the loop is slow, the scan after N steps may have any
    condition.
    """
    length, n = steps.A.shape[1:3]
    for head in (0, n):
        if head >= length:
            break
        start, middle = None, state
        if head:
            start, middle = _sequential(_cut(steps, slice(head)), state, blame)
        rest = _cut(steps, slice(head, None))
        reached, failed, information = _scan(rest, middle)
        if failed.any():
            break
        condition = _condition(middle.cov, information)
        if condition < torch.finfo(condition.dtype).eps ** -0.5 or (head and condition.device.type != "cpu"):
            out, last = _all_at_once(reached, rest, blame)
            return (out if start is None else concat([start, out], dim=1)), last
    return _sequential(steps, state, blame)


def _scan(steps: Steps, state: Gaussian) -> tuple[Gaussian, Tensor, Tensor]:
    """The states before every step, where a factorisation failed (not 0), and J of all steps before each."""
    elements, failed = _elements(_cut(steps, slice(-1)))
    first = tree_map(lambda z: z[:, None], state)
    zero = torch.zeros_like(first.cov)
    known = GaussianElement(zero, first.mean, first.cov, zero[..., 0], zero)
    products = associative_scan(combine_gaussian, elements)
    reached = combine_gaussian(known, products)
    return concat([first, Gaussian(reached.b, reached.C)], dim=1), failed, products.J


@torch.no_grad()
def _condition(P: Tensor, J: Tensor) -> Tensor:
    """The greatest condition number of ``I + P J`` in the 1-norm; infinite where there is no inverse."""
    system = torch.eye(P.shape[-1], dtype=P.dtype, device=P.device) + P[:, None] @ J
    inverse = torch.linalg.inv_ex(system).inverse
    large, small = (z.abs().sum(-2).amax(-1).flatten() for z in (system, inverse))
    condition = torch.cat([large * small, large.new_ones(1)])  # of one step there is no J
    return condition.nan_to_num(nan=torch.inf, posinf=torch.inf).max()


def _elements(steps: Steps) -> tuple[GaussianElement, Tensor]:
    """Each step by itself: the filter from a known state, and what its observation says about that state."""
    CQ = steps.C @ steps.Q
    root, failed = torch.linalg.cholesky_ex(symmetric_part(CQ @ steps.C.mT) + steps.R)
    K = torch.cholesky_solve(CQ, root).mT
    left = torch.eye(CQ.shape[-1], dtype=CQ.dtype, device=CQ.device) - K @ steps.C
    CA = steps.C @ steps.A
    information = torch.cholesky_solve(CA, root).mT
    elements = GaussianElement(
        left @ steps.A,
        matvec(K, steps.y),
        symmetric_part(left @ steps.Q),
        matvec(information, steps.y),
        symmetric_part(information @ CA),
    )
    return elements, failed


def _all_at_once(before: Gaussian, steps: Steps, blame: Blame) -> tuple[Filtered, Gaussian]:
    out, after = update(predict(before, steps), steps, blame)
    return out, tree_map(lambda z: z[:, -1], after)


def _update(predicted: Gaussian, steps: Steps) -> tuple[Filtered, Tensor]:
    """The update, and where its Cholesky factorisation failed (not 0)."""
    mean, cov = predicted
    C, R = steps.C, steps.R
    CP = C @ cov
    root, failed = torch.linalg.cholesky_ex(symmetric_part(CP @ C.mT) + R)
    innovation = steps.y - matvec(C, mean)
    K = torch.cholesky_solve(CP, root).mT
    left = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device) - K @ C
    white = torch.linalg.solve_triangular(root, innovation.unsqueeze(-1), upper=False).squeeze(-1)
    scale = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    loglik = -white.square().sum(-1) / 2 - scale - steps.seen.to(mean.dtype).sum(-1) * (math.log(2 * math.pi) / 2)
    joseph = symmetric_part(left @ cov @ left.mT) + symmetric_part(K @ R @ K.mT)
    return Filtered(mean + matvec(K, innovation), joseph, loglik), failed


def _finish(
    out: Filtered, failed: Tensor, steps: Steps, predicted: Callable[[], Gaussian], blame: Blame
) -> tuple[Filtered, Gaussian]:
    """The results, unless a step has failed: then an error that says which step and why."""
    bad = (failed != 0) | ~out.loglik.isfinite()
    if not torch.compiler.is_compiling() and bad.any():
        blame()
        at = tuple(bad.nonzero()[0].tolist())
        before, C = predicted(), steps.C[at]
        S = symmetric_part(C @ before.cov[at] @ C.mT) + steps.R[at]
        if not (S.isfinite().all() and before.mean[at].isfinite().all()):
            _refuse_step(at, "the prediction overflows", "has A an eigenvalue outside of the unit circle?")
        if not failed[at]:
            _refuse_step(at, "the log-likelihood is not finite", "the observation is too far from its prediction")
        hint = f"its smallest eigenvalue is {torch.linalg.eigvalsh(S.detach())[0].item():.2g}: add noise to R"
        hint += "" if S.dtype == torch.float64 else ", or compute in float64"
        _refuse_step(at, "C P C^T + R, of the predicted covariance P, is not positive definite", hint)
    return out, Gaussian(out.mean, out.cov)


def _refuse_step(at: tuple[int, ...], what: str, hint: str) -> NoReturn:
    """Name a step by its row and, if it has one, its time."""
    place = ", ".join(f"{axis} {index}" for axis, index in zip(("row", "time"), at, strict=False))
    raise ArgumentError(f"KalmanFilter: {what} at {place}", hint=hint)


def _before(state: Gaussian, out: Filtered) -> Gaussian:
    """The states before every step, from the filtered moments of all."""
    first = tree_map(lambda z: z[:, None], state)
    return concat([first, Gaussian(out.mean[:, :-1], out.cov[:, :-1])], dim=1)


def _cut(steps: Steps, part: slice) -> Steps:
    return tree_map(lambda z: z[:, part], steps)
