"""What the Kalman filter finds at each step, the transition of a step, and what to say where one fails."""

from collections.abc import Callable
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.linalg import matvec, symmetric_part
from dualform.gaussian.belief import Belief, Gaussian
from dualform.gaussian.steps import Steps, Transition


class Pass(NamedTuple):
    """What the filter finds at each step: before its observation, with it, and how likely that was.

    Where moments were not asked for, there may be no steps of them.
    """

    mean: Tensor  # (B, T, N)
    cov: Tensor  # (B, T, N, N)
    diffuse: Tensor  # (B, T, N, K)
    predicted_mean: Tensor  # (B, T, N)
    predicted_cov: Tensor  # (B, T, N, N)
    predicted_diffuse: Tensor  # (B, T, N, K)
    loglik: Tensor  # (B, T)


Blame = Callable[[], None]  # raises if the caller's observations are infinite or the caller's state is not finite


class Found(NamedTuple):
    """What the updates of some steps make of their predictions, where nothing is diffuse."""

    mean: Tensor
    cov: Tensor
    loglik: Tensor
    predicted_mean: Tensor
    predicted_cov: Tensor


def predict(belief: Belief, steps: Steps | Transition) -> Belief:
    """The transition of one step, without a time axis."""
    mean, cov = predicted(Gaussian(belief.mean, belief.cov), steps)
    return belief._replace(mean=mean, cov=cov, diffuse=steps.A @ directions(belief.diffuse))


def directions(Z: Tensor) -> Tensor:
    """The diffuse directions, where a column of zeros has no gradient: it is none."""
    return torch.where((Z != 0).any(-2, keepdim=True), Z, 0) if Z.shape[-1] else Z


def predicted(state: Gaussian, steps: Steps | Transition) -> Gaussian:
    """The transition, of every step given."""
    cov = symmetric_part(steps.A @ state.cov @ steps.A.mT) + steps.Q
    return Gaussian(matvec(steps.A, state.mean) + steps.c, cov)


def check_steps(out: Found, failed: Tensor, steps: Steps, blame: Blame, start: int | None) -> None:
    """Raise where a step has failed, and say which and why; a single step has no time, and ``start`` None."""
    bad = (failed != 0) | ~out.loglik.isfinite()
    if torch.compiler.is_compiling() or not bad.any():
        return
    blame()
    at = tuple(bad.nonzero()[0].tolist())
    row, time = at[0], None if start is None else start + at[1]
    C, cov = steps.C[at], out.predicted_cov[at]
    S = symmetric_part(C @ cov @ C.mT) + steps.R[at]
    if not (S.isfinite().all() and out.predicted_mean[at].isfinite().all()):
        _refuse_step(row, time, "the prediction overflows", "has A an eigenvalue outside of the unit circle?")
    if not failed[at]:
        _refuse_step(row, time, "the log-likelihood is not finite", "the observation is too far from its prediction")
    hint = f"its smallest eigenvalue is {torch.linalg.eigvalsh(S.detach())[0].item():.2g}: add noise to R"
    hint += "" if S.dtype == torch.float64 else ", or compute in float64"
    _refuse_step(row, time, "C P C^T + R, of the predicted covariance P, is not positive definite", hint)


def _refuse_step(row: int, time: int | None, what: str, hint: str) -> NoReturn:
    place = f"row {row}" + ("" if time is None else f", time {time}")
    raise ArgumentError(f"KalmanFilter: {what} at {place}", hint=hint)
