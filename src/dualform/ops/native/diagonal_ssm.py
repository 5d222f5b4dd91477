"""The diagonal state space model on a CPU: its recurrence, without a kernel and without a Fourier transform."""

from typing import Any

import torch
from torch import Tensor

from dualform.ops.diagonal_ssm import DiagonalSSM, diagonal_ssm_op
from dualform.ops.native import library
from dualform.ops.native.library import fresh, readable
from dualform.ops.native.structs import DIAGONAL_SSM
from dualform.ops.op import Backend


def _forward(a: DiagonalSSM) -> list[Tensor]:
    y, final = fresh(a.u.new_empty(a.u.shape)), a.h0.clone(memory_format=torch.contiguous_format)
    if a.u.numel() == 0 or a.h0.numel() == 0:
        return [y.zero_(), final]
    library.call("diagonal_ssm", DIAGONAL_SSM, **_inputs(a), y=y, final=final)
    return [y, final]


def _backward(grads: list[Tensor], kept: list[Tensor], a: DiagonalSSM) -> dict[str, Tensor]:
    du, dh0 = fresh(a.u.new_empty(a.u.shape)), grads[1].clone()
    dA, dC = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (a.Abar, a.CB))
    if a.u.numel() == 0 or a.h0.numel() == 0:
        return {"u": du.zero_(), "Abar": dA.zero_(), "CB": dC.zero_(), "h0": dh0}
    library.call(
        "diagonal_ssm_backward",
        DIAGONAL_SSM,
        **_inputs(a),
        dy=readable(grads[0]),
        dfinal=grads[1].resolve_conj().contiguous(),
        du=du,
        da=dA,
        dc=dC,
        dh0=dh0,
    )
    return {"u": du, "Abar": dA, "CB": dC, "h0": dh0}


def _inputs(a: DiagonalSSM) -> dict[str, Any]:
    """The fields of ``DiagonalSSM`` that forward and backward read."""
    u, (Abar, CB, h0) = readable(a.u), (m.resolve_conj().contiguous() for m in (a.Abar, a.CB, a.h0))
    return {
        "dtype": h0.dtype.to_real(),
        "sequences": (u, a.packing),
        "width": h0.shape[1],
        "states": h0.shape[2],
        "u": u,
        "a": Abar,
        "c": CB,
        "h0": h0,
    }


diagonal_ssm_op.add(Backend("native", _forward, _backward, devices=("cpu",), missing=library.why_missing))
