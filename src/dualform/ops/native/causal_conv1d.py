"""The short causal convolution on a CPU."""

import torch
from torch import Tensor

from dualform.ops.causal_conv1d import causal_conv1d_op
from dualform.ops.native import library
from dualform.ops.native.library import NO_VIEW, fresh, readable, sequences, view
from dualform.ops.op import Backend


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, state: Tensor, cu_seqlens: Tensor | None
) -> list[Tensor]:
    y, final = fresh(x.new_empty(x.shape)), state.clone(memory_format=torch.contiguous_format)
    if y.numel() == 0:
        return [y, final]
    given, fields = _fields(x, weight, bias, silu, state, cu_seqlens)
    library.call("causal_conv1d", *fields, *view(y), final.data_ptr(), *NO_VIEW, 0, *NO_VIEW, 0, 0, 0)
    del given
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
        given, fields = _fields(x, weight, bias, silu, state, cu_seqlens)
        library.call(
            "causal_conv1d_backward",
            *fields,
            *NO_VIEW,
            0,
            *view(grads[0]),
            grads[1].data_ptr(),
            *view(dx),
            dweight.data_ptr(),
            dbias.data_ptr(),
            dstate.data_ptr(),
        )
        del given
    return [dx, dweight.to(weight.dtype), *([] if bias is None else [dbias.to(bias.dtype)]), dstate]


def _fields(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, state: Tensor, cu_seqlens: Tensor | None
) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
    """What the kernels are given, to be kept alive, and the first fields of ``CausalConv1d``."""
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
    x, state, weight = readable(x), state.contiguous(), weight.to(state.dtype).contiguous()
    bias = None if bias is None else bias.to(state.dtype).contiguous()
    fields = (
        library.number(state),
        *sequences(x, cu_seqlens),
        *weight.shape,
        silu,
        *view(x),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        state.data_ptr(),
    )
    return (x, weight, bias, state, cu_seqlens), fields


causal_conv1d_op.add(Backend("native", _forward, _backward, devices=("cpu",), missing=library.missing))
