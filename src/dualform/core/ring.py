"""Caches that grow with the context up to a limit: position p lies in slot ``p mod S``, rows may differ in length."""

import torch
from torch import Tensor

from dualform.core.shapes import larger
from dualform.core.tree import may_write


def held(length: Tensor, capacity: int) -> Tensor:
    """The position each of S slots holds after ``length`` ``(B,)`` tokens, ``(B, S)``; negative where empty."""
    last = length[:, None] - 1
    return last - (last - torch.arange(capacity, device=length.device)) % larger(capacity, 1)


def write(cache: Tensor, at: tuple[Tensor, Tensor], new: Tensor) -> Tensor:
    """Put ``new`` at (row, slot): into the memory of the cache where that is allowed, else into a copy."""
    return (cache.index_put_ if may_write(cache) else cache.index_put)(at, new)


def blank_where_full(y: Tensor, length: Tensor, capacity: int, row: Tensor | None = None) -> Tensor:
    """Outputs ``(B, T, ...)``, NaN in every row whose ``length`` tokens are more than a cache holds.

    For programs that can read no lengths: a compiled one cannot grow its cache, nor say so.

    Args:
        y: the outputs.
        length: tokens that each row of the state has seen, the new ones among them, ``(rows,)``.
        capacity: slots of the cache.
        row: of the state, for every output, ``(B, 1)`` or ``(1, T)``; None where rows are those of ``y``.
    """
    full = length > capacity
    full = full[:, None] if row is None else full[row]
    return torch.where(full.view(*full.shape, *[1] * (y.dim() - 2)), float("nan"), y)
