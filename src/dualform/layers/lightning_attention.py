"""Lightning attention: linear attention with constant decays, and plain linear attention as the case without."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dualform.core.errors import ConfigError
from dualform.core.options import options
from dualform.core.packing import Borders, Packing
from dualform.core.shapes import check_features, wide
from dualform.core.tree import state_class
from dualform.layers.constant_decay import decayed_attention, decayed_attention_step
from dualform.layers.heads import head_width
from dualform.layers.mixer import Mixer, check_kind
from dualform.layers.norm import RMSNorm


@options
class LightningAttentionConfig:
    """A layer of lightning attention.

    Args:
        heads: H, each with a decay of its own.
        d_head: N, width of a head; None is ``d_model / heads``.
        decay: a factor of the decay rates ``2^(-8 i / H)``, i = 1 to H; 0 is plain linear attention. In MiniMax-01,
            layer l of L has the factor ``1 - l / (L - 1)``.
        norm_eps: epsilon of the norm before the projection out.
    """

    heads: int = 4
    d_head: int | None = None
    decay: float = 1.0
    norm_eps: float = 1e-6

    def build(self, d_model: int) -> "LightningAttention":
        """The layer, freshly initialised."""
        return LightningAttention(self, d_model)


@state_class
class LightningAttentionState(NamedTuple):
    """Constant in the length of the context."""

    h: Tensor  # (B, H, N, N), values by keys


class LightningAttention(Mixer):
    """``q, k, v = silu(qkv(x))``; ``h_t = exp(-rate) h_{t-1} + v_t k_t^T``; ``y_t = out(s(gate(x)) * rms(h_t q_t))``.

    s is the logistic function; the norm is over all heads together.

    Shapes:
        ``(B, T, d_model) -> (B, T, d_model)``; inside, H heads of width N.

    Raises:
        ConfigError: when ``heads`` does not divide ``d_model`` and no ``d_head`` is given, for a size below 1, or a
            negative ``decay``.

    References:
        MiniMax (2025), "MiniMax-01", arXiv:2501.08313, section 2.2; Qin et al. (2024), "Lightning attention-2",
        arXiv:2401.04658; the rates are those of Press et al. (2021), arXiv:2108.12409, section 3.
    """

    def __init__(self, config: LightningAttentionConfig, d_model: int):
        super().__init__()
        c, self.config, self.d_model = config, config, d_model
        self.heads, self.d_head = c.heads, head_width("lightning_attention", d_model, c.heads, c.d_head)
        if not 0 <= c.decay < math.inf:
            raise ConfigError(f"lightning_attention: decay is {c.decay}, expected at least 0")
        if not 0 < c.norm_eps < math.inf:
            raise ConfigError(f"lightning_attention: norm_eps is {c.norm_eps}, expected a small positive number")
        width = c.heads * self.d_head
        self.qkv_proj = nn.Linear(d_model, 3 * width, bias=False)
        self.gate_proj = nn.Linear(d_model, width, bias=False)
        self.norm = RMSNorm(width, c.norm_eps)
        self.out_proj = nn.Linear(width, d_model, bias=False)

    def init_state(self, batch: int, *, max_len: int = 0) -> LightningAttentionState:
        """Zeros; ``max_len`` is ignored."""
        weight = self.norm.weight
        return LightningAttentionState(
            weight.new_zeros(batch, self.heads, self.d_head, self.d_head, dtype=wide(weight))
        )

    def forward(
        self, x: Float[Tensor, "B T D"], state: LightningAttentionState | None = None, *, cu_seqlens: Borders = None
    ) -> tuple[Float[Tensor, "B T D"], LightningAttentionState]:
        """The parallel form."""
        check_features("lightning_attention", x, self.d_model)
        packing = Packing.of("lightning_attention", cu_seqlens, x)
        if state is not None:
            check_kind("lightning_attention", state, LightningAttentionState)
        q, k, v = self._maps(x)
        y, h = decayed_attention(q, k, v, self.rates(), None if state is None else state.h, packing)
        return self._out(x, y), LightningAttentionState(h)

    def step(
        self, x: Float[Tensor, "B D"], state: LightningAttentionState
    ) -> tuple[Float[Tensor, "B D"], LightningAttentionState]:
        """The recurrent form."""
        check_features("lightning_attention", x, self.d_model, "B")
        check_kind("lightning_attention", state, LightningAttentionState)
        q, k, v = self._maps(x)
        y, h = decayed_attention_step(q, k, v, self.rates(), state.h)
        return self._out(x, y), LightningAttentionState(h)

    def rates(self) -> Float[Tensor, " H"]:
        """The decay rate of each head."""
        weight = self.norm.weight
        head = torch.arange(1, self.heads + 1, dtype=wide(weight), device=weight.device)
        return self.config.decay * torch.exp2(-8 / self.heads * head)

    def _maps(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, ``(..., H, N)``."""
        return F.silu(self.qkv_proj(x)).unflatten(-1, (3, self.heads, self.d_head)).unbind(-3)

    def _out(self, x: Tensor, y: Tensor) -> Tensor:
        return self.out_proj(torch.sigmoid(self.gate_proj(x)) * self.norm(y.flatten(-2)))
