"""The short causal convolution on a CPU."""

from typing import Any

import torch
from torch import Tensor

from dualform.ops.causal_conv1d import causal_conv1d_op
from dualform.ops.native import library
from dualform.ops.native.library import borders, fresh, readable
from dualform.ops.native.structs import CAUSAL_CONV1D
from dualform.ops.op import Backend


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, state: Tensor, cu_seqlens: Tensor | None
) -> list[Tensor]:
    y, final = fresh(x.new_empty(x.shape)), state.clone(memory_format=torch.contiguous_format)
    if y.numel() == 0:
        return [y, final]
    inputs = _inputs(x, weight, bias, silu, state, cu_seqlens)
    library.call("causal_conv1d", CAUSAL_CONV1D, **inputs, y=y, final=final)
    return [y, final]


def _backward(
    grads: list[Tensor],
    kept: list[Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> list[Tensor]:
    dx, dstate = fresh(x.new_empty(x.shape)), grads[1].clone()
    dweight, dbias = state.new_zeros(weight.shape), state.new_zeros(len(weight))
    if x.numel() > 0:
        library.call(
            "causal_conv1d_backward",
            CAUSAL_CONV1D,
            **_inputs(x, weight, bias, silu, state, cu_seqlens),
            dy=readable(grads[0]),
            dfinal=grads[1].contiguous(),
            dx=dx,
            dweight=dweight,
            dbias=dbias,
            dh0=dstate,
        )
    return [dx, dweight.to(weight.dtype), *([] if bias is None else [dbias.to(bias.dtype)]), dstate]


def _inputs(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, state: Tensor, cu_seqlens: Tensor | None
) -> dict[str, Any]:
    """The fields of ``CausalConv1d`` that forward and backward read."""
    x, state = readable(x), state.contiguous()
    return {
        "dtype": state.dtype,
        "sequences": (x, borders(cu_seqlens)),
        "width": weight.shape[0],
        "taps": weight.shape[1],
        "silu": silu,
        "x": x,
        "weight": weight.to(state.dtype).contiguous(),
        "bias": None if bias is None else bias.to(state.dtype).contiguous(),
        "h0": state,
    }


causal_conv1d_op.add(Backend("native", _forward, _backward, devices=("cpu",), missing=library.missing))
