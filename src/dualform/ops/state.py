"""What every op with a state asks of its caller, in one place: rows, shape and dtype of states."""

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.packing import Packing
from dualform.ops.rows import put


def initial(
    where: str,
    state: Tensor | None,
    packing: Packing | None,
    like: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Tensor:
    """The state an op starts from, ``(rows, *shape)`` in ``dtype``: the caller's, or zeros.

    Rows are the batch of ``like`` ``(B, T, ...)``, or the number of packed sequences. States have one dtype rule in
    all ops: :func:`dualform.core.shapes.wide` of everything that an op is given, its initial state included, which is
    float32 or wider and never narrower than an argument.

    Raises:
        ArgumentError: for a shape, dtype or device that does not fit.
    """
    if state is None:
        rows = like.shape[0] if packing is None else packing.rows
        return like.new_zeros((rows, *shape), dtype=dtype)
    check_state(where, "initial_state", state, packing, like, shape)
    if state.is_complex() and not dtype.is_complex:
        raise ArgumentError(f"{where}: initial_state is {state.dtype}, expected {dtype}: the recurrence is real")
    return state.to(dtype)


def unless_complex(state: Tensor | None) -> Tensor | None:
    """A state as far as it counts for the dtype of a real recurrence, which refuses a complex one."""
    return None if isinstance(state, Tensor) and state.is_complex() else state


def check_state(
    where: str, name: str, state: Tensor, packing: Packing | None, like: Tensor, shape: tuple[int, ...]
) -> None:
    """A state must be a floating tensor ``(rows, *shape)`` on the device of ``like``.

    Raises:
        ArgumentError: says what came and what was expected.
    """
    rows, per = (like.shape[0], "row") if packing is None else (packing.rows, "sequence")
    if not isinstance(state, Tensor) or tuple(state.shape) != (rows, *shape):
        came = tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__
        raise ArgumentError(f"{where}: {name} is {came}, expected {(rows, *shape)}: one state per {per}")
    if state.device != like.device:
        raise ArgumentError(f"{where}: {name} is on {state.device}, but the inputs are on {like.device}")
    if not (state.is_floating_point() or state.is_complex()):
        raise ArgumentError(f"{where}: {name} is {state.dtype}, expected a floating dtype")


def check_dtype(where: str, dtype: torch.dtype, **tensors: Tensor) -> None:
    """Inside of an op, tensors that kernels read as states must have the dtype of states.

    Raises:
        ArgumentError: names the argument.
    """
    if dtype.to_real().itemsize < 4:
        raise ArgumentError(f"{where}: the state is {dtype}, expected float32 or wider")
    for name, tensor in tensors.items():
        if tensor.dtype != dtype:
            raise ArgumentError(f"{where}: {name} is {tensor.dtype}, expected {dtype}, the dtype of the state")


def give_state(state: Tensor, out_state: Tensor | None, rows: Tensor | None = None) -> Tensor:
    """The state that an update returns: written to the caller's memory where there is some, rounded to its dtype.

    With ``rows``, which are those of the caller's memory that are written.
    """
    if out_state is None or out_state is state:
        return state
    return out_state.copy_(state) if rows is None else put(out_state, rows, state)


def check_out_state(where: str, out_state: Tensor | None, state: Tensor, *recorded: Tensor | None) -> None:
    """Memory for the next state: of the shape and on the device of the state, and only where nothing is recorded.

    Raises:
        ArgumentError: says what came and what was expected.
    """
    if out_state is None:
        return
    check_state(where, "out_state", out_state, None, state, tuple(state.shape[1:]))
    if out_state.is_complex() != state.is_complex():
        raise ArgumentError(f"{where}: out_state is {out_state.dtype}, but the state is {state.dtype}")
    if torch.is_grad_enabled() and any(m is not None and m.requires_grad for m in (out_state, state, *recorded)):
        raise ArgumentError(
            f"{where}: out_state cannot be written to while gradients are recorded",
            hint="leave it out, or run under torch.no_grad() or torch.inference_mode()",
        )
