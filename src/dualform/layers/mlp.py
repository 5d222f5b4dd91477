"""SwiGLU, the feed-forward layer of most language models. It maps every step by itself, and so has no state."""

from typing import ClassVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dualform.core.errors import ConfigError
from dualform.core.options import options
from dualform.layers.part import Part


@options
class MLPConfig:
    """The options of an :class:`MLP`.

    Args:
        d_hidden: the inner width. None is ``8/3 d_model`` rounded up to a multiple of 8; the three matrices then have
            together as many entries as the two of an MLP without a gate and with inner width ``4 d_model``.
        bias: whether a bias is added after each matrix.
    """

    d_hidden: int | None = None
    bias: bool = False

    def build(self, d_model: int) -> "MLP":
        """The layer for inputs of ``d_model`` features, with random weights."""
        return MLP(self, d_model)


class MLP(Part):
    """``y = W_down (silu(W_gate x) * W_up x)``, ``(..., D) -> (..., D)``.

    ``W_gate`` and ``W_up`` are the two halves of one matrix, ``gate_up_proj``.

    Raises:
        ConfigError: for an inner width below 1.

    References:
        Shazeer (2020), arXiv:2002.05202, equation 6 (FFN_SwiGLU).
    """

    residual: ClassVar[tuple[str, ...]] = ("down_proj.weight",)

    def __init__(self, config: MLPConfig, d_model: int):
        super().__init__()
        d_hidden = -(-d_model // 3) * 8 if config.d_hidden is None else config.d_hidden
        if d_hidden < 1:
            raise ConfigError(f"mlp: d_hidden is {d_hidden}, expected at least 1")
        self.gate_up_proj = nn.Linear(d_model, 2 * d_hidden, bias=config.bias)
        self.down_proj = nn.Linear(d_hidden, d_model, bias=config.bias)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """The outputs for ``x``; every step is mapped by itself."""
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)
