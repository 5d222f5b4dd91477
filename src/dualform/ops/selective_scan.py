"""The selective scan of Mamba: a diagonal recurrence whose step, input and output maps depend on the input."""

from bisect import bisect_left
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.packing import each_alone
from dualform.core.shapes import check_floating, check_tensors, wide
from dualform.ops.linear_scan import as_grad, scan
from dualform.ops.op import Backend, Op
from dualform.ops.state import initial
from dualform.ops.step import fast_step

_CPU_SPAN = 3 * 2**18  # elements of (K, B, N, D) held at a time: few enough for a cache, enough to share out
_GPU_SPAN = 2**23  # elsewhere launches cost more than cache misses
_SAVE_EVERY = 4  # spans on a CPU between the states that the backward starts from


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run ``h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t``, ``y_t = C_t h_t + D u_t``, gated by ``silu(z_t)``.

    ``dt = softplus(delta + delta_bias)`` where the flag asks for softplus. With a complex A the state is complex and
    stands for conjugate pairs: ``y_t = 2 Re(C_t h_t) + D u_t``.

    Args:
        u: ``(B, T, D)``, input.
        delta: ``(B, T, D)``, step before bias and softplus.
        A: ``(D, N)``, decay rates, negative (real part) for a stable recurrence; real or complex.
        B: ``(B, T, G, N)``, input map; channel d uses group ``d // (D / G)``.
        C: ``(B, T, G, N)``, output map; its number of groups may differ from that of B.
        D: ``(D,)``, skip.
        z: ``(B, T, D)``, gate.
        delta_bias: ``(D,)``.
        delta_softplus: whether the step passes through softplus.
        initial_state: ``(B, D, N)``, zero by default; with ``cu_seqlens`` one row per sequence.
        cu_seqlens: ``(n + 1,)``, cumulative lengths of sequences packed on the time axis; B is then 1.

    Returns:
        y ``(B, T, D)`` in the dtype of u, and the final state ``(B, D, N)``, float32 or wider.

    Raises:
        ArgumentError: for shapes, dtypes or devices that do not fit together.

    References:
        Gu & Dao (2023), arXiv:2312.00752, section 3.2 and algorithm 2.
    """
    where = "selective_scan"
    sizes = check_tensors(
        where,
        u=(u, "B T D"),
        delta=(delta, "B T D"),
        A=(A, "D N"),
        B=(B, "B T * N"),
        C=(C, "B T * N"),
        D=(D, "D"),
        z=(z, "B T D"),
        delta_bias=(delta_bias, "D"),
    )
    check_floating(where, u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
    for name, tensor in (("B", B), ("C", C)):
        if tensor.shape[2] == 0 or sizes["D"] % tensor.shape[2]:
            raise ArgumentError(f"{where}: {name} has {tensor.shape[2]} groups, which do not divide D = {sizes['D']}")
        if tensor.is_complex() and not A.is_complex():
            raise ArgumentError(f"{where}: {name} is {tensor.dtype} but A is {A.dtype}: make A complex, or {name} real")
    real = wide(u, delta)
    dt = delta.to(real) if delta_bias is None else delta.to(real) + delta_bias
    dt = F.softplus(dt) if delta_softplus else dt
    dtype = wide(u, delta, A)
    h0 = initial(where, initial_state, cu_seqlens, u, (sizes["D"], sizes["N"]), dtype)
    y, final = selective_scan_op(u, dt, A.to(dtype), B, C, h0, cu_seqlens)
    if D is not None:
        y = y + D.to(y.dtype) * u
    return y if z is None else y * F.silu(z), final


def _reference(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    width, scale = u.shape[2], 2 if A.is_complex() else 1

    def run(u: Tensor, dt: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        B, C = (m.to(h.dtype).repeat_interleave(width // m.shape[2], 2) for m in (B, C))
        ys = []
        for t in range(u.shape[1]):
            h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * u[:, t])[..., None] * B[:, t]
            ys.append(scale * (C[:, t] * h).sum(-1).real)
        return torch.stack(ys, 1) if ys else dt * u, h.clone()

    y, final = each_alone(run, cu_seqlens, initial_state, u, dt, B, C)
    return y.to(u.dtype), final


def selective_state_update(
    state: Tensor,
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
) -> tuple[Tensor, Tensor]:
    """One step of the selective recurrence; the streaming form of :func:`selective_scan` and of ``ssd``.

    Args:
        state: ``(B, D, N)``, or ``(B, H, P, N)`` by heads, float32 or wider.
        x: ``(B, D)`` or ``(B, H, P)``.
        dt: as x, or broadcastable to it, such as ``(B, H, 1)``; before bias and softplus.
        A: ``(D, N)`` or ``(H, P, N)``, or broadcastable to it, such as ``(H, 1, 1)``; real.
        B: ``(B, G, N)``; channel d (head h) uses group ``d // (D / G)``.
        C: ``(B, G, N)``.
        D: ``(D,)`` or ``(H, P)``, or broadcastable to it, such as ``(H, 1)``.
        z: as x, gate.
        dt_bias: added to dt; broadcastable to it.
        dt_softplus: whether dt passes through softplus.

    Returns:
        y like x, and the next state.

    References:
        Gu & Dao (2023), arXiv:2312.00752, equation 2 with the discretisation of section 3.2.
    """
    fast = fast_step("selective_state_update", state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
    if fast is not None:
        return fast
    dt = dt.to(state.dtype) if dt_bias is None else dt.to(state.dtype) + dt_bias
    dt = F.softplus(dt) if dt_softplus else dt
    heads, by_head = state.shape[1], state.dim() == 4
    B, C = (m.to(state.dtype).repeat_interleave(heads // m.shape[1], 1) for m in (B, C))
    B, C = (m[:, :, None] if by_head else m for m in (B, C))
    state = torch.exp(dt[..., None] * A) * state + (dt * x)[..., None] * B
    y = (state * C).sum(-1)
    y = (y if D is None else y + D * x).to(x.dtype)
    return y if z is None else y * F.silu(z), state


class _Borders:
    """Where packed sequences begin and end inside a span of time; an unpacked batch has no borders."""

    def __init__(self, cu_seqlens: Tensor | None):
        self.packed = cu_seqlens is not None
        if cu_seqlens is not None:
            full = cu_seqlens.diff() > 0
            self.rows = full.nonzero()[:, 0]
            self.first, self.last = cu_seqlens[:-1][full].long(), cu_seqlens[1:][full].long() - 1
            self._sorted = self.first.tolist(), self.last.tolist()

    def starts(self, begin: int, end: int) -> tuple[Tensor, Tensor] | None:
        """``(steps, rows)`` of the sequences that begin in the span, counted from ``begin``; None if none does."""
        return self._within(0, begin, end)

    def ends(self, begin: int, end: int) -> tuple[Tensor, Tensor] | None:
        """``(steps, rows)`` of the sequences whose last element lies in the span; None if none does."""
        return self._within(1, begin, end)

    def _within(self, which: int, begin: int, end: int) -> tuple[Tensor, Tensor] | None:
        if not self.packed:
            return None
        i, j = bisect_left(self._sorted[which], begin), bisect_left(self._sorted[which], end)
        return None if i == j else ((self.first, self.last)[which][i:j] - begin, self.rows[i:j])


def _span_sizes(h0: Tensor, batch: int) -> tuple[int, int]:
    """Steps whose states ``(K, B, N, D)`` are held at once by the forward, and by the backward."""
    on_cpu = h0.device.type in ("cpu", "meta")
    size = max(1, (_CPU_SPAN if on_cpu else _GPU_SPAN) // max(1, batch * h0.shape[1] * h0.shape[2]))
    return size, size * (_SAVE_EVERY if on_cpu else 1)


def _spans(size: int, length: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + size, length)) for begin in range(0, length, size)]


class _Span(NamedTuple):
    """One span of the recurrence, time first and channels last: ``h_t = a_t h_{t-1} + dt_t u_t B_t``."""

    dt: Tensor  # (K, B, D)
    u: Tensor  # (K, B, D)
    B: Tensor  # (K, B, G, N)
    C: Tensor  # (K, B, J, N)
    a: Tensor  # (K, B, N, D), the decays, 0 where a sequence begins
    first: Tensor | None  # the decays of steps that begin a sequence
    h: Tensor  # (K, B, N, D), the states

    @classmethod
    def run(
        cls,
        times: slice,
        inputs: tuple[Tensor, ...],
        A: Tensor,
        h: Tensor,
        h0: Tensor,
        starts: tuple[Tensor, Tensor] | None,
    ) -> "_Span":
        """The states of one span; ``A`` ``(N, D)``, ``h`` ``(B, N, D)`` enters it, ``h0`` ``(rows, N, D)``."""
        u, dt, B, C = (m[:, times].transpose(0, 1) for m in inputs)
        dt, B, C = dt.contiguous(), B.to(h.dtype), C.to(h.dtype)
        u = u.to(dt.dtype)
        a = torch.mul(dt[:, :, None], A).exp_()
        b = _outer(B, dt * u)
        first = None
        if starts is not None:
            steps, rows = starts
            first = a[steps, 0]
            b[steps, 0] += first * h0[rows]
            a[steps, 0] = 0
        return cls(dt, u, B, C, a, first, scan(a, b, h, dim=0, overwrite=True))


def _outer(m: Tensor, x: Tensor) -> Tensor:
    """``m`` ``(K, B, G, N)`` times ``x`` ``(K, B, D)`` -> ``(K, B, N, D)``."""
    return (m.transpose(2, 3)[..., None] * x.unflatten(2, (m.shape[2], -1))[:, :, None]).flatten(3)


def _over_states(m: Tensor, h: Tensor) -> Tensor:
    """``sum_n m h``: ``(K, B, G, N)`` and ``(K, B, N, D)`` -> ``(K, B, D)``."""
    return (m[..., None, :] @ h.unflatten(3, (m.shape[2], -1)).transpose(2, 3)).flatten(2)


def _over_channels(h: Tensor, x: Tensor, groups: int) -> Tensor:
    """``sum_d h x`` over the channels of a group: ``(K, B, N, D)`` and ``(K, B, D)`` -> ``(K, B, G, N)``."""
    x = x.unflatten(2, (groups, -1))[..., None].to(h.dtype)
    return (h.unflatten(3, (groups, -1)).transpose(2, 3) @ x)[..., 0]


def _run(keep: bool, *args: Any) -> list[Tensor]:
    u, dt, A, B, C, h0, cu_seqlens = args
    A, h0 = A.T.contiguous(), h0.transpose(1, 2).contiguous()
    borders, (size, save_every) = _Borders(cu_seqlens), _span_sizes(h0, len(u))
    y, final, scale = torch.empty_like(dt), h0.clone(), 2 if A.is_complex() else 1
    h = torch.zeros_like(h0[: len(u)]) if borders.packed else h0
    entering = []
    for begin, end in _spans(size, u.shape[1]):
        if keep and begin % save_every == 0:
            entering.append(h)
        times = slice(begin, end)
        span = _Span.run(times, (u, dt, B, C), A, h, h0, borders.starts(begin, end))
        out = _over_states(span.C, span.h)
        y[:, times] = (out.real if scale == 2 else out).transpose(0, 1)
        if (ends := borders.ends(begin, end)) is not None:
            final[ends[1]] = span.h[ends[0], 0]
        h = span.h[-1].clone()
    final = final if borders.packed else h
    saved = [torch.stack(entering) if entering else h0.new_empty(0, *h.shape)] if keep else []
    return [y.mul_(scale).to(u.dtype), final.transpose(1, 2).clone(memory_format=torch.contiguous_format), *saved]


def _forward(*args: Any) -> list[Tensor]:
    return _run(True, *args)


def _infer(*args: Any) -> list[Tensor]:
    return _run(False, *args)


def _saved(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor, cu_seqlens: Tensor | None
) -> list[Tensor]:
    _, size = _span_sizes(h0, u.shape[0])
    return [h0.new_empty(-(-u.shape[1] // size), u.shape[0], h0.shape[2], h0.shape[1])]


def _backward(
    grads: list[Tensor],
    kept: list[Tensor],
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h0: Tensor,
    cu_seqlens: Tensor | None,
) -> list[Tensor]:
    """Spans from last to first, states recomputed from the one that entered.

    With ``g_t = dL/dh_t`` in full, ``g_t = conj(C_t) dy_t + conj(a_{t+1}) g_{t+1}``, and everything else is a product.
    """
    borders, (entering,), scale = _Borders(cu_seqlens), kept, 2 if A.is_complex() else 1
    rates, start = A.T.contiguous(), h0.transpose(1, 2).contiguous()
    dy, dfinal = grads[0].to(dt.dtype), grads[1].transpose(1, 2).contiguous()
    du, ddt = torch.empty_like(dt), torch.empty_like(dt)
    dA, dB, dC = torch.zeros_like(rates), torch.empty_like(B, dtype=A.dtype), torch.empty_like(C, dtype=A.dtype)
    dh0 = dfinal.clone()
    carry = torch.zeros_like(start[: len(u)]) if borders.packed else dfinal
    for i, (begin, end) in reversed(list(enumerate(_spans(_span_sizes(h0, len(u))[1], u.shape[1])))):
        times, starts = slice(begin, end), borders.starts(begin, end)
        s = _Span.run(times, (u, dt, B, C), rates, entering[i], start, starts)
        dys = scale * dy[:, times].transpose(0, 1)
        dC[:, times] = _over_channels(s.h.conj(), dys, C.shape[2]).transpose(0, 1)
        g = _outer(s.C.conj(), dys)
        if (ends := borders.ends(begin, end)) is not None:
            g[ends[0], 0] += dfinal[ends[1]]
        g[-1] += carry
        after = torch.cat([s.a[1:], torch.zeros_like(s.a[:1])]).conj()
        g = scan(after, g, torch.zeros_like(carry), dim=0, reverse=True, overwrite=True)
        carry = s.a[0].conj() * g[0]
        before, a = torch.cat([entering[i][None], s.h[:-1]]), s.a
        if starts is not None and s.first is not None:
            steps, rows = starts
            dh0[rows] = s.first.conj() * g[steps, 0]
            before[steps, 0], a[steps, 0] = start[rows], s.first
        dlog = before.mul_(a).conj() * g  # dL/d(dt A)
        dB[:, times] = _over_channels(g, s.dt * s.u, B.shape[2]).transpose(0, 1)
        dinput, dstep = _over_states(s.B.conj(), g), (dlog * rates.conj()).sum(2)
        dinput, dstep = (dinput.real, dstep.real) if scale == 2 else (dinput, dstep)
        du[:, times] = (dinput * s.dt).transpose(0, 1)
        ddt[:, times] = (dstep + dinput * s.u).transpose(0, 1)
        dA += (dlog * s.dt[:, :, None]).sum((0, 1))
    dh0 = dh0 if borders.packed else carry
    found = (du, ddt, dA.T, dB, dC, dh0.transpose(1, 2))
    return [as_grad(g, of) for g, of in zip(found, (u, dt, A, B, C, h0), strict=True)]


def _fake(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor, cu_seqlens: Tensor | None
) -> list[Tensor]:
    return [u.new_empty(u.shape), h0.new_empty(h0.shape)]


selective_scan_op = Op("selective_scan", _reference, fake=_fake)
selective_scan_op.add(Backend("torch", _forward, _backward, infer=_infer, saved=_saved))
