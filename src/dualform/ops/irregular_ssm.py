"""A diagonal state space model per channel, sampled at irregular times: S4D and DSS with intervals."""

from typing import NamedTuple

import torch
from torch import Tensor

from dualform.core.discretize import hold
from dualform.core.packing import Borders, Packing, each_alone
from dualform.core.shapes import check_floating, check_real, check_tensors, wide
from dualform.ops.linear_scan import linear_scan
from dualform.ops.op import Op
from dualform.ops.spans import Spanned, Tables
from dualform.ops.state import check_dtype, check_state, initial

_WHERE = "irregular_ssm"


def irregular_ssm(
    u: Tensor,
    intervals: Tensor,
    log_a: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    *,
    cu_seqlens: Borders = None,
) -> tuple[Tensor, Tensor]:
    """Run ``h_t = a^s_t h_{t-1} + (a^s_t - 1) / (a - 1) B u_t``, ``y_t = 2 Re sum_n C_n h_{t,n}``, per channel.

    The input at t is held over ``s_t`` steps, see :func:`dualform.core.discretize.hold`. One mode of each conjugate
    pair is given, hence the factor 2. With intervals of 1 it is :func:`~dualform.ops.diagonal_ssm.diagonal_ssm`.

    Args:
        u: ``(B, T, D)``, input.
        intervals: ``(B, T)``, s, positive.
        log_a: ``(D, N)``, complex, logarithm of the decay of one step.
        B: ``(D, N)``, complex.
        C: ``(D, N)``, complex.
        initial_state: ``(B, D, N)``, complex, zero by default; with ``cu_seqlens`` one row per sequence.
        cu_seqlens: ``(n + 1,)``, cumulative lengths of sequences packed on the time axis, or a ``Packing`` that was
            made of them; B is then 1.

    Returns:
        y ``(B, T, D)`` and the final state ``(B, D, N)``, in the precision of the state: complex64 or wider.

    Raises:
        ArgumentError: for shapes, dtypes or devices that do not fit together.
    """
    _check_inputs(u, intervals, log_a, B, C)
    packing = Packing.of(_WHERE, cu_seqlens, u)
    dtype = torch.promote_types(wide(u, intervals, log_a, B, C, initial_state), torch.complex64)
    h0 = initial(_WHERE, initial_state, packing, u, tuple(log_a.shape), dtype)
    real = h0.real.dtype
    a = IrregularSSM(u.to(real), intervals.to(real), log_a.to(dtype), B.to(dtype), C.to(dtype), h0, packing)
    y, final = irregular_ssm_op(a)
    return y, final


class IrregularSSM(NamedTuple):
    """The arguments of the operator, as in :func:`irregular_ssm`; all in the precision of the state."""

    u: Tensor  # (B, T, D)
    intervals: Tensor  # (B, T)
    log_a: Tensor  # (D, N)
    B: Tensor  # (D, N)
    C: Tensor  # (D, N)
    h0: Tensor  # (rows, D, N)
    packing: Packing | None


def _check_inputs(u: Tensor, intervals: Tensor, log_a: Tensor, B: Tensor, C: Tensor) -> None:
    check_tensors(
        _WHERE, u=(u, "B T D"), intervals=(intervals, "B T"), log_a=(log_a, "D N"), B=(B, "D N"), C=(C, "D N")
    )
    check_real(_WHERE, u=u, intervals=intervals)
    check_floating(_WHERE, log_a=log_a, B=B, C=C)


def _check(a: IrregularSSM) -> None:
    _check_inputs(a.u, a.intervals, a.log_a, a.B, a.C)
    check_state(_WHERE, "the initial state", a.h0, a.packing, a.u, tuple(a.log_a.shape))
    check_dtype(_WHERE, a.h0.dtype, log_a=a.log_a, B=a.B, C=a.C)
    check_dtype(_WHERE, a.h0.real.dtype, u=a.u, intervals=a.intervals)


def _reference(a: IrregularSSM) -> tuple[Tensor, Tensor]:
    def run(u: Tensor, s: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        ys = [u[:, :0]]
        for t in range(u.shape[1]):
            decay, weight = hold(a.log_a, s[:, t, None, None])
            h = decay * h + weight * a.B * u[:, t, :, None]
            ys.append(2 * (a.C * h).sum(-1).real[:, None])
        return torch.cat(ys, 1), h.clone()

    return each_alone(run, a.packing, a.h0, a.u, a.intervals)


def _tables(a: IrregularSSM, most: int) -> Tables:
    return a.log_a, a.B, a.C


def _run(a: IrregularSSM, tables: Tables) -> tuple[Tensor, Tensor]:
    """A scan from step to step."""
    log_a, B, C = tables
    decay, weight = hold(log_a, a.intervals[..., None, None])
    hs, h = linear_scan(decay, weight * B * a.u[..., None], a.h0, cu_seqlens=a.packing)
    return 2 * (C * hs).sum(-1).real, h


def _fake(a: IrregularSSM) -> list[Tensor]:
    return [a.u.new_empty(a.u.shape), a.h0.new_empty(a.h0.shape)]


irregular_ssm_op = Op(_WHERE, IrregularSSM, _reference, fake=_fake, check=_check)
irregular_ssm_op.add(Spanned(irregular_ssm_op, _run, _tables, ("u", "intervals"), lambda a: a.log_a.numel()).backend())
