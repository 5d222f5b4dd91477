"""One step of a block with a Mamba in it: everything from the residual stream to the residual stream."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.int8 import check_quantized, dequantize
from dualform.core.shapes import check_real, check_tensors, once_per_shape
from dualform.ops.causal_conv1d import ConvUpdate, conv_update_op
from dualform.ops.normalize import check_norm, normalize, scale
from dualform.ops.op import Op
from dualform.ops.selective_scan import SelectiveUpdate, selective_update_op

_WHERE = "mamba_step"


def mamba_step(
    x: Tensor,
    conv: Tensor,
    h: Tensor,
    weights: "MambaWeights",
    *,
    eps: float = 1e-5,
    group: int = 0,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``x + out(y silu(z))`` of one element, where ``u, z = in(norm(x))``.

    ``u = silu(conv(u))``; ``dt, B, C = maps(u)``; ``h = exp(dt A) h + dt B u``; ``y = C h + D u``, where dt has been
    through its own map and softplus, and ``norm(x) = x / sqrt(mean(x^2) + eps)`` times a weight.

    The matrices may have 16 bits beside a float32 stream, or 8 with scales: then ``in_weight`` has, and one without
    scales is float32. The states may have 16 bits, which they keep; everything else has the dtype of x, in which all of
    it is computed, and nothing is rounded in between.

    Args:
        x: ``(B, M)``, the residual stream, float32 or float64.
        conv: ``(B, D, W - 1)``, the last inputs of the convolution.
        h: ``(B, D, N)``.
        weights: of the norm and the layer.
        eps: added to the mean square.
        group: for matrices of 8 bits, the neighbours in a row that share a scale, as in
            :func:`~dualform.ops.quantized_linear.quantized_linear`.
        in_place: whether the next conv and h may be written where these lie.

    Returns:
        The stream ``(B, M)``, and the next conv and h.

    Raises:
        ArgumentError: for shapes, dtypes or devices that do not fit together.

    References:
        Gu & Dao (2023), arXiv:2312.00752, section 3.4 and algorithm 2.
    """
    a = MambaStep(x, conv, h, *weights, eps, group, in_place)
    _check(a)
    y, conv, h = mamba_step_op(a)
    return y, conv, h


class MambaWeights(NamedTuple):
    """What a block with a Mamba is made of, by the names of its parameters."""

    norm: Tensor  # (M,)
    in_weight: Tensor  # (2 D, M), a matrix
    in_bias: Tensor | None  # (2 D,)
    conv_weight: Tensor  # (D, W)
    conv_bias: Tensor | None  # (D,)
    maps: Tensor  # (R + 2 N, D), a matrix: the bottleneck of the step, B and C
    steps: Tensor  # (D, R), a matrix
    dt_bias: Tensor  # (D,)
    A: Tensor  # (D, N)
    D: Tensor  # (D,)
    out_weight: Tensor  # (M, D), a matrix
    out_bias: Tensor | None  # (M,)
    in_scales: Tensor | None = None  # of the matrices where those have 8 bits, (rows, ceil(columns / group)) each
    maps_scales: Tensor | None = None
    steps_scales: Tensor | None = None
    out_scales: Tensor | None = None


class MambaStep(NamedTuple):
    """The arguments of the operator, as in :func:`mamba_step`."""

    x: Tensor
    conv: Tensor
    h: Tensor
    norm: Tensor
    in_weight: Tensor
    in_bias: Tensor | None
    conv_weight: Tensor
    conv_bias: Tensor | None
    maps: Tensor
    steps: Tensor
    dt_bias: Tensor
    A: Tensor
    D: Tensor
    out_weight: Tensor
    out_bias: Tensor | None
    in_scales: Tensor | None
    maps_scales: Tensor | None
    steps_scales: Tensor | None
    out_scales: Tensor | None
    eps: float
    group: int = 0
    in_place: bool = False


MATRICES = {"in_weight": "in_scales", "maps": "maps_scales", "steps": "steps_scales", "out_weight": "out_scales"}
_STATES = ("conv", "h", "k", "v")


def check_step_dtypes(
    where: str, a: Any, matrices: dict[str, str], complex: tuple[str, ...] = (), beside: tuple[str, ...] = ()
) -> None:
    """Matrices are of one dtype: that of x, 16 bits beside float32, or 8 with scales; states of that of x, or 16 bits.

    Where the first matrix has 8 bits, others may be float32, without scales.
    Everything else that is real has the dtype of x.

    Args:
        where: name of the function, first word of every error.
        a: the record.
        matrices: their names, and those of their scales; "" for one that has none.
        complex: names of what is complex.
        beside: names of what has a dtype of its own, which is not looked at.

    Raises:
        ArgumentError: names the tensor, its dtype and the one that was expected.
    """
    named = {name: m for name, m in a._asdict().items() if isinstance(m, Tensor) and name not in (*complex, *beside)}
    first, scales = next(iter(matrices)), {of for of in matrices.values() if of}
    x, matrix = named["x"].dtype, named[first].dtype
    if matrix == torch.int8 and scales:
        named = {name: m for name, m in named.items() if name not in scales}
        check_real(where, **{name: m for name, m in named.items() if name not in matrices})
        whole = {name: of for name, of in matrices.items() if named[name].dtype != x or getattr(a, of) is not None}
        check_quantized(where, a.group, **{name: (named[name], getattr(a, of)) for name, of in whole.items()})
        matrices = whole
    else:
        check_real(where, **named)
        if given := next((of for of in scales if of in named), None):
            raise ArgumentError(f"{where}: {given} is given, and {first} is {matrix}, expected torch.int8")
    if x not in (torch.float32, torch.float64):
        raise ArgumentError(f"{where}: x is {x}, expected float32 or float64")
    fewer = "8 or 16 bits" if scales else "16 bits"
    if matrix != x and (x != torch.float32 or matrix.itemsize > 2):
        raise ArgumentError(f"{where}: {first} is {matrix}, expected {x}, or {fewer} beside float32")
    states = [name for name in _STATES if name in named]
    for name in states:
        if named[name].dtype != x and (x != torch.float32 or named[name].dtype.itemsize > 2):
            raise ArgumentError(f"{where}: {name} is {named[name].dtype}, expected {x}, or 16 bits beside float32")
    for name, m in named.items():
        want = matrix if name in matrices else named[states[0]].dtype if name in states else x
        if m.dtype != want:
            raise ArgumentError(f"{where}: {name} is {m.dtype}, expected {want}")
    for name in complex:
        m, want = getattr(a, name), x.to_complex()
        if m.dtype != want:
            raise ArgumentError(f"{where}: {name} is {m.dtype}, expected {want}")


