r"""A diffuse start whose directions look alike to the first observations: a regression on all of them at once.

The exact diffuse filter determines a direction with each observation. Directions that differ little in as many steps,
such as the waves of a year of weeks, make its covariances so large that those of later predictions are lost in their
rounding. Here the state is ``h_t = b_t + E_t delta``, with ``delta ~ N(0, kappa I)`` in the limit of infinite kappa. A
Kalman filter that takes delta for known keeps b, E, and P, the covariance of h_t given delta; their innovations are
``v_t - V_t delta`` with covariance F_t, and

    J_t = sum V^T F^-1 V,    s_t = sum V^T F^-1 v,    q_t = sum v^T F^-1 v,
    h_t | y_1 .. y_t  ~  N(b + E J^-1 s, P + E J^-1 E^T),
    log p(y_1 .. y_t) = -(sum log |F| + log |J| + q - s^T J^-1 s + n log(2 pi)) / 2.

All of them are of moderate size. As soon as J is far from singular, delta is put into the state, and the filter goes on
without it. Likelihood and moments are those of the exact diffuse filter.

References:
    de Jong (1991), "The diffuse Kalman filter"; Durbin and Koopman (2012), "Time series analysis by state space
    methods", section 5.7.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dualform.core.linalg import matvec, symmetric_part
from dualform.core.tree import tree_map
from dualform.gaussian.belief import Belief
from dualform.gaussian.steps import Steps, masked

_LOST = 1e-7
"""The least ratio of the variance of a prediction to what its terms sum to, of which half of the digits are left."""
_CLEAR, _LEAST = 1e-8, 1e-12
"""The least eigenvalue of J, with ones on its diagonal, at which delta is put into the state; and at the last step."""


class Reached(NamedTuple):
    """What is known at each step, once all directions are determined, and the log-likelihood of all steps up to it."""

    mean: Tensor  # (B, T, N)
    cov: Tensor  # (B, T, N, N)
    predicted_mean: Tensor  # (B, T, N)
    predicted_cov: Tensor  # (B, T, N, N)
    total: Tensor  # (B, T)


@torch.no_grad()
def is_lost(before: Belief, step: Steps) -> bool:
    """Whether the variance of a prediction is lost in the rounding of the covariance that it is computed from.

    Args:
        before: the belief before the observation.
        step: masked, with a time axis of length 1.
    """
    C, R = step.C[:, 0], step.R[:, 0].diagonal(dim1=-2, dim2=-1)
    terms = matvec(C.square(), before.cov.diagonal(dim1=-2, dim2=-1)) + R
    variance = ((C @ before.cov) * C).sum(-1) + R
    proper = step.seen[:, 0] & (C @ before.diffuse == 0).all(-1)
    return bool((proper & (terms > 0) & ~(variance > _LOST * terms)).any())


def augmented(steps: Steps, belief: Belief, counted: bool) -> tuple[Reached | None, int]:
    """All steps from the first to the one after which J is far from singular.

    Args:
        steps: not masked.
        belief: before the first of them.
        counted: whether an observation that determines a direction counts ``-log(2 pi) / 2``.

    Returns:
        What is known at these steps, and 0; None where J is singular to the end, or where an observation has no noise
        given delta, and how many steps there are up to that one, 0 in the first case.
    """
    steps = masked(steps)
    with torch.no_grad():  # first to see how far, and where delta is; then around that, so that q is small
        passed, blocked = _pass(steps, belief)
        if not passed:
            return None, blocked
        none = _none(belief)
        _, _, gram, _ = passed[-1]
        offset = torch.cholesky_solve(-gram[:, 1:, :1], _root(gram, none)).squeeze(-1)
    belief = belief._replace(mean=belief.mean + matvec(belief.diffuse, offset))
    passed, _ = _pass(steps, belief, len(passed))
    active = belief.diffuse.shape[-1] - none.diagonal(dim1=-2, dim2=-1).sum(-1)
    found, gram = [], torch.zeros_like(passed[0][2])
    for predicted, updated, new, scale in passed:
        moments = (*_collapsed(updated, new, none), *_collapsed(predicted, gram, none))
        root = _root(new, none)
        left = torch.linalg.solve_triangular(root, new[:, 1:, :1], upper=False).square().sum((-2, -1))
        log_det = 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = 0 if counted else active * math.log(2 * math.pi)
        found.append(Reached(*moments, -(scale + log_det + new[:, 0, 0] - left - constant) / 2))
        gram = new
    return tree_map(lambda *z: torch.stack(z, 1), *found), 0


_Columns = tuple[Tensor, Tensor]  # [b | E] (B, N, 1 + K), and P


def _pass(
    steps: Steps, belief: Belief, count: int | None = None
) -> tuple[list[tuple[_Columns, _Columns, Tensor, Tensor]], int]:
    """For each step [b | E] and P before and after its observation, the Gram matrix of [v | -V], and log |F| and more.

    They end where J is far from singular, or after ``count`` steps. There are none where it never is, or where F is
    singular; then there is also the number of steps up to that one.
    """
    columns, cov = torch.cat([belief.mean.unsqueeze(-1), belief.diffuse], -1), belief.cov
    eye = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
    none, found = _none(belief), []
    gram, scale = columns.new_zeros(len(cov), columns.shape[-1], columns.shape[-1]), torch.zeros_like(cov[:, 0, 0])
    for t in range(steps.A.shape[1] if count is None else count):
        now = tree_map(lambda z, t=t: z[:, t], steps)
        columns = now.A @ columns + _first(now.c, columns)
        cov = symmetric_part(now.A @ cov @ now.A.mT) + now.Q
        predicted = columns, cov
        CP = now.C @ cov
        root, failed = torch.linalg.cholesky_ex(symmetric_part(CP @ now.C.mT) + now.R)
        if count is None and failed.any():
            return [], t + 1
        K, innovation = torch.cholesky_solve(CP, root).mT, _first(now.y, columns) - now.C @ columns
        left = eye - K @ now.C
        cov = symmetric_part(left @ cov @ left.mT) + symmetric_part(K @ now.R @ K.mT)
        columns = columns + K @ innovation
        white = torch.linalg.solve_triangular(root, innovation, upper=False)
        gram = gram + white.mT @ white
        numbers = now.seen.to(cov.dtype).sum(-1)
        scale = scale + 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1) + numbers * math.log(2 * math.pi)
        found.append((predicted, (columns, cov), gram, scale))
        if count is None and _least(gram, none) > (_CLEAR if t + 1 < steps.A.shape[1] else _LEAST):
            return found, 0
    return (found, 0) if count is not None else ([], 0)


def _none(belief: Belief) -> Tensor:
    """Ones on the diagonal where a column is no direction ``(B, K, K)``."""
    return torch.diag_embed((belief.diffuse == 0).all(-2).to(belief.diffuse.dtype))


def _first(value: Tensor, columns: Tensor) -> Tensor:
    """A vector as the first of several columns, of which the others are zero."""
    return torch.nn.functional.pad(value.unsqueeze(-1), (0, columns.shape[-1] - 1))


def _least(gram: Tensor, none: Tensor) -> float:
    """The least eigenvalue of J of any row, with ones on its diagonal."""
    J = gram[:, 1:, 1:] + none
    size = J.diagonal(dim1=-2, dim2=-1)
    if not (size > 0).all():
        return 0.0
    return torch.linalg.eigvalsh(J * size.rsqrt().unsqueeze(-1) * size.rsqrt().unsqueeze(-2)).min().item()


def _root(gram: Tensor, none: Tensor) -> Tensor:
    """The Cholesky factor of J; of one that is singular up to rounding, that of one a little larger."""
    J = gram[:, 1:, 1:] + none
    root, failed = torch.linalg.cholesky_ex(J)
    if failed.any():
        size = J.detach().diagonal(dim1=-2, dim2=-1)
        more = torch.diag_embed(torch.where(size > 0, size * (16 * len(size[0]) * torch.finfo(J.dtype).eps), 1))
        root, _ = torch.linalg.cholesky_ex(J + torch.where((failed != 0)[:, None, None], more, 0))
    return root


def _collapsed(at: _Columns, gram: Tensor, none: Tensor) -> tuple[Tensor, Tensor]:
    """The moments of a state with what is known of delta."""
    columns, cov = at
    root = _root(gram, none)
    solved = torch.linalg.solve_triangular(root, torch.cat([-gram[:, 1:, :1], columns[..., 1:].mT], -1), upper=False)
    score, E = solved[..., :1], solved[..., 1:]
    return columns[..., 0] + (E.mT @ score).squeeze(-1), cov + symmetric_part(E.mT @ E)
