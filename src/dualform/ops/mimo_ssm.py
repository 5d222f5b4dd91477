"""A diagonal state space model whose states are reached by every input and seen by every output: S5 and LRU."""

from typing import NamedTuple

import torch
from torch import Tensor

from dualform.core.discretize import hold
from dualform.core.dplr import as_complex, as_real
from dualform.core.packing import Borders, Packing, each_alone
from dualform.core.shapes import check_floating, check_real, check_tensors, wide
from dualform.ops.linear_scan import linear_scan
from dualform.ops.op import Op
from dualform.ops.spans import Spanned, Tables
from dualform.ops.state import check_dtype, check_state, initial

_WHERE = "mimo_ssm"


def mimo_ssm(
    u: Tensor,
    decay: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    *,
    intervals: Tensor | None = None,
    cu_seqlens: Borders = None,
) -> tuple[Tensor, Tensor]:
    """Run ``h_t = a h_{t-1} + B u_t``, ``y_t = Re(C h_t)``, with a diagonal and h complex, u and y real.

    With intervals s every input is held over so many steps, see :func:`dualform.core.discretize.hold`:
    ``h_t = a^s_t h_{t-1} + (a^s_t - 1) / (a - 1) B u_t``.

    Args:
        u: ``(B, T, D)``, input.
        decay: ``(N,)``, complex: a, or with intervals ``log a``.
        B: ``(N, D)``, complex.
        C: ``(D, N)``, complex.
        initial_state: ``(B, N)``, complex, zero by default; with ``cu_seqlens`` one row per sequence.
        intervals: ``(B, T)``, positive.
        cu_seqlens: ``(n + 1,)``, cumulative lengths of sequences packed on the time axis, or a ``Packing`` that was
            made of them; B is then 1.

    Returns:
        y ``(B, T, D)`` and the final state ``(B, N)``, in the precision of the state: complex64 or wider.

    Raises:
        ArgumentError: for shapes, dtypes or devices that do not fit together.

    References:
        Smith, Warrington and Linderman (2023), arXiv:2208.04933, equation 3.
    """
    _check_inputs(u, decay, B, C, intervals)
    packing = Packing.of(_WHERE, cu_seqlens, u)
    dtype = torch.promote_types(wide(u, decay, B, C, intervals, initial_state), torch.complex64)
    h0 = initial(_WHERE, initial_state, packing, u, tuple(decay.shape), dtype)
    real = h0.real.dtype
    s = None if intervals is None else intervals.to(real)
    y, final = mimo_ssm_op(MimoSSM(u.to(real), s, decay.to(dtype), B.to(dtype), C.to(dtype), h0, packing))
    return y, final


class MimoSSM(NamedTuple):
    """The arguments of the operator, as in :func:`mimo_ssm`; all in the precision of the state."""

    u: Tensor  # (B, T, D)
    intervals: Tensor | None  # (B, T)
    decay: Tensor  # (N,)
    B: Tensor  # (N, D)
    C: Tensor  # (D, N)
    h0: Tensor  # (rows, N)
    packing: Packing | None


def _check_inputs(u: Tensor, decay: Tensor, B: Tensor, C: Tensor, intervals: Tensor | None) -> None:
    check_tensors(
        _WHERE, u=(u, "B T D"), decay=(decay, "N"), B=(B, "N D"), C=(C, "D N"), intervals=(intervals, "? B T")
    )
    check_real(_WHERE, u=u, intervals=intervals)
    check_floating(_WHERE, decay=decay, B=B, C=C)


def _check(a: MimoSSM) -> None:
    _check_inputs(a.u, a.decay, a.B, a.C, a.intervals)
    check_state(_WHERE, "the initial state", a.h0, a.packing, a.u, tuple(a.decay.shape))
    check_dtype(_WHERE, a.h0.dtype, decay=a.decay, B=a.B, C=a.C)
    check_dtype(_WHERE, a.h0.real.dtype, u=a.u, **({} if a.intervals is None else {"intervals": a.intervals}))


def _reference(a: MimoSSM) -> tuple[Tensor, Tensor]:
    def run(u: Tensor, s: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        ys = [u[:, :0]]
        for t in range(u.shape[1]):
            decay, weight = (a.decay, 1) if a.intervals is None else hold(a.decay, s[:, t, None])
            h = decay * h + weight * (u[:, t].to(h.dtype) @ a.B.T)
            ys.append((h @ a.C.T).real[:, None])
        return torch.cat(ys, 1), h.clone()

    return each_alone(run, a.packing, a.h0, a.u, a.u if a.intervals is None else a.intervals)


def _tables(a: MimoSSM, most: int) -> Tables:
    """The decay, and B and C as real matrices on the real and imaginary parts of states side by side."""
    return a.decay, as_real(a.B.T), as_real(a.C.conj()).T


def _run(a: MimoSSM, tables: Tables) -> tuple[Tensor, Tensor]:
    decay, into, out = tables
    b = as_complex(a.u @ into)
    if a.intervals is not None:
        decay, weight = hold(decay, a.intervals[..., None])
        b = weight * b
    hs, h = linear_scan(decay.expand_as(b), b, a.h0, cu_seqlens=a.packing)
    return as_real(hs) @ out, h


def _fake(a: MimoSSM) -> list[Tensor]:
    return [a.u.new_empty(a.u.shape), a.h0.new_empty(a.h0.shape)]


mimo_ssm_op = Op(_WHERE, MimoSSM, _reference, fake=_fake, check=_check)
mimo_ssm_op.add(Spanned(mimo_ssm_op, _run, _tables, ("u", "intervals"), lambda a: a.decay.shape[0]).backend())
