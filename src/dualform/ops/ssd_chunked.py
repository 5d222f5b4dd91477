"""The portable form of state space duality: matrix products within chunks, states from chunk to chunk."""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.core.shapes import larger, smaller, widest
from dualform.ops.chunks import Chunks
from dualform.ops.op import Backend
from dualform.ops.ssd import SSD, ssd_op

_SPAN_ELEMENTS = 2**21  # of the (K, K) masks held at a time
_FORGOTTEN = -1e4  # the exponential is 0, and sums of it are numbers


def _span_size(batch: int, heads: int, chunk: int) -> int:
    return larger(1, _SPAN_ELEMENTS // larger(1, batch * heads * chunk * chunk))


class _Runs(NamedTuple):
    """The runs of equal ids in some chunks: kept apart by zeros, and where numbers are not finite."""

    same: Tensor  # (B, S, 1, K, K), whether two steps are of one run
    first: Tensor  # (B, S, 1, K), whether a step sees the state that enters the chunk
    last: Tensor  # (B, S, 1, K), whether the state that leaves the chunk sees it

    @classmethod
    def of(cls, ids: Tensor, chunks: Chunks) -> "_Runs":
        """Those of all chunks; what fills up a short one goes on with its last run."""
        begins = ids != ids.roll(1, 1)
        begins[:, :1] = False
        runs = chunks.cut(begins, torch.int32).cumsum(2)[:, :, None]
        return cls(runs[..., None] == runs[..., None, :], runs == 0, runs == runs[..., -1:])

    def span(self, begin: int, end: int) -> "_Runs":
        """Those of some of the chunks."""
        return _Runs(*(m[:, begin:end] for m in self))

    def spread(self, bad: Tensor) -> Tensor:
        """Whether a run has a step that is bad, for each of its steps: ``(B, S, H, K)``, like ``bad``."""
        return (self.same.float() @ bad.float()[..., None])[..., 0] > 0


class _Span(NamedTuple):
    """What forward and backward share of some chunks. Heads of one group lie side by side: ``J = H P / G``."""

    xdt: Tensor  # (B, S, H, K, P), dt x
    B: Tensor  # (B, S, G, K, N)
    C: Tensor  # (B, S, G, K, N)
    mask: Tensor  # (B, S, H, K, K), decay from step j to step i, zero above the diagonal
    CB: Tensor  # (B, S, G, K, K), C_i . B_j
    since: Tensor  # (B, S, H, K), decay from the chunk's beginning
    until: Tensor  # (B, S, H, K), decay to the chunk's end
    kept: Tensor  # (B, S, G, K, J), what is left of dt x at the chunk's end
    runs: _Runs | None

    def first(self, m: Tensor) -> Tensor:
        """``(B, S, H, K, ...)``, zero at the steps that do not see the state that enters the chunk."""
        return m if self.runs is None else _only(self.runs.first, m)

    def last(self, m: Tensor) -> Tensor:
        """The same of the state that leaves the chunk."""
        return m if self.runs is None else _only(self.runs.last, m)

    def passed(self, h: Tensor, s: int | slice = slice(None)) -> Tensor:
        """Of states ``(B, [S], H, P, N)`` beside chunks: zero where a run begins in the chunk."""
        return h if self.runs is None else h.masked_fill(~self.runs.first[:, s, :, -1, None, None], 0)

    def times(self, weights: Tensor, m: Tensor) -> Tensor:
        """``weights @ m``, where a row of ``m`` that is not finite reaches rows of its run alone."""
        if self.runs is None:
            return weights @ m
        finite = m.isfinite()
        found = weights @ m.masked_fill(~finite, 0)
        return found.masked_fill_(self.runs.spread(~finite.all(-1))[..., None], torch.nan)


def _only(keep: Tensor, m: Tensor) -> Tensor:
    return m.masked_fill(~keep.view(*keep.shape, *[1] * (m.dim() - keep.dim())), 0)


def _span(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, runs: _Runs | None) -> _Span:
    """``x`` ``(B, S, K, H, P)``, dt ``(B, S, K, H)``, B and C ``(B, S, K, G, N)``."""
    groups = B.shape[3]
    finite = dt if runs is None else dt.masked_fill(~dt.isfinite(), 0)
    exact = (finite.to(widest(dt)) * A).clamp_(min=_FORGOTTEN).transpose(2, 3).contiguous().cumsum(3)
    if runs is not None:
        exact.masked_fill_(runs.spread(~dt.transpose(2, 3).isfinite()), torch.nan)
    total = exact.to(dt.dtype)
    rest = (exact - total).to(dt.dtype)  # what counts is the difference of two sums, which may be far smaller
    above = torch.ones(x.shape[2], x.shape[2], dtype=torch.bool, device=x.device).triu_(1)
    unseen = above if runs is None else above | ~runs.same
    mask = total[..., None] - total[..., None, :]
    mask.add_(rest[..., None]).sub_(rest[..., None, :]).masked_fill_(unseen, -torch.inf).exp_()
    B, C = (m.transpose(2, 3).contiguous() for m in (B, C))
    xdt = (x * dt[..., None]).transpose(2, 3).contiguous()
    until = (exact[..., -1:] - exact).to(dt.dtype).exp_()
    since, kept, CB = total.exp(), xdt * until[..., None], C @ B.mT
    if runs is not None:
        since, kept, CB = _only(runs.first, since), _only(runs.last, kept), CB.masked_fill_(~runs.same, 0)
    return _Span(xdt, B, C, mask, CB, since, until, _by_group(kept, groups), runs)


def _by_group(m: Tensor, groups: int) -> Tensor:
    """``(B, S, H, K, P)`` -> ``(B, S, G, K, J)``."""
    b, s, h, k, p = m.shape
    return m.reshape(b, s, groups, h // groups, k, p).transpose(3, 4).reshape(b, s, groups, k, h // groups * p)


def _by_head(m: Tensor, heads: int) -> Tensor:
    """``(B, S, G, K, J)`` -> ``(B, S, H, K, P)``, a view where it can be."""
    b, s, g, k, j = m.shape
    return m.reshape(b, s, g, k, heads // g, g * j // heads).transpose(3, 4).reshape(b, s, heads, k, g * j // heads)


def _weights(span: _Span) -> Tensor:
    """The masked product that is the parallel form inside a chunk, ``(B, S, H, K, K)``."""
    groups = span.CB.shape[2]
    return (span.mask.unflatten(2, (groups, -1)) * span.CB[:, :, :, None]).flatten(2, 3)


def _carry(
    span: _Span, chunks: Chunks, begin: int, h: Tensor, h0: Tensor, final: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The states that enter each chunk ``(B, S, H, P, N)``, and the one that leaves the last."""
    added = (span.kept.mT @ span.last(span.B)).reshape(*span.kept.shape[:2], *h0.shape[1:])
    decay = span.since[..., -1, None, None]
    enter = torch.empty_like(added)
    for s in range(added.shape[1]):
        c = begin + s
        h = h0[chunks.starts[c]] if c in chunks.starts else h
        enter[:, s] = h
        h = torch.addcmul(added[:, s], decay[:, s], span.passed(h, s))
        if final is not None and c in chunks.stops:
            final[chunks.stops[c]] = h
    return enter, h


def _chunks(a: SSD) -> Chunks:
    """K is at most the longest sequence."""
    longest = a.x.shape[1] if a.packing is None else a.packing.longest
    return Chunks.of(a.x, a.packing, max(1, min(a.chunk, longest)))


def _spans(a: SSD, chunks: Chunks) -> list[tuple[int, int]]:
    """Runs of chunks whose masks are held at once."""
    size = _span_size(len(a.x), a.x.shape[2], chunks.size)
    return [(begin, min(begin + size, chunks.in_row)) for begin in range(0, chunks.in_row, size)]


def _run(keep: bool, a: SSD) -> list[Tensor]:
    chunks, heads, h0 = _chunks(a), a.x.shape[2], a.h0
    cut = [chunks.cut(m, h0.dtype) for m in (a.x, a.dt, a.B, a.C)]
    y, final, saved = torch.empty_like(cut[0]), h0.clone(), _states(a) if keep else None
    h, runs = torch.zeros_like(h0[: len(a.x)]), None if a.ids is None else _Runs.of(a.ids, chunks)
    for i, (begin, end) in enumerate(_spans(a, chunks)):
        if saved is not None:
            saved[i] = h
        xs, dts, Bs, Cs = (m[:, begin:end] for m in cut)
        span = _span(xs, dts, a.A, Bs, Cs, runs and runs.span(begin, end))
        enter, h = _carry(span, chunks, begin, h, h0, final)
        inside = span.times(_weights(span), span.xdt)
        before = _by_head(span.C @ enter.reshape(*span.kept.shape[:3], span.kept.shape[4], h0.shape[3]).mT, heads)
        y[:, begin:end] = inside.addcmul_(span.first(before), span.since[..., None]).transpose(2, 3)
    out, gated = a.finish(chunks.join(y))
    return [out.contiguous(), final, *([] if saved is None else [saved, *([] if a.z is None else [gated])])]


_forward, _infer = partial(_run, True), partial(_run, False)


def _passing(later: Tensor, earlier: Tensor, runs: _Runs | None) -> Tensor:
    """What passes each step: the sums of ``later`` from it on, and of ``earlier`` before it, ``(B, S, H, K)``."""
    bad = None if runs is None else ~(later.isfinite() & earlier.isfinite())
    if bad is not None:
        later, earlier = later.masked_fill(bad, 0), earlier.masked_fill(bad, 0)
    found = later.flip(3).cumsum(3).flip(3) + F.pad(earlier.cumsum(3)[..., :-1], (1, 0))
    return found if bad is None or runs is None else found.masked_fill_(runs.spread(bad), torch.nan)


def _backward(grads: list[Tensor], kept: list[Tensor], a: SSD) -> dict[str, Tensor]:
    """Spans from last to first, everything but the states between spans recomputed; matrix products throughout."""
    chunks, heads, groups, h0 = _chunks(a), a.x.shape[2], a.B.shape[2], a.h0
    dout, found = a.start(grads[0], kept[-1])
    cut = [chunks.cut(m, h0.dtype) for m in (a.x, a.dt, a.B, a.C)]
    dy, dfinal = chunks.cut(dout, h0.dtype), grads[1]
    dx, ddt, dB, dC = (torch.empty_like(m) for m in cut)
    dA, dh0, g = a.A.new_zeros(heads, dtype=widest(a.A)), dfinal.clone(), torch.zeros_like(h0[: len(a.x)])
    runs = None if a.ids is None else _Runs.of(a.ids, chunks)
    for i, (begin, end) in reversed(list(enumerate(_spans(a, chunks)))):
        xs, dts, Bs, Cs = (m[:, begin:end] for m in cut)
        s = _span(xs, dts, a.A, Bs, Cs, runs and runs.span(begin, end))
        enter, _ = _carry(s, chunks, begin, kept[0][i], h0, None)
        enter_g = enter.reshape(*s.kept.shape[:3], s.kept.shape[4], h0.shape[3])
        dyh = dy[:, begin:end].transpose(2, 3).contiguous()

        weights, dweights = _weights(s), dyh @ s.xdt.mT
        if s.runs is not None:
            dweights.masked_fill_(~s.runs.same, 0)
        dxdt = s.times(weights.mT, dyh)
        dmask = weights.mul_(dweights)
        dmask.diagonal(dim1=-2, dim2=-1).zero_()  # nothing decays between a step and itself
        pairs = dmask.to(widest(dmask))  # sums over what passes a step are differences of sums over much more
        dtotal = pairs.sum(-1) - pairs.sum(-2)
        dCB = dweights.mul_(s.mask).unflatten(2, (groups, -1)).sum(3)
        dCs, dBs = s.times(dCB, s.B), s.times(dCB.mT, s.C)

        dbefore = s.first(dyh * s.since[..., None])
        dtotal += s.first(dbefore * _by_head(s.C @ enter_g.mT, heads)).sum(-1)
        dbefore = _by_group(dbefore, groups)
        dCs += s.first(dbefore @ enter_g)
        denter = (dbefore.mT @ s.first(s.C)).reshape(enter.shape)

        dadded, decay = torch.empty_like(enter), s.since[..., -1, None, None]
        for c in reversed(range(begin, end)):
            n = c - begin
            if c in chunks.stops:
                g = g + dfinal[chunks.stops[c]]
            dadded[:, n] = g
            g = torch.addcmul(denter[:, n], decay[:, n], s.passed(g, n))
            if c in chunks.starts:
                dh0[chunks.starts[c]] = g
                g = torch.zeros_like(g)
        dtotal[..., -1] += s.passed(dadded * enter * decay).sum((-1, -2))

        dadded = dadded.reshape(enter_g.shape)
        dBs += s.last(s.kept @ dadded)
        dkept = s.last(_by_head(s.B @ dadded.mT, heads) * s.until[..., None])
        dxdt += dkept
        duntil = s.last(dkept * s.xdt).sum(-1)

        dlog_a = _passing(dtotal, duntil.to(dtotal.dtype), s.runs).transpose(2, 3)
        dxdt = dxdt.transpose(2, 3)
        dx[:, begin:end] = dxdt * dts[..., None]
        ddt[:, begin:end] = dlog_a * a.A + (dxdt * xs).sum(-1)
        dA += (dlog_a * dts).sum((0, 1, 2))
        dB[:, begin:end], dC[:, begin:end] = dBs.transpose(2, 3), dCs.transpose(2, 3)
    dx, ddt, dB, dC = (chunks.join(m) for m in (dx, ddt, dB, dC))
    dx = dx if a.skip is None else dx + a.skip * dout
    return {**found, "x": dx, "dt": ddt, "A": dA, "B": dB, "C": dC, "h0": dh0}


def _states(a: SSD) -> Tensor:
    """Room for the states between spans; packed, for as many as there may be: every sequence may end within a chunk."""
    batch, length, heads = a.x.shape[:3]
    size = larger(1, smaller(a.chunk, length))
    chunks = -(-length // size) if a.packing is None else length // size + a.h0.shape[0]
    return a.h0.new_empty(-(-chunks // _span_size(batch, heads, size)), batch, *a.h0.shape[1:])


def _saved(a: SSD) -> list[Tensor]:
    return [_states(a), *([] if a.z is None else [a.x.new_empty(a.x.shape, dtype=a.h0.dtype)])]


ssd_op.add(Backend("torch", _forward, _backward, infer=_infer, saved=_saved))
