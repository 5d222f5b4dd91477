"""State space duality: Mamba-2's scan with one decay per head, a recurrence that is also a masked matrix product."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.packing import Borders, Packing, each_alone
from dualform.core.shapes import check_real, check_tensors, once_per_shape, wide
from dualform.ops.op import Op
from dualform.ops.runs import check_ids
from dualform.ops.state import check_dtype, check_state, initial, unless_complex

_WHERE = "ssd"
_DEFAULT_CHUNK = 64


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
    seq_idx: Tensor | None = None,
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
        seq_idx: ``(B, T)``, int32, the sequence of each step, where rows hold several and no synchronisation of a GPU
            is wanted; not with ``cu_seqlens``. A sequence is a run of equal ids and sees no other one; a negative id is
            one like the others. The initial state belongs to the first run of each row, the final one to the last.
        chunk: steps per matrix product; changes speed and rounding, never the result.

    Returns:
        y ``(B, T, H, P)`` in the dtype of x, and the final state ``(B, H, P, N)``, float32 or wider. What is not
        finite at some step may reach earlier steps of the same chunk, through the zeros of a masked product; it never
        reaches another sequence or row.

    Raises:
        ArgumentError: for shapes, dtypes, devices, limits or a chunk that do not fit together, and for ``seq_idx``
            together with ``cu_seqlens``.

    References:
        Dao & Gu (2024), arXiv:2405.21060, section 6 (block decomposition).
    """
    _check_inputs(x, dt, A, B, C, D, z, dt_bias)
    if dt_limit[0] > dt_limit[1]:
        raise ArgumentError(f"{_WHERE}: dt_limit is {dt_limit}, expected (smallest, largest)")
    if chunk is not None and chunk < 1:
        raise ArgumentError(f"{_WHERE}: chunk is {chunk}, expected at least 1")
    packing = Packing.of(_WHERE, cu_seqlens, x)
    if seq_idx is not None:
        check_ids(_WHERE, seq_idx, x, packing)
        seq_idx = seq_idx.to(torch.int32)
    dtype = wide(x, dt, A, B, C, D, z, dt_bias, unless_complex(initial_state))
    dt = limit_step(dt.to(dtype), dt_bias, dt_softplus, dt_limit)
    h0 = initial(_WHERE, initial_state, packing, x, (*x.shape[2:], B.shape[3]), dtype)
    y, final = ssd_op(SSD(x, dt, A.to(dtype), B, C, D, z, h0, packing, chunk or _DEFAULT_CHUNK, seq_idx))
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
    ids: Tensor | None = None  # (B, T) int32, not with a packing

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
    if a.ids is not None:
        check_ids(_WHERE, a.ids, a.x, a.packing)
        if a.ids.dtype != torch.int32:
            raise ArgumentError(f"{_WHERE}: ids are {a.ids.dtype}, expected torch.int32")


def _reference(a: SSD) -> tuple[Tensor, Tensor]:
    per_group = a.x.shape[2] // a.B.shape[2]

    def run(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, h: Tensor, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        B, C = (m.to(h.dtype).repeat_interleave(per_group, 2) for m in (B, C))
        ys = []
        for t in range(x.shape[1]):
            decay = torch.exp(dt[:, t] * a.A)[..., None, None]
            if ids is not None and t > 0:
                h = h.masked_fill((ids[:, t] != ids[:, t - 1])[:, None, None, None], 0)
            h = decay * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
            ys.append((h * C[:, t, :, None]).sum(-1))
        return torch.stack(ys, 1) if ys else x.to(h.dtype), h.clone()

    inputs = (a.x, a.dt, a.B, a.C)
    y, final = each_alone(run, a.packing, a.h0, *inputs) if a.ids is None else run(*inputs, a.h0, a.ids)
    return a.finish(y)[0], final


def _fake(a: SSD) -> list[Tensor]:
    return [a.x.new_empty(a.x.shape), a.h0.new_empty(a.h0.shape)]


ssd_op = Op(_WHERE, SSD, _reference, fake=_fake, check=_check)
