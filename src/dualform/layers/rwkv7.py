"""RWKV-7 (Goose): a delta rule with decays and rates of every channel, and values that look back to the first layer."""

import math
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dualform.core.options import options
from dualform.core.packing import Borders, Packing
from dualform.core.shapes import check_tensors, wide
from dualform.core.shift import shift
from dualform.core.tree import state_class
from dualform.layers.context import Context
from dualform.layers.mamba import check_sizes
from dualform.layers.mixer import Hint, Mixer, check_state
from dualform.layers.rwkv6 import check_heads
from dualform.ops.gated_norm import gated_norm
from dualform.ops.wkv7 import wkv7, wkv7_update

FIRST_VALUE = "first_value"
"""The name under which the first layer of a model saves its values."""
_MIXED = ("r", "w", "k", "v", "a", "g")  # what is made of an own mix of an input with the one before it


@options
class RWKV7Config:
    """The time mixing of RWKV-7.

    Args:
        d_head: N, key and value channels of a head.
        decay_rank: rank of the map that makes decays.
        rate_rank: rank of the map that makes the rates at which what is stored under a key is replaced.
        gate_rank: rank of the map that makes the gate of the output.
        value_rank: rank of the map that says how much of the first layer's value takes the place of the layer's own; 0
            in the first layer, whose value that is.
        norm_eps: epsilon of the norm of every head's output.
    """

    d_head: int = 64
    decay_rank: int = 64
    rate_rank: int = 64
    gate_rank: int = 128
    value_rank: int = 0
    norm_eps: float = 64e-5

    def build(self, d_model: int) -> "RWKV7":
        """The layer, freshly initialised."""
        return RWKV7(self, d_model)


@state_class
class RWKV7State(NamedTuple):
    """Constant in the length of the context."""

    x: Tensor  # (B, D), the last input
    h: Tensor  # (B, H, N, N)


class LowRank(nn.Module):
    """``bias + B f(A x)``, without a bias where ``bias`` is false."""

    def __init__(self, d_model: int, rank: int, bias: bool = True):
        super().__init__()
        self.down, self.up = nn.Linear(d_model, rank, bias=False), nn.Linear(rank, d_model, bias=False)
        self.bias = nn.Parameter(torch.zeros(d_model)) if bias else None

    def forward(self, x: Tensor, inner: str = "") -> Tensor:
        """The map of ``x`` ``(..., D)``; ``inner`` is the name of the function between the two matrices, if any."""
        low = self.down(x)
        y = self.up(getattr(low, inner)() if inner else low)
        return y if self.bias is None else y + self.bias


