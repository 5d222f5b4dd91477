"""RWKV-6 (Finch): gated linear attention, whose decays, and mixes with the previous input, depend on the input."""

from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dualform.core.errors import ConfigError
from dualform.core.options import options
from dualform.core.packing import Borders, Packing
from dualform.core.shapes import check_features, wide
from dualform.core.shift import shift
from dualform.core.tree import state_class
from dualform.layers.mamba import check_sizes
from dualform.layers.mixer import Hint, Mixer, check_state
from dualform.ops.gated_linear_attention import gated_linear_attention, gated_linear_attention_update
from dualform.ops.gated_norm import gated_norm

_MIXED = ("w", "k", "v", "r", "g")  # what is made of an own mix of an input with the one before it


@options
class RWKV6Config:
    """The time mixing of RWKV-6.

    Args:
        d_head: N, key and value channels of a head.
        mix_rank: rank of the maps that make the mixes.
        decay_rank: rank of the map that makes decays.
        norm_eps: epsilon of the norm of every head's output.
    """

    d_head: int = 64
    mix_rank: int = 32
    decay_rank: int = 64
    norm_eps: float = 64e-5

    def build(self, d_model: int) -> "RWKV6":
        """The layer, freshly initialised."""
        return RWKV6(self, d_model)


@state_class
class RWKV6State(NamedTuple):
    """Constant in the length of the context."""

    x: Tensor  # (B, D), the last input
    h: Tensor  # (B, H, N, N)


def check_heads(where: str, d_model: int, d_head: int) -> None:
    """The heads of a layer as wide as the model.

    Raises:
        ConfigError: where they do not divide it.
    """
    if d_model % d_head:
        raise ConfigError(
            f"{where}: d_model = {d_model} is not a multiple of d_head = {d_head}",
            hint=f"set d_head to a divisor of {d_model}",
        )


class RWKV6(Mixer):
    """``y = out(silu(g) norm(o))``, ``o_t = (S_{t-1} + diag(u) k_t v_t^T)^T r_t``, where S decays by ``diag(w_t)``.

    With ``d_t = x_{t-1} - x_t``, each of w, k, v, r and g is made of ``x_t + d_t (mix + B tanh(A (x_t + mix_x d_t)))``
    with matrices of its own; ``w_t = exp(-exp(time_decay + B_w tanh(A_w x^w_t)))``. The norm is the layer norm of every
    head. Before the first input there is zero.

    Raises:
        ConfigError: for a size below 1, or a head that does not divide ``d_model``.

    References:
        Peng et al. (2024), arXiv:2404.05892, section 4.2.
    """

    hints: ClassVar[dict[str, Hint]] = {
        name: Hint(decay=False)
        for name in ("mix_x", "mix", "mix_in", "mix_out", "time_decay", "bonus", "norm_weight", "norm_bias")
    }

    def __init__(self, config: RWKV6Config, d_model: int):
        super().__init__()
        c, self.config, self.d_model = config, config, d_model
        check_sizes("rwkv6", d_model=d_model, d_head=c.d_head, mix_rank=c.mix_rank, decay_rank=c.decay_rank)
        check_heads("rwkv6", d_model, c.d_head)
        self.heads = d_model // c.d_head
        feature, place = torch.arange(d_model) / d_model, torch.arange(d_model) / max(1, d_model - 1)
        self.mix_x = nn.Parameter(1 - feature**0.5)
        self.mix = nn.Parameter((1 - feature**0.5).repeat(len(_MIXED), 1))
        self.mix_in = nn.Parameter(torch.empty(len(_MIXED), d_model, c.mix_rank).uniform_(-1e-4, 1e-4))
        self.mix_out = nn.Parameter(torch.empty(len(_MIXED), c.mix_rank, d_model).uniform_(-1e-4, 1e-4))
        self.time_decay = nn.Parameter(-6 + 5 * place**1.2)
        self.decay_in = nn.Linear(d_model, c.decay_rank, bias=False)
        self.decay_out = nn.Linear(c.decay_rank, d_model, bias=False)
        zigzag = (torch.arange(d_model) + 1) % 3 - 1
        self.bonus = nn.Parameter((0.5 * (1 - place) + 0.1 * zigzag).unflatten(0, (self.heads, c.d_head)))
        self.receptance = nn.Linear(d_model, d_model, bias=False)
        self.key = nn.Linear(d_model, d_model, bias=False)
        self.value = nn.Linear(d_model, d_model, bias=False)
        self.gate = nn.Linear(d_model, d_model, bias=False)
        self.norm_weight, self.norm_bias = nn.Parameter(torch.ones(d_model)), nn.Parameter(torch.zeros(d_model))
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def init_state(self, batch: int, *, max_len: int = 0) -> RWKV6State:
        """Zeros; ``max_len`` is ignored."""
        like, n = self.time_decay, self.config.d_head
        return RWKV6State(
            like.new_zeros(batch, self.d_model, dtype=wide(like)),
            like.new_zeros(batch, self.heads, n, n, dtype=wide(like)),
        )

    def forward(
        self, x: Float[Tensor, "B T D"], state: RWKV6State | None = None, *, cu_seqlens: Borders = None
    ) -> tuple[Float[Tensor, "B T D"], RWKV6State]:
        """The parallel form."""
        check_features("rwkv6", x, self.d_model)
        packing = Packing.of("rwkv6", cu_seqlens, x)
        state = check_state("rwkv6", state, self.init_state(x.shape[0] if packing is None else packing.rows))
        before, last = shift(x, state.x, packing)
        (r, k, v, decay), gate = self._given(x, before)
        y, h = gated_linear_attention(r, k, v, decay, self.bonus, initial_state=state.h, cu_seqlens=packing)
        return self._out(y, gate), RWKV6State(last, h)

    def step(self, x: Float[Tensor, "B D"], state: RWKV6State) -> tuple[Float[Tensor, "B D"], RWKV6State]:
        """The recurrent form."""
        check_features("rwkv6", x, self.d_model, "B")
        state = check_state("rwkv6", state, self.init_state(x.shape[0]))
        (r, k, v, decay), gate = self._given(x, state.x.to(x.dtype))
        y, h = gated_linear_attention_update(state.h, r, k, v, decay, self.bonus)
        return self._out(y, gate), RWKV6State(x.to(state.x.dtype, copy=True), h)

    def _given(self, x: Tensor, before: Tensor) -> tuple[list[Tensor], Tensor]:
        """r, k, v and logarithms of decays by head, and the gate, for inputs ``(..., D)`` and those before them."""
        d = before - x
        low = torch.einsum("...d,mdr->m...r", x + d * self.mix_x, self.mix_in).tanh()
        mixes = (low.flatten(1, -2) @ self.mix_out).unflatten(1, x.shape[:-1])
        w, k, v, r, g = (x + d * (mix + more) for mix, more in zip(self.mix, mixes, strict=True))
        decay = (self.time_decay + self.decay_out(self.decay_in(w).tanh())).to(wide(w))
        maps = self.receptance(r), self.key(k), self.value(v), -decay.exp()
        return [m.unflatten(-1, (self.heads, -1)) for m in maps], self.gate(g)

    def _out(self, y: Tensor, gate: Tensor) -> Tensor:
        norm = {"groups": self.heads, "eps": self.config.norm_eps, "center": True, "norm_before_gate": True}
        return self.out_proj(gated_norm(y.flatten(-2), self.norm_weight, self.norm_bias, z=gate, **norm))
