"""The diagonal state space model on a CPU: its recurrence, without a kernel and without a Fourier transform."""

from typing import Any

import torch
from torch import Tensor

from dualform.ops.diagonal_ssm import diagonal_ssm_op
from dualform.ops.native import library
from dualform.ops.native.library import borders, fresh, readable
from dualform.ops.native.structs import DIAGONAL_SSM
from dualform.ops.op import Backend


def _forward(u: Tensor, Abar: Tensor, CB: Tensor, h0: Tensor, cu_seqlens: Tensor | None) -> list[Tensor]:
    y, final = fresh(u.new_empty(u.shape)), h0.clone(memory_format=torch.contiguous_format)
    if u.numel() == 0 or h0.numel() == 0:
        return [y.zero_(), final]
    library.call("diagonal_ssm", DIAGONAL_SSM, **_inputs(u, Abar, CB, h0, cu_seqlens), y=y, final=final)
    return [y, final]


def _backward(
    grads: list[Tensor],
    kept: list[Tensor],
    u: Tensor,
    Abar: Tensor,
    CB: Tensor,
    h0: Tensor,
    cu_seqlens: Tensor | None,
) -> list[Tensor]:
    du, dh0 = fresh(u.new_empty(u.shape)), grads[1].clone()
    dA, dC = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (Abar, CB))
    if u.numel() == 0 or h0.numel() == 0:
        return [du.zero_(), dA.zero_(), dC.zero_(), dh0]
    library.call(
        "diagonal_ssm_backward",
        DIAGONAL_SSM,
        **_inputs(u, Abar, CB, h0, cu_seqlens),
        dy=readable(grads[0]),
        dfinal=grads[1].resolve_conj().contiguous(),
        du=du,
        da=dA,
        dc=dC,
        dh0=dh0,
    )
    return [du, dA, dC, dh0]


def _inputs(u: Tensor, Abar: Tensor, CB: Tensor, h0: Tensor, cu_seqlens: Tensor | None) -> dict[str, Any]:
    """The fields of ``DiagonalSSM`` that forward and backward read."""
    u, (Abar, CB, h0) = readable(u), (x.resolve_conj().contiguous() for x in (Abar, CB, h0))
    return {
        "dtype": h0.dtype.to_real(),
        "sequences": (u, borders(cu_seqlens)),
        "width": h0.shape[1],
        "states": h0.shape[2],
        "u": u,
        "a": Abar,
        "c": CB,
        "h0": h0,
    }


diagonal_ssm_op.add(Backend("native", _forward, _backward, devices=("cpu",), missing=library.missing))
