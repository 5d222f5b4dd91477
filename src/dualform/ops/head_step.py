"""What follows the last block of a language model in a step: from the residual stream to the logits."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.shapes import check_tensors, once_per_shape
from dualform.ops.mamba_step import check_axes, check_step_dtypes, widened
from dualform.ops.normalize import check_norm, normalize, scale
from dualform.ops.op import Op

_WHERE = "head_step"


def head_step(
    x: Tensor,
    weights: "HeadWeights",
    *,
    factor: float = 1.0,
    cap: float | None = None,
    eps: float = 1e-5,
    group: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``y = factor (W norm(x) + bias)``, where ``norm(x) = x / sqrt(mean(x^2) + eps)`` times a weight.

    With a bound the result is ``cap tanh(y / cap)``. W may have 16 bits beside a float32 stream, or 8 with scales;
    everything else has the dtype of x, in which all of it is computed, and y is rounded once.

    Args:
        x: ``(B, M)``, the residual stream, float32 or float64.
        weights: of the norm and the head.
        factor: of the logits.
        cap: their bound; None for none.
        eps: added to the mean square.
        group: where W has 8 bits, the neighbours in a row that share a scale, as in
            :func:`~dualform.ops.quantized_linear.quantized_linear`.
        dtype: of the logits; None is that of x.

    Returns:
        The logits ``(B, V)``.

    Raises:
        ArgumentError: for shapes, dtypes or devices that do not fit together.
    """
    a = HeadStep(x, *weights, factor, cap or 0.0, eps, dtype or getattr(x, "dtype", torch.float32), group)
    _check(a)
    return head_step_op(a)[0]


class HeadWeights(NamedTuple):
    """What the end of a model is made of."""

    norm: Tensor  # (M,)
    out_weight: Tensor  # W, (V, M), a matrix
    out_bias: Tensor | None  # (V,)
    out_scales: Tensor | None = None  # of W where it has 8 bits, (V, ceil(M / group))


class HeadStep(NamedTuple):
    """The arguments of the operator, as in :func:`head_step`."""

    x: Tensor
    norm: Tensor
    out_weight: Tensor
    out_bias: Tensor | None
    out_scales: Tensor | None
    factor: float
    cap: float  # 0 for none
    eps: float
    dtype: torch.dtype
    group: int = 0


_TENSORS = HeadStep._fields.index("factor")


def _check(a: HeadStep) -> None:
    check_norm(_WHERE, a.eps, dtype=a.dtype)
    if not (math.isfinite(a.factor) and 0 <= a.cap < math.inf):
        came = f"factor and cap are {a.factor} and {a.cap}"
        raise ArgumentError(f"{_WHERE}: {came}, expected finite numbers, the second one not negative")
    _check_tensors(a.group, *a[:_TENSORS])


@once_per_shape
def _check_tensors(group: int, *tensors: Tensor | None) -> None:
    a = HeadStep._make((*tensors, 1.0, 0.0, 0.0, torch.float32, group))
    sizes = check_tensors(
        _WHERE,
        x=(a.x, "B M"),
        norm=(a.norm, "M"),
        out_weight=(a.out_weight, "V M"),
        out_bias=(a.out_bias, "? *"),
        out_scales=(a.out_scales, "? * *"),
    )
    if 0 in (sizes["M"], sizes["V"]):
        raise ArgumentError(f"{_WHERE}: out_weight has shape {tuple(a.out_weight.shape)}, expected no size of 0")
    check_axes(_WHERE, {"out_bias": (a.out_bias, 0, sizes["V"])})
    check_step_dtypes(_WHERE, a, {"out_weight": "out_scales"})


def _reference(a: HeadStep) -> tuple[Tensor]:
    weight = widened(a.out_weight, a.out_scales, a.group, a.x.dtype)
    y = a.factor * F.linear(scale(normalize(a.x, 1, a.eps, False), a.norm, None), weight, a.out_bias)
    return ((a.cap * torch.tanh(y / a.cap) if a.cap else y).to(a.dtype),)


def _fake(a: HeadStep) -> list[Tensor]:
    return [a.x.new_empty(a.x.shape[0], a.out_weight.shape[0], dtype=a.dtype)]


head_step_op = Op(_WHERE, HeadStep, _reference, fake=_fake, check=_check, outputs=1, stepwise=True)
