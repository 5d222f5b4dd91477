"""Filter, smoother and likelihood of a Markov chain that is observed through log-likelihoods of its states."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.discrete.passes import (
    Pass,
    log_loop,
    log_scan,
    logsumexp,
    negligible,
    relative_likelihoods,
    safe_log,
    scaled_chunks,
    scaled_loop,
    scaled_scan,
)


class Form(NamedTuple):
    """How a pass over time is made; None leaves the choice to :func:`one_pass`."""

    parallel: bool | None = None
    scaled: bool | None = None


class Both(NamedTuple):
    """The passes in both directions, and what they say about every step."""

    alpha: Tensor  # (B, T, K): p(z_t | y_1 .. y_t), or its logarithm
    after: Tensor  # (B, T, K): up to a factor p(y_t .. y_T | z_t), summing to 1, or its logarithm
    probs: Tensor  # (B, T, K): p(z_t | y_1 .. y_T)
    weight: Tensor  # (B, T): of the sum over z_t that probs was divided by, or its logarithm
    log_c: Tensor  # (B, T): log p(y_t | y_1 .. y_{t-1})
    log: bool


def records(*tensors: Tensor) -> bool:
    """Whether the graph of gradients is recorded through any of these."""
    return torch.is_grad_enabled() and any(m.requires_grad for m in tensors)


def one_pass(where: str, start: Tensor, A: Tensor, log_b: Tensor, form: Form) -> tuple[Pass, bool]:
    """A pass over time, with ``log_c`` of the full log-likelihoods; and whether its probabilities are logarithms.

    Where nothing is asked for, the form is scaled, and the log form follows where that may have lost something: after
    a step that was almost impossible, in a chain with transitions that are.

    Raises:
        ArgumentError: names the first step whose observations have probability 0.
    """
    if form.scaled is not False:
        e, top = relative_likelihoods(log_b)
        found = _scaled(start, A, e, form.parallel)
        if form.scaled or not _lost(A, found.log_c):
            _refuse_impossible(where, found.log_c)
            return found._replace(log_c=found.log_c + top), False
    found = (log_scan if form.parallel else log_loop)(start, A, log_b)
    _refuse_impossible(where, found.log_c)
    return found, True


def _scaled(start: Tensor, A: Tensor, e: Tensor, parallel: bool | None) -> Pass:
    if parallel is None and A.dim() == 2 and not records(start, A, e) and not torch.compiler.is_compiling():
        return scaled_chunks(start, A, e)
    if parallel is None:
        parallel = e.device.type != "cpu"
    return (scaled_scan if parallel else scaled_loop)(start, A, e)


def _lost(A: Tensor, log_c: Tensor) -> bool:
    """Whether a scaled form may have lost what matters."""
    if torch.compiler.is_compiling() or not log_c.numel():
        return False
    least = log_c.detach().min()  # NaN where one is
    if least.isnan() or least.isinf():
        return True
    faint = torch.finfo(log_c.dtype).tiny ** 0.25
    return bool(least.exp() < faint) and bool(A.detach().min() < negligible(A.dtype))


def _refuse_impossible(where: str, log_c: Tensor) -> None:
    if torch.compiler.is_compiling() or not log_c.numel():
        return
    bad = ~log_c.detach().isfinite()
    if bad.any():
        row, time = bad.nonzero()[0].tolist()
        raise ArgumentError(
            f"{where}: the observation at row {row}, time {time} has probability 0 after those before it",
            hint="a transition, a first state or an emission that it needs has probability 0",
        )


def both_passes(where: str, start: Tensor, A: Tensor, log_b: Tensor, form: Form) -> Both:
    """Forward and backward over ``log_b`` ``(B, T, K)``, T above 0."""
    forward, log = one_pass(where, start, A, log_b, form)
    same = form._replace(scaled=not log)
    back_A = A.mT if A.dim() == 2 else A.flip(1).mT
    backward, _ = one_pass(where, torch.ones_like(start), back_A, log_b.flip(1), same)
    after = backward.p.flip(1)
    if log:
        reached = _log_reached(A, after)
        joint = forward.p + reached
        weight = logsumexp(joint, -1)
        probs = (joint - weight.unsqueeze(-1)).exp()
    else:
        joint = forward.p * _reached(A, after)
        weight = joint.sum(-1)
        if form.scaled is None and _lost(A, weight.log()):
            return both_passes(where, start, A, log_b, form._replace(scaled=False))
        probs = joint / weight.unsqueeze(-1)
    return Both(forward.p, after, probs, weight, forward.log_c, log)


def _reached(A: Tensor, after: Tensor) -> Tensor:
    """``sum_j A_ij after_{t+1,j}``, and 1 at the last step."""
    later, last = after[:, 1:], torch.ones_like(after[:, :1])
    moved = later @ A.mT if A.dim() == 2 else (A @ later.unsqueeze(-1)).squeeze(-1)
    return torch.cat([moved, last], 1)


def _log_reached(A: Tensor, after: Tensor) -> Tensor:
    moved = logsumexp(safe_log(A) + after[:, 1:].unsqueeze(-2), -1)
    return torch.cat([moved, torch.zeros_like(after[:, :1])], 1)


def pair_probs(both: Both, A: Tensor) -> Tensor:
    """``p(z_t = i, z_{t+1} = j | y)``, ``(B, T - 1, K, K)``."""
    alpha, later, weight = both.alpha[:, :-1], both.after[:, 1:], both.weight[:, :-1]
    if both.log:
        return (alpha.unsqueeze(-1) + safe_log(A) + later.unsqueeze(-2) - weight[..., None, None]).exp()
    return (alpha / weight.unsqueeze(-1)).unsqueeze(-1) * later.unsqueeze(-2) * A


def pair_counts(both: Both, A: Tensor, keep: Tensor | None) -> Tensor:
    """How often each transition is expected, ``(K, K)``; only between steps that are kept, ``(B, T)``."""
    if both.log or A.dim() > 2:
        pairs = pair_probs(both, A)
        return (pairs if keep is None else pairs * keep[:, 1:, None, None]).sum((0, 1))
    left = both.alpha[:, :-1] / both.weight[:, :-1, None]
    left = left if keep is None else left * keep[:, 1:, None]
    return left.flatten(0, 1).mT @ both.after[:, 1:].flatten(0, 1) * A


class LogLikelihood(torch.autograd.Function):
    """``log p(y)`` ``(B,)``, whose gradients are posterior probabilities (Fisher's identity), to any order.

    The first derivatives need no graph of the passes. Higher ones differentiate the smoother.
    """

    @staticmethod
    def forward(ctx: Any, where: str, form: Form, start: Tensor, A: Tensor, log_b: Tensor) -> Tensor:
        ctx.where, ctx.form = where, form
        ctx.save_for_backward(start, A, log_b)
        return one_pass(where, start, A, log_b, form)[0].log_c.sum(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        start, A, log_b = ctx.saved_tensors
        both = both_passes(ctx.where, start, A, log_b, ctx.form)
        if both.log:
            first = (both.after[:, 0] - logsumexp(both.after[:, 0] + safe_log(start), -1).unsqueeze(-1)).exp()
            alpha, later = both.alpha[:, :-1] - both.weight[:, :-1, None], both.after[:, 1:]

            def outer(g: Tensor) -> Tensor:
                return (alpha.unsqueeze(-1) + later.unsqueeze(-2)).exp() * g[:, None, None, None]
        else:
            first = both.after[:, 0] / (both.after[:, 0] * start).sum(-1, keepdim=True)
            alpha, later = both.alpha[:, :-1] / both.weight[:, :-1, None], both.after[:, 1:]

            def outer(g: Tensor) -> Tensor:
                return (alpha * g[:, None, None]).unsqueeze(-1) * later.unsqueeze(-2)

        if A.dim() > 2:
            by_A = outer(grad)
        elif both.log:
            by_A = outer(grad).sum((0, 1))
        else:
            by_A = (alpha * grad[:, None, None]).flatten(0, 1).mT @ later.flatten(0, 1)
        return None, None, first * grad[:, None], by_A, both.probs * grad[:, None, None]


def log_likelihood(where: str, start: Tensor, A: Tensor, log_b: Tensor, form: Form) -> Tensor:
    """``log p(y)``, ``(B,)``."""
    if not log_b.shape[1]:
        return log_b.sum((1, 2))
    if records(start, A, log_b):
        apply: Callable[..., Tensor] = LogLikelihood.apply  # pyright: ignore[reportAssignmentType]
        return apply(where, form, start, A, log_b)
    return one_pass(where, start, A, log_b, form)[0].log_c.sum(-1)
