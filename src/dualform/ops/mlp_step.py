"""One step of a block with a feed-forward in it: everything from the residual stream to the residual stream."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.shapes import check_tensors, once_per_shape
from dualform.ops.mamba_step import check_axes, check_step_dtypes, widened
from dualform.ops.normalize import check_norm, normalize, scale
from dualform.ops.op import Op

_WHERE = "mlp_step"


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": _relu2,
}
"""The functions between the matrices of a feed-forward, by the names that configs use.

``silu`` is ``x s(x)`` with the logistic function s; ``gelu_tanh`` the approximation of ``gelu`` by a tanh; ``relu2``
the square of ``relu``: So et al. (2021), arXiv:2109.08668."""


def mlp_step(
    x: Tensor,
    weights: "MLPWeights",
    *,
    gated: bool = True,
    activation: str = "silu",
    factor: float = 1.0,
    eps: float = 1e-5,
    group: int = 0,
) -> Tensor:
    """``x + down(f(factor gate(u)) up(u))`` of one element, where ``u = norm(x)``.

    Without a gate it is ``x + down(f(factor up(u)))``, and ``norm(x) = x / sqrt(mean(x^2) + eps)`` times a weight.

    The matrices may have 16 bits beside a float32 stream, or 8 with scales; everything else has the dtype of x, in
    which all of it is computed, and nothing is rounded in between.

    Args:
        x: ``(B, M)``, the residual stream, float32 or float64.
        weights: of the norm and the layer.
        gated: whether the first half of the rows of ``in_weight`` is that of a gate.
        activation: f, one of :data:`ACTIVATIONS`.
        factor: of what the activation reads.
        eps: added to the mean square.
        group: for matrices of 8 bits, the neighbours in a row that share a scale, as in
            :func:`~dualform.ops.quantized_linear.quantized_linear`.

    Returns:
        The stream ``(B, M)``.

    Raises:
        ArgumentError: for shapes, dtypes or devices that do not fit together, or an activation that does not exist.

    References:
        Shazeer (2020), arXiv:2002.05202, equations 1 to 6.
    """
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ArgumentError(f"{_WHERE}: activation is {activation!r}, expected one of {known}")
    a = MLPStep(x, *weights, gated, list(ACTIVATIONS).index(activation), factor, eps, group)
    _check(a)
    return mlp_step_op(a)[0]


class MLPWeights(NamedTuple):
    """What a block with a feed-forward is made of."""

    norm: Tensor  # (M,)
    in_weight: Tensor  # (2 D, M), or without a gate (D, M), a matrix
    in_bias: Tensor | None  # as many as it has rows
    out_weight: Tensor  # (M, D), a matrix
    out_bias: Tensor | None  # (M,)
    in_scales: Tensor | None = None  # of the matrices where those have 8 bits, (rows, ceil(columns / group)) each
    out_scales: Tensor | None = None


class MLPStep(NamedTuple):
    """The arguments of the operator, as in :func:`mlp_step`."""

    x: Tensor
    norm: Tensor
    in_weight: Tensor
    in_bias: Tensor | None
    out_weight: Tensor
    out_bias: Tensor | None
    in_scales: Tensor | None
    out_scales: Tensor | None
    gated: bool
    activation: int  # its place among the activations
    factor: float
    eps: float
    group: int = 0
    in_place: bool = False  # there is nothing that it could write to


MATRICES = {"in_weight": "in_scales", "out_weight": "out_scales"}
_TENSORS = MLPStep._fields.index("gated")


def _check(a: MLPStep) -> None:
    check_norm(_WHERE, a.eps)
    if not math.isfinite(a.factor) or a.activation not in range(len(ACTIVATIONS)):
        came = f"factor is {a.factor}, and activation {a.activation}"
        raise ArgumentError(f"{_WHERE}: {came}, expected a finite number, and one from 0 to {len(ACTIVATIONS) - 1}")
    _check_tensors(a.gated, a.group, *a[:_TENSORS])


@once_per_shape
def _check_tensors(gated: bool, group: int, *tensors: Tensor | None) -> None:
    a = MLPStep._make((*tensors, gated, 0, 1.0, 0.0, group, False))
    sizes = check_tensors(
        _WHERE,
        x=(a.x, "B M"),
        norm=(a.norm, "M"),
        in_weight=(a.in_weight, "* M"),
        in_bias=(a.in_bias, "? *"),
        out_weight=(a.out_weight, "M D"),
        out_bias=(a.out_bias, "? M"),
        **{of: (getattr(a, of), "? * *") for of in MATRICES.values()},
    )
    M, D = sizes["M"], sizes["D"]
    if 0 in (M, D):
        raise ArgumentError(f"{_WHERE}: a size of the weights is 0: M, D = {M}, {D}")
    rows = 2 * D if gated else D
    check_axes(_WHERE, {"in_weight": (a.in_weight, 0, rows), "in_bias": (a.in_bias, 0, rows)})
    check_step_dtypes(_WHERE, a, MATRICES)


def _reference(a: MLPStep) -> tuple[Tensor]:
    dtype, f = a.x.dtype, list(ACTIVATIONS.values())[a.activation]

    def of(x: Tensor, matrix: Tensor, scales: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.linear(x, widened(matrix, scales, a.group, dtype), bias)

    made = of(scale(normalize(a.x, 1, a.eps, False), a.norm, None), a.in_weight, a.in_scales, a.in_bias)
    if a.gated:
        gate, up = made.chunk(2, -1)
        made = f(a.factor * gate) * up
    else:
        made = f(a.factor * made)
    return (a.x + of(made, a.out_weight, a.out_scales, a.out_bias),)


def _fake(a: MLPStep) -> list[Tensor]:
    return [a.x.new_empty(a.x.shape)]


mlp_step_op = Op(_WHERE, MLPStep, _reference, fake=_fake, check=_check, outputs=1, stepwise=True)
