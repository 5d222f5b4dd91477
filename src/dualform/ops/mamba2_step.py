"""One step of a block with a Mamba-2 in it: everything from the residual stream to the residual stream."""

import math
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.shapes import check_tensors, once_per_shape
from dualform.ops.causal_conv1d import conv_update_op
from dualform.ops.mamba_step import check_axes, check_step_dtypes, convolution, widened
from dualform.ops.normalize import check_norm, normalize, scale
from dualform.ops.op import Op
from dualform.ops.selective_scan import SelectiveUpdate, selective_update_op
from dualform.ops.ssd import limit_step

_WHERE = "mamba2_step"


def mamba2_step(
    x: Tensor,
    conv: Tensor,
    h: Tensor,
    weights: "Mamba2Weights",
    *,
    groups: int = 1,
    eps: float = 1e-5,
    gate_eps: float = 1e-5,
    norm_before_gate: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    group: int = 0,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``x + out(norm(y silu(z)))`` of one element, where ``z, uBC, dt = in(norm(x))``.

    ``u, B, C = silu(conv(uBC))``; ``dt = softplus(dt + bias)`` within its limits; ``h = exp(dt A) h + dt u B^T``;
    ``y = h C + D u``, and ``norm(x) = x / sqrt(mean(x^2) + eps)`` times a weight, the second one over each group.

    The matrices may have 16 bits beside a float32 stream, or 8 with scales, and the states may have 16, which they
    keep; everything else has the dtype of x, in which all of it is computed, and nothing is rounded in between.

    Args:
        x: ``(B, M)``, the residual stream, float32 or float64.
        conv: ``(B, H P + 2 G N, W - 1)``, the last inputs of the convolution.
        h: ``(B, H, P, N)``.
        weights: of the norm and the layer.
        groups: G, which divides H.
        eps: of the norm of x.
        gate_eps: of the norm at the gate.
        norm_before_gate: whether the gate multiplies the norm of y, ``norm(y) silu(z)``.
        dt_limit: bounds of dt.
        group: for matrices of 8 bits, the neighbours in a row that share a scale, as in
            :func:`~dualform.ops.quantized_linear.quantized_linear`.
        in_place: whether the next conv and h may be written where these lie.

    Returns:
        The stream ``(B, M)``, and the next conv and h.

    Raises:
        ArgumentError: for shapes, dtypes or devices that do not fit together.

    References:
        Dao & Gu (2024), arXiv:2405.21060, section 7.1.
    """
    low, high = dt_limit
    a = Mamba2Step(x, conv, h, *weights, groups, eps, gate_eps, norm_before_gate, low, high, group, in_place)
    _check(a)
    y, conv, h = mamba2_step_op(a)
    return y, conv, h


class Mamba2Weights(NamedTuple):
    """What a block with a Mamba-2 is made of, by the names of its parameters."""

    norm: Tensor  # (M,)
    in_weight: Tensor  # (2 H P + 2 G N + H, M), a matrix
    in_bias: Tensor | None  # (2 H P + 2 G N + H,)
    conv_weight: Tensor  # (H P + 2 G N, W)
    conv_bias: Tensor | None  # (H P + 2 G N,)
    dt_bias: Tensor  # (H,)
    A: Tensor  # (H,)
    D: Tensor  # (H,)
    gate: Tensor | None  # (H P,), the weight of the norm at the gate; None where there is no norm
    out_weight: Tensor  # (M, H P), a matrix
    out_bias: Tensor | None  # (M,)
    in_scales: Tensor | None = None  # of the matrices where those have 8 bits, (rows, ceil(columns / group)) each
    out_scales: Tensor | None = None


class Mamba2Step(NamedTuple):
    """The arguments of the operator, as in :func:`mamba2_step`."""

    x: Tensor
    conv: Tensor
    h: Tensor
    norm: Tensor
    in_weight: Tensor
    in_bias: Tensor | None
    conv_weight: Tensor
    conv_bias: Tensor | None
    dt_bias: Tensor
    A: Tensor
    D: Tensor
    gate: Tensor | None
    out_weight: Tensor
    out_bias: Tensor | None
    in_scales: Tensor | None
    out_scales: Tensor | None
    groups: int
    eps: float
    gate_eps: float
    norm_before_gate: bool
    low: float
    high: float
    group: int = 0
    in_place: bool = False


MATRICES = {"in_weight": "in_scales", "out_weight": "out_scales"}
_TENSORS = Mamba2Step._fields.index("groups")


def _check(a: Mamba2Step) -> None:
    for eps in (a.eps, a.gate_eps):
        check_norm(_WHERE, eps)
    if not 0 <= a.low <= a.high:
        raise ArgumentError(f"{_WHERE}: dt_limit is {(a.low, a.high)}, expected two numbers from 0 that do not fall")
    _check_tensors(a.groups, a.group, *a[:_TENSORS])


@once_per_shape
def _check_tensors(groups: int, group: int, *tensors: Tensor | None) -> None:
    a = Mamba2Step._make((*tensors, groups, 0.0, 0.0, False, 0.0, 0.0, group, False))
    sizes = check_tensors(
        _WHERE,
        x=(a.x, "B M"),
        conv=(a.conv, "B * *"),
        h=(a.h, "B H P N"),
        norm=(a.norm, "M"),
        in_weight=(a.in_weight, "* M"),
        in_bias=(a.in_bias, "? *"),
        conv_weight=(a.conv_weight, "* W"),
        conv_bias=(a.conv_bias, "? *"),
        dt_bias=(a.dt_bias, "H"),
        A=(a.A, "H"),
        D=(a.D, "H"),
        gate=(a.gate, "? *"),
        out_weight=(a.out_weight, "M *"),
        out_bias=(a.out_bias, "? M"),
        **{of: (getattr(a, of), "? * *") for of in MATRICES.values()},
    )
    H, P, N, W = (sizes[letter] for letter in "HPNW")
    if W < 1 or 0 in (H, P, N, sizes["M"]):
        raise ArgumentError(f"{_WHERE}: a size of the weights is 0: M, H, P, N, W = {sizes['M']}, {H}, {P}, {N}, {W}")
    if not isinstance(groups, int) or groups < 1 or H % groups:
        raise ArgumentError(f"{_WHERE}: groups is {groups}, which does not divide H = {H}")
    inner = H * P
    through = inner + 2 * groups * N
    expected = {
        "conv": (a.conv, 1, through),
        "in_weight": (a.in_weight, 0, inner + through + H),
        "in_bias": (a.in_bias, 0, inner + through + H),
        "conv_weight": (a.conv_weight, 0, through),
        "conv_bias": (a.conv_bias, 0, through),
        "gate": (a.gate, 0, inner),
        "out_weight": (a.out_weight, 1, inner),
    }
    check_axes(_WHERE, expected)
    check_axes(_WHERE, {"conv": (a.conv, 2, W - 1)})
    check_step_dtypes(_WHERE, a, MATRICES)


def _reference(a: Mamba2Step) -> tuple[Tensor, Tensor, Tensor]:
    dtype, (heads, width, states) = a.x.dtype, a.h.shape[1:]
    inner, maps = heads * width, a.groups * states

    def of(x: Tensor, matrix: Tensor, scales: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.linear(x, widened(matrix, scales, a.group, dtype), bias)

    made = of(scale(normalize(a.x, 1, a.eps, False), a.norm, None), a.in_weight, a.in_scales, a.in_bias)
    z, uBC, dt = made.split([inner, inner + 2 * maps, heads], -1)
    uBC, conv = conv_update_op.reference(convolution(uBC, a.conv, a.conv_weight, a.conv_bias))
    u, B, C = uBC.split([inner, maps, maps], -1)
    dt = limit_step(dt, a.dt_bias, True, (a.low, a.high))[..., None]
    u, B, C = u.unflatten(-1, (heads, width)), B.unflatten(-1, (a.groups, -1)), C.unflatten(-1, (a.groups, -1))
    A, D = a.A[:, None, None], a.D[:, None]
    y, h = selective_update_op.reference(SelectiveUpdate(a.h, u, dt, A, B, C, D, None, None, False, None, None))
    y, gate = y.flatten(1), F.silu(z)
    y = y if a.norm_before_gate else y * gate
    y = y if a.gate is None else scale(normalize(y, a.groups, a.gate_eps, False), a.gate, None)
    y = y * gate if a.norm_before_gate else y
    return a.x + of(y, a.out_weight, a.out_scales, a.out_bias), conv.to(a.conv.dtype), h.to(a.h.dtype)


def _fake(a: Mamba2Step) -> list[Tensor]:
    return [m.new_empty(m.shape) for m in (a.x, a.conv, a.h)]


mamba2_step_op = Op(_WHERE, Mamba2Step, _reference, fake=_fake, check=_check, outputs=3, stepwise=True)
