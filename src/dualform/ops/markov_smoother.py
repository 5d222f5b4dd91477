"""The smoother of a Markov chain that is seen through log-likelihoods of its states: a loop back over time."""

from typing import NamedTuple

import torch
from torch import Tensor

from dualform.ops.markov_filter import check_record, relative_likelihoods, taken
from dualform.ops.op import Op

_WHERE = "markov_smoother"


class Smoothed(NamedTuple):
    """What all observations say about each state."""

    probs: Tensor  # (B, T, K)
    weight: Tensor  # (B, T)
    after: Tensor  # (B, T, K)


def markov_smoother(p: Tensor, A: Tensor, log_b: Tensor, *, messages: bool = True) -> Smoothed:
    """The states of the chain of :func:`~dualform.ops.markov_filter.markov_filter` given y_1 .. y_T.

        r_T = 1,                                  r_t = A_t after_{t+1}
        probs_t = p_t r_t / weight_t,             weight_t = sum_k p_tk r_tk
        after_t = e_t r_t / sum_k e_tk r_tk

    ``probs_t`` is ``p(z_t | y_1 .. y_T)``. ``after_t`` is ``p(y_t .. y_T | z_t)`` up to a factor; the probability of a
    pair of neighbours is ``p_ti A_tij after_{t+1,j} / weight_t``.

    Args:
        p: what the filter found ``(B, T, K)``.
        A: ``(B, T - 1, K, K)``, from each step to the next.
        log_b: ``(B, T, K)``.
        messages: whether ``after`` is wanted.

    Returns:
        ``probs`` (B, T, K), ``weight`` (B, T) and ``after`` (B, T, K), which has no steps without messages.

    Raises:
        ArgumentError: for shapes, dtypes or devices that do not fit together.

    References:
        Rabiner (1989), "A tutorial on hidden Markov models and selected applications in speech recognition", sections
        III.A and V.A.
    """
    return Smoothed(*markov_smoother_op(MarkovSmoother(*taken(_WHERE, p, A, log_b), messages)))


class MarkovSmoother(NamedTuple):
    """The arguments of the operator, as in :func:`markov_smoother`; all in one dtype."""

    p: Tensor  # (B, T, K)
    A: Tensor  # (B, T - 1, K, K)
    log_b: Tensor  # (B, T, K)
    messages: bool


def _reference(a: MarkovSmoother) -> tuple[Tensor, ...]:
    e, _ = relative_likelihoods(a.log_b)
    if not e.shape[1]:
        return tuple(_fake(a))
    r, found = torch.ones_like(a.p[:, 0]), []
    for t in range(e.shape[1] - 1, -1, -1):
        joint, message = a.p[:, t] * r, e[:, t] * r
        weight = joint.sum(-1, keepdim=True)
        message = message / message.sum(-1, keepdim=True)
        found.append((joint / weight, weight.squeeze(-1), message))
        if t:
            r = (a.A[:, t - 1] @ message.unsqueeze(-1)).squeeze(-1)
    probs, weight, after = (torch.stack(m[::-1], 1) for m in zip(*found, strict=True))
    return probs, weight, after if a.messages else after[:, :0].clone()


def _fake(a: MarkovSmoother) -> list[Tensor]:
    rows, length, states = a.log_b.shape
    shapes = (rows, length, states), (rows, length), (rows, length if a.messages else 0, states)
    return [a.log_b.new_empty(shape) for shape in shapes]


def _check(a: MarkovSmoother) -> None:
    check_record(_WHERE, a)


markov_smoother_op = Op(_WHERE, MarkovSmoother, _reference, fake=_fake, check=_check, outputs=3, stepwise=True)
