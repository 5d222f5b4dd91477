"""The selective scan of Mamba: a diagonal recurrence whose step, input and output maps depend on the input."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.packing import each_alone
from dualform.core.shapes import check_floating, check_tensors, wide
from dualform.ops.op import Op
from dualform.ops.state import initial
from dualform.ops.step import fast_step


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
    dtype = wide(u, delta, A)
    h0 = initial(where, initial_state, cu_seqlens, u, (sizes["D"], sizes["N"]), dtype)
    y, final = selective_scan_op(u, delta, A.to(dtype), B, C, D, z, delta_bias, delta_softplus, h0, cu_seqlens)
    return y, final


class Arguments(NamedTuple):
    """Those of the operator, as every backend is given them: as in :func:`selective_scan`."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    bias: Tensor | None
    softplus: bool
    h0: Tensor
    cu_seqlens: Tensor | None


def _reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    width, scale, real = u.shape[2], 2 if A.is_complex() else 1, initial_state.dtype.to_real()

    def run(u: Tensor, dt: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        B, C = (m.to(h.dtype).repeat_interleave(width // m.shape[2], 2) for m in (B, C))
        ys = []
        for t in range(u.shape[1]):
            h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * u[:, t])[..., None] * B[:, t]
            ys.append(scale * (C[:, t] * h).sum(-1).real)
        return torch.stack(ys, 1) if ys else dt * u, h.clone()

    dt = delta.to(real) if delta_bias is None else delta.to(real) + delta_bias
    dt, x = F.softplus(dt) if delta_softplus else dt, u.to(real)
    y, final = each_alone(run, cu_seqlens, initial_state, x, dt, B, C)
    y = y if D is None else y + D * x
    y = y if z is None else y * F.silu(z.to(real))
    return y.to(u.dtype), final


def _fake(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    h0: Tensor,
    cu_seqlens: Tensor | None,
) -> list[Tensor]:
    return [u.new_empty(u.shape), h0.new_empty(h0.shape)]


selective_scan_op = Op("selective_scan", _reference, fake=_fake)


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
    y = y if D is None else y + D * x
    y = y if z is None else y * F.silu(z.to(y.dtype))
    return y.to(x.dtype), state
