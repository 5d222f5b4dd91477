"""The operator of Hyena, whatever computes its long convolutions: gates and convolutions in turn."""

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from dualform.core.errors import ConfigError
from dualform.core.packing import Borders
from dualform.core.shapes import wide
from dualform.layers.mixer import Hint, Mixer
from dualform.ops.causal_conv1d import causal_conv1d, causal_conv1d_update


class HyenaOperator(Mixer):
    """``v, x_0 .. x_{N-1} = conv(in(u))``; ``v <- k_n * (x_n v) + D_n x_n v`` from n = N - 1 to 1; ``y = out(x_0 v)``.

    Args:
        name: of the layer, for errors.
        order: N; ``N - 1`` long convolutions per channel.
        d_conv: W, width of the short convolution.
        d_model: D.

    Raises:
        ConfigError: for an order below 2, or sizes below 1.
    """

    hints: ClassVar[dict[str, Hint]] = {"D": Hint(decay=False), "conv_weight": Hint(decay=False)}

    def __init__(self, name: str, order: int, d_conv: int, d_model: int):
        super().__init__()
        if order < 2:
            raise ConfigError(f"{name}: order is {order}, expected at least 2: one long convolution")
        if min(d_conv, d_model) < 1:
            raise ConfigError(f"{name}: d_conv is {d_conv} and d_model {d_model}, expected at least 1")
        self.d_model, self.order, width, spread = d_model, order, (order + 1) * d_model, 1 / math.sqrt(d_conv)
        self.in_proj = nn.Linear(d_model, width)
        self.conv_weight = nn.Parameter(torch.empty(width, d_conv).uniform_(-spread, spread))
        self.conv_bias = nn.Parameter(torch.empty(width).uniform_(-spread, spread))
        self.D = nn.Parameter(torch.randn(order - 1, d_model))
        self.out_proj = nn.Linear(d_model, d_model)

    def _conv_shape(self, rows: int) -> tuple[int, int, int]:
        return rows, len(self.conv_weight), self.conv_weight.shape[1] - 1

    def _short(self, x: Tensor, state: Tensor, cu_seqlens: Borders) -> tuple[Tensor, Tensor]:
        """The projections of ``(B, T, D)`` after the short convolution, in float32 or wider, and its state."""
        p = self.in_proj(x).to(wide(self.D))
        return causal_conv1d(p, self.conv_weight, self.conv_bias, initial_state=state, cu_seqlens=cu_seqlens)

    def _short_step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        p = self.in_proj(x).to(wide(self.D))
        return causal_conv1d_update(p, state, self.conv_weight, self.conv_bias)

    def _gate(self, p: Tensor, convolve: Callable[[int, Tensor], Tensor], x: Tensor) -> Tensor:
        """The recurrence of the order, ``convolve(n, u)`` its n-th long convolution, and the map to the outputs."""
        *gates, v = p.split(self.d_model, -1)
        for n, gate in enumerate(reversed(gates[1:])):
            u = gate * v
            v = convolve(n, u) + self.D[n].to(u.dtype) * u
        return self.out_proj((gates[0] * v).to(x.dtype))
