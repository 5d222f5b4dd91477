"""What every op with a state asks of its caller: one place to validate rows, shape and dtype."""

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.packing import check_cu_seqlens


def initial(
    where: str,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    like: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Tensor:
    """The state an op starts from, ``(rows, *shape)`` in ``dtype``: the caller's, or zeros.

    Rows are the batch of ``like`` ``(B, T, ...)``, or the number of packed sequences.

    Raises:
        ArgumentError: for cumulative lengths, a shape, dtype or device that does not fit.
    """
    rows = like.shape[0]
    if cu_seqlens is not None:
        rows = check_cu_seqlens(where, cu_seqlens, rows, like.shape[1])
        if cu_seqlens.device != like.device:
            raise ArgumentError(f"{where}: cu_seqlens is on {cu_seqlens.device}, but the inputs are on {like.device}")
    if state is None:
        return like.new_zeros((rows, *shape), dtype=dtype)
    if not isinstance(state, Tensor) or tuple(state.shape) != (rows, *shape):
        came = tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__
        per = "sequence" if cu_seqlens is not None else "row"
        raise ArgumentError(f"{where}: initial_state is {came}, expected {(rows, *shape)}: one state per {per}")
    if state.device != like.device:
        raise ArgumentError(f"{where}: initial_state is on {state.device}, but the inputs are on {like.device}")
    if state.is_complex() and not dtype.is_complex:
        raise ArgumentError(f"{where}: initial_state is {state.dtype}, expected {dtype}: the recurrence is real")
    return state.to(dtype)
