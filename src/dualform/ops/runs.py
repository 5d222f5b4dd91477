"""Sequences within rows, marked by an id for every step: what ``seq_idx`` is, without borders that must be read.

A sequence is a run of equal ids: only neighbours are compared, and an id may come again later in a row. Steps with a
negative id are padding. The run that a row begins with goes on from the row's initial state.
"""

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.packing import Packing
from dualform.core.shapes import check_tensors

_MOST = 2**31 - 1


def check_ids(where: str, seq_idx: Tensor, x: Tensor, packing: Packing | None) -> None:
    """Ids must be integers ``(B, T)`` on the device of ``x`` ``(B, T, ...)``, and say alone where sequences lie.

    Raises:
        ArgumentError: says what came and what was expected.
    """
    check_tensors(where, x=(x, "B T ..."), seq_idx=(seq_idx, "B T"))
    if seq_idx.is_floating_point() or seq_idx.is_complex():
        raise ArgumentError(f"{where}: seq_idx is {seq_idx.dtype}, expected int32, the sequence of each step")
    if packing is not None:
        raise ArgumentError(
            f"{where}: seq_idx together with cu_seqlens",
            hint="give one of them: both say where sequences begin and end",
        )


def as_ids(seq_idx: Tensor | None) -> Tensor | None:
    """Ids as ops take them: int32. Wider ones stay as different as they were, from one step to the next."""
    if seq_idx is None or seq_idx.dtype == torch.int32:
        return seq_idx
    if seq_idx.dtype == torch.int64:
        seq_idx = torch.where(seq_idx < 0, -1, seq_idx % _MOST)
    return seq_idx.to(torch.int32)


def reach(ids: Tensor, most: int) -> Tensor:
    """How many earlier steps of its run a step sees, ``(B, T)``: ``most`` or fewer, -1 where it is padding.

    The run that a row begins with sees the row's initial state as well, so its steps see ``most``.
    """
    steps = torch.arange(ids.shape[1], device=ids.device)
    begins = torch.where(ids[:, 1:] != ids[:, :-1], steps[1:], 0)
    begin = torch.cat([torch.zeros_like(ids[:, :1], dtype=torch.int64), begins], 1).cummax(1).values
    seen = torch.where(begin == 0, most, (steps - begin).clamp(max=most))
    return seen.masked_fill(ids < 0, -1)
