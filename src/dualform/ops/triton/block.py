"""Steps of whole blocks on a GPU, in few kernels.

Of one row, or two, products are made by a kernel that begins with the norm, reads the matrix once, and goes on with the
convolution or the residual stream: four kernels for a block with a Mamba, three for one with a Mamba-2. Of more rows,
small products are made of tiles, and large ones are PyTorch's; what a matrix of 16 bits is multiplied with then has its
dtype, as in the layers themselves. A kernel reads its parameters and states while the one before it runs: within a
block no kernel writes what another reads in this way.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.ops.causal_conv1d import ConvUpdate
from dualform.ops.gated_norm import GatedNorm
from dualform.ops.mamba2_step import Mamba2Step, mamba2_step_op
from dualform.ops.mamba_step import MambaStep, mamba_step_op
from dualform.ops.selective_scan import SelectiveUpdate
from dualform.ops.triton.linear import Convolution, Norm, by_kernel, by_tiles, few
from dualform.ops.triton.norm import gated_norm
from dualform.ops.triton.step import MOST_STATES, add, convolve, mamba2_update, selective_update
from dualform.ops.triton.support import add_backend


def _mamba2(a: Mamba2Step) -> list[Tensor]:
    _, heads, width, states = a.h.shape
    inner, maps, matrix = heads * width, a.groups * states, a.in_weight.dtype
    conv, h = _next(a)
    into = Convolution(a.conv, a.conv_weight, a.conv_bias, inner, conv)
    z, uBC, dt = _convolved(a.x, Norm(a.norm, a.eps), a.in_weight, a.in_bias, into)
    u, B, C = uBC.split([inner, maps, maps], -1)
    behind = a.gate is not None and a.norm_before_gate  # whether the gate comes behind the norm
    norm = None if a.gate is None else Norm(a.gate, a.gate_eps)
    dtype = a.x.dtype if norm is not None or few(len(u), a.out_weight) else matrix  # of what the product out takes
    y = mamba2_update(
        a.h, u, dt, a.A, B, C, a.D, None if behind else z, a.dt_bias, h, dtype, a.groups, (a.low, a.high)
    )  # fmt: skip
    if norm is not None and (behind or a.groups > 1 or not few(len(y), a.out_weight)):
        y, norm = _normed(y, norm, matrix, z if behind else None, a.groups), None
    return [_projected(y, a.out_weight, a.out_bias, a.x, norm), conv, h]


def _mamba(a: MambaStep) -> list[Tensor]:
    states, rank = a.h.shape[2], a.steps.shape[1]
    conv, h = _next(a)
    into = Convolution(a.conv, a.conv_weight, a.conv_bias, 0, conv)
    _, u, z = _convolved(a.x, Norm(a.norm, a.eps), a.in_weight, a.in_bias, into)
    alone = few(len(u), a.maps)
    made = by_kernel(u, a.maps, None, a.x.dtype, ahead=True) if alone else _by_library(u, a.maps, None)
    low, B, C = made.split([rank, states, states], -1)
    dt = None if alone else by_tiles(low, a.steps, None, dtype=a.x.dtype)  # once for all rows
    low, steps = (low, a.steps) if dt is None else (dt, None)
    update = SelectiveUpdate(a.h, u, low, a.A, B[:, None], C[:, None], a.D, z, a.dt_bias, True, h, None)
    y, h = selective_update(update, steps=steps, ahead=True)
    return [_projected(y, a.out_weight, a.out_bias, a.x), conv, h]


def _convolved(
    x: Tensor, norm: Norm, weight: Tensor, bias: Tensor | None, conv: Convolution
) -> tuple[Tensor, Tensor, Tensor]:
    """``W norm(x) + b`` in three: the outputs before the convolution's, what it makes of its own, and those behind."""
    channels, together = conv.state.shape[1], few(len(x), weight)
    if together:
        made = by_kernel(x, weight, bias, x.dtype, conv, norm=norm, ahead=True)
    else:
        made = _product(_normed(x, norm, weight.dtype), weight, bias)
    before, through, behind = made.split([conv.first, channels, made.shape[1] - conv.first - channels], -1)
    if not together:
        given = ConvUpdate(through, conv.state, conv.weight, conv.bias, True, conv.after, None, None)
        through = convolve(given, ahead=True)[0]
    return before, through, behind


def _projected(y: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, norm: Norm | None = None) -> Tensor:
    """The stream x and ``W norm(y) + b``."""
    if few(len(y), weight):
        return by_kernel(y, weight, bias, x.dtype, stream=x, norm=norm, ahead=True)
    made = by_tiles(y.to(weight.dtype), weight, bias, x)
    return add(x, _by_library(y, weight, bias)) if made is None else made


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``W x + b`` of many rows."""
    made = by_tiles(x, weight, bias)
    return _by_library(x, weight, bias) if made is None else made


def _by_library(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))


def _normed(x: Tensor, norm: Norm, dtype: torch.dtype, z: Tensor | None = None, groups: int = 1) -> Tensor:
    """The norm in so many groups, and behind it the gate, if there is one."""
    return gated_norm(GatedNorm(x, norm.weight, None, z, groups, norm.eps, False, True, dtype))[0]


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
