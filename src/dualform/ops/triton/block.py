"""Steps of whole blocks on a GPU, in few kernels.

Of few rows, products are made by a kernel that reads the matrix once and goes on with the convolution or the residual
stream: five kernels for a block of either kind. Of more rows they are PyTorch's. What a matrix of 16 bits is multiplied
with has its dtype, as in the layers themselves. A kernel reads its parameters and states while the one before it runs:
within a block no kernel writes what another reads in this way.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.ops.causal_conv1d import ConvUpdate
from dualform.ops.gated_norm import GatedNorm
from dualform.ops.mamba2_step import Mamba2Step, mamba2_step_op
from dualform.ops.mamba_step import MambaStep, mamba_step_op
from dualform.ops.selective_scan import SelectiveUpdate
from dualform.ops.triton.linear import FEW, Convolution, by_kernel
from dualform.ops.triton.norm import gated_norm
from dualform.ops.triton.step import MOST_STATES, add, convolve, selective_update
from dualform.ops.triton.support import add_backend


def _project(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, stream: Tensor | None = None
) -> Tensor:
    """``W x + b`` ``(B, O)``, or the stream and that."""
    if len(x) <= FEW:
        return by_kernel(x, weight, bias, dtype, stream=stream, ahead=True)
    y = _by_library(x, weight, bias)
    return y if stream is None else add(stream, y)


def _convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, conv: Convolution
) -> tuple[Tensor, Tensor, Tensor]:
    """``W x + b`` in three: the outputs before the convolution's, what it makes of its own, and those behind them."""
    few = len(x) <= FEW
    made = by_kernel(x, weight, bias, dtype, conv, ahead=True) if few else _by_library(x, weight, bias)
    channels = conv.state.shape[1]
    before, through, behind = made.split([conv.first, channels, made.shape[1] - conv.first - channels], -1)
    if not few:
        given = ConvUpdate(through, conv.state, conv.weight, conv.bias, True, conv.after, None, None)
        through = convolve(given)[0]
    return before, through, behind


def _by_library(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))


def _mamba2(a: Mamba2Step) -> list[Tensor]:
    rows, heads, width, states = a.h.shape
    inner, maps, matrix = heads * width, a.groups * states, a.in_weight.dtype
    conv, h = _next(a)
    x = _normed(a.x, a.norm, a.eps, matrix)
    into = Convolution(a.conv, a.conv_weight, a.conv_bias, inner, conv)
    z, uBC, dt = _convolved(x, a.in_weight, a.in_bias, a.x.dtype, into)
    u, B, C = uBC.split([inner, maps, maps], -1)
    y, h = selective_update(
        SelectiveUpdate(
            a.h, u.unflatten(-1, (heads, width)), dt[..., None], a.A[:, None, None],
            B.unflatten(-1, (a.groups, -1)), C.unflatten(-1, (a.groups, -1)), a.D[:, None], None, a.dt_bias[:, None],
            True, h, None,
        ),
        limits=(a.low, a.high), ahead=True,
    )  # fmt: skip
    y = y.view(rows, inner)
    y = y * F.silu(z) if a.gate is None else _normed(y, a.gate, a.gate_eps, matrix, z, a.groups, a.norm_before_gate)
    return [_project(y, a.out_weight, a.out_bias, a.x.dtype, a.x), conv, h]


def _mamba(a: MambaStep) -> list[Tensor]:
    states, dtype = a.h.shape[2], a.x.dtype
    conv, h = _next(a)
    x = _normed(a.x, a.norm, a.eps, a.in_weight.dtype)
    into = Convolution(a.conv, a.conv_weight, a.conv_bias, 0, conv)
    _, u, z = _convolved(x, a.in_weight, a.in_bias, dtype, into)
    low, B, C = _project(u, a.maps, None, dtype).split([a.steps.shape[1], states, states], -1)
    update = SelectiveUpdate(a.h, u, low, a.A, B[:, None], C[:, None], a.D, z, a.dt_bias, True, h, None)
    y, h = selective_update(update, steps=a.steps, ahead=True)
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


def _refuses(a: MambaStep | Mamba2Step) -> str | None:
    if a.h.shape[-1] > MOST_STATES:
        return f"N is {a.h.shape[-1]}, expected at most {MOST_STATES}"
    return f"it cannot read {a.in_weight.dtype}" if a.in_weight.dtype == torch.int8 else None


add_backend(mamba_step_op, forward=_mamba, refuses=_refuses)
add_backend(mamba2_step_op, forward=_mamba2, refuses=_refuses)
