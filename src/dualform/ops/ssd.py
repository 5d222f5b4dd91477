"""State space duality: Mamba-2's scan with one decay per head, a recurrence that is also a masked matrix product."""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.packing import Borders, Packing, each_alone
from dualform.core.shapes import check_real, check_tensors, larger, once_per_shape, smaller, wide, widest
from dualform.ops.chunks import Chunks
from dualform.ops.op import Backend, Op
from dualform.ops.state import check_dtype, check_state, initial, unless_complex

_WHERE = "ssd"
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
    cu_seqlens: Borders = None,
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
        cu_seqlens: ``(n + 1,)``, cumulative lengths of sequences packed on the time axis, or a ``Packing`` that was
            made of them; B is then 1.
        chunk: steps per matrix product; changes speed and rounding, never the result.

    Returns:
        y ``(B, T, H, P)`` in the dtype of x, and the final state ``(B, H, P, N)``, float32 or wider. What is not
        finite at some step may reach earlier steps of the same chunk, through the zeros of a masked product; it never
        reaches another sequence or row.

    Raises:
        ArgumentError: for shapes, dtypes, devices, limits or a chunk that do not fit together.

    References:
        Dao & Gu (2024), arXiv:2405.21060, section 6 (block decomposition).
    """
    _check_inputs(x, dt, A, B, C, D, z, dt_bias)
    if dt_limit[0] > dt_limit[1]:
        raise ArgumentError(f"{_WHERE}: dt_limit is {dt_limit}, expected (smallest, largest)")
    if chunk is not None and chunk < 1:
        raise ArgumentError(f"{_WHERE}: chunk is {chunk}, expected at least 1")
    packing = Packing.of(_WHERE, cu_seqlens, x)
    dtype = wide(x, dt, A, B, C, D, z, dt_bias, unless_complex(initial_state))
    dt = limit_step(dt.to(dtype), dt_bias, dt_softplus, dt_limit)
    h0 = initial(_WHERE, initial_state, packing, x, (*x.shape[2:], B.shape[3]), dtype)
    y, final = ssd_op(SSD(x, dt, A.to(dtype), B, C, D, z, h0, packing, chunk or _DEFAULT_CHUNK))
    return y, final


def limit_step(dt: Tensor, bias: Tensor | None, softplus: bool, limit: tuple[float, float]) -> Tensor:
    """The step that the recurrence takes: bias, softplus, limits."""
    dt = dt if bias is None else dt + bias
    dt = F.softplus(dt) if softplus else dt
    return dt if limit == (0.0, float("inf")) and softplus else dt.clamp(*limit)


class SSD(NamedTuple):
    """The arguments of the operator, as in :func:`ssd`; dt, A and h0 have the dtype of the state."""

    x: Tensor  # (B, T, H, P)
    dt: Tensor  # (B, T, H), the step that the recurrence takes
    A: Tensor  # (H,)
    B: Tensor  # (B, T, G, N)
    C: Tensor  # (B, T, G, N)
    D: Tensor | None  # (H,) or (H, P)
    z: Tensor | None  # (B, T, H, P)
    h0: Tensor  # (rows, H, P, N)
    packing: Packing | None
    chunk: int

    @property
    def skip(self) -> Tensor | None:
        """D as it multiplies x, in the dtype of the state."""
        if self.D is None:
            return None
        return (self.D if self.D.dim() == 2 else self.D[:, None]).to(self.h0.dtype)

    def finish(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """``(y + D x) silu(z)`` in the dtype of x, rounded once, and what was gated, in the dtype of the state."""
        y = y.to(self.h0.dtype)
        y = y if self.skip is None else torch.addcmul(y, self.skip, self.x.to(y.dtype))
        return (y if self.z is None else y * F.silu(self.z.to(y.dtype))).to(self.x.dtype), y

    def start(self, dy: Tensor, gated: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradient of the recurrence's own output, and those of D and z; :meth:`finish` backwards."""
        dy, found = dy.to(self.h0.dtype), {}
        if self.z is not None:
            z = self.z.to(dy.dtype)
            found["z"] = torch.ops.aten.silu_backward(dy * gated, z)
            dy = dy * F.silu(z)
        if self.D is not None:
            found["D"] = (dy * self.x).sum((0, 1) if self.D.dim() == 2 else (0, 1, 3))
        return dy, found


