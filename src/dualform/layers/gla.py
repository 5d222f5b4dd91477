"""Gated linear attention: keys and values in a matrix of which every key channel decays as the input says."""

import math
from typing import ClassVar, NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dualform.core.errors import ConfigError
from dualform.core.options import options
from dualform.core.packing import Borders, Packing
from dualform.core.shapes import check_features, wide
from dualform.core.tree import state_class
from dualform.layers.mamba import check_sizes
from dualform.layers.mixer import Hint, Mixer, check_kind
from dualform.layers.norm import GatedRMSNorm
from dualform.ops.gated_linear_attention import gated_linear_attention, gated_linear_attention_update


@options
class GLAConfig:
    """A layer of gated linear attention.

    Args:
        heads: H.
        expand_k: key channels of all heads per feature of the model.
        expand_v: value channels of all heads per feature of the model.
        gate_rank: rank of the map that makes decays.
        gate_temperature: by what the logarithm of the logistic function is divided; the larger, the slower the decay.
        norm_eps: epsilon of the norm of every head's output.
    """

    heads: int = 4
    expand_k: float = 0.5
    expand_v: float = 1.0
    gate_rank: int = 16
    gate_temperature: float = 16.0
    norm_eps: float = 1e-5

    def build(self, d_model: int) -> "GLA":
        """The layer, freshly initialised."""
        return GLA(self, d_model)


@state_class
class GLAState(NamedTuple):
    """Constant in the length of the context."""

    h: Tensor  # (B, H, N, P)


class GLA(Mixer):
    """``y = out(silu(W_g x) norm(o))``, ``o_t = S_t^T q_t / sqrt(N)``, ``S_t = diag(alpha_t) S_{t-1} + k_t v_t^T``.

    Per head, ``alpha_t = s(W_2 W_1 x_t + b)^(1/temperature)`` with the logistic function s; the norm is the RMS norm of
    every head.

    Shapes:
        ``(B, T, d_model) -> (B, T, d_model)``; inside, H heads with N key and P value channels each.

    Raises:
        ConfigError: where heads do not divide the channels, or a temperature or epsilon is not positive.

    References:
        Yang et al. (2024), arXiv:2312.06635, section 4.4.
    """

    def __init__(self, config: GLAConfig, d_model: int):
        super().__init__()
        c, self.config, self.d_model = config, config, d_model
        for name in ("expand_k", "expand_v", "gate_temperature", "norm_eps"):
            if not 0 < getattr(c, name) < math.inf:
                raise ConfigError(f"gla: {name} is {getattr(c, name)}, expected a positive number")
        keys, values = int(c.expand_k * d_model), int(c.expand_v * d_model)
        check_sizes("gla", d_model=d_model, heads=c.heads, gate_rank=c.gate_rank)
        check_sizes("gla", **{"expand_k * d_model": keys, "expand_v * d_model": values})
        for name, channels in (("expand_k", keys), ("expand_v", values)):
            if channels % c.heads:
                raise ConfigError(
                    f"gla: {name} * d_model = {channels} is not a multiple of heads = {c.heads}",
                    hint=f"set heads to a divisor of {channels}",
                )
        self.heads, self.sizes = c.heads, [keys, keys, values, values, c.gate_rank]
        self.in_proj = nn.Linear(d_model, sum(self.sizes), bias=False)
        self.decay_proj = nn.Linear(c.gate_rank, keys, bias=False)
        self.decay_bias = nn.Parameter(self.decay_proj.weight.new_zeros(keys))
        self.norm = GatedRMSNorm(values, c.heads, c.norm_eps, norm_before_gate=True)
        self.out_proj = nn.Linear(values, d_model, bias=False)

    hints: ClassVar[dict[str, Hint]] = {"decay_bias": Hint(decay=False)}

    def init_state(self, batch: int, *, max_len: int = 0) -> GLAState:
        """Zeros; ``max_len`` is ignored."""
        keys, _, values, *_ = (size // self.heads for size in self.sizes)
        bias = self.decay_bias
        return GLAState(bias.new_zeros(batch, self.heads, keys, values, dtype=wide(bias)))

    def forward(
        self, x: Float[Tensor, "B T D"], state: GLAState | None = None, *, cu_seqlens: Borders = None
    ) -> tuple[Float[Tensor, "B T D"], GLAState]:
        """The parallel form."""
        check_features("gla", x, self.d_model)
        packing = Packing.of("gla", cu_seqlens, x)
        if state is not None:
            check_kind("gla", state, GLAState)
        *given, gate = self._given(x)
        start = None if state is None else state.h
        y, h = gated_linear_attention(*given, initial_state=start, cu_seqlens=packing)
        return self.out_proj(self.norm(y.flatten(-2), gate)), GLAState(h)

    def step(self, x: Float[Tensor, "B D"], state: GLAState) -> tuple[Float[Tensor, "B D"], GLAState]:
        """The recurrent form."""
        check_features("gla", x, self.d_model, "B")
        check_kind("gla", state, GLAState)
        *given, gate = self._given(x)
        y, h = gated_linear_attention_update(state.h, *given)
        return self.out_proj(self.norm(y.flatten(-2), gate)), GLAState(h)

    def _given(self, x: Tensor) -> list[Tensor]:
        """Queries, keys, values and logarithms of decays by head, and the gate."""
        q, k, v, gate, low = self.in_proj(x).split(self.sizes, -1)
        decay = (self.decay_proj(low) + self.decay_bias).to(wide(low))
        q, k, v, g = (m.unflatten(-1, (self.heads, -1)) for m in (q, k, v, F.logsigmoid(decay)))
        return [q * q.shape[-1] ** -0.5, k, v, g / self.config.gate_temperature, gate]
