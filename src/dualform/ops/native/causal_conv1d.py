"""The short causal convolution on a CPU."""

from typing import Any

import torch
from torch import Tensor

from dualform.ops.causal_conv1d import CausalConv1d, causal_conv1d_op
from dualform.ops.layout import empty_like
from dualform.ops.native import library
from dualform.ops.native.library import fresh, timed
from dualform.ops.native.structs import CAUSAL_CONV1D
from dualform.ops.op import Backend


def _forward(a: CausalConv1d) -> list[Tensor]:
    y, final = fresh(empty_like(a.x)), a.h0.clone(memory_format=torch.contiguous_format)
    if y.numel() > 0:
        library.call("causal_conv1d", CAUSAL_CONV1D, **_inputs(a), y=y, final=final)
    return [y, final]


def _backward(grads: list[Tensor], kept: list[Tensor], a: CausalConv1d) -> dict[str, Tensor]:
    dx, dh0 = fresh(empty_like(a.x)), grads[1].clone()
    dweight, dbias = a.h0.new_zeros(a.weight.shape), a.h0.new_zeros(len(a.weight))
    if a.x.numel() > 0:
        library.call(
            "causal_conv1d_backward",
            CAUSAL_CONV1D,
            **_inputs(a),
            dy=timed(grads[0]),
            dfinal=grads[1].contiguous(),
            dx=dx,
            dweight=dweight,
            dbias=dbias,
            dh0=dh0,
        )
    return {"x": dx, "weight": dweight, "bias": dbias, "h0": dh0}


def _inputs(a: CausalConv1d) -> dict[str, Any]:
    """The fields of ``CausalConv1d`` that forward and backward read."""
    x, h0 = timed(a.x), a.h0.contiguous()
    return {
        "dtype": h0.dtype,
        "sequences": (x, a.packing),
        "width": a.weight.shape[0],
        "taps": a.weight.shape[1],
        "silu": a.silu,
        "x": x,
        "weight": a.weight.to(h0.dtype).contiguous(),
        "bias": None if a.bias is None else a.bias.to(h0.dtype).contiguous(),
        "h0": h0,
        "ids": None if a.ids is None else a.ids.contiguous(),
    }


causal_conv1d_op.add(Backend("native", _forward, _backward, devices=("cpu",), missing=library.why_missing))
