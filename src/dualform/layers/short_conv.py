"""The gated short convolution of LFM2: a convolution over a few steps between two gates, and nothing else."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dualform.core.options import options
from dualform.core.packing import Borders, Packing
from dualform.core.shapes import check_features, wide
from dualform.core.tree import state_class
from dualform.layers.mamba import check_sizes
from dualform.layers.mixer import Mixer, check_kind
from dualform.ops.causal_conv1d import causal_conv1d, causal_conv1d_update


@options
class GatedShortConvConfig:
    """A gated short convolution.

    Args:
        d_conv: W, how many inputs an output sees.
        bias: whether the convolution and the projections have one.
    """

    d_conv: int = 3
    bias: bool = False

    def build(self, d_model: int) -> "GatedShortConv":
        """The layer, freshly initialised."""
        return GatedShortConv(self, d_model)


@state_class
class GatedShortConvState(NamedTuple):
    """Constant in the length of the context."""

    conv: Tensor  # (B, D, W-1), the last inputs of the convolution, oldest first


class GatedShortConv(Mixer):
    """``B, C, x = in(u)``; ``y = out(C * conv(B * x))``, where ``conv`` is depthwise, causal and W steps wide.

    Shapes:
        ``(B, T, d_model) -> (B, T, d_model)``; inside, as many channels as features.

    Raises:
        ConfigError: for a width below 1.

    References:
        Liquid AI (2025), "LFM2 technical report", arXiv:2511.23404.
    """

    def __init__(self, config: GatedShortConvConfig, d_model: int):
        super().__init__()
        check_sizes("short_conv", d_model=d_model, d_conv=config.d_conv)
        self.config, self.d_model = config, d_model
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=config.bias)
        bound = 1 / math.sqrt(config.d_conv)
        self.conv_weight = nn.Parameter(torch.empty(d_model, config.d_conv).uniform_(-bound, bound))
        self.conv_bias = nn.Parameter(torch.empty(d_model).uniform_(-bound, bound)) if config.bias else None
        self.out_proj = nn.Linear(d_model, d_model, bias=config.bias)

    def init_state(self, batch: int, *, max_len: int = 0) -> GatedShortConvState:
        """Zeros; ``max_len`` is ignored."""
        weight = self.conv_weight
        return GatedShortConvState(weight.new_zeros(batch, self.d_model, weight.shape[1] - 1, dtype=wide(weight)))

    def forward(
        self, x: Float[Tensor, "B T D"], state: GatedShortConvState | None = None, *, cu_seqlens: Borders = None
    ) -> tuple[Float[Tensor, "B T D"], GatedShortConvState]:
        """The parallel form."""
        check_features("short_conv", x, self.d_model)
        packing = Packing.of("short_conv", cu_seqlens, x)
        if state is not None:
            check_kind("short_conv", state, GatedShortConvState)
        B, C, x = self.in_proj(x).chunk(3, -1)
        start = None if state is None else state.conv
        y, conv = causal_conv1d(B * x, self.conv_weight, self.conv_bias, initial_state=start, cu_seqlens=packing)
        return self.out_proj(C * y), GatedShortConvState(conv)

    def step(
        self, x: Float[Tensor, "B D"], state: GatedShortConvState
    ) -> tuple[Float[Tensor, "B D"], GatedShortConvState]:
        """The recurrent form."""
        check_features("short_conv", x, self.d_model, "B")
        check_kind("short_conv", state, GatedShortConvState)
        B, C, x = self.in_proj(x).chunk(3, -1)
        y, conv = causal_conv1d_update(B * x, state.conv, self.conv_weight, self.conv_bias)
        return self.out_proj(C * y), GatedShortConvState(conv)
