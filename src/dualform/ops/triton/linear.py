"""A linear map of few rows in Triton, alone or before a convolution or the residual stream of a step."""

from typing import NamedTuple

import torch
from torch import Tensor

from dualform.ops.layout import inner_contiguous
from dualform.ops.linear import Linear, linear_op
from dualform.ops.triton.support import add_backend, blocks, early, kernels, power_of_two

FEW = 4
"""Rows of a tile: up to so many, the matrix is read once."""
_TILES_AHEAD = 4  # that a program holds while it waits


class Convolution(NamedTuple):
    """The convolution of the outputs from ``first`` on, and memory for its next state."""

    state: Tensor
    weight: Tensor
    bias: Tensor | None
    first: int
    after: Tensor


def by_kernel(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, conv: Convolution | None = None,
    stream: Tensor | None = None, *, ahead: bool = False,
) -> Tensor:  # fmt: skip
    """``W x + b`` ``(B, O)``: some of it convolved, or added to the stream.

    ``ahead`` says that the kernel before this one does not write the matrix, which is read while that kernel runs.
    """
    x, (rows, inputs), outputs = inner_contiguous(x), x.shape, weight.shape[0]
    y = x.new_empty(rows, outputs, dtype=dtype)
    if y.numel() == 0:
        return y
    few, wide = min(FEW, power_of_two(rows)), 256 if inputs < 1024 else 512 if inputs < 4096 else 1024
    tile = {"BR": few, "BO": 4 if outputs >= 2048 else 2, "BK": min(wide, power_of_two(inputs))}
    kernels("project").project[(blocks(outputs, tile["BO"]), blocks(rows, few))](
        x, weight.contiguous(), _dense(bias), _dense(stream), _dense(conv and conv.state),
        _dense(conv and conv.weight), _dense(conv and conv.bias), conv and conv.after, y,
        rows, outputs, conv.first if conv else 0, conv.state.shape[1] if conv else 0, x.stride(0),
        K=inputs, TAPS=conv.weight.shape[1] if conv else 0, WIDE=torch.float64 in (x.dtype, weight.dtype),
        AHEAD=ahead and inputs <= _TILES_AHEAD * tile["BK"],
        num_warps=max(1, min(8, few * tile["BO"] * tile["BK"] // 512)), **tile, **early(),
    )  # fmt: skip
    return y


def _dense(m: Tensor | None) -> Tensor | None:
    return None if m is None else m.contiguous()


def _forward(a: Linear) -> list[Tensor]:
    return [by_kernel(a.x, a.weight, a.bias, a.x.dtype)]


add_backend(linear_op, forward=_forward)
