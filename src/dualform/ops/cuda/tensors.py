"""How kernels find their numbers in tensors: dtypes, contiguous axes, alignment."""

import torch
from torch import Tensor

from dualform.core.packing import Packing
from dualform.ops.layout import inner_contiguous, time_last

TYPES = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def readable(tensor: Tensor, inner: int = 1) -> Tensor:
    """The tensor in a dtype that kernels read, its last ``inner`` axes contiguous."""
    return inner_contiguous(tensor if tensor.dtype in TYPES else tensor.float(), inner)


def in_place(tensor: Tensor, inner: int = 1) -> tuple[Tensor, bool]:
    """The tensor ``(B, T, ...)`` as :func:`readable`, or where time is innermost ``(B, D, T)``; and whether it is."""
    tensor = tensor if tensor.dtype in TYPES else tensor.float()
    return (by_time(tensor), True) if time_last(tensor) else (inner_contiguous(tensor, inner), False)


def by_time(tensor: Tensor) -> Tensor:
    """A tensor ``(B, T, ...)`` with time innermost as ``(B, D, T)``, the axes between in one."""
    return tensor.movedim(1, -1).flatten(1, -2)


def borders(packing: Packing | None) -> Tensor | None:
    """The cumulative lengths as kernels read them: int64, one after another."""
    return None if packing is None else packing.cu_seqlens.contiguous()


def aligned(size: int, *tensors: Tensor | None, many: int = 4) -> bool:
    """Whether ``many`` neighbours on a last axis of ``size`` can always be read at once, up to 16 bytes of them."""
    if size % many:
        return False
    for x in tensors:
        if x is not None:
            strides = x.stride()
            if x.data_ptr() % min(many * x.element_size(), 16) or strides[0] % many or strides[1] % many:
                return False
    return True
