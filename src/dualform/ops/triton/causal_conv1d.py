"""The short causal convolution in Triton: one pass forward; one backward, and the sums of its parts."""

import torch
from torch import Tensor

from dualform.ops.causal_conv1d import causal_conv1d_op
from dualform.ops.layout import inner_contiguous
from dualform.ops.op import Backend
from dualform.ops.triton.support import DEVICES, blocks, kernels, missing, owners, power_of_two

_AHEAD = 4  # rows requested before they are used
_FORWARD, _BACKWARD = (64, 16), (128, 8)  # steps of a program, and the bytes of each row that a thread reads


def _tile(x: Tensor, steps: int, loads: int) -> tuple[int, int]:
    """Steps and channels of a program of one warp."""
    channels = 32 * loads // x.element_size()
    return min(steps, max(_AHEAD, power_of_two(x.shape[1]))), min(channels, max(16, power_of_two(x.shape[2])))


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, state: Tensor, cu_seqlens: Tensor | None
) -> list[Tensor]:
    y = x.new_empty(x.shape)
    if y.numel() == 0:
        return [y, state.clone(memory_format=torch.contiguous_format)]
    final, (rows, length, width) = state.new_empty(state.shape), x.shape
    x, weight, state = inner_contiguous(x), weight.contiguous(), state.contiguous()
    steps, channels = _tile(x, *_FORWARD)
    finals = 1 if cu_seqlens is None else len(state)
    kernels("causal_conv1d").forward[(rows * (blocks(length, steps) + finals) * blocks(width, channels),)](
        x,
        weight,
        bias,
        state,
        owners(cu_seqlens, length),
        cu_seqlens,
        y,
        final,
        length,
        width,
        finals,
        x.stride(0),
        x.stride(1),
        SILU=silu,
        W=weight.shape[1],
        BT=steps,
        R=_AHEAD,
        BD=channels,
        num_warps=1,
    )
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
    dx, dweight = x.new_empty(x.shape), weight.new_empty(weight.shape)
    dbias = None if bias is None else bias.new_empty(bias.shape)
    found = [dx, dweight, *([] if dbias is None else [dbias])]
    if x.numel() == 0:
        return [*(g.zero_() for g in found), grads[1].clone()]
    dstate = state.new_empty(state.shape) if cu_seqlens is None else grads[1].clone()  # empty sequences pass it on
    x, weight, state, (rows, length, width) = inner_contiguous(x), weight.contiguous(), state.contiguous(), x.shape
    steps, channels = _tile(x, *_BACKWARD)
    parts = rows * blocks(length, steps)
    partial = state.new_empty(parts, weight.shape[1] + 1, width)
    kernels("causal_conv1d").backward[(parts * blocks(width, channels),)](
        x,
        weight,
        bias,
        state,
        owners(cu_seqlens, length),
        cu_seqlens,
        grads[0],
        grads[1],
        dx,
        partial,
        dstate,
        length,
        width,
        x.stride(0),
        x.stride(1),
        SILU=silu,
        W=weight.shape[1],
        BT=steps,
        R=_AHEAD,
        BD=channels,
        num_warps=1,
    )
    kernels("causal_conv1d").gather[(blocks(width, 64) * (weight.shape[1] + 1),)](
        partial, dweight, dbias, parts, width, W=weight.shape[1], BP=32, BD=64
    )
    return [*found, dstate]


causal_conv1d_op.add(Backend("triton", _forward, _backward, devices=DEVICES, missing=missing))
