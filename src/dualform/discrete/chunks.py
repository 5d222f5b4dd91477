"""Passes over chunks of time that stand side by side as rows: the fastest form, without gradients.

A Markov chain forgets where it started. So each chunk but the first guesses the vector that it starts from, by a pass
over the steps before it, and guesses are compared with what the chunk before then ends in. Where these differ by more
than rounding, the chunk is run again. Where that does not help after a few rounds, the starts are computed: from the
products of all chunks, one chunk after the other.

Everything is written into memory that is laid out once, one row of it per step and chunk, so that a step of all chunks
stays in the cache.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

_WARM = 64  # steps that a chunk looks beyond its border to guess
BLOCK = 8  # steps of all chunks that are handled at once where there is no recursion
_SHARED = 1 << 20  # products of a step that are worth more than one thread
_GUESSES = 3  # rounds of guesses before the starts are computed
ROUNDING = 64  # times the precision, by which vectors may differ that are taken as equal


class Chunks(NamedTuple):
    """Relative likelihoods in chunks, and how to lay out what is made of them."""

    e: Tensor  # (size, B * chunks, K), 1 after the end: steps of which nothing is observed
    top: Tensor  # (B, T): the logarithm of what each step was divided by
    rows: int
    length: int

    @classmethod
    def of(cls, log_b: Tensor, size: int, *, log: bool = False) -> "Chunks":
        """Lay out log-likelihoods ``(B, T, K)``, as logarithms if ``log``."""
        rows, length, _ = log_b.shape
        top = log_b.amax(-1)
        top = torch.where(top.isfinite(), top, 0)
        e = in_chunks(log_b, size, top)
        return cls(e if log else e.exp_(), top, rows, length)

    @property
    def per_row(self) -> int:
        """Chunks of a row."""
        return self.e.shape[1] // self.rows

    def back(self, laid: Tensor) -> Tensor:
        """``(size, B * chunks, ...)`` -> ``(B, T, ...)``."""
        return in_rows(laid, self.rows, self.length)

    def after(self, ends: Tensor, first: Tensor) -> Tensor:
        """What all chunks end in ``(B * chunks, K)`` as what those after them start from."""
        ends = ends.view(self.rows, self.per_row, -1)
        return torch.cat([first[:, None], ends[:, :-1]], 1).flatten(0, 1)

    def before(self, ends: Tensor, last: Tensor) -> Tensor:
        """The same for passes that run backwards."""
        ends = ends.view(self.rows, self.per_row, -1)
        return torch.cat([ends[:, 1:], last[:, None]], 1).flatten(0, 1)


class Smoothed(NamedTuple):
    """What both passes together say."""

    probs: Tensor  # (B, T, K): p(z_t | y_1 .. y_T)
    log_c: Tensor  # (B, T): log c, relative to top
    top: Tensor  # (B, T)
    least: Tensor  # the smallest weight that a posterior was divided by
    first: Tensor | None  # (B, K): the derivative of log p(y) by the distribution of the first state
    counts: Tensor | None  # (K, K): expected transitions, each divided by its probability


Counted = tuple[Tensor | None, Tensor | None]  # steps that there are (B, T), and the weight of each row (B,)


def chunk_size(rows: int, length: int) -> int:
    """Steps of a chunk: as many chunks as steps in one, and at least twice the steps of a guess."""
    return max(2 * _WARM, math.isqrt(length * max(1, rows)) // max(1, min(rows, 4)))


@contextmanager
def by_itself(work: int) -> Iterator[None]:
    """Inside, PyTorch uses one thread of the CPU, if a step has so few operations that others do not pay.

    A pass has thousands of steps. On a busy machine a step that waits for another thread may wait for milliseconds.
    """
    threads = torch.get_num_threads()
    if threads == 1 or work > _SHARED:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def forward_pass(start: Tensor, A: Tensor, chunks: Chunks) -> tuple[Tensor, Tensor]:
    """The scaled pass of :mod:`dualform.discrete.passes`: p and c, laid out in chunks."""
    p, c = torch.empty_like(chunks.e), chunks.e.new_empty(*chunks.e.shape[:2], 1)
    settle(start, A, chunks, (p, c, None), SCALED, backward=False)
    return p, c


@torch.no_grad()
def smooth(start: Tensor, A: Tensor, log_b: Tensor, size: int, counted: Counted | None) -> Smoothed:
    """Both passes, and the posterior.

    Args:
        start: ``(B, K)``.
        A: ``(K, K)``.
        log_b: ``(B, T, K)``, 0 after the end of a row.
        size: steps of a chunk.
        counted: what the counts are of; None leaves them and the derivative out.
    """
    with by_itself(len(log_b) * -(-log_b.shape[1] // size) * A.numel()):
        return _smooth(start, A, Chunks.of(log_b, size), counted)


def _smooth(start: Tensor, A: Tensor, chunks: Chunks, counted: Counted | None) -> Smoothed:
    size = len(chunks.e)
    p, c = forward_pass(start, A, chunks)
    v = torch.empty_like(p)
    after = None if counted is None else torch.empty_like(p)
    settle(torch.ones_like(start), A.mT.contiguous(), chunks, (after, None, v), SCALED, backward=True)
    weight = torch.empty_like(c)
    for t in range(0, size, BLOCK):
        now = slice(t, t + BLOCK)
        torch.mul(p[now], v[now], out=v[now])
        torch.sum(v[now], -1, keepdim=True, out=weight[now])
        v[now].div_(weight[now])
    log_c = chunks.back(c).squeeze(-1).log()
    if counted is None or after is None:
        return Smoothed(chunks.back(v), log_c, chunks.top, weight.min(), None, None)
    first = after[0].view(chunks.rows, chunks.per_row, -1)[:, 0]
    first = first / (first * start).sum(-1, keepdim=True)
    share = shares(chunks, size, *counted)
    p.div_(weight if share is None else weight / share)
    begun = chunks.before(after[0], torch.zeros_like(start))  # of a row's last chunk nothing comes after
    counts = p[-1].mT @ begun
    for t in range(0, size - 1, BLOCK):
        to = after[t + 1 : t + 1 + BLOCK].flatten(0, 1)
        counts.addmm_(p[t : t + BLOCK].flatten(0, 1)[: len(to)].mT, to)
    return Smoothed(chunks.back(v), log_c, chunks.top, weight.min(), first, counts)


def shares(chunks: Chunks, size: int, keep: Tensor | None, weights: Tensor | None) -> Tensor | None:
    """How much the transition after each step counts, ``(size, B * chunks, 1)``; None is 1 for each."""
    length = chunks.length
    if keep is None and weights is None and chunks.per_row * size == length:
        return None
    share = chunks.e.new_ones(chunks.rows, length, 1)
    share[:, -1] = 0
    if keep is not None:
        share[:, :-1] *= keep[:, 1:, None]
    if weights is not None:
        share *= weights[:, None, None]
    return in_chunks(share, size)


Memory = tuple[Tensor | None, Tensor | None, Tensor | None]  # p, c and v of every step, where they are wanted
_NOTHING: Memory = (None, None, None)


class Arithmetic(NamedTuple):
    """How a pass computes: with probabilities, or with their logarithms."""

    run: Callable[[Tensor, Tensor, Tensor, Memory, bool], Tensor]  # the loop over the first axis; what it ends in
    equal: Callable[[Tensor, Tensor], Tensor]  # which rows agree but for rounding
    starts: Callable[[Tensor, Tensor, Chunks, bool], Tensor]  # what each chunk starts from, without guesses


def settle(start: Tensor, A: Tensor, chunks: Chunks, memory: Memory, by: Arithmetic, *, backward: bool) -> None:
    """The pass through all chunks from starts that are right, written into memory."""
    e, count = chunks.e, chunks.per_row
    if count == 1:
        by.run(start, A, e, memory, backward)
        return
    shift, everything = chunks.before if backward else chunks.after, torch.arange(e.shape[1], device=e.device)
    guess = by.run(torch.ones_like(e[0]), A, e[:_WARM] if backward else e[-_WARM:], _NOTHING, backward)
    starts = shift(guess, start)
    wanted, which = shift(by.run(starts, A, e, memory, backward), start), everything
    for _ in range(_GUESSES):
        which = (~by.equal(starts, wanted)).nonzero().squeeze(1)
        if not len(which):
            return
        starts[which] = wanted[which]
        p, c, v = (None if m is None else m[:, which] for m in memory)
        ends = by.run(starts[which], A, e[:, which], (p, c, v), backward)
        for whole, part in zip(memory, (p, c, v), strict=True):
            if whole is not None and part is not None:
                whole[:, which] = part
        there = (which % count != 0) if backward else (which + 1) % count != 0  # a chunk is there to go on
        wanted[which[there] + (-1 if backward else 1)] = ends[there]
    if not by.equal(starts, wanted).all():
        by.run(by.starts(start, A, chunks, backward), A, e, memory, backward)


def _equal(a: Tensor, b: Tensor) -> Tensor:
    """Which rows agree in each probability, relative to it; NaN agrees with NaN."""
    close = (a - b).abs() <= ROUNDING * torch.finfo(a.dtype).eps * (a.abs() + b.abs())
    return (close | (a.isnan() & b.isnan())).all(-1)


def _run(start: Tensor, A: Tensor, e: Tensor, memory: Memory, backward: bool) -> Tensor:
    """The loop over the first axis; what it ends in."""
    now, size, order = start.clone(), len(e), range(len(e))
    p_once, end, c_once = torch.empty_like(now), torch.empty_like(now), now.new_empty(len(now), 1)
    p, c, v = memory
    if v is not None:
        v[-1 if backward else 0].copy_(now)
    for t in reversed(order) if backward else order:
        p_t, c_t = p_once if p is None else p[t], c_once if c is None else c[t]
        torch.mul(now, e[t], out=p_t)
        torch.sum(p_t, -1, keepdim=True, out=c_t)
        p_t.div_(c_t)
        following = t - 1 if backward else t + 1
        if v is not None and 0 <= following < size:
            now = v[following]
        elif v is not None:
            now = end
        torch.mm(p_t, A, out=now)
    return now


def _starts(start: Tensor, A: Tensor, chunks: Chunks, backward: bool) -> Tensor:
    """What each chunk starts from: the products of all chunks side by side, then chunk after chunk."""
    e, rows, states = chunks.e, chunks.rows, chunks.e.shape[-1]
    now = torch.eye(states, dtype=e.dtype, device=e.device).expand(e.shape[1], states, states)
    log_scale = e.new_zeros(e.shape[1], states)
    for e_t in reversed(e.unbind(0)) if backward else e.unbind(0):
        joint = now * e_t[:, None]
        c = joint.sum(-1, keepdim=True)
        log_scale += c.squeeze(-1).log()
        now = (joint / torch.where(c > 0, c, 1)) @ A
    P, scale = now.unflatten(0, (rows, -1)), log_scale.unflatten(0, (rows, -1))
    found, v = [start], start
    order = range(P.shape[1] - 1, 0, -1) if backward else range(P.shape[1] - 1)
    for i in order:
        weights = v * (scale[:, i] - scale[:, i].amax(-1, keepdim=True)).exp()
        v = (weights[:, None] @ P[:, i]).squeeze(1) / weights.sum(-1, keepdim=True)
        found.append(v)
    return torch.stack(found[::-1] if backward else found, 1).flatten(0, 1)


SCALED = Arithmetic(_run, _equal, _starts)


def in_chunks(x: Tensor, size: int, minus: Tensor | None = None, *, transposed: bool = False) -> Tensor:
    """``(B, T, K)``, less ``minus`` ``(B, T)`` -> ``(size, B * chunks, K)``, 0 after the end; K first if transposed."""
    (rows, length, last), full = x.shape, x.shape[1] // size
    count = -(-length // size)
    if transposed:
        out = x.new_zeros(size, last, rows, count)
        laid = out.movedim(1, -1)
    else:
        out = laid = x.new_zeros(size, rows, count, last)
    offset = x.new_zeros(rows, length, 1) if minus is None else minus[..., None]
    for part, to in (
        (slice(0, full * size), laid[:, :, :full]),
        (slice(full * size, length), laid[: length - full * size, :, full:]),
    ):
        if x[:, part].shape[1]:
            a, b = (m[:, part].unflatten(1, (to.shape[2], -1)).movedim(2, 0) for m in (x, offset))
            torch.sub(a, b, out=to)
    return out.flatten(2) if transposed else out.flatten(1, 2)


def in_rows(laid: Tensor, rows: int, length: int) -> Tensor:
    """``(size, B * chunks, ...)`` -> ``(B, T, ...)``."""
    x = laid.unflatten(1, (rows, -1))
    return x.permute(1, 2, 0, *range(3, x.dim())).flatten(1, 2)[:, :length]