_TENSORS = MambaStep._fields.index("eps")


def _check(a: MambaStep) -> None:
    check_norm(_WHERE, a.eps)
    _check_tensors(a.group, *a[:_TENSORS])


@once_per_shape
def _check_tensors(group: int, *tensors: Tensor | None) -> None:
    a = MambaStep._make((*tensors, 0.0, group, False))
    sizes = check_tensors(
        _WHERE,
        x=(a.x, "B M"),
        conv=(a.conv, "B D *"),
        h=(a.h, "B D N"),
        norm=(a.norm, "M"),
        in_weight=(a.in_weight, "* M"),
        in_bias=(a.in_bias, "? *"),
        conv_weight=(a.conv_weight, "D W"),
        conv_bias=(a.conv_bias, "? D"),
        maps=(a.maps, "* D"),
        steps=(a.steps, "D R"),
        dt_bias=(a.dt_bias, "D"),
        A=(a.A, "D N"),
        D=(a.D, "D"),
        out_weight=(a.out_weight, "M D"),
        out_bias=(a.out_bias, "? M"),
        **{of: (getattr(a, of), "? * *") for of in MATRICES.values()},
    )
    D, N, R, W = (sizes[letter] for letter in "DNRW")
    expected = {
        "conv": (a.conv, 2, W - 1),
        "in_weight": (a.in_weight, 0, 2 * D),
        "in_bias": (a.in_bias, 0, 2 * D),
        "maps": (a.maps, 0, R + 2 * N),
    }
    check_axes(_WHERE, expected)
    if W < 1 or 0 in (D, N, R, sizes["M"]):
        raise ArgumentError(f"{_WHERE}: a size of the weights is 0: M, D, N, R, W = {sizes['M']}, {D}, {N}, {R}, {W}")
    check_step_dtypes(_WHERE, a, MATRICES)


def check_axes(where: str, expected: dict[str, tuple[Tensor | None, int, int]]) -> None:
    """That axes have sizes which follow from others.

    Raises:
        ArgumentError: names the tensor, its shape and the size that was expected.
    """
    for name, (m, axis, size) in expected.items():
        if m is not None and m.shape[axis] != size:
            raise ArgumentError(f"{where}: {name} has shape {tuple(m.shape)}, expected {size} on axis {axis}")


def _reference(a: MambaStep) -> tuple[Tensor, Tensor, Tensor]:
    dtype, states = a.x.dtype, a.A.shape[1]

    def of(x: Tensor, matrix: Tensor, scales: Tensor | None, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, widened(matrix, scales, a.group, dtype), bias)

    u, z = of(scale(normalize(a.x, 1, a.eps, False), a.norm, None), a.in_weight, a.in_scales, a.in_bias).chunk(2, -1)
    u, conv = conv_update_op.reference(convolution(u, a.conv, a.conv_weight, a.conv_bias))
    low, B, C = of(u, a.maps, a.maps_scales).split([a.steps.shape[1], states, states], -1)
    dt, B, C = of(low, a.steps, a.steps_scales), B[:, None], C[:, None]
    y, h = selective_update_op.reference(SelectiveUpdate(a.h, u, dt, a.A, B, C, a.D, z, a.dt_bias, True, None, None))
    return a.x + of(y, a.out_weight, a.out_scales, a.out_bias), conv.to(a.conv.dtype), h.to(a.h.dtype)


def widened(matrix: Tensor, scales: Tensor | None, group: int, dtype: torch.dtype) -> Tensor:
    """A matrix of a step in the dtype that is computed in."""
    return matrix.to(dtype) if scales is None else dequantize(matrix, scales, group, dtype)


def convolution(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None) -> ConvUpdate:
    """The record of one step of a convolution with SiLU."""
    return ConvUpdate(x, state, weight, bias, True, None, None, None)


def _fake(a: MambaStep) -> list[Tensor]:
    return [m.new_empty(m.shape) for m in (a.x, a.conv, a.h)]


mamba_step_op = Op(_WHERE, MambaStep, _reference, fake=_fake, check=_check, outputs=3, stepwise=True)
