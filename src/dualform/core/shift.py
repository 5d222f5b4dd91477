"""The element before each one of a sequence."""

import torch
from torch import Tensor

from dualform.core.packing import Packing


def shift(x: Tensor, before: Tensor, packing: Packing | None) -> tuple[Tensor, Tensor]:
    """``x_{t-1}`` for every t, and what is before the next piece of each sequence: its last element.

    Args:
        x: ``(B, T, ...)``.
        before: ``(rows, ...)``, the element before the first of each row, or of each packed sequence; it may be wider.
        packing: of the sequences of one row; None where every row is a sequence.

    Returns:
        ``(B, T, ...)`` in the dtype of x, and ``(rows, ...)`` in that of ``before``; a sequence without elements keeps
        what was before it.
    """
    old = before.to(x.dtype)
    if packing is None:
        whole = torch.cat([old[:, None], x], 1)
        return whole[:, :-1], whole[:, -1].to(before.dtype, copy=True)
    if x.shape[1] == 0:
        return x, before.clone()
    ids, index = packing.places(x.shape[1])
    inner = (1,) * (x.dim() - 2)
    previous = torch.where((index == 0).view(1, -1, *inner), old.index_select(0, ids)[None], x.roll(1, 1))
    ends, lengths = packing.cu_seqlens[1:], packing.cu_seqlens.diff()
    last = x[0].index_select(0, (ends - 1).clamp(min=0))
    return previous, torch.where((lengths > 0).view(-1, *inner), last.to(before.dtype), before)
