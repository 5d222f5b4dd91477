"""Packed sequences: documents laid end to end on the time axis, borders given by cumulative lengths.

``cu_seqlens`` is the convention of FlashAttention: ``(n + 1,)``, from 0 to T, never decreasing. An empty
sequence is allowed; its final state is its initial state. Padding, left or right, becomes packing at a
model's door (:func:`pack`), so there is one mechanism and not three.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError


def check_cu_seqlens(where: str, cu_seqlens: Tensor, batch: int, length: int) -> int:
    """The number of sequences n, after checking the cumulative lengths against ``(batch, length)``.

    Raises:
        ArgumentError: for a batch other than 1, a dtype that is not int32 or int64, or borders that do not
            run from 0 to ``length``. Values are read on the host; a meta tensor's are taken on trust.
    """
    shape = tuple(cu_seqlens.shape)
    if cu_seqlens.dim() != 1 or shape[0] < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ArgumentError(
            f"{where}: cu_seqlens is {cu_seqlens.dtype} {shape}, expected int32 or int64 of shape (n + 1,)",
            hint="cumulative lengths, such as [0, 3, 7] for sequences of 3 and 4",
        )
    if batch != 1:
        raise ArgumentError(
            f"{where}: with cu_seqlens the batch axis must be 1, got {batch}",
            hint="lay the sequences end to end on the time axis",
        )
    if not torch.compiler.is_compiling() and cu_seqlens.device.type != "meta":
        borders = cu_seqlens.tolist()
        if borders[0] != 0 or borders[-1] != length or any(a > b for a, b in pairwise(borders)):
            raise ArgumentError(f"{where}: cu_seqlens {borders} must rise from 0 to the length {length}")
    return shape[0] - 1


def from_lengths(lengths: Tensor) -> Tensor:
    """Lengths ``(n,)`` -> cumulative lengths ``(n + 1,)``, int64."""
    return torch.cat([lengths.new_zeros(1, dtype=torch.int64), lengths.to(torch.int64).cumsum(0)])


def sequence_ids(cu_seqlens: Tensor, length: int) -> Tensor:
    """The sequence each of ``length`` packed positions belongs to, ``(T,)``."""
    positions = torch.arange(length, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), positions, right=True)


def pack(x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the padding: ``x`` ``(B, T, ...)`` and a bool mask ``(B, T)`` -> ``(1, total, ...)`` and cu_seqlens."""
    return x[keep][None], from_lengths(keep.sum(1))


def unpack(x: Tensor, keep: Tensor) -> Tensor:
    """The inverse of :func:`pack`: ``(1, total, ...)`` -> ``(B, T, ...)``, zeros where ``keep`` is false."""
    out = x.new_zeros(*keep.shape, *x.shape[2:])
    out[keep] = x[0]
    return out


def keep_mask(cu_seqlens: Tensor) -> Tensor:
    """The mask ``(n, longest)`` that lays n packed sequences out as right-padded rows."""
    lengths = cu_seqlens.diff()
    return torch.arange(int(lengths.max()), device=cu_seqlens.device) < lengths[:, None]


def each_alone(
    run: Callable[..., tuple[Tensor, Tensor]], cu_seqlens: Tensor | None, state: Tensor, *inputs: Tensor
) -> tuple[Tensor, Tensor]:
    """What packing means: ``run(*inputs, state) -> (y, state)`` on every sequence by itself, laid end to end."""
    if cu_seqlens is None:
        return run(*inputs, state)
    borders = list(enumerate(pairwise(cu_seqlens.tolist())))
    results = [run(*(x[:, start:end] for x in inputs), state[i : i + 1]) for i, (start, end) in borders]
    return torch.cat([y for y, _ in results], 1), torch.cat([h for _, h in results], 0)
