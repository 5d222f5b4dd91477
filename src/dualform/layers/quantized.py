"""Linear maps and embeddings whose weights have 8 bits. They are for inference: nothing in them is trained."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dualform.core.errors import ArgumentError
from dualform.core.int8 import dequantize, groups_of, quantize
from dualform.ops.quantized_linear import quantized_linear

TRAINS = "load the model without quantize, and train that"


class _Quantized(nn.Module):
    """A matrix ``(F, D)`` of whole numbers and the scales of its groups, which stay float32 whatever ``to`` is told."""

    weight: Tensor  # (F, D), int8
    scales: Tensor  # (F, ceil(D / group)), float32

    def __init__(self, rows: int, width: int, group: int):
        super().__init__()
        self.group = group
        self.register_buffer("weight", torch.empty(rows, width, dtype=torch.int8))
        self.register_buffer("scales", torch.empty(rows, groups_of(width, group), dtype=torch.float32))

    def take(self, weight: Tensor) -> None:
        """Hold the matrix that is nearest to a floating one, on the device of that."""
        self.weight, self.scales = quantize(weight, self.group)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != torch.float32:
            self.scales = scales.to(self.scales.device)
        return self

    def extra_repr(self) -> str:
        """The sizes, as PyTorch shows those of its modules."""
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}, int8 in groups of {self.group}"


class QuantizedLinear(_Quantized):
    """``y = W x + b`` with W in 8 bits; see :func:`~dualform.ops.quantized_linear.quantized_linear`.

    Args:
        inputs: D.
        outputs: F.
        group: neighbours in a row of W that share a scale.
        bias: b ``(F,)``, or None.
    """

    def __init__(self, inputs: int, outputs: int, group: int, bias: nn.Parameter | None = None):
        super().__init__(outputs, inputs, group)
        self.bias = bias

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... F"]:
        """The products, in the dtype of x.

        Raises:
            ArgumentError: where a gradient would be recorded.
        """
        return _products(self, x, self.bias)


class QuantizedEmbedding(_Quantized):
    """Rows of a matrix in 8 bits, one for each token.

    Args:
        tokens: V.
        width: D.
        group: neighbours in a row that share a scale.
    """

    def __init__(self, tokens: int, width: int, group: int):
        super().__init__(tokens, width, group)

    def forward(self, tokens: Int[Tensor, "..."]) -> Float[Tensor, "... D"]:
        """The rows of tokens, float32."""
        return dequantize(self.weight[tokens], self.scales[tokens], self.group, torch.float32)

    def products(self, h: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """The products with all rows, which a tied head takes, in the dtype of h.

        Raises:
            ArgumentError: where a gradient would be recorded.
        """
        return _products(self, h, None)


def _products(of: _Quantized, x: Tensor, bias: Tensor | None) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        raise ArgumentError(f"{type(of).__name__}: weights of 8 bits have no gradient", hint=TRAINS)
    y = quantized_linear(x.reshape(-1, x.shape[-1]), of.weight, of.scales, bias, group=of.group)
    return y.view(*x.shape[:-1], of.weight.shape[0])


def quantized_within(module: nn.Module) -> dict[str, _Quantized]:
    """The quantised maps and embeddings inside of a module, each once, by name."""
    return {name: m for name, m in module.named_modules() if isinstance(m, _Quantized)}


def group_of(m: Any) -> int:
    """How many neighbours in a row of a linear map share a scale; 0 where it is not quantised."""
    return m.group if isinstance(m, QuantizedLinear) else 0


def scales_of(m: Any) -> Tensor | None:
    """The scales of a linear map, where it is quantised."""
    return m.scales if isinstance(m, QuantizedLinear) else None