class RWKV7(Mixer):
    """``S_t = (diag(w_t) - (a_t l_t) l_t^T) S_{t-1} + k_t v_t^T``, ``y = out(g (norm(S^T r) + (r . (bonus k)) v))``.

    Each of r, w, k, v, a and g is made of an own mix ``x_t + mix (x_{t-1} - x_t)``. ``w = exp(-exp(-1/2) s(...))``,
    ``a = s(...)`` and g are maps of low rank, with the logistic function s; l is ``key_scale k``, each head of it at
    length 1, and k is then ``k (1 + (a - 1) rate_scale)``. Layers after the first take ``v + (v_first - v) s(...)`` for
    v, with the value of the first. The norm is the layer norm of every head. Before the first input there is zero.

    In a model the first layer (``value_rank`` 0) saves its value in the context, and later ones read it there;
    ``first_value=`` gives it to a layer that runs by itself, which without one takes its own.

    Raises:
        ConfigError: for a size below 1, or a head that does not divide ``d_model``.

    References:
        Peng et al. (2025), arXiv:2503.14456, section 4.
    """

    in_context = True
    hints: ClassVar[dict[str, Hint]] = {
        name: Hint(decay=False) for name in ("mix", "key_scale", "rate_scale", "bonus", "norm_weight", "norm_bias")
    }

    def __init__(self, config: RWKV7Config, d_model: int):
        super().__init__()
        c, self.config, self.d_model = config, config, d_model
        check_sizes(
            "rwkv7", d_model=d_model, d_head=c.d_head, decay_rank=c.decay_rank, rate_rank=c.rate_rank,
            gate_rank=c.gate_rank,
        )  # fmt: skip
        check_sizes("rwkv7", **({"value_rank": c.value_rank} if c.value_rank else {}))
        check_heads("rwkv7", d_model, c.d_head)
        self.heads = d_model // c.d_head
        feature, place = torch.arange(d_model) / d_model, torch.arange(d_model) / max(1, d_model - 1)
        self.mix = nn.Parameter((1 - feature**0.5).repeat(len(_MIXED), 1))
        self.receptance = nn.Linear(d_model, d_model, bias=False)
        self.key = nn.Linear(d_model, d_model, bias=False)
        self.value = nn.Linear(d_model, d_model, bias=False)
        self.decay = LowRank(d_model, c.decay_rank)
        self.rate = LowRank(d_model, c.rate_rank)
        self.gate = LowRank(d_model, c.gate_rank, bias=False)
        self.value_mix = LowRank(d_model, c.value_rank) if c.value_rank else None
        self.key_scale, self.rate_scale = (nn.Parameter(torch.full((d_model,), f)) for f in (0.7, 1.0))
        self.bonus = nn.Parameter(torch.full((self.heads, c.d_head), -0.04))
        self.norm_weight, self.norm_bias = nn.Parameter(torch.ones(d_model)), nn.Parameter(torch.zeros(d_model))
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        with torch.no_grad():
            for low in filter(None, (self.decay, self.rate, self.gate, self.value_mix)):
                low.down.weight.zero_()
            torch.nn.init.uniform_(self.gate.down.weight, -1 / math.sqrt(d_model), 1 / math.sqrt(d_model))
            biases = {self.decay: -6 + 6 * place**1.5 + 0.5, self.rate: -0.19 + 0 * place, self.value_mix: 0.73 - place}
            for low, start in biases.items():
                if low is not None and low.bias is not None:
                    low.bias.copy_(start)

    def init_state(self, batch: int, *, max_len: int = 0) -> RWKV7State:
        """Zeros; ``max_len`` is ignored."""
        like, n = self.key_scale, self.config.d_head
        return RWKV7State(
            like.new_zeros(batch, self.d_model, dtype=wide(like)),
            like.new_zeros(batch, self.heads, n, n, dtype=wide(like)),
        )

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: RWKV7State | None = None,
        *,
        cu_seqlens: Borders = None,
        first_value: Tensor | None = None,
        context: Context | None = None,
    ) -> tuple[Float[Tensor, "B T D"], RWKV7State]:
        """The parallel form; ``first_value`` is ``(B, T, D)``."""
        check_tensors("rwkv7", x=(x, f"B T {self.d_model}"), first_value=(first_value, f"? B T {self.d_model}"))
        packing = Packing.of("rwkv7", cu_seqlens, x)
        state = check_state("rwkv7", state, self.init_state(x.shape[0] if packing is None else packing.rows))
        before, last = shift(x, state.x, packing)
        given, gate = self._given(x, before, self._first(first_value, context))
        if context is not None and self.value_mix is None:
            context[FIRST_VALUE] = given[3].flatten(-2)
        y, h = wkv7(*given, initial_state=state.h, cu_seqlens=packing)
        return self._out(y, given, gate), RWKV7State(last, h)

    def step(
        self,
        x: Float[Tensor, "B D"],
        state: RWKV7State,
        *,
        first_value: Tensor | None = None,
        context: Context | None = None,
    ) -> tuple[Float[Tensor, "B D"], RWKV7State]:
        """The recurrent form; ``first_value`` is ``(B, D)``."""
        check_tensors("rwkv7", x=(x, f"B {self.d_model}"), first_value=(first_value, f"? B {self.d_model}"))
        state = check_state("rwkv7", state, self.init_state(x.shape[0]))
        saved = self._first(None, context)
        first_value = first_value if saved is None else saved[:, 0]
        given, gate = self._given(x, state.x.to(x.dtype), first_value)
        if context is not None and self.value_mix is None:
            context[FIRST_VALUE] = given[3].flatten(-2)[:, None]
        y, h = wkv7_update(state.h, *given)
        return self._out(y, given, gate), RWKV7State(x.to(state.x.dtype, copy=True), h)

    def _first(self, given: Tensor | None, context: Context | None) -> Tensor | None:
        """The value of the first layer, ``(B, T, D)``; None where the layer takes its own."""
        return given if context is None or self.value_mix is None else context[FIRST_VALUE]

    def _given(self, x: Tensor, before: Tensor, first_value: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """What the op is given, by head, and the gate, for inputs ``(..., D)`` and those before them."""
        r, w, k, v, a, g = (torch.lerp(x, before, mix) for mix in self.mix)
        decay = -math.exp(-0.5) * self.decay(w, "tanh").to(wide(w)).sigmoid()
        rate, gate = self.rate(a).sigmoid(), self.gate(g, "sigmoid")
        r, k, value = self.receptance(r), self.key(k), self.value(v)
        if self.value_mix is not None and first_value is not None:
            value = torch.lerp(value, first_value.to(value.dtype), self.value_mix(v).sigmoid())
        unit = F.normalize((k * self.key_scale).unflatten(-1, (self.heads, -1)), dim=-1)
        k = k * (1 + (rate - 1) * self.rate_scale)
        r, decay, k, value, rate = (m.unflatten(-1, (self.heads, -1)) for m in (r, decay, k, value, rate))
        return [r, decay, k, value, -unit, unit * rate], gate

    def _out(self, y: Tensor, given: list[Tensor], gate: Tensor) -> Tensor:
        r, _, k, v, *_ = given
        norm = {"groups": self.heads, "eps": self.config.norm_eps, "center": True}
        y = gated_norm(y.flatten(-2), self.norm_weight, self.norm_bias, **norm)
        return self.out_proj(gate * (y + ((r * k * self.bonus).sum(-1, keepdim=True) * v).flatten(-2)))
