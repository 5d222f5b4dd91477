"""Gauss-Newton steps to the most probable state: where an affine observation leads, and how far to go there."""

from collections.abc import Callable

import torch
from torch import Tensor

from dualform.core.linalg import matvec, symmetric_part
from dualform.gaussian.belief import Belief
from dualform.gaussian.linearization import Affine, Method, root_of
from dualform.gaussian.steps import Steps, Transition, noise_of_seen

_PARTS = (1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125, 0.0)


def nearer(cost: Callable[[Tensor], Tensor], here: Tensor, there: Tensor) -> Tensor:
    """The point on the way from ``here`` to ``there`` ``(B, ...)`` with the least cost, for each row.

    The whole way is taken where nothing is better, and none where everything is worse. The choice has no gradient.

    Args:
        cost: ``(K, B, ...)`` -> ``(K, B)``.
        here: where the step begins.
        there: where it leads.
    """
    with torch.no_grad():
        parts = torch.tensor(_PARTS, dtype=here.dtype, device=here.device)
        parts = parts.view(-1, *[1] * here.dim())
        value = cost(here + parts * (there - here)).nan_to_num(nan=torch.inf)
        part = parts.flatten()[value.argmin(0)].view(-1, *[1] * (here.dim() - 1))
    return here + part * (there - here)


class Normal:
    """``-log N(x; 0, cov)`` but for constants: what a deviation costs, for covariances ``(..., N, N)``.

    A direction without a variance costs nothing; ``proper`` says that there is none.
    """

    def __init__(self, cov: Tensor):
        self.unit, self.scale = root_of(cov.detach())

    @property
    def proper(self) -> Tensor:
        """Whether every direction has a variance, ``(...)``."""
        return (self.scale > 0).all(-1)

    def __call__(self, away: Tensor) -> Tensor:
        """``(...)`` of deviations ``(..., N)``."""
        away, varies = away.unsqueeze(-1), self.scale > 0
        white = torch.linalg.solve_triangular(self.unit, away, upper=False, unitriangular=True).squeeze(-1)
        return torch.where(varies, white / torch.where(varies, self.scale, 1), 0).square().sum(-1) / 2


def at_once(move: Transition, view: Affine, R: Tensor, y: Tensor, seen: Tensor) -> Steps:
    """A step, with a time axis of length 1."""
    parts = (*move, view.A, R + view.V, torch.where(seen, y - view.b, 0), seen)
    return Steps(*(z[:, None] for z in parts))


def toward(before: Belief, view: Affine, R: Tensor, y: Tensor, seen: Tensor) -> Tensor:
    """The mean of a belief after an observation ``(B, M)``, where that is affine."""
    C, R, away = view.A * seen.unsqueeze(-1), noise_of_seen(R + view.V, seen), torch.where(seen, y - view.b, 0)
    CP = C @ before.cov
    root, _ = torch.linalg.cholesky_ex(symmetric_part(CP @ C.mT) + R)
    return before.mean + matvec(torch.cholesky_solve(CP, root).mT, away - matvec(C, before.mean))


def settled(change: Tensor, cov: Tensor, method: Method) -> Tensor:
    """Whether no state moves by more standard deviations than the method tolerates, ``(...)``."""
    return (change.detach().square() <= method.tolerance**2 * cov.detach().diagonal(dim1=-2, dim2=-1)).all(-1)
