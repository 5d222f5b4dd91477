"""The portable selective scan: spans of time, whose states are recomputed in the backward instead of being stored."""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.core.shapes import larger
from dualform.ops.layout import empty_like
from dualform.ops.linear_scan import scan
from dualform.ops.op import Backend
from dualform.ops.selective_scan import SelectiveScan, selective_scan_op

_CPU_SPAN = 3 * 2**18  # elements of (K, B, N, D) held at a time: few enough for a cache, enough to share out
_GPU_SPAN = 2**23  # elsewhere launches cost more than cache misses
_SAVE_EVERY = 4  # spans on a CPU between the states that the backward starts from


def _span_sizes(h0: Tensor, batch: int) -> tuple[int, int]:
    """Steps whose states ``(K, B, N, D)`` are held at once by the forward, and by the backward."""
    on_cpu = h0.device.type in ("cpu", "meta")
    held = larger(1, batch * h0.shape[1] * h0.shape[2])
    size = larger(1, (_CPU_SPAN if on_cpu else _GPU_SPAN) // held)
    return size, size * (_SAVE_EVERY if on_cpu else 1)


def _spans(size: int, length: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + size, length)) for begin in range(0, length, size)]


class _Inputs(NamedTuple):
    """What every span is computed from, batch first; rates ``(N, D)`` and the initial state ``(rows, N, D)``."""

    u: Tensor  # (B, T, D)
    delta: Tensor  # (B, T, D)
    B: Tensor  # (B, T, G, N), or (N, D)
    C: Tensor  # (B, T, J, N), or (N, D)
    A: Tensor
    D: Tensor | None
    z: Tensor | None  # (B, T, D)
    bias: Tensor | None
    softplus: bool
    h0: Tensor

    @property
    def scale(self) -> int:
        """What ``Re(C h)`` is multiplied by: complex states stand for conjugate pairs."""
        return 2 if self.A.is_complex() else 1

    def part(self, m: Tensor, times: slice, dtype: torch.dtype | None = None) -> Tensor:
        """One span of an input, time first, in the real dtype of the states or another one."""
        return m[:, times].transpose(0, 1).to(dtype or self.h0.dtype.to_real())

    def map(self, m: Tensor, times: slice) -> Tensor:
        """B or C of one span, time first, in the dtype of the states; a constant one as it is."""
        return m.to(self.h0.dtype) if m.dim() == 2 else self.part(m, times, self.h0.dtype)


class _Span(NamedTuple):
    """One span of the recurrence, time first and channels last: ``h_t = a_t h_{t-1} + dt_t u_t B_t``."""

    step: Tensor  # (K, B, D), the step before softplus
    dt: Tensor  # (K, B, D)
    u: Tensor  # (K, B, D)
    B: Tensor  # (K, B, G, N), or (N, D)
    C: Tensor  # (K, B, J, N), or (N, D)
    a: Tensor  # (K, B, N, D), the decays
    h: Tensor  # (K, B, N, D), the states

    @classmethod
    def run(cls, times: slice, of: _Inputs, h: Tensor, starts: tuple[Tensor, Tensor] | None) -> "_Span":
        """The states of one span, which ``h`` ``(B, N, D)`` enters."""
        u, step = of.part(of.u, times), of.part(of.delta, times).contiguous()
        B, C = of.map(of.B, times), of.map(of.C, times)
        step = step if of.bias is None else step + of.bias.to(step.dtype)
        dt = F.softplus(step) if of.softplus else step
        a = torch.mul(dt[:, :, None], of.A).exp_()
        b = _outer(B, dt * u)
        steps = None
        if starts is not None:
            steps, rows = starts
            b[steps, 0] += a[steps, 0] * of.h0[rows]
        return cls(step, dt, u, B, C, a, scan(a, b, h, dim=0, overwrite=True, starts=steps))

    def output(self, of: _Inputs) -> Tensor:
        """``C h + D u``, before the gate."""
        out = _over_states(self.C, self.h)
        out = 2 * out.real if of.scale == 2 else out
        return out if of.D is None else out.addcmul_(of.D.to(out.dtype), self.u)


def _outer(m: Tensor, x: Tensor) -> Tensor:
    """``m`` ``(K, B, G, N)``, or ``(N, D)``, times ``x`` ``(K, B, D)`` -> ``(K, B, N, D)``."""
    if m.dim() == 2:
        return m * x[:, :, None]
    return (m.transpose(2, 3)[..., None] * x.unflatten(2, (m.shape[2], -1))[:, :, None]).flatten(3)


def _over_states(m: Tensor, h: Tensor) -> Tensor:
    """``sum_n m h``: ``(K, B, G, N)``, or ``(N, D)``, and ``(K, B, N, D)`` -> ``(K, B, D)``."""
    if m.dim() == 2:
        return (m * h).sum(2)
    return (m[..., None, :] @ h.unflatten(3, (m.shape[2], -1)).transpose(2, 3)).flatten(2)


def _add_products(into: Tensor, times: slice, h: Tensor, x: Tensor) -> None:
    """``sum h x`` of ``(K, B, N, D)`` and ``(K, B, D)``: the gradient of B or C in one span.

    The sum is over the channels of a group, ``into`` being ``(B, T, G, N)``; or over time and batch, being ``(D, N)``.
    """
    if into.dim() == 2:
        into += (h * x[:, :, None]).sum((0, 1)).T
        return
    groups = into.shape[2]
    x = x.unflatten(2, (groups, -1))[..., None].to(h.dtype)
    into[:, times] = (h.unflatten(3, (groups, -1)).transpose(2, 3) @ x)[..., 0].transpose(0, 1)


