"""A linear map whose weights have 8 bits: in a step a quarter of the bytes is read."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.int8 import check_quantized, dequantize
from dualform.core.shapes import check_real, check_tensors, once_per_shape, wide
from dualform.ops.op import Op

_WHERE = "quantized_linear"


def quantized_linear(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None, *, group: int) -> Tensor:
    """``y = W x + b`` for each row of x, where ``W[f, d] = scales[f, d // group] * weight[f, d]``.

    x is not quantised: products and sums are float32 or wider, and rounded once. On the CPU kernels a row of y does not
    depend on the others to the last bit, up to 16 rows; one by itself is summed in another order.

    Args:
        x: ``(B, D)``.
        weight: ``(F, D)``, int8.
        scales: ``(F, ceil(D / group))``, float32.
        bias: ``(F,)``, in the dtype of x.
        group: neighbours in a row of the weight that share a scale.

    Returns:
        y ``(B, F)`` in the dtype of x.

    Raises:
        ArgumentError: for shapes, dtypes or devices that do not fit together.
    """
    _check_inputs(x, weight, scales, bias, group)
    return quantized_linear_op(QuantizedLinear(x, weight, scales, bias, group))[0]


class QuantizedLinear(NamedTuple):
    """The arguments of the operator, as in :func:`quantized_linear`."""

    x: Tensor  # (B, D)
    weight: Tensor  # (F, D)
    scales: Tensor  # (F, ceil(D / group))
    bias: Tensor | None  # (F,)
    group: int


@once_per_shape
def _check_inputs(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, group: int) -> None:
    given = {"x": (x, "B D"), "weight": (weight, "F D"), "scales": (scales, "F *"), "bias": (bias, "? F")}
    check_tensors(_WHERE, **given)
    check_real(_WHERE, x=x, bias=bias)
    check_quantized(_WHERE, group, weight=(weight, scales))
    if bias is not None and bias.dtype != x.dtype:
        raise ArgumentError(f"{_WHERE}: bias is {bias.dtype}, but x is {x.dtype}", hint=f"bias.to({x.dtype})")


def _reference(a: QuantizedLinear) -> tuple[Tensor]:
    dtype = wide(a.x)
    weight, bias = dequantize(a.weight, a.scales, a.group, dtype), None if a.bias is None else a.bias.to(dtype)
    return (F.linear(a.x.to(dtype), weight, bias).to(a.x.dtype),)


def _fake(a: QuantizedLinear) -> list[Tensor]:
    return [a.x.new_empty(a.x.shape[0], a.weight.shape[0])]


quantized_linear_op = Op(
    _WHERE, QuantizedLinear, _reference, fake=_fake, check=lambda a: _check_inputs(*a), outputs=1, stepwise=True
)
