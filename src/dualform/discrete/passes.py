"""One pass over the time of a Markov chain: a loop or a scan.

:mod:`dualform.discrete.chunks` has a third form, and the scaled loop is an operator,
:func:`~dualform.ops.markov_filter.markov_filter`.

A pass starts from a vector ``v_1`` and makes, for every step, ``p_t = v_t e_t / c_t`` with ``c_t = sum(v_t e_t)`` and
``v_{t+1} = p_t A``. From the distribution of the first state it is the filter; over the reversed sequence with ``A^T``
and from ones, it gives the backward messages of the smoother.

Each form comes twice. The *scaled* one multiplies probabilities, with ``e_t`` relative to the likeliest state
of the step. What is smaller than the smallest number relative to the rest is lost there, which can only matter where a
transition has a probability below :func:`negligible` and the observations insist on it. The *log* one keeps
logarithms, and loses nothing.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dualform.core.scan import associative_scan


class Pass(NamedTuple):
    """``p_t``, or its logarithm in a log form, and ``log c_t``."""

    p: Tensor  # (B, T, K)
    log_c: Tensor  # (B, T)


def negligible(dtype: torch.dtype) -> float:
    """Transitions that are likelier than this lose nothing in a scaled form."""
    return torch.finfo(dtype).tiny / torch.finfo(dtype).eps


def safe_log(x: Tensor) -> Tensor:
    """The logarithm of what may be 0, which has no gradient there."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1).log(), -math.inf)


def logsumexp(x: Tensor, dim: int) -> Tensor:
    """``log sum exp``, where all may be -inf; the gradient is finite there."""
    top = x.detach().amax(dim, keepdim=True)
    top = torch.where(top.isfinite(), top, 0)
    return safe_log((x - top).exp().sum(dim)) + top.squeeze(dim)


def log_loop(start: Tensor, A: Tensor, log_b: Tensor) -> Pass:
    """One step after the other, on logarithms; A is ``(K, K)``, or ``(B, T - 1, K, K)``, one after each step."""
    log_A, now, probs, scales = safe_log(A), safe_log(start), [], []
    moves = None if A.dim() == 2 else log_A.unbind(1)
    for t, b_t in enumerate(log_b.unbind(1)):
        joint = now + b_t
        c = logsumexp(joint, -1)
        p = joint - torch.where(c.isfinite(), c, 0).unsqueeze(-1)
        probs.append(p)
        scales.append(c)
        if moves is None or t < len(moves):
            now = logsumexp(p.unsqueeze(-1) + (log_A if moves is None else moves[t]), -2)
    return Pass(torch.stack(probs, 1), torch.stack(scales, 1))


class Moves(NamedTuple):
    """From each state before some steps to each state after them: in proportion to ``exp(log_scale_i) P_ij``."""

    P: Tensor  # (..., K, K), or its logarithm; rows sum to 1
    log_scale: Tensor  # (..., K); up to a constant


def _levelled(log_scale: Tensor) -> Tensor:
    """Less its maximum, which keeps its digits."""
    top = log_scale.detach().amax(-1, keepdim=True)
    return log_scale - torch.where(top.isfinite(), top, 0)


def combine_moves(earlier: Moves, later: Moves) -> Moves:
    """The product of two, each row scaled for itself."""
    P = (earlier.P * later.log_scale.exp().unsqueeze(-2)) @ later.P
    total = P.sum(-1)
    P = P / torch.where(total > 0, total, 1).unsqueeze(-1)
    return Moves(P, _levelled(earlier.log_scale + safe_log(total)))


def combine_log_moves(earlier: Moves, later: Moves) -> Moves:
    """The product of two with logarithms."""
    P = logsumexp((earlier.P + later.log_scale.unsqueeze(-2)).unsqueeze(-1) + later.P.unsqueeze(-3), -2)
    total = logsumexp(P, -1)
    P = P - torch.where(total.isfinite(), total, 0).unsqueeze(-1)
    return Moves(P, _levelled(earlier.log_scale + total))


def each_step(A: Tensor, log_b: Tensor) -> Tensor:
    """The transition after each step but the last, ``(B, T - 1, K, K)``."""
    return A.expand(*log_b.shape[:1], log_b.shape[1] - 1, *A.shape[-2:])


def scaled_scan(start: Tensor, A: Tensor, e: Tensor) -> Pass:
    """All ``v_t`` by an associative scan of depth ``O(log T)``, then all steps at once."""
    products = associative_scan(combine_moves, Moves(each_step(A, e), safe_log(e[:, :-1])))
    weights = start[:, None] * products.log_scale.exp()
    v = (weights.unsqueeze(-2) @ products.P).squeeze(-2)
    v = torch.cat([start[:, None], v / weights.sum(-1, keepdim=True)], 1)
    joint = v * e
    c = joint.sum(-1, keepdim=True)
    return Pass(joint / c, c.squeeze(-1).log())


def log_scan(start: Tensor, A: Tensor, log_b: Tensor) -> Pass:
    """:func:`scaled_scan` on logarithms."""
    log_start = safe_log(start)[:, None]
    products = associative_scan(combine_log_moves, Moves(safe_log(each_step(A, log_b)), _levelled(log_b[:, :-1])))
    weights = log_start + products.log_scale
    total = logsumexp(weights, -1)
    weights = weights - torch.where(total.isfinite(), total, 0).unsqueeze(-1)
    v = torch.cat([log_start, logsumexp(weights.unsqueeze(-1) + products.P, -2)], 1)
    joint = v + log_b
    c = logsumexp(joint, -1)
    return Pass(joint - torch.where(c.isfinite(), c, 0).unsqueeze(-1), c)
