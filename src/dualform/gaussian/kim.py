"""The steps of Kim's filter and smoother: of every pair of regimes, and then one normal distribution for each regime.

References:
    Kim (1994), "Dynamic linear models with Markov-switching".
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dualform.core.linalg import matvec, symmetric_part
from dualform.core.tree import state_class, tree_map
from dualform.gaussian.belief import Belief, Gaussian
from dualform.gaussian.conditioning import condition
from dualform.gaussian.filtering import observe
from dualform.gaussian.passes import predict
from dualform.gaussian.steps import Steps


@state_class
class SwitchingBelief(NamedTuple):
    """What is known of a state and its regime: a normal distribution in each, and how likely each is.

    ``steps`` counts the times that have been reached; with 0 steps, ``probs`` are those of the first regime.
    """

    mean: Tensor  # (B, K, N)
    cov: Tensor  # (B, K, N, N)
    probs: Tensor  # (B, K)
    steps: Tensor  # (B,), int64


def advance(state: SwitchingBelief, step: Steps, moves: Tensor) -> tuple[SwitchingBelief, Tensor]:
    """One step of every pair of regimes ``(B, from, to)``, and one normal distribution for all that end in a regime.

    Args:
        state: before it.
        step: of every regime ``(B, K, ...)``, masked.
        moves: the probabilities of the regimes moved to ``(B, K, K)``.

    Returns:
        The state after it, and the log-likelihoods ``(B,)``.
    """
    k = state.probs.shape[1]
    pairs = tree_map(lambda z: z.unsqueeze(1).expand(-1, k, *z.shape[1:]).flatten(1, 2), step)
    mean, cov = (z.unsqueeze(2).expand(-1, -1, k, *z.shape[2:]).flatten(1, 2) for z in (state.mean, state.cov))
    before = predict(Belief(mean, cov, state.steps, mean.new_zeros(*mean.shape, 0)), pairs)
    out = observe(Gaussian(before.mean, before.cov), pairs, lambda: None)
    mean, cov, loglik = (z.unflatten(1, (k, k)) for z in (out.mean, out.cov, out.loglik))
    prior = state.probs.unsqueeze(-1) * moves
    possible = prior > 0
    top = torch.where(possible, loglik, -torch.inf).detach().amax((1, 2))
    joint = prior * torch.where(possible, loglik - top[:, None, None], 0).exp()
    total = joint.sum((1, 2))
    joint = joint / total[:, None, None]
    mean, cov = collapsed(_shares(joint).mT, mean.transpose(1, 2), cov.transpose(1, 2))
    return SwitchingBelief(mean, cov, joint.sum(1), state.steps + 1), top + total.log()


def earlier(now: SwitchingBelief, later: SwitchingBelief, step: Steps, moves: Tensor) -> SwitchingBelief:
    """What the smoother knows of a time, from what the filter knows of it and the smoother of the next.

    Args:
        now: by the filter; pairs are ``(B, now, next)``.
        later: by the smoother.
        step: the one between them, of every regime ``(B, K, ...)``.
        moves: the probabilities of the regimes moved to ``(B, K, K)``.
    """
    k, n = now.mean.shape[1:]
    shape = (len(now.mean), k, k)
    A, c, Q = (z.unsqueeze(1).expand(*shape, *z.shape[2:]) for z in step[:3])
    mean, cov = (z.unsqueeze(2).expand(*shape, *z.shape[2:]) for z in (now.mean, now.cov))
    eye = torch.eye(n, dtype=mean.dtype, device=mean.device).expand_as(cov)
    found = condition(torch.zeros_like(cov), cov, cov[..., :0], A, Q, eye)
    G = found.mean
    mean = mean + matvec(G, later.mean.unsqueeze(1) - matvec(A, mean) - c)
    cov = symmetric_part(G @ later.cov.unsqueeze(1) @ G.mT) + found.cov
    joint = _shares(now.probs.unsqueeze(-1) * moves) * later.probs.unsqueeze(1)
    mean, cov = collapsed(_shares(joint.mT).mT, mean, cov)
    return SwitchingBelief(mean, cov, joint.sum(2), now.steps)


def _shares(joint: Tensor) -> Tensor:
    """The columns of ``(B, K, K)`` with the sum 1; equal shares where a column is 0."""
    total = joint.sum(1, keepdim=True)
    return torch.where(total > 0, joint / torch.where(total > 0, total, 1), 1 / joint.shape[1])


def collapsed(weights: Tensor, mean: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
    """The moments of mixtures: weights ``(..., K)``, means ``(..., K, N)`` and covariances ``(..., K, N, N)``."""
    center = (weights.unsqueeze(-1) * mean).sum(-2)
    away = mean - center.unsqueeze(-2)
    spread = cov + away.unsqueeze(-1) * away.unsqueeze(-2)
    return center, (weights[..., None, None] * spread).sum(-3)
