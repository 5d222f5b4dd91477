"""The selective scan on samples at irregular times: Mamba with intervals."""

from typing import NamedTuple

import torch
from torch import Tensor

from dualform.core.discretize import hold
from dualform.core.packing import Borders, Packing, each_alone
from dualform.core.shapes import check_real, check_tensors, wide
from dualform.ops.linear_scan import linear_scan
from dualform.ops.op import Op
from dualform.ops.spans import Spanned, Tables
from dualform.ops.state import check_dtype, check_state, initial

_WHERE = "irregular_scan"


def irregular_scan(
    u: Tensor,
    intervals: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    *,
    cu_seqlens: Borders = None,
) -> tuple[Tensor, Tensor]:
    """Run ``h_t = a_t^s_t h_{t-1} + w_t dt_t B_t u_t``, ``y_t = C_t h_t``, with ``a_t = exp(dt_t A)``, per channel.

    The input at t is held over ``s_t`` steps, ``w_t = (a_t^s_t - 1) / (a_t - 1)``, see
    :func:`dualform.core.discretize.hold`. With intervals of 1 it is the scan of Mamba,
    :func:`~dualform.ops.selective_scan.selective_scan`, without what that has besides.

    Args:
        u: ``(B, T, D)``, input.
        intervals: ``(B, T)``, s, positive.
        dt: ``(B, T, D)``, positive.
        A: ``(D, N)``, negative.
        B: ``(B, T, N)``.
        C: ``(B, T, N)``.
        initial_state: ``(B, D, N)``, zero by default; with ``cu_seqlens`` one row per sequence.
        cu_seqlens: ``(n + 1,)``, cumulative lengths of sequences packed on the time axis, or a ``Packing`` that was
            made of them; B is then 1.

    Returns:
        y ``(B, T, D)`` in the dtype of u, and the final state ``(B, D, N)``, float32 or wider.

    Raises:
        ArgumentError: for shapes, dtypes or devices that do not fit together.
    """
    _check_inputs(u, intervals, dt, A, B, C)
    packing, dtype = Packing.of(_WHERE, cu_seqlens, u), wide(u, intervals, dt, A, B, C, initial_state)
    h0 = initial(_WHERE, initial_state, packing, u, tuple(A.shape), dtype)
    given = u.dtype
    u, intervals, dt, A, B, C = (m.to(dtype) for m in (u, intervals, dt, A, B, C))
    y, final = irregular_scan_op(IrregularScan(u, intervals, dt, A, B, C, h0, packing))
    return y.to(given), final


class IrregularScan(NamedTuple):
    """The arguments of the operator, as in :func:`irregular_scan`; all in the dtype of the state."""

    u: Tensor  # (B, T, D)
    intervals: Tensor  # (B, T)
    dt: Tensor  # (B, T, D)
    A: Tensor  # (D, N)
    B: Tensor  # (B, T, N)
    C: Tensor  # (B, T, N)
    h0: Tensor  # (rows, D, N)
    packing: Packing | None


def _check_inputs(u: Tensor, intervals: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> None:
    maps = {"B": (B, "B T N"), "C": (C, "B T N")}
    check_tensors(_WHERE, u=(u, "B T D"), intervals=(intervals, "B T"), dt=(dt, "B T D"), A=(A, "D N"), **maps)
    check_real(_WHERE, u=u, intervals=intervals, dt=dt, A=A, B=B, C=C)


def _check(a: IrregularScan) -> None:
    _check_inputs(*a[:6])
    check_state(_WHERE, "the initial state", a.h0, a.packing, a.u, tuple(a.A.shape))
    check_dtype(_WHERE, a.h0.dtype, u=a.u, intervals=a.intervals, dt=a.dt, A=a.A, B=a.B, C=a.C)


def _reference(a: IrregularScan) -> tuple[Tensor, Tensor]:
    def run(u: Tensor, s: Tensor, dt: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        ys = [u[:, :0]]
        for t in range(u.shape[1]):
            decay, weight = hold(dt[:, t, :, None] * a.A, s[:, t, None, None])
            h = decay * h + weight * (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
            ys.append((h * C[:, t, None]).sum(-1)[:, None])
        return torch.cat(ys, 1), h.clone()

    return each_alone(run, a.packing, a.h0, a.u, a.intervals, a.dt, a.B, a.C)


def _run(a: IrregularScan, tables: Tables) -> tuple[Tensor, Tensor]:
    """A scan from step to step."""
    decay, weight = hold(a.dt[..., None] * tables[0], a.intervals[..., None, None])
    hs, h = linear_scan(decay, weight * (a.dt * a.u)[..., None] * a.B[:, :, None], a.h0, cu_seqlens=a.packing)
    return (hs * a.C[:, :, None]).sum(-1), h


def _fake(a: IrregularScan) -> list[Tensor]:
    return [a.u.new_empty(a.u.shape), a.h0.new_empty(a.h0.shape)]


_INPUTS = ("u", "intervals", "dt", "B", "C")
irregular_scan_op = Op(_WHERE, IrregularScan, _reference, fake=_fake, check=_check)
irregular_scan_op.add(
    Spanned(irregular_scan_op, _run, lambda a, most: (a.A,), _INPUTS, lambda a: a.A.numel()).backend()
)
