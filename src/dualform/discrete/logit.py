"""Transitions that depend on inputs: multinomial logits, fitted by Newton's method."""

import torch
from torch import Tensor

_STEPS = 30  # of Newton's method, in one step of a fit
_RIDGE = 1e-10  # of the curvature, relative to its mean; some directions have none
_ENOUGH = 1e-12  # of the objective, relative to the number of transitions: less is no gain


@torch.no_grad()
def multinomial_logit(logits: Tensor, weights: Tensor, counts: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Maximise ``sum_nij counts_nij log softmax_j(logits_ij + sum_k u_nk weights_kij)``, which is concave.

    Rows i are independent of each other. Each step of Newton's method is halved until it gains.

    Args:
        logits: to start from ``(K, K)``; what is -inf stays.
        weights: to start from ``(U, K, K)``.
        counts: how often each transition was made, may be fractions ``(n, K, K)``.
        u: ``(n, U)``.

    Returns:
        ``logits`` and ``weights``, which are 0 for staying in a state.

    References:
        McCullagh and Nelder (1989), "Generalized linear models", section 5.2.
    """
    found = [_row(logits[i], weights[:, i], counts[:, i], u) for i in range(len(logits))]
    logits, weights = torch.stack([row[0] for row in found]), torch.stack([row[1:] for row in found], 1)
    return logits, weights - weights.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)


def _row(logits: Tensor, weights: Tensor, counts: Tensor, u: Tensor) -> Tensor:
    """The parameters of one row, ``(1 + U, K)``."""
    z, total = torch.cat([torch.ones_like(u[:, :1]), u], 1), counts.sum(-1)
    keep = total > 0
    z, counts, total = z[keep], counts[keep], total[keep]
    at = torch.cat([logits[None], weights]).to(counts.dtype)
    if not len(z):
        return at
    last, amount = _objective(at, z, counts), float(total.sum())
    for _ in range(_STEPS):
        p = (z @ at).softmax(-1)
        gradient = z.mT @ (counts - total[:, None] * p)
        rooted = (z[:, :, None] * (total.sqrt()[:, None] * p)[:, None]).flatten(1)  # (n, (1 + U) K)
        curvature = -rooted.mT @ rooted
        by_state = torch.einsum("na,nj,nb->jab", z, total[:, None] * p, z)
        size = p.shape[1]
        for j in range(size):
            curvature[j::size, j::size] += by_state[j]
        ridge = _RIDGE * curvature.diagonal().mean() + torch.finfo(p.dtype).tiny
        curvature.diagonal().add_(ridge)
        step, failed = torch.linalg.solve_ex(curvature, gradient.flatten())
        if bool(failed) or not bool(step.isfinite().all()):
            return at
        step, share = step.view_as(at), 1.0
        while (gained := _objective(at + share * step, z, counts) - last) < 0 and share > 1e-6:
            share /= 2
        if not gained > 0:
            return at
        at, last = at + share * step, last + gained
        if gained < _ENOUGH * amount:
            return at
    return at


def _objective(at: Tensor, z: Tensor, counts: Tensor) -> float:
    log_p = (z @ at).log_softmax(-1)
    return float(torch.where(counts > 0, counts * log_p, 0).sum())
