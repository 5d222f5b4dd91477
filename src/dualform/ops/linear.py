"""A linear map of a few rows, as a step has them: its time is that of reading the weights once."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.shapes import check_real, check_tensors, once_per_shape
from dualform.ops.op import Op

_WHERE = "linear"
FEW = 16
"""Rows up to which reading the weights is what takes the time; beyond, PyTorch's own product is the faster one."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y = W x + b`` for each row of x.

    Sums are float32 or wider, and rounded once. On the CPU kernels a row of y does not depend on the others to the last
    bit, nor on how many there are, as long as there is more than one: a single row is summed in another order.

    Args:
        x: ``(B, D)``.
        weight: W, ``(F, D)``, in the dtype of x.
        bias: ``(F,)``, in the dtype of x.

    Returns:
        y ``(B, F)`` in the dtype of x.

    Raises:
        ArgumentError: for shapes, dtypes or devices that do not fit together.
    """
    _check_inputs(x, weight, bias)
    return linear_op(Linear(x, weight, bias))[0]


class Linear(NamedTuple):
    """The arguments of the operator, as in :func:`linear`."""

    x: Tensor  # (B, D)
    weight: Tensor  # (F, D)
    bias: Tensor | None  # (F,)


@once_per_shape
def _check_inputs(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_tensors(_WHERE, x=(x, "B D"), weight=(weight, "F D"), bias=(bias, "? F"))
    check_real(_WHERE, x=x, weight=weight, bias=bias)
    for name, m in (("weight", weight), ("bias", bias)):
        if m is not None and m.dtype != x.dtype:
            raise ArgumentError(f"{_WHERE}: {name} is {m.dtype}, but x is {x.dtype}", hint=f"{name}.to({x.dtype})")


def _run(a: Linear) -> tuple[Tensor]:
    return (F.linear(a.x, a.weight, a.bias),)


def _fake(a: Linear) -> list[Tensor]:
    return [a.x.new_empty(a.x.shape[0], a.weight.shape[0])]


linear_op = Op(_WHERE, Linear, _run, fake=_fake, check=lambda a: _check_inputs(*a), outputs=1, stepwise=True)
