"""Rows of a table of states, picked by index, that steps write in place."""

import torch
from torch import Tensor


def pick(table: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The rows ``indices`` ``(B,)`` of a table, negative ones being padding, and which are no padding ``(B,)``."""
    return table.index_select(0, indices.clamp(min=0).long()), indices >= 0


def write(table: Tensor, indices: Tensor, after: Tensor) -> None:
    """Write ``after`` ``(B, ...)`` to the rows ``indices`` ``(B,)``, except where they are negative.

    Nothing is read on the host. What padding writes is what the first row that is none writes as well, to the same
    place; where all are padding, what lies there already.
    """
    if not len(indices):
        return
    there = indices >= 0
    one = there.to(torch.int8).argmax()[None]
    place = indices.index_select(0, one).clamp(min=0).long()
    shape = (-1, *[1] * (table.dim() - 1))
    after = after.to(table.dtype)
    same = torch.where(there.index_select(0, one).view(shape), after.index_select(0, one), table.index_select(0, place))
    after = torch.where(there.view(shape), after, same)
    table.index_copy_(0, torch.where(there, indices.long(), place), after)
