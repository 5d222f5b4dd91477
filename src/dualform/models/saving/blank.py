"""New models whose values are not made, since a checkpoint replaces them."""

from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

_FILLS = ("normal_", "uniform_", "kaiming_uniform_")


class Blank(TorchFunctionMode):
    """Leaves out the random fills of a new model, whose values a checkpoint replaces; so its memory is not touched."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")  # of torch.nn.init, and of Tensor
        if name in _FILLS or (name == "div_" and isinstance(args[0], nn.Parameter)):
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))
