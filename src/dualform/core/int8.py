"""Matrices of 8 bits: whole numbers, and a scale for each group of neighbours in a row.

Number d of row f stands for ``scales[f, d // group] * weight[f, d]``. The numbers go from -127 to 127, and no zero
point shifts them: 0 is 0. A group is a multiple of 32, of which the last one in a row may lack some, or all of the row.
"""

from typing import Any

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.options import brief

LARGEST = 127
CHUNK, LONGEST = 32, 2**40  # a group is a multiple of the first
_WHERE = "quantize"


def quantize(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The nearest matrix of 8 bits: a scale is the largest magnitude of its group, over 127.

    Args:
        weight: ``(F, D)``, floating and finite.
        group: neighbours in a row that share a scale: a multiple of 32, or at least D.

    Returns:
        Whole numbers ``(F, D)``, int8, and scales ``(F, ceil(D / group))``, float32.

    Raises:
        ArgumentError: for a matrix of another shape or dtype, one that holds NaN or infinity, or another group.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        came = f"{weight.dtype} of shape {tuple(weight.shape)}"
        raise ArgumentError(f"{_WHERE}: weight is {came}, expected a floating matrix (F, D)")
    rows, width = weight.shape
    check_group(_WHERE, group, width)
    group = min(group, max(width, 1))
    groups = groups_of(width, group)
    parts = torch.nn.functional.pad(weight.detach().float(), (0, groups * group - width)).view(rows, groups, group)
    most = parts.abs().amax(-1) if parts.numel() else parts.new_zeros(rows, groups)
    if not bool(most.isfinite().all()):
        raise ArgumentError(f"{_WHERE}: weight holds NaN or infinity, which 8 bits do not have")
    scales = most / LARGEST
    whole = (parts / torch.where(scales > 0, scales, 1)[..., None]).round_().clamp_(-LARGEST, LARGEST)
    return whole.to(torch.int8).flatten(1)[:, :width].contiguous(), scales


def dequantize(weight: Tensor, scales: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """What whole numbers ``(..., D)`` and their scales ``(..., ceil(D / group))`` stand for."""
    spread = scales.to(dtype)
    if scales.shape[-1] > 1:
        spread = spread.repeat_interleave(group, -1)[..., : weight.shape[-1]]
    return weight.to(dtype) * spread


def groups_of(width: int, group: int) -> int:
    """How many scales a row of so many numbers has."""
    return -(-width // group)


def check_group(where: str, group: Any, width: int = LONGEST + 1) -> None:
    """That a group of neighbours is one that kernels take in rows of so many numbers.

    Raises:
        ArgumentError: says what came and what was expected.
    """
    if not isinstance(group, int) or not 1 <= group <= LONGEST or (group % CHUNK and group < width):
        raise ArgumentError(
            f"{where}: group is {brief(group)}, expected a multiple of {CHUNK}, or at least the width of the matrix",
            hint="such as 64",
        )


def check_quantized(where: str, group: int, **matrices: tuple[Tensor, Tensor | None]) -> None:
    """That matrices are of 8 bits, with the scales that belong to them.

    Args:
        where: name of the function, first word of every error.
        group: neighbours in a row that share a scale.
        matrices: ``name=(weight, scales)``.

    Raises:
        ArgumentError: names what came and what was expected.
    """
    for name, (weight, scales) in matrices.items():
        if weight.dtype != torch.int8:
            raise ArgumentError(f"{where}: {name} is {weight.dtype}, expected torch.int8")
        check_group(where, group, weight.shape[1])
        shape = (weight.shape[0], groups_of(weight.shape[1], group))
        came = "None" if scales is None else f"{scales.dtype} of shape {tuple(scales.shape)}"
        if scales is None or scales.dtype != torch.float32 or tuple(scales.shape) != shape:
            raise ArgumentError(f"{where}: the scales of {name} are {came}, expected torch.float32 of shape {shape}")
        if scales.device != weight.device:
            raise ArgumentError(f"{where}: the scales of {name} are on {scales.device}, and it is on {weight.device}")
