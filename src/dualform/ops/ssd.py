"""State space duality: Mamba-2's scan with one decay per head, a recurrence that is also a masked matrix product."""

from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.packing import each_alone, sequence_ids
from dualform.core.shapes import check_floating, check_tensors, wide, widest
from dualform.ops.op import Backend, Op
from dualform.ops.state import initial

_SPAN_ELEMENTS = 2**21  # of the (K, K) masks held at a time
_DEFAULT_CHUNK = 64
_FORGOTTEN = -1e4  # the exponential is 0, and sums of it are numbers


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Run ``h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T``, ``y_t = h_t C_t + D x_t`` per head, gated by ``silu(z_t)``.

    ``dt`` is ``dt + dt_bias``, then softplus where the flag asks for it, then clamped to ``dt_limit``.

    Args:
        x: ``(B, T, H, P)``, input.
        dt: ``(B, T, H)``, step before bias, softplus and limits.
        A: ``(H,)``, decay rates, negative for a stable recurrence.
        B: ``(B, T, G, N)``, input map; head h uses group ``h // (H / G)``.
        C: ``(B, T, G, N)``, output map.
        D: ``(H,)`` or ``(H, P)``, skip.
        z: ``(B, T, H, P)``, gate.
        dt_bias: ``(H,)``.
        dt_softplus: whether the step passes through softplus.
        dt_limit: smallest and largest step.
        initial_state: ``(B, H, P, N)``, zero by default; with ``cu_seqlens`` one row per sequence.
        cu_seqlens: ``(n + 1,)``, cumulative lengths of sequences packed on the time axis; B is then 1.
        chunk: steps per matrix product; changes speed and rounding, never the result.

    Returns:
        y ``(B, T, H, P)`` in the dtype of x, and the final state ``(B, H, P, N)``, float32 or wider.

    Raises:
        ArgumentError: for shapes, dtypes, devices, limits or a chunk that do not fit together.

    References:
        Dao & Gu (2024), arXiv:2405.21060, section 6 (block decomposition).
    """
    where = "ssd"
    sizes = check_tensors(
        where,
        x=(x, "B T H P"),
        dt=(dt, "B T H"),
        A=(A, "H"),
        B=(B, "B T G N"),
        C=(C, "B T G N"),
        D=(D, "H ..."),
        z=(z, "B T H P"),
        dt_bias=(dt_bias, "H"),
    )
    check_floating(where, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    if sizes["G"] == 0 or sizes["H"] % sizes["G"]:
        raise ArgumentError(f"{where}: B and C have {sizes['G']} groups, which do not divide H = {sizes['H']}")
    if D is not None and tuple(D.shape[1:]) not in ((), (sizes["P"],)):
        raise ArgumentError(f"{where}: D has shape {tuple(D.shape)}, expected (H,) or (H, P) = {tuple(x.shape[2:])}")
    if dt_limit[0] > dt_limit[1]:
        raise ArgumentError(f"{where}: dt_limit is {dt_limit}, expected (smallest, largest)")
    if chunk is not None and chunk < 1:
        raise ArgumentError(f"{where}: chunk is {chunk}, expected at least 1")
    dt = limit_step(dt.to(wide(x, dt)), dt_bias, dt_softplus, dt_limit)
    h0 = initial(where, initial_state, cu_seqlens, x, (sizes["H"], sizes["P"], sizes["N"]), dt.dtype)
    y, final = ssd_op(x, dt, A.to(dt.dtype), B, C, h0, cu_seqlens, chunk or _DEFAULT_CHUNK)
    if D is not None:
        y = y + (D if D.dim() == 2 else D[:, None]).to(y.dtype) * x
    return y if z is None else y * F.silu(z), final


def limit_step(dt: Tensor, bias: Tensor | None, softplus: bool, limit: tuple[float, float]) -> Tensor:
    """The step that the recurrence takes: bias, softplus, limits."""
    dt = dt if bias is None else dt + bias
    dt = F.softplus(dt) if softplus else dt
    return dt if limit == (0.0, float("inf")) and softplus else dt.clamp(*limit)


def _reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    per_group = x.shape[2] // B.shape[2]

    def run(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        B, C = (m.to(h.dtype).repeat_interleave(per_group, 2) for m in (B, C))
        ys = []
        for t in range(x.shape[1]):
            a = torch.exp(dt[:, t] * A)[..., None, None]
            h = a * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
            ys.append((h * C[:, t, :, None]).sum(-1))
        return torch.stack(ys, 1) if ys else x.to(h.dtype), h.clone()

    y, final = each_alone(run, cu_seqlens, initial_state, x, dt, B, C)
    return y.to(x.dtype), final


class _Chunks:
    """Time cut into chunks of K that no border crosses: ``(B, T, ...)`` <-> ``(B, chunks, K, ...)``, zeros between."""

    def __init__(self, x: Tensor, cu_seqlens: Tensor | None, chunk: int):
        self.batch, self.length = x.shape[:2]
        self.slots: Tensor | None = None
        if cu_seqlens is None:
            self.K = max(1, min(chunk, self.length))
            self.count = -(-self.length // self.K)
            whole = slice(None)
            self.starts, self.stops = ({0: whole}, {self.count - 1: whole}) if self.count else ({}, {})
            return
        lengths = cu_seqlens.diff()
        self.K = max(1, min(chunk, int(lengths.max())))
        ends = (-(-lengths // self.K)).cumsum(0)
        ids = sequence_ids(cu_seqlens, self.length)
        first = (ends - -(-lengths // self.K))[ids] * self.K - cu_seqlens[:-1][ids]
        self.slots = torch.arange(self.length, device=x.device) + first
        borders = list(enumerate(pairwise([0, *ends.tolist()])))
        self.count = borders[-1][1][1]
        self.starts = {begin: slice(i, i + 1) for i, (begin, end) in borders if begin < end}
        self.stops = {end - 1: slice(i, i + 1) for i, (begin, end) in borders if begin < end}

    def cut(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Lay time out in chunks."""
        total = self.count * self.K
        if self.slots is not None:
            out = x.new_zeros(1, total, *x.shape[2:], dtype=dtype)
            out[0, self.slots] = x[0].to(dtype)
        elif total == self.length:
            out = x.to(dtype)
        else:
            out = x.new_zeros(self.batch, total, *x.shape[2:], dtype=dtype)
            out[:, : self.length] = x
        return out.unflatten(1, (self.count, self.K))

    def join(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`cut`."""
        x = x.flatten(1, 2)
        return x[:, : self.length] if self.slots is None else x[:, self.slots]

    def spans(self, heads: int) -> list[tuple[int, int]]:
        """Runs of chunks whose masks are held at once."""
        size = _span_size(self.batch, heads, self.K)
        return [(begin, min(begin + size, self.count)) for begin in range(0, self.count, size)]


def _span_size(batch: int, heads: int, chunk: int) -> int:
    return max(1, _SPAN_ELEMENTS // max(1, batch * heads * chunk * chunk))


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


def _span(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> _Span:
    """``x`` ``(B, S, K, H, P)``, dt ``(B, S, K, H)``, B and C ``(B, S, K, G, N)``."""
    groups = B.shape[3]
    exact = (dt.to(widest(dt)) * A).clamp_(min=_FORGOTTEN).transpose(2, 3).contiguous().cumsum(3)
    total = exact.to(dt.dtype)
    rest = (exact - total).to(dt.dtype)  # what counts is the difference of two sums, which may be far smaller
    above = torch.ones(x.shape[2], x.shape[2], dtype=torch.bool, device=x.device).triu_(1)
    mask = total[..., None] - total[..., None, :]
    mask.add_(rest[..., None]).sub_(rest[..., None, :]).masked_fill_(above, -torch.inf).exp_()
    B, C = (m.transpose(2, 3).contiguous() for m in (B, C))
    xdt = (x * dt[..., None]).transpose(2, 3).contiguous()
    until = (exact[..., -1:] - exact).to(dt.dtype).exp_()
    kept = _by_group(xdt * until[..., None], groups)
    return _Span(xdt, B, C, mask, C @ B.mT, total.exp(), until, kept)


def _by_group(m: Tensor, groups: int) -> Tensor:
    """``(B, S, H, K, P)`` -> ``(B, S, G, K, J)``."""
    b, s, h, k, p = m.shape
    return m.view(b, s, groups, h // groups, k, p).transpose(3, 4).reshape(b, s, groups, k, h // groups * p)


def _by_head(m: Tensor, heads: int) -> Tensor:
    """``(B, S, G, K, J)`` -> ``(B, S, H, K, P)``, a view where it can be."""
    b, s, g, k, j = m.shape
    return m.view(b, s, g, k, heads // g, g * j // heads).transpose(3, 4).reshape(b, s, heads, k, g * j // heads)


def _weights(span: _Span) -> Tensor:
    """The masked product that is the parallel form inside a chunk, ``(B, S, H, K, K)``."""
    groups = span.CB.shape[2]
    return (span.mask.unflatten(2, (groups, -1)) * span.CB[:, :, :, None]).flatten(2, 3)


def _carry(
    span: _Span, chunks: _Chunks, begin: int, h: Tensor, h0: Tensor, final: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The states that enter each chunk ``(B, S, H, P, N)``, and the one that leaves the last."""
    added = (span.kept.mT @ span.B).view(*span.kept.shape[:2], *h0.shape[1:])
    decay = span.since[..., -1, None, None]
    enter = torch.empty_like(added)
    for s in range(added.shape[1]):
        c = begin + s
        h = h0[chunks.starts[c]] if c in chunks.starts else h
        enter[:, s] = h
        h = torch.addcmul(added[:, s], decay[:, s], h)
        if final is not None and c in chunks.stops:
            final[chunks.stops[c]] = h
    return enter, h


def _run(keep: bool, *args: Any) -> list[Tensor]:
    x, dt, A, B, C, h0, cu_seqlens, chunk = args
    chunks = _Chunks(x, cu_seqlens, chunk)
    heads = x.shape[2]
    cut = [chunks.cut(m, h0.dtype) for m in (x, dt, B, C)]
    y, final, saved = torch.empty_like(cut[0]), h0.clone(), []
    h = torch.zeros_like(h0[: len(x)])
    for begin, end in chunks.spans(heads):
        saved.append(h)
        xs, dts, Bs, Cs = (m[:, begin:end] for m in cut)
        span = _span(xs, dts, A, Bs, Cs)
        enter, h = _carry(span, chunks, begin, h, h0, final)
        inside = _weights(span) @ span.xdt
        before = _by_head(span.C @ enter.view(*span.kept.shape[:3], span.kept.shape[4], h0.shape[3]).mT, heads)
        y[:, begin:end] = inside.addcmul_(before, span.since[..., None]).transpose(2, 3)
    y = chunks.join(y).to(x.dtype).contiguous()
    return [y, final, *([torch.stack(saved) if saved else h.new_empty(0, *h.shape)] if keep else [])]


_forward, _infer = partial(_run, True), partial(_run, False)


def _backward(
    grads: list[Tensor],
    kept: list[Tensor],
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h0: Tensor,
    cu_seqlens: Tensor | None,
    chunk: int,
) -> list[Tensor]:
    """Spans from last to first, everything but the states between spans recomputed; matrix products throughout."""
    chunks, heads, groups = _Chunks(x, cu_seqlens, chunk), x.shape[2], B.shape[2]
    cut = [chunks.cut(m, h0.dtype) for m in (x, dt, B, C)]
    dy, dfinal = chunks.cut(grads[0], h0.dtype), grads[1]
    dx, ddt, dB, dC = (torch.empty_like(m) for m in cut)
    dA, dh0, g = torch.zeros_like(A), dfinal.clone(), torch.zeros_like(h0[: len(x)])
    for i, (begin, end) in reversed(list(enumerate(chunks.spans(heads)))):
        xs, dts, Bs, Cs = (m[:, begin:end] for m in cut)
        s = _span(xs, dts, A, Bs, Cs)
        enter, _ = _carry(s, chunks, begin, kept[0][i], h0, None)
        enter_g = enter.view(*s.kept.shape[:3], s.kept.shape[4], h0.shape[3])
        dyh = dy[:, begin:end].transpose(2, 3).contiguous()

        weights, dweights = _weights(s), dyh @ s.xdt.mT
        dxdt = weights.mT @ dyh
        dlog = weights.mul_(dweights)
        dtotal = dlog.sum(-1) - dlog.sum(-2)
        dCB = dweights.mul_(s.mask).unflatten(2, (groups, -1)).sum(3)
        dCs, dBs = dCB @ s.B, dCB.mT @ s.C

        dbefore = dyh * s.since[..., None]
        dtotal += (dbefore * _by_head(s.C @ enter_g.mT, heads)).sum(-1)
        dbefore = _by_group(dbefore, groups)
        dCs += dbefore @ enter_g
        denter = (dbefore.mT @ s.C).view(enter.shape)

        dadded, decay = torch.empty_like(enter), s.since[..., -1, None, None]
        for c in reversed(range(begin, end)):
            n = c - begin
            if c in chunks.stops:
                g = g + dfinal[chunks.stops[c]]
            dadded[:, n] = g
            g = torch.addcmul(denter[:, n], decay[:, n], g)
            if c in chunks.starts:
                dh0[chunks.starts[c]] = g
                g = torch.zeros_like(g)
        dtotal[..., -1] += (dadded * enter).sum((-1, -2)) * s.since[..., -1]

        dadded = dadded.view(enter_g.shape)
        dBs += s.kept @ dadded
        dkept = _by_head(s.B @ dadded.mT, heads) * s.until[..., None]
        dxdt += dkept
        duntil = (dkept * s.xdt).sum(-1)
        dtotal[..., -1] += duntil.sum(-1)
        dtotal -= duntil

        dlog_a = dtotal.flip(3).cumsum(3).flip(3).transpose(2, 3)
        dxdt = dxdt.transpose(2, 3)
        dx[:, begin:end] = dxdt * dts[..., None]
        ddt[:, begin:end] = dlog_a * A + (dxdt * xs).sum(-1)
        dA += (dlog_a * dts).sum((0, 1, 2))
        dB[:, begin:end], dC[:, begin:end] = dBs.transpose(2, 3), dCs.transpose(2, 3)
    dx, ddt, dB, dC = (chunks.join(m) for m in (dx, ddt, dB, dC))
    return [m.to(of.dtype).contiguous() for m, of in zip((dx, ddt, dA, dB, dC, dh0), (x, dt, A, B, C, h0), strict=True)]


def _fake(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h0: Tensor,
    cu_seqlens: Tensor | None,
    chunk: int,
) -> list[Tensor]:
    return [x.new_empty(x.shape), h0.new_empty(h0.shape)]


def _saved(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h0: Tensor,
    cu_seqlens: Tensor | None,
    chunk: int,
) -> list[Tensor]:
    batch, length, heads = x.shape[:3]
    if cu_seqlens is None:
        chunk = max(1, min(chunk, length))
        size = _span_size(batch, heads, chunk)
        chunks = -(-length // chunk)
        spans = -(-chunks // size)
    else:
        spans = torch.library.get_ctx().new_dynamic_size()  # as many as the lengths ask for
    return [h0.new_empty(spans, batch, *h0.shape[1:])]


ssd_op = Op("ssd", _reference, fake=_fake)
ssd_op.add(Backend("torch", _forward, _backward, infer=_infer, saved=_saved))
