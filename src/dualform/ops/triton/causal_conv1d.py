"""The short causal convolution in Triton: one pass forward; one backward, then a sum over its programs.

It serves GPUs that the CUDA kernels do not run on. There sequences given by ids run in plain PyTorch, and a tensor with
time innermost is copied: one more pass over memory, which is not worth a second kernel.
"""

import torch
from torch import Tensor

from dualform.ops.causal_conv1d import CausalConv1d, causal_conv1d_op
from dualform.ops.layout import inner_contiguous, lay, time_last
from dualform.ops.triton.support import add_backend, blocks, kernels, owners, power_of_two

_MOST_TAPS = 8  # the kernels unroll them: of many, Triton compiles for minutes
_AHEAD = 4  # rows requested before they are used
_FORWARD, _BACKWARD = (64, 16), (128, 8)  # steps of a program, and the bytes of each row that a thread reads


def _tile(x: Tensor, steps: int, loads: int) -> tuple[int, int]:
    """Steps and channels of a program of one warp."""
    channels = 32 * loads // x.element_size()
    return min(steps, max(_AHEAD, power_of_two(x.shape[1]))), min(channels, max(16, power_of_two(x.shape[2])))


def _forward(a: CausalConv1d) -> list[Tensor]:
    y = a.x.new_empty(a.x.shape)
    if y.numel() == 0:
        return [lay(y, time_last(a.x)), a.h0.clone(memory_format=torch.contiguous_format)]
    final, (rows, length, width) = a.h0.new_empty(a.h0.shape), a.x.shape
    x, weight, state = inner_contiguous(a.x), a.weight.contiguous(), a.h0.contiguous()
    steps, channels = _tile(x, *_FORWARD)
    finals = 1 if a.packing is None else a.packing.rows
    kernels("causal_conv1d").forward[(rows * (blocks(length, steps) + finals) * blocks(width, channels),)](
        x,
        weight,
        _contiguous(a.bias),
        state,
        owners(a.packing, length),
        _borders(a),
        y,
        final,
        length,
        width,
        finals,
        x.stride(0),
        x.stride(1),
        SILU=a.silu,
        W=weight.shape[1],
        BT=steps,
        R=_AHEAD,
        BD=channels,
        num_warps=1,
    )
    return [lay(y, time_last(a.x)), final]


def _backward(grads: list[Tensor], kept: list[Tensor], a: CausalConv1d) -> dict[str, Tensor]:
    dx, dweight = a.x.new_empty(a.x.shape), a.weight.new_empty(a.weight.shape)
    found = {"x": dx, "weight": dweight}
    if a.bias is not None:
        found["bias"] = a.bias.new_empty(a.bias.shape)
    if a.x.numel() == 0:
        return {**{name: g.zero_() for name, g in found.items()}, "h0": grads[1].clone()}
    # Empty sequences pass the gradient of their state on.
    found["h0"] = a.h0.new_empty(a.h0.shape) if a.packing is None else grads[1].clone()
    x, weight, state, (rows, length, width) = inner_contiguous(a.x), a.weight.contiguous(), a.h0.contiguous(), a.x.shape
    steps, channels = _tile(x, *_BACKWARD)
    parts = rows * blocks(length, steps)
    partial = state.new_empty(parts, weight.shape[1] + 1, width)
    kernels("causal_conv1d").backward[(parts * blocks(width, channels),)](
        x,
        weight,
        _contiguous(a.bias),
        state,
        owners(a.packing, length),
        _borders(a),
        lay(grads[0], False),
        grads[1],
        dx,
        partial,
        found["h0"],
        length,
        width,
        x.stride(0),
        x.stride(1),
        SILU=a.silu,
        W=weight.shape[1],
        BT=steps,
        R=_AHEAD,
        BD=channels,
        num_warps=1,
    )
    kernels("causal_conv1d").gather[(blocks(width, 64) * (weight.shape[1] + 1),)](
        partial, dweight, found.get("bias"), parts, width, W=weight.shape[1], BP=32, BD=64
    )
    return found


def _borders(a: CausalConv1d) -> Tensor | None:
    return None if a.packing is None else a.packing.cu_seqlens.contiguous()


def _contiguous(m: Tensor | None) -> Tensor | None:
    return None if m is None else m.contiguous()


def _refuses(a: CausalConv1d) -> str | None:
    if a.weight.shape[1] > _MOST_TAPS:
        return f"a width of {a.weight.shape[1]}, more than {_MOST_TAPS}"
    return None if a.ids is None else "it takes no seq_idx"


add_backend(causal_conv1d_op, forward=_forward, backward=_backward, refuses=_refuses)
