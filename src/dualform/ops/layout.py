"""How kernels find their numbers in tensors that were not made for them."""

from torch import Tensor


def inner_contiguous(tensor: Tensor, inner: int = 1) -> Tensor:
    """The tensor with its last ``inner`` axes contiguous, any strides before: slices of a projection pass uncopied."""
    stride = 1
    for axis in range(tensor.dim() - 1, tensor.dim() - 1 - inner, -1):
        if tensor.shape[axis] != 1 and tensor.stride(axis) != stride:
            return tensor.contiguous()
        stride *= tensor.shape[axis]
    return tensor