@once_per_shape
def _check_inputs(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None = None,
) -> None:
    sizes = check_tensors(
        _WHERE,
        x=(x, "B T H P"),
        dt=(dt, "B T H"),
        A=(A, "H"),
        B=(B, "B T G N"),
        C=(C, "B T G N"),
        D=(D, "? H ..."),
        z=(z, "? B T H P"),
        dt_bias=(dt_bias, "? H"),
    )
    check_real(_WHERE, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    if sizes["G"] == 0 or sizes["H"] % sizes["G"]:
        raise ArgumentError(f"{_WHERE}: B and C have {sizes['G']} groups, which do not divide H = {sizes['H']}")
    if D is not None and tuple(D.shape[1:]) not in ((), (sizes["P"],)):
        raise ArgumentError(f"{_WHERE}: D has shape {tuple(D.shape)}, expected (H,) or (H, P) = {tuple(x.shape[2:])}")


def _check(a: SSD) -> None:
    _check_inputs(a.x, a.dt, a.A, a.B, a.C, a.D, a.z)
    check_state(_WHERE, "the initial state", a.h0, a.packing, a.x, (*a.x.shape[2:], a.B.shape[3]))
    check_dtype(_WHERE, a.h0.dtype, dt=a.dt, A=a.A)
    if a.chunk < 1:
        raise ArgumentError(f"{_WHERE}: chunk is {a.chunk}, expected at least 1")


def _reference(a: SSD) -> tuple[Tensor, Tensor]:
    per_group = a.x.shape[2] // a.B.shape[2]

    def run(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        B, C = (m.to(h.dtype).repeat_interleave(per_group, 2) for m in (B, C))
        ys = []
        for t in range(x.shape[1]):
            decay = torch.exp(dt[:, t] * a.A)[..., None, None]
            h = decay * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
            ys.append((h * C[:, t, :, None]).sum(-1))
        return torch.stack(ys, 1) if ys else x.to(h.dtype), h.clone()

    y, final = each_alone(run, a.packing, a.h0, a.x, a.dt, a.B, a.C)
    return a.finish(y)[0], final


def _span_size(batch: int, heads: int, chunk: int) -> int:
    return larger(1, _SPAN_ELEMENTS // larger(1, batch * heads * chunk * chunk))


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
    added = (span.kept.mT @ span.B).reshape(*span.kept.shape[:2], *h0.shape[1:])
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
    h = torch.zeros_like(h0[: len(a.x)])
    for i, (begin, end) in enumerate(_spans(a, chunks)):
        if saved is not None:
            saved[i] = h
        xs, dts, Bs, Cs = (m[:, begin:end] for m in cut)
        span = _span(xs, dts, a.A, Bs, Cs)
        enter, h = _carry(span, chunks, begin, h, h0, final)
        inside = _weights(span) @ span.xdt
        before = _by_head(span.C @ enter.reshape(*span.kept.shape[:3], span.kept.shape[4], h0.shape[3]).mT, heads)
        y[:, begin:end] = inside.addcmul_(before, span.since[..., None]).transpose(2, 3)
    out, gated = a.finish(chunks.join(y))
    return [out.contiguous(), final, *([] if saved is None else [saved, *([] if a.z is None else [gated])])]


_forward, _infer = partial(_run, True), partial(_run, False)


def _backward(grads: list[Tensor], kept: list[Tensor], a: SSD) -> dict[str, Tensor]:
    """Spans from last to first, everything but the states between spans recomputed; matrix products throughout."""
    chunks, heads, groups, h0 = _chunks(a), a.x.shape[2], a.B.shape[2], a.h0
    dout, found = a.start(grads[0], kept[-1])
    cut = [chunks.cut(m, h0.dtype) for m in (a.x, a.dt, a.B, a.C)]
    dy, dfinal = chunks.cut(dout, h0.dtype), grads[1]
    dx, ddt, dB, dC = (torch.empty_like(m) for m in cut)
    dA, dh0, g = torch.zeros_like(a.A), dfinal.clone(), torch.zeros_like(h0[: len(a.x)])
    for i, (begin, end) in reversed(list(enumerate(_spans(a, chunks)))):
        xs, dts, Bs, Cs = (m[:, begin:end] for m in cut)
        s = _span(xs, dts, a.A, Bs, Cs)
        enter, _ = _carry(s, chunks, begin, kept[0][i], h0, None)
        enter_g = enter.reshape(*s.kept.shape[:3], s.kept.shape[4], h0.shape[3])
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
        denter = (dbefore.mT @ s.C).reshape(enter.shape)

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

        dadded = dadded.reshape(enter_g.shape)
        dBs += s.kept @ dadded
        dkept = _by_head(s.B @ dadded.mT, heads) * s.until[..., None]
        dxdt += dkept
        duntil = (dkept * s.xdt).sum(-1)
        dtotal[..., -1] += duntil.sum(-1)
        dtotal -= duntil

        dlog_a = dtotal.flip(3).cumsum(3).flip(3).transpose(2, 3)
        dxdt = dxdt.transpose(2, 3)
        dx[:, begin:end] = dxdt * dts[..., None]
        ddt[:, begin:end] = dlog_a * a.A + (dxdt * xs).sum(-1)
        dA += (dlog_a * dts).sum((0, 1, 2))
        dB[:, begin:end], dC[:, begin:end] = dBs.transpose(2, 3), dCs.transpose(2, 3)
    dx, ddt, dB, dC = (chunks.join(m) for m in (dx, ddt, dB, dC))
    dx = dx if a.skip is None else dx + a.skip * dout
    return {**found, "x": dx, "dt": ddt, "A": dA, "B": dB, "C": dC, "h0": dh0}


def _fake(a: SSD) -> list[Tensor]:
    return [a.x.new_empty(a.x.shape), a.h0.new_empty(a.h0.shape)]


def _states(a: SSD) -> Tensor:
    """Room for the states between spans; packed, for as many as there may be: every sequence may end within a chunk."""
    batch, length, heads = a.x.shape[:3]
    size = larger(1, smaller(a.chunk, length))
    chunks = -(-length // size) if a.packing is None else length // size + a.h0.shape[0]
    return a.h0.new_empty(-(-chunks // _span_size(batch, heads, size)), batch, *a.h0.shape[1:])


def _saved(a: SSD) -> list[Tensor]:
    return [_states(a), *([] if a.z is None else [a.x.new_empty(a.x.shape, dtype=a.h0.dtype)])]


ssd_op = Op(_WHERE, SSD, _reference, fake=_fake, check=_check)
ssd_op.add(Backend("torch", _forward, _backward, infer=_infer, saved=_saved))
