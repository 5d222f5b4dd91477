"""New models whose values are not made, since a checkpoint replaces them."""

from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

_FILLS = ("normal_", "uniform_", "kaiming_uniform_", "div_")


class Blank(TorchFunctionMode):
    """Leaves out the random fills of new parameters, which a checkpoint replaces; so their memory is not touched.

    Other tensors are filled: some are drawn again until they lie within bounds, and what was not drawn never would.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _FILLS:  # of torch.nn.init, and of Tensor
            filled = kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
            if isinstance(filled, nn.Parameter):
                return filled
        return func(*args, **(kwargs or {}))
