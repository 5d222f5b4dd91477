"""The norms around the sub-layers of a block, by the names that configs use."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dualform.core.errors import ConfigError
from dualform.core.options import suggestion
from dualform.core.shapes import wide
from dualform.layers.norm import RMSNorm


class OffsetRMSNorm(RMSNorm):
    """``rms(x) * (1 + weight)``, the weight 0 at the start; otherwise as :class:`~dualform.layers.norm.RMSNorm`.

    References:
        Gemma Team (2024), arXiv:2403.08295, whose models store the weight so.
    """

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__(width, eps)
        nn.init.zeros_(self.weight)

    def forward(self, x: Float[Tensor, "... D"], stream: Float[Tensor, "... D"] | None = None) -> Any:
        """The norm of x, or of ``stream + x``, and that sum."""
        x = x if stream is None else stream + x
        dtype = wide(x, self.weight)
        y = F.rms_norm(x.to(dtype), self.weight.shape, 1 + self.weight.to(dtype), self.eps).to(self.weight.dtype)
        return y if stream is None else (y, x)


class LayerNorm(nn.LayerNorm):
    """``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias``, in the dtype of the weight; computed in float32 or wider.

    Args:
        width: the size of the last axis.
        eps: added to the variance.
        bias: whether there is one.

    References:
        Ba et al. (2016), arXiv:1607.06450, equation 3.
    """

    def __init__(self, width: int, eps: float = 1e-5, *, bias: bool = True):
        super().__init__(width, eps, bias=bias)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Float[Tensor, "... D"], stream: Float[Tensor, "... D"] | None = None
    ) -> Any:
        """The norm of x, or of ``stream + x``, and that sum."""
        x = x if stream is None else stream + x
        dtype = wide(x, self.weight)
        bias = None if self.bias is None else self.bias.to(dtype)
        y = F.layer_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), bias, self.eps).to(self.weight.dtype)
        return y if stream is None else (y, x)


class NoNorm(nn.Module):
    """``x`` as it is, where a block would have a norm."""

    def forward(self, x: Float[Tensor, "... D"], stream: Float[Tensor, "... D"] | None = None) -> Any:
        """x, or ``stream + x`` twice."""
        return x if stream is None else (stream + x, stream + x)


NORMS: dict[str, Callable[[int, float], nn.Module]] = {
    "rms": RMSNorm,
    "rms_offset": OffsetRMSNorm,
    "layer": LayerNorm,
    "layer_no_bias": lambda width, eps: LayerNorm(width, eps, bias=False),
}
"""The norms of configs: each is called with a width and an epsilon."""


def make_norm(kind: str | None, width: int, eps: float) -> nn.Module:
    """The norm called ``kind``; without a name, :class:`NoNorm`."""
    return NoNorm() if kind is None else NORMS[kind](width, eps)


def check_norm_kind(where: str, kind: str | None) -> None:
    """That there is a norm of that name.

    Raises:
        ConfigError: suggests the nearest.
    """
    if kind is not None and kind not in NORMS:
        raise ConfigError(f"{where} is {kind!r}, expected the name of a norm", hint=suggestion(kind, list(NORMS)))