def _inputs(a: SelectiveScan) -> _Inputs:
    rates, start = a.A.T.contiguous(), a.h0.transpose(1, 2).contiguous()
    B, C = (m.T if m.dim() == 2 else m for m in (a.B, a.C))
    return _Inputs(a.u, a.delta, B, C, rates, a.D, a.z, a.delta_bias, a.delta_softplus, start)


def _run(keep: bool, a: SelectiveScan) -> list[Tensor]:
    of, packing = _inputs(a), a.packing
    size, save_every = _span_sizes(a.h0, len(a.u))
    y, final = empty_like(a.u), of.h0.clone()
    h = of.h0 if packing is None else torch.zeros_like(of.h0[:1])
    entering = []
    for begin, end in _spans(size, a.u.shape[1]):
        if keep and begin % save_every == 0:
            entering.append(h)
        times = slice(begin, end)
        span = _Span.run(times, of, h, None if packing is None else packing.starting(begin, end))
        out = span.output(of)
        out = out if of.z is None else out.mul_(F.silu(of.part(of.z, times)))
        y[:, times] = out.transpose(0, 1)
        if packing is not None and (ends := packing.ending(begin, end)) is not None:
            final[ends[1]] = span.h[ends[0], 0]
        h = span.h[-1].clone()
    final = h if packing is None else final
    saved = [torch.stack(entering) if entering else of.h0.new_empty(0, *h.shape)] if keep else []
    return [y, final.transpose(1, 2).clone(memory_format=torch.contiguous_format), *saved]


_forward, _infer = partial(_run, True), partial(_run, False)


def _saved(a: SelectiveScan) -> list[Tensor]:
    _, size = _span_sizes(a.h0, a.u.shape[0])
    return [a.h0.new_empty(-(-a.u.shape[1] // size), a.u.shape[0], a.h0.shape[2], a.h0.shape[1])]


def _backward(grads: list[Tensor], kept: list[Tensor], args: SelectiveScan) -> dict[str, Tensor]:
    """Spans from last to first, states recomputed from the one that entered.

    With ``g_t = dL/dh_t`` in full, ``g_t = conj(C_t) dy_t + conj(a_{t+1}) g_{t+1}``, and everything else is a product.
    """
    of, packing, (entering,) = _inputs(args), args.packing, kept
    (batch, length, width), real = of.u.shape, of.h0.dtype.to_real()
    dfinal = grads[1].transpose(1, 2).contiguous()
    du, ddelta = empty_like(of.u), empty_like(of.delta)
    new = of.A.new_empty
    dB, dC = (new(m.shape) if m.dim() == 4 else new(m.shape).zero_() for m in (args.B, args.C))
    found = {"u": du, "delta": ddelta, "B": dB, "C": dC}
    if of.z is not None:
        found["z"] = empty_like(of.z)
    dA, dh0 = torch.zeros_like(of.A), dfinal.clone()
    dD, dbias = (torch.zeros(width, dtype=real, device=of.u.device) for _ in range(2))
    carry = dfinal if packing is None else torch.zeros_like(of.h0[:1])
    for i, (begin, end) in reversed(list(enumerate(_spans(_span_sizes(args.h0, batch)[1], length)))):
        times, starts = slice(begin, end), None if packing is None else packing.starting(begin, end)
        s, dy = _Span.run(times, of, entering[i], starts), of.part(grads[0], times)
        if of.z is not None:
            z = of.part(of.z, times)
            found["z"][:, times] = torch.ops.aten.silu_backward(dy * s.output(of), z).transpose(0, 1)
            dy = dy * F.silu(z)
        dys = of.scale * dy
        _add_products(dC, times, s.h.conj(), dys)
        g = _outer(s.C.conj(), dys)
        if packing is not None and (ends := packing.ending(begin, end)) is not None:
            g[ends[0], 0] += dfinal[ends[1]]
        g[-1] += carry
        after = torch.cat([s.a[1:], torch.zeros_like(s.a[:1])]).conj()
        last = None if starts is None else starts[0][starts[0] > 0] - 1  # of the sequences before those that start
        g = scan(after, g, torch.zeros_like(carry), dim=0, reverse=True, overwrite=True, starts=last)
        carry, before = s.a[0].conj() * g[0], torch.cat([entering[i][None], s.h[:-1]])
        if starts is not None:
            steps, rows = starts
            dh0[rows], before[steps, 0] = s.a[steps, 0].conj() * g[steps, 0], of.h0[rows]
            carry = torch.where((steps == 0).any(), 0, carry)
        dlog = before.mul_(s.a).conj() * g  # dL/d(dt A)
        _add_products(dB, times, g, s.dt * s.u)
        dinput, dstep = _over_states(s.B.conj(), g), (dlog * of.A.conj()).sum(2)
        dinput, dstep = (dinput.real, dstep.real) if of.scale == 2 else (dinput, dstep)
        dx, dstep = dinput * s.dt, dstep + dinput * s.u
        if of.softplus:
            dstep = torch.ops.aten.softplus_backward(dstep, s.step, 1, 20)
        dA += (dlog * s.dt[:, :, None]).sum((0, 1))
        dD += (dy * s.u).sum((0, 1))
        dbias += dstep.sum((0, 1))
        du[:, times] = (dx if of.D is None else dx.addcmul_(of.D.to(real), dy)).transpose(0, 1)
        ddelta[:, times] = dstep.transpose(0, 1)
    dh0 = carry if packing is None else dh0
    return {**found, "A": dA.T, "D": dD, "delta_bias": dbias, "h0": dh0.transpose(1, 2)}


selective_scan_op.add(Backend("torch", _forward, _backward, infer=_infer, saved=_saved))
