"""Steps of whole blocks on a GPU, in few kernels.

Of few rows, products are made by a kernel that reads the matrix once and goes on with the convolution or the residual
stream: five kernels for a Mamba-2, six for a Mamba. Of more rows they are PyTorch's. What a matrix of 16 bits is
multiplied with has its dtype, as in the layers themselves.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.ops.causal_conv1d import ConvUpdate
from dualform.ops.gated_norm import GatedNorm
from dualform.ops.layout import inner_contiguous
from dualform.ops.linear import Linear, linear_op
from dualform.ops.mamba2_step import Mamba2Step, mamba2_step_op
from dualform.ops.mamba_step import MambaStep, mamba_step_op
from dualform.ops.selective_scan import SelectiveUpdate
from dualform.ops.triton.norm import gated_norm
from dualform.ops.triton.step import MOST_STATES, convolve, selective_update
from dualform.ops.triton.support import add_backend, blocks, kernels, power_of_two

_FEW = 4  # rows of a tile of the kernel


class _Conv(NamedTuple):
    """The convolution of the outputs from ``first`` on, and memory for its next state."""

    state: Tensor
    weight: Tensor
    bias: Tensor | None
    first: int
    after: Tensor


def _project(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, stream: Tensor | None = None
) -> Tensor:
    """``W x + b`` ``(B, O)``, or the stream and that."""
    if len(x) <= _FEW:
        return _by_kernel(x, weight, bias, dtype, stream=stream)
    y = _by_library(x, weight, bias)
    return y if stream is None else stream + y


def _convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, conv: _Conv
) -> tuple[Tensor, Tensor, Tensor]:
    """``W x + b`` in three: the outputs before the convolution's, what it makes of its own, and those behind them."""
    few = len(x) <= _FEW
    made = _by_kernel(x, weight, bias, dtype, conv) if few else _by_library(x, weight, bias)
    channels = conv.state.shape[1]
    before, through, behind = made.split([conv.first, channels, made.shape[1] - conv.first - channels], -1)
    if not few:
        given = ConvUpdate(through, conv.state, conv.weight, conv.bias, True, conv.after, None, None)
        through = convolve(given)[0]
    return before, through, behind


def _by_library(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))


def _by_kernel(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, conv: _Conv | None = None,
    stream: Tensor | None = None,
) -> Tensor:  # fmt: skip
    x, (rows, inputs), outputs = inner_contiguous(x), x.shape, weight.shape[0]
    y = x.new_empty(rows, outputs, dtype=dtype)
    if y.numel() == 0:
        return y
    few, wide = min(_FEW, power_of_two(rows)), 256 if inputs < 1024 else 512 if inputs < 4096 else 1024
    tile = {"BR": few, "BO": 4 if outputs >= 2048 else 2, "BK": min(wide, power_of_two(inputs))}
    kernels("project").project[(blocks(outputs, tile["BO"]), blocks(rows, few))](
        x, weight.contiguous(), _dense(bias), _dense(stream), _dense(conv and conv.state),
        _dense(conv and conv.weight), _dense(conv and conv.bias), conv and conv.after, y,
        rows, outputs, conv.first if conv else 0, conv.state.shape[1] if conv else 0, x.stride(0),
        K=inputs, TAPS=conv.weight.shape[1] if conv else 0, WIDE=torch.float64 in (x.dtype, weight.dtype),
        **tile, num_warps=max(1, min(8, few * tile["BO"] * tile["BK"] // 512)),
    )  # fmt: skip
    return y


def _dense(m: Tensor | None) -> Tensor | None:
    return None if m is None else m.contiguous()


def _mamba2(a: Mamba2Step) -> list[Tensor]:
    rows, heads, width, states = a.h.shape
    inner, maps, matrix = heads * width, a.groups * states, a.in_weight.dtype
    conv, h = _next(a)
    x = _normed(a.x, a.norm, a.eps, matrix)
    into = _Conv(a.conv, a.conv_weight, a.conv_bias, inner, conv)
    z, uBC, dt = _convolved(x, a.in_weight, a.in_bias, a.x.dtype, into)
    u, B, C = uBC.split([inner, maps, maps], -1)
    y, h = selective_update(
        SelectiveUpdate(
            a.h, u.unflatten(-1, (heads, width)), dt[..., None], a.A[:, None, None],
            B.unflatten(-1, (a.groups, -1)), C.unflatten(-1, (a.groups, -1)), a.D[:, None], None, a.dt_bias[:, None],
            True, h, None,
        ),
        limits=(a.low, a.high),
    )  # fmt: skip
    y = y.view(rows, inner)
    y = y * F.silu(z) if a.gate is None else _normed(y, a.gate, a.gate_eps, matrix, z, a.groups, a.norm_before_gate)
    return [_project(y, a.out_weight, a.out_bias, a.x.dtype, a.x), conv, h]


def _mamba(a: MambaStep) -> list[Tensor]:
    states, dtype = a.h.shape[2], a.x.dtype
    conv, h = _next(a)
    x = _normed(a.x, a.norm, a.eps, a.in_weight.dtype)
    into = _Conv(a.conv, a.conv_weight, a.conv_bias, 0, conv)
    _, u, z = _convolved(x, a.in_weight, a.in_bias, dtype, into)
    low, B, C = _project(u, a.maps, None, dtype).split([a.steps.shape[1], states, states], -1)
    dt = _by_kernel(low, a.steps, None, dtype)
    y, h = selective_update(SelectiveUpdate(a.h, u, dt, a.A, B[:, None], C[:, None], a.D, z, a.dt_bias, True, h, None))
    return [_project(y, a.out_weight, a.out_bias, dtype, a.x), conv, h]


def _normed(
    x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, z: Tensor | None = None, groups: int = 1,
    norm_before_gate: bool = False,
) -> Tensor:  # fmt: skip
    return gated_norm(GatedNorm(x, weight, None, z, groups, eps, False, norm_before_gate, dtype))[0]


def _next(a: MambaStep | Mamba2Step) -> tuple[Tensor, Tensor]:
    """Memory for the next states: that of the present ones, where it may be written to."""
    if a.in_place and a.conv.is_contiguous() and a.h.is_contiguous():
        return a.conv, a.h
    return torch.empty_like(a.conv, memory_format=torch.contiguous_format), a.h.new_empty(a.h.shape)


def _linear(a: Linear) -> list[Tensor]:
    return [_by_kernel(a.x, a.weight, a.bias, a.x.dtype)]


def _refuses(a: MambaStep | Mamba2Step) -> str | None:
    if a.h.shape[-1] > MOST_STATES:
        return f"N is {a.h.shape[-1]}, expected at most {MOST_STATES}"
    return None


add_backend(mamba_step_op, forward=_mamba, refuses=_refuses)
add_backend(mamba2_step_op, forward=_mamba2, refuses=_refuses)
add_backend(linear_op, forward=_linear)
