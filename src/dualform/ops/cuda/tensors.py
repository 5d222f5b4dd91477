"""How kernels see tensors: an address, and strides in elements."""

from typing import Any

import torch
from torch import Tensor

from dualform.ops.layout import inner_contiguous

TYPES = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "float16"}
NO_VIEW = (0, 0, 0)


def pointer(tensor: Tensor | None) -> int:
    """The address of the first element; 0 for no tensor."""
    return 0 if tensor is None else tensor.data_ptr()


def readable(tensor: Tensor, inner: int = 1) -> Tensor:
    """The tensor in a dtype that kernels read, its last ``inner`` axes contiguous."""
    return inner_contiguous(tensor if tensor.dtype in TYPES else tensor.float(), inner)


def view(tensor: Tensor) -> tuple[int, int, int]:
    """``View``: a tensor ``(B, T, ...)`` whose axes after time are contiguous."""
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1)


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


def alive(*tensors: Any) -> None:
    """Names the tensors once more after a launch, so that their memory is not given back before it is queued."""
