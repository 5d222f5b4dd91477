"""Filter, smoother and likelihood of a Markov chain that is observed through log-likelihoods of its states."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.discrete import log_chunks
from dualform.discrete.chunks import Chunks, Counted, Smoothed, by_itself, chunk_size, forward_pass, smooth
from dualform.discrete.passes import (
    Pass,
    each_step,
    log_loop,
    log_scan,
    logsumexp,
    negligible,
    safe_log,
    scaled_scan,
)
from dualform.ops.markov_filter import MarkovFilter, markov_filter, markov_filter_op, relative_likelihoods
from dualform.ops.markov_smoother import markov_smoother


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
        found, top = _scaled(start, A, log_b, form)
        if form.scaled or not _lost(A, found.log_c):
            _refuse_impossible(where, found.log_c)
            return found._replace(log_c=found.log_c + top), False
    found = _log(start, A, log_b, form)
    _refuse_impossible(where, found.log_c)
    return found, True


def _scaled(start: Tensor, A: Tensor, log_b: Tensor, form: Form) -> tuple[Pass, Tensor]:
    """A pass with probabilities, ``log_c`` relative to what is second, ``(B, T)``."""
    if _parallel(log_b, form):
        e, top = relative_likelihoods(log_b)
        return scaled_scan(start, A, e), top
    if not _has_kernel(start, A, log_b) and (size := _chunk_size(start, A, log_b, form)):
        with by_itself(log_b.shape[0] * -(-log_b.shape[1] // size) * A.numel()):
            chunks = Chunks.of(log_b, size)
            p, c = forward_pass(start, A, chunks)
            return Pass(chunks.back(p), chunks.back(c).squeeze(-1).log()), chunks.top
    p, c, top = markov_filter(start, each_step(A, log_b), log_b)
    return Pass(p, c.log()), top


def _parallel(log_b: Tensor, form: Form) -> bool:
    """Whether a scaled pass is a scan."""
    return log_b.device.type != "cpu" if form.parallel is None else form.parallel


def _has_kernel(start: Tensor, A: Tensor, log_b: Tensor) -> bool:
    """Whether the scaled loop is compiled, without gradients."""
    return markov_filter_op.has_kernel(MarkovFilter(start, each_step(A, log_b), log_b), records(start, A, log_b))


def _log(start: Tensor, A: Tensor, log_b: Tensor, form: Form) -> Pass:
    """A pass with logarithms."""
    if size := _chunk_size(start, A, log_b, form):
        chunks = Chunks.of(log_b, size, log=True)
        p, c = log_chunks.forward_pass(start, A, chunks)
        return Pass(chunks.back(p), chunks.back(c).squeeze(-1) + chunks.top)
    return (log_scan if form.parallel else log_loop)(start, A, log_b)


def _chunk_size(start: Tensor, A: Tensor, log_b: Tensor, form: Form) -> int:
    """Steps of the chunks that a pass is made of; 0 for a pass in another form."""
    if form.parallel is not None or A.dim() > 2 or torch.compiler.is_compiling() or records(start, A, log_b):
        return 0
    return min(chunk_size(*log_b.shape[:2]), log_b.shape[1])


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


def _refuse_lost(where: str, weight: Tensor) -> None:
    """Refuse a posterior in a scaled form that was asked for, where both passes have nothing in common."""
    if not torch.compiler.is_compiling() and not bool((weight.detach() > 0).all()):
        raise ArgumentError(f"{where}: probabilities are too small for a scaled form", hint="leave scaled at None")


def both_passes(where: str, start: Tensor, A: Tensor, log_b: Tensor, form: Form, *, messages: bool = True) -> Both:
    """Forward and backward over ``log_b`` ``(B, T, K)``, T above 0; ``after`` may be left out."""
    forward, log = one_pass(where, start, A, log_b, form)
    by_op = not _parallel(log_b, form) and (_has_kernel(start, A, log_b) or not _chunk_size(start, A, log_b, form))
    if by_op and not log:
        probs, weight, after = markov_smoother(forward.p, each_step(A, log_b), log_b, messages=messages)
        return _unless_lost(where, start, A, log_b, form, Both(forward.p, after, probs, weight, forward.log_c, log))
    back_A = A.mT if A.dim() == 2 else A.flip(1).mT
    back = torch.ones_like(start), back_A, log_b.flip(1), form
    after = (_log(*back) if log else _scaled(*back)[0]).p.flip(1)
    if log:
        reached = _log_reached(A, after)
        joint = forward.p + reached
        weight = logsumexp(joint, -1)
        probs = (joint - weight.unsqueeze(-1)).exp()
    else:
        joint = forward.p * _reached(A, after)
        weight = joint.sum(-1)
        both = Both(forward.p, after, joint / weight.unsqueeze(-1), weight, forward.log_c, log)
        return _unless_lost(where, start, A, log_b, form, both)
    return Both(forward.p, after, probs, weight, forward.log_c, log)


def _unless_lost(where: str, start: Tensor, A: Tensor, log_b: Tensor, form: Form, both: Both) -> Both:
    """Both scaled passes, or those with logarithms where the scaled ones may have lost what matters."""
    if form.scaled is None and _lost(A, both.weight.log()):
        return both_passes(where, start, A, log_b, form._replace(scaled=False))
    _refuse_lost(where, both.weight)
    return both


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


class Expected(NamedTuple):
    """What a model thinks of the data, without the passes behind it."""

    probs: Tensor  # (B, T, K): p(z_t | y_1 .. y_T)
    log_c: Tensor  # (B, T): log p(y_t | y_1 .. y_{t-1})
    by_start: Tensor  # (B, K): the derivative of log p(y) by the distribution of the first state
    by_A: Tensor  # of the shape of A: the same by the transition, summed over rows and steps where it is one matrix


def expect(
    where: str,
    start: Tensor,
    A: Tensor,
    log_b: Tensor,
    form: Form,
    keep: Tensor | None = None,
    weights: Tensor | None = None,
) -> Expected:
    """Posterior probabilities and expected transitions: ``A * by_A`` are those, between steps that are kept.

    Args:
        where: name of the function, first word of every error.
        start: ``(B, K)``.
        A: ``(K, K)``, or ``(B, T - 1, K, K)``.
        log_b: ``(B, T, K)``, T above 0; 0 after the end of a row.
        form: of the passes.
        keep: steps that there are ``(B, T)``.
        weights: of each row in by_A ``(B,)``.
    """
    found = _smoothed(where, start, A, log_b, form, (keep, weights))
    if found is not None and found.first is not None and found.counts is not None:
        return Expected(found.probs, found.log_c + found.top, found.first, found.counts)
    both = both_passes(where, start, A, log_b, form)
    if both.log:
        first = both.after[:, 0] - logsumexp(both.after[:, 0] + safe_log(start), -1).unsqueeze(-1)
        pairs = (both.alpha[:, :-1] - both.weight[:, :-1, None]).unsqueeze(-1) + both.after[:, 1:].unsqueeze(-2)
        share = _share(pairs, keep, weights)
        by_A = pairs.exp() if share is None else pairs.exp() * share[..., None, None]
        return Expected(both.probs, both.log_c, first.exp(), by_A if A.dim() > 2 else by_A.sum((0, 1)))
    first = both.after[:, 0] / (both.after[:, 0] * start).sum(-1, keepdim=True)
    alpha, later = both.alpha[:, :-1] / both.weight[:, :-1, None], both.after[:, 1:]
    share = _share(alpha, keep, weights)
    alpha = alpha if share is None else alpha * share[..., None]
    if A.dim() > 2:
        return Expected(both.probs, both.log_c, first, alpha.unsqueeze(-1) * later.unsqueeze(-2))
    return Expected(both.probs, both.log_c, first, alpha.flatten(0, 1).mT @ later.flatten(0, 1))


def posterior(where: str, start: Tensor, A: Tensor, log_b: Tensor, form: Form) -> Tensor:
    """``p(z_t | y)`` alone, ``(B, T, K)``."""
    found = _smoothed(where, start, A, log_b, form, None)
    return both_passes(where, start, A, log_b, form, messages=False).probs if found is None else found.probs


def _smoothed(
    where: str, start: Tensor, A: Tensor, log_b: Tensor, form: Form, counted: Counted | None
) -> Smoothed | None:
    """What chunks side by side say, which are scaled where that loses nothing; None where another form is taken."""
    size = _chunk_size(start, A, log_b, form)
    if not size or (form.scaled is not False and _has_kernel(start, A, log_b)):
        return None
    if form.scaled is not False:
        found = smooth(start, A, log_b, size, counted)
        if form.scaled or not (_lost(A, found.log_c) or _lost(A, found.least.log()[None])):
            _refuse_impossible(where, found.log_c)
            _refuse_lost(where, found.least)
            return found
    found = log_chunks.smooth(start, A, log_b, size, counted)
    _refuse_impossible(where, found.log_c)
    return found


def _share(like: Tensor, keep: Tensor | None, weights: Tensor | None) -> Tensor | None:
    """How much each transition counts, ``(B, T - 1)``; None is 1 for each."""
    if keep is None:
        return None if weights is None else weights[:, None].expand(like.shape[:2])
    share = keep[:, 1:].to(like.dtype)
    return share if weights is None else share * weights[:, None]


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
        found = expect(ctx.where, start, A, log_b, ctx.form, weights=grad)
        return None, None, found.by_start * grad[:, None], found.by_A, found.probs * grad[:, None, None]


def log_likelihood(where: str, start: Tensor, A: Tensor, log_b: Tensor, form: Form) -> Tensor:
    """``log p(y)``, ``(B,)``."""
    if not log_b.shape[1]:
        return log_b.sum((1, 2))
    if records(start, A, log_b):
        apply: Callable[..., Tensor] = LogLikelihood.apply  # pyright: ignore[reportAssignmentType]
        return apply(where, form, start, A, log_b)
    return one_pass(where, start, A, log_b, form)[0].log_c.sum(-1)
