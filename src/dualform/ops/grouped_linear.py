"""A linear map for each group of rows: the matrix products of a mixture of experts."""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.packing import readable
from dualform.core.shapes import check_real, check_tensors, once_per_shape
from dualform.ops.op import Backend, Op

_WHERE = "grouped_linear"
_ALIGNED = 16  # bytes, of which a row has a multiple in PyTorch's grouped product


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """``y_i = W_e x_i`` for the rows i from ``ends[e - 1]`` to ``ends[e] - 1``; the first group begins at row 0.

    Args:
        x: ``(M, D)``, the rows of the first group, then those of the second, and so on; a group may have none.
        weight: W, ``(E, F, D)``, in the dtype of x.
        ends: ``(E,)`` int64, where each group ends; the last is M. Values on a device other than the CPU are taken on
            trust, as reading them would wait for it.

    Returns:
        y ``(M, F)`` in the dtype of x.

    Raises:
        ArgumentError: for shapes, dtypes or devices that do not fit together, or ends that do not rise to M.

    References:
        Gale et al. (2022), arXiv:2211.15841, section 4 (a mixture of experts without a limit on the rows of each).
    """
    a = GroupedLinear(x, weight, ends)
    _check(a)
    return grouped_linear_op(a)[0]


class GroupedLinear(NamedTuple):
    """The arguments of the operator, as in :func:`grouped_linear`."""

    x: Tensor  # (M, D)
    weight: Tensor  # (E, F, D)
    ends: Tensor  # (E,) int64


def _check(a: GroupedLinear) -> None:
    _check_inputs(a.x, a.weight, a.ends)
    if a.ends.is_cpu and readable(a.ends):
        borders = [0, *a.ends.tolist()]
        if borders[-1] != a.x.shape[0] or any(last < first for first, last in pairwise(borders)):
            came = ", ".join(map(str, borders[1:9])) + (", ..." if len(borders) > 9 else "")
            raise ArgumentError(f"{_WHERE}: ends is {came}, expected numbers that rise to the {a.x.shape[0]} rows of x")


@once_per_shape
def _check_inputs(x: Tensor, weight: Tensor, ends: Tensor) -> None:
    check_tensors(_WHERE, x=(x, "M D"), weight=(weight, "E F D"), ends=(ends, "E"))
    check_real(_WHERE, x=x, weight=weight)
    if weight.shape[0] == 0:
        raise ArgumentError(f"{_WHERE}: weight has no groups, expected at least one")
    if weight.dtype != x.dtype:
        raise ArgumentError(f"{_WHERE}: x is {x.dtype}, but weight is {weight.dtype}")
    if ends.dtype != torch.int64:
        raise ArgumentError(f"{_WHERE}: ends is {ends.dtype}, expected torch.int64")


def _groups(x: Tensor, ends: Tensor) -> Tensor:
    """The group of each row, ``(M,)``."""
    rows = torch.arange(x.shape[0], device=x.device)
    return torch.searchsorted(ends, rows, right=True).clamp(max=len(ends) - 1)


def _reference(a: GroupedLinear) -> tuple[Tensor]:
    return (torch.einsum("mfd,md->mf", a.weight[_groups(a.x, a.ends)], a.x),)


def _forward(a: GroupedLinear) -> list[Tensor]:
    return [_products(a.x, a.weight, a.ends)]


def _backward(grads: list[Tensor], kept: list[Tensor], a: GroupedLinear) -> dict[str, Tensor]:
    return {"x": _products(grads[0], a.weight.mT, a.ends), "weight": _outer(grads[0], a.x, a.ends)}


def _products(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """``x`` ``(M, D)`` times the transpose of each group's ``weight`` ``(F, D)``."""
    if x.numel() == 0 or weight.numel() == 0:
        return x.new_zeros(x.shape[0], weight.shape[1])
    if fits_the_grouped_product(x, *weight.shape[1:]):
        return F.grouped_mm(x.contiguous(), weight.mT, offs=ends.to(torch.int32))
    if not readable(ends):
        return _of_all_groups(x, weight, ends)
    y = x.new_empty(x.shape[0], weight.shape[1])
    for group, first, last in _slices(ends):
        torch.mm(x[first:last], weight[group].mT, out=y[first:last])
    return y


def _outer(dy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """``sum_i dy_i x_i^T`` over the rows of each group, ``(E, F, D)``."""
    total = x.new_zeros(len(ends), dy.shape[1], x.shape[1])
    if total.numel() == 0 or x.shape[0] == 0:
        return total
    if fits_the_grouped_product(x, x.shape[1], dy.shape[1]):
        empty = ends.diff(prepend=ends.new_zeros(1)) == 0  # sums over nothing are not written everywhere
        found = F.grouped_mm(dy.contiguous().mT, x.contiguous(), offs=ends.to(torch.int32))
        return found.masked_fill(empty[:, None, None], 0)
    if not readable(ends):
        group = _groups(x, ends)[:, None]
        return torch.stack(
            [torch.where(group == e, dy, 0).mT @ torch.where(group == e, x, 0) for e in range(len(ends))]
        )
    for group, first, last in _slices(ends):
        torch.mm(dy[first:last].mT, x[first:last], out=total[group])
    return total


def _of_all_groups(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Every row times every group's matrix, where the borders cannot be read and there is no grouped product."""
    y, group = x.new_zeros(x.shape[0], weight.shape[1]), _groups(x, ends)
    for e, matrix in enumerate(weight):
        y = torch.where((group == e)[:, None], x @ matrix.mT, y)
    return y


def _slices(ends: Tensor) -> list[tuple[int, int, int]]:
    """Number, first row and end of every group that has rows."""
    pairs = enumerate(pairwise([0, *ends.tolist()]))
    return [(group, first, last) for group, (first, last) in pairs if last > first]


def fits_the_grouped_product(x: Tensor, *widths: int) -> bool:
    """Whether PyTorch's grouped product takes rows of these widths: in bfloat16, on a GPU, of whole 16 bytes."""
    if x.device.type != "cuda" or torch.version.hip or x.dtype is not torch.bfloat16:
        return False
    if torch.cuda.get_device_capability(x.device) < (9, 0):
        return False
    return all(n * x.element_size() % _ALIGNED == 0 for n in widths)


def _fake(a: GroupedLinear) -> list[Tensor]:
    return [a.x.new_empty(a.x.shape[0], a.weight.shape[1])]


grouped_linear_op = Op(_WHERE, GroupedLinear, _reference, fake=_fake, check=_check, outputs=1)
grouped_linear_op.add(Backend("torch", _forward, _backward))
