"""Markov chains of any emission, and with transitions that change: from log-likelihoods of the states alone."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualform.core.calls import explained
from dualform.core.errors import ArgumentError
from dualform.core.linalg import as_tensors, refuse
from dualform.core.shapes import check_tensors
from dualform.discrete import decoding, smoothing
from dualform.discrete.emission import check_distribution


class Posterior(NamedTuple):
    """What observations say about the states of a Markov chain; without B for one series."""

    loglik: Tensor  # (B, T): log p(y_t | y_1 .. y_{t-1})
    filtered: Tensor  # (B, T, K): p(z_t | y_1 .. y_t)
    probs: Tensor  # (B, T, K): p(z_t | y_1 .. y_T)
    pairs: Tensor  # (B, T - 1, K, K): p(z_t, z_{t+1} | y_1 .. y_T)


@explained
def forward_backward(
    initial: Any, transition: Any, log_b: Any, *, parallel: bool | None = None, scaled: bool | None = None
) -> Posterior:
    """Filter and smoother of a Markov chain, differentiable.

    The transition may be another one after every step, such as what a network makes of covariates.

    Args:
        initial: distribution of the first state, ``(K,)`` or ``(B, K)``.
        transition: ``(K, K)``; or with the one from each step to the next, ``(T - 1, K, K)`` or ``(B, T - 1, K, K)``.
        log_b: ``log p(y_t | z_t = k)``, ``(T, K)`` or ``(B, T, K)``, T above 0; 0 in all states where nothing is seen.
        parallel: see :class:`~dualform.discrete.model.HiddenMarkov`.
        scaled: see there.

    Raises:
        ArgumentError: for shapes that do not fit, rows that are no distribution, log-likelihoods that are NaN or +inf,
            or observations of probability 0.
    """
    where = "forward_backward"
    start, A, log_b = _checked(where, initial, transition, log_b)
    batched = log_b.dim() == 3
    both = smoothing.both_passes(where, start, A, _rows(log_b), smoothing.Form(parallel, scaled))
    filtered = both.alpha.exp() if both.log else both.alpha
    found = Posterior(both.log_c, filtered, both.probs, smoothing.pair_probs(both, A))
    return found if batched else Posterior(*(m[0] for m in found))


@explained
def log_likelihood(
    initial: Any, transition: Any, log_b: Any, *, parallel: bool | None = None, scaled: bool | None = None
) -> Tensor:
    """``log p(y_1 .. y_T)``, ``(B,)``, or without axes for one series; the quickest to differentiate.

    Args and errors are those of :func:`forward_backward`.
    """
    where = "log_likelihood"
    start, A, log_b = _checked(where, initial, transition, log_b)
    found = smoothing.log_likelihood(where, start, A, _rows(log_b), smoothing.Form(parallel, scaled))
    return found if log_b.dim() == 3 else found[0]


@explained
def viterbi(initial: Any, transition: Any, log_b: Any) -> tuple[Tensor, Tensor]:
    """The most likely path ``(B, T)``, int64, and its log-probability ``(B,)``; without B for one series.

    Args and errors are those of :func:`forward_backward`.
    """
    start, A, log_b = _checked("viterbi", initial, transition, log_b)
    path, score = decoding.viterbi(start, A, _rows(log_b))
    return (path, score) if log_b.dim() == 3 else (path[0], score[0])


def _rows(log_b: Tensor) -> Tensor:
    return log_b if log_b.dim() == 3 else log_b[None]


def _checked(where: str, initial: Any, transition: Any, log_b: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The distribution of the first state ``(B, K)``, the transition, and the log-likelihoods."""
    given = as_tensors(where, initial=initial, transition=transition, log_b=log_b)
    start, A, log_b = given["initial"], given["transition"], given["log_b"]
    sizes = check_tensors(where, log_b=(log_b, "B T K" if log_b.dim() == 3 else "T K"))
    batch, length, k = sizes.get("B", 1), sizes["T"], sizes["K"]
    if not length:
        raise ArgumentError(f"{where}: log_b has no steps")
    start = start.expand(batch, -1) if start.dim() == 1 else start
    A = A[None].expand(batch, -1, -1, -1) if A.dim() == 3 else A
    of_A = (A, f"{k} {k}") if A.dim() == 2 else (A, f"{batch} {length - 1} {k} {k}")
    check_tensors(where, initial=(start, f"{batch} {k}"), transition=of_A)
    check_distribution(where, "initial", start.detach())
    check_distribution(where, "transition", A.detach())
    bad = log_b.detach().isnan() | (log_b.detach() == torch.inf)
    refuse(where, "log_b", log_b, bad, "has values that are no log-likelihoods")
    return start, A, log_b
