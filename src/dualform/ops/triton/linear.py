"""A linear map in Triton, alone or in a step: behind a norm, before a convolution or the residual stream."""

from typing import NamedTuple

import torch
from torch import Tensor

from dualform.ops.layout import inner_contiguous
from dualform.ops.linear import Linear, linear_op
from dualform.ops.triton.support import INTERPRETED, add_backend, blocks, early, kernels, power_of_two, warps

_FEW = 2  # rows of a tile: up to so many, the matrix is read once
_LARGE = 2**22  # numbers of a matrix, above which PyTorch is faster for two rows and more
_THREADS = 128  # of a program
_COLUMNS = 512  # of a tile
_TALL = 8  # outputs of a program, times its rows
_HELD = 128  # numbers of the matrix that a thread holds while it waits
_MANY = 128  # rows that products of tiles are for


class Norm(NamedTuple):
    """The RMS norm before a map."""

    weight: Tensor
    eps: float


class Convolution(NamedTuple):
    """The convolution of the outputs from ``first`` on, and memory for its next state."""

    state: Tensor
    weight: Tensor
    bias: Tensor | None
    first: int
    after: Tensor


def few(rows: int, weight: Tensor) -> bool:
    """Whether rows are so few that :func:`by_kernel` is the fastest way to multiply a matrix with them."""
    return rows <= 1 or (rows <= _FEW and weight.numel() <= _LARGE)


def by_kernel(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, conv: Convolution | None = None,
    stream: Tensor | None = None, *, norm: Norm | None = None, ahead: bool = False,
) -> Tensor:  # fmt: skip
    """``W norm(x) + b`` ``(B, O)``: some of it convolved, or added to the stream.

    ``ahead`` says that the kernel before this one writes nothing but x of what this one reads, which does so while that
    kernel runs.
    """
    x, (rows, inputs), outputs = inner_contiguous(x), x.shape, weight.shape[0]
    y = x.new_empty(rows, outputs, dtype=dtype)
    if y.numel() == 0:
        return y
    together, wide = min(_FEW, power_of_two(rows)), min(_COLUMNS, power_of_two(inputs))
    tall = (_TALL if outputs >= 2048 else _TALL // 2) // together
    kernels("project").project[(blocks(outputs, tall), blocks(rows, together))](
        x, _dense(norm and norm.weight), weight.contiguous(), _dense(bias), _dense(stream), _dense(conv and conv.state),
        _dense(conv and conv.weight), _dense(conv and conv.bias), conv and conv.after, y,
        rows, outputs, conv.first if conv else 0, conv.state.shape[1] if conv else 0, x.stride(0),
        norm.eps if norm else 0.0, K=inputs, TAPS=conv.weight.shape[1] if conv else 0,
        WIDE=torch.float64 in (x.dtype, weight.dtype), AHEAD=ahead,
        HELD=ahead and inputs * tall * together <= _HELD * _THREADS,
        BR=together, BO=tall, BK=wide, num_warps=warps(_THREADS), **early(),
    )  # fmt: skip
    return y


def by_tiles(
    x: Tensor, weight: Tensor, bias: Tensor | None, stream: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor | None:
    """``W x + b`` ``(B, O)`` of x and a matrix of 16 bits, or the stream and that; None where PyTorch is faster.

    The kernel before this one must not write the matrix, which is asked for while that runs.
    """
    x, (rows, inputs), outputs = inner_contiguous(x), x.shape, weight.shape[0]
    halves = (torch.float16,) if INTERPRETED else (torch.float16, torch.bfloat16)
    if not 0 < rows <= _MANY or weight.numel() > _LARGE or x.dtype not in halves or weight.dtype != x.dtype:
        return None
    y = (
        x.new_empty(rows, outputs, dtype=dtype)
        if stream is None
        else torch.empty(stream.shape, dtype=stream.dtype, device=x.device)
    )
    high, low = (64, 32) if outputs >= 2048 else (32, 16)
    tile = {"BR": min(high, max(16, power_of_two(rows))), "BO": low, "BK": min(64, max(16, power_of_two(inputs)))}
    kernels("project").project_tiles[(blocks(outputs, tile["BO"]), blocks(rows, tile["BR"]))](
        x, weight.contiguous(), _dense(bias), _dense(stream), y, rows, outputs, x.stride(0),
        K=inputs, LINES=power_of_two(min(16, blocks(inputs, 64))), STAGES=8, **tile,
        **(early() if stream is None else {"EARLY": False}),  # behind an update, to start early takes longer
    )  # fmt: skip
    return y


def _dense(m: Tensor | None) -> Tensor | None:
    return None if m is None else m.contiguous()


def _forward(a: Linear) -> list[Tensor]:
    return [by_kernel(a.x, a.weight, a.bias, a.x.dtype)]


add_backend(linear_op, forward=_forward)
