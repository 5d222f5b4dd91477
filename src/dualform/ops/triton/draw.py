"""The most likely token of each row on a GPU, without waiting for it."""

import torch
from torch import Tensor

from dualform.ops.layout import inner_contiguous
from dualform.ops.triton.support import blocks, early, kernels, power_of_two

_PART = 1024  # numbers of a program


def largest(x: Tensor, found: Tensor) -> None:
    """Where the largest number of each row is first, and whether it is finite; a NaN is larger than any number.

    Args:
        x: ``(B, V)``, compared in float32.
        found: where the places and 0 or 1 are written, int64 ``(2, B)``, each of them contiguous.
    """
    (rows, width), number = x.shape, blocks(x.shape[1], _PART)
    if rows == 0:
        return
    x = inner_contiguous(x)
    values = x.new_empty(rows, number, dtype=torch.float32)
    places = x.new_empty(rows, number, dtype=torch.int32)
    options = early()
    kernels("draw").parts[(number, rows)](x, values, places, width, x.stride(0), BLOCK=_PART, **options)
    kernels("draw").whole[(rows,)](
        values, places, found, found.stride(0), number, width - 1, BLOCK=power_of_two(number), **options
    )
