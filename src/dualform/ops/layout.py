"""How tensors lie in memory.

The rule of all ops and backends: an output lies as the input that it is made of, ``y`` as ``u``, and a gradient lies as
its tensor. A tensor ``(B, T, ...)`` is contiguous, or time is its innermost axis, as in a transposed ``(B, D, T)``; any
other is taken for a contiguous one. The norms read rows of features, and what they make is contiguous. The gradient of
an output comes to a backend as that output lies.
"""

import torch
from torch import Tensor

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def time_last(x: Tensor) -> bool:
    """Whether ``x`` ``(B, T, ...)`` has its axis of time innermost: the next step is the next number in memory."""
    return x.dim() > 2 and x.stride(1) == 1 and not x.is_contiguous()


def empty_like(x: Tensor, last: bool | None = None) -> Tensor:
    """New memory for numbers like those of ``x`` ``(B, T, ...)``, which lies as ``x`` does.

    Args:
        x: whose shape, dtype and device it has.
        last: whether time is innermost, where that is not to be as it is in ``x``.
    """
    if not (time_last(x) if last is None else last):
        return x.new_empty(x.shape)
    _, length, *rest = x.shape
    strides = [length] * len(rest)
    for axis in reversed(range(len(rest) - 1)):
        strides[axis] = strides[axis + 1] * rest[axis + 1]
    return x.new_empty_strided(x.shape, (strides[0] * rest[0], 1, *strides))


def lay(y: Tensor, last: bool) -> Tensor:
    """The numbers of ``y`` ``(B, T, ...)``, contiguous or with time innermost; ``y`` itself where it lies like that.

    It is differentiable.
    """
    if not last:
        return y.contiguous()
    return y if y.movedim(1, -1).is_contiguous() else empty_like(y, last).copy_(y)


def flat_stride(x: Tensor) -> int | None:
    """The stride of the axes of ``x`` ``(B, T, ...)`` after time, taken as one axis; None where they do not lie so."""
    found = following = None
    for axis in range(x.dim() - 1, 1, -1):
        if x.shape[axis] != 1:
            if following is None:
                found = x.stride(axis)
            elif x.stride(axis) != following:
                return None
            following = x.stride(axis) * x.shape[axis]
    return 1 if found is None else found


def inner_contiguous(tensor: Tensor, inner: int = 1) -> Tensor:
    """The tensor with its last ``inner`` axes contiguous, any strides before: slices of a projection pass uncopied."""
    stride = 1
    for axis in range(tensor.dim() - 1, tensor.dim() - 1 - inner, -1):
        if tensor.shape[axis] != 1 and tensor.stride(axis) != stride:
            return tensor.contiguous()
        stride *= tensor.shape[axis]
    return tensor


def whole_steps(x: Tensor) -> Tensor:
    """The tensor ``(B, T, ...)`` with its axes after time contiguous; what is constant is not spread out."""
    one = x[: 1 if x.stride(0) == 0 else None, : 1 if x.stride(1) == 0 else None]
    return inner_contiguous(one.resolve_neg(), x.dim() - 2).expand(x.shape)


def next_state(
    memory: Tensor | None, state: Tensor, rows: int, dtype: torch.dtype, inner: int = 0
) -> tuple[Tensor, bool]:
    """Where a kernel that reads ``state`` writes the next one, number by number, and whether that is the caller's.

    The caller's memory has the rows of ``state``; new memory has one for each of ``rows`` rows of x. It is new where
    there is none of the caller's, or its last ``inner`` axes are not contiguous, or two entries of it are one, as in
    what was expanded, or no kernel knows its dtype, or it shares a storage with the state but is another view of it.
    """
    if memory is not None and _writable(memory, state, inner):
        return memory, True
    return state.new_empty((rows, *state.shape[1:]), dtype=dtype), False


def _writable(memory: Tensor, state: Tensor, inner: int) -> bool:
    if memory.dtype not in _FLOATS or (inner and inner_contiguous(memory, inner) is not memory):
        return False
    extent = 1
    for stride, size in () if memory.is_contiguous() else sorted(zip(memory.stride(), memory.shape, strict=True)):
        if size > 1 and stride < extent:
            return False
        extent += stride * max(size - 1, 0)
    if memory is state:
        return True
    like, found = ((m.data_ptr(), m.stride(), m.dtype) for m in (memory, state))
    return like == found or memory.untyped_storage().data_ptr() != state.untyped_storage().data_ptr()
