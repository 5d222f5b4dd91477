"""RetNet's multi-scale retention: linear attention with positions, and a constant decay for each head."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dualform.core.errors import ConfigError
from dualform.core.options import options
from dualform.core.packing import Borders, Packing
from dualform.core.shapes import check_features, wide
from dualform.core.tree import state_class
from dualform.layers.constant_decay import decayed_attention, decayed_attention_step
from dualform.layers.elapsed import advanced, positions
from dualform.layers.heads import head_width
from dualform.layers.mamba import check_sizes
from dualform.layers.mixer import Mixer, check_kind
from dualform.layers.norm import GatedRMSNorm
from dualform.layers.rotary import rotate


@options
class RetNetConfig:
    """A layer of multi-scale retention.

    Args:
        heads: H, each with a decay of its own.
        d_head: N, width of the queries and keys of a head; None is ``d_model / heads``.
        expand: values of a head per key; their width is P = ``expand * d_head``.
        rope: base of the rotary embedding; None for no positions at all.
        norm_eps: epsilon of the norm of each head's output.
    """

    heads: int = 4
    d_head: int | None = None
    expand: int = 2
    rope: float | None = 10000.0
    norm_eps: float = 1e-5

    def build(self, d_model: int) -> "RetNet":
        """The layer, freshly initialised."""
        return RetNet(self, d_model)


@state_class
class RetNetState(NamedTuple):
    """Constant in the length of the context."""

    h: Tensor  # (B, H, P, N), values by keys
    length: Tensor  # (B,) int64, steps each row has seen


class RetNet(Mixer):
    """``h_t = gamma h_{t-1} + v_t R_t(k_t)^T``, ``y_t = out(rms(h_t R_t(q_t) / sqrt(N)) silu(g_t))`` in each head.

    q, k, v and g are linear maps of the input. ``R_t`` rotates by the position t, and ``gamma = 1 - 2^(-5 - i)`` in
    head i = 0, 1, .... The norm is of each head by itself, with a weight for each channel: an RMS norm, as in the code
    of the paper's authors, where the paper has a group norm. The factors by which the paper normalises scores are left
    out: a norm follows, which would remove them.

    Shapes:
        ``(B, T, d_model) -> (B, T, d_model)``; inside, H heads with keys of width N and values of width P.

    Raises:
        ConfigError: when ``heads`` does not divide ``d_model`` and no ``d_head`` is given, or for a size below 1.

    References:
        Sun et al. (2023), "Retentive network", arXiv:2307.08621: equations 5 to 8.
    """

    def __init__(self, config: RetNetConfig, d_model: int):
        super().__init__()
        c, self.config, self.d_model = config, config, d_model
        self.heads, self.d_head = c.heads, head_width("retnet", d_model, c.heads, c.d_head)
        check_sizes("retnet", expand=c.expand)
        for name, value in (("rope", c.rope), ("norm_eps", c.norm_eps)):
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"retnet: {name} is {value}, expected a positive number")
        self.d_keys, self.d_values = c.heads * self.d_head, c.heads * self.d_head * c.expand
        self.in_proj = nn.Linear(d_model, 2 * self.d_keys + 2 * self.d_values, bias=False)
        self.norm = GatedRMSNorm(self.d_values, c.heads, c.norm_eps, norm_before_gate=True)
        self.out_proj = nn.Linear(self.d_values, d_model, bias=False)

    def init_state(self, batch: int, *, max_len: int = 0) -> RetNetState:
        """Zeros; ``max_len`` is ignored."""
        weight, width = self.norm.weight, self.d_head * self.config.expand
        return RetNetState(
            h=weight.new_zeros(batch, self.heads, width, self.d_head, dtype=wide(weight)),
            length=torch.zeros(batch, dtype=torch.int64, device=weight.device),
        )

    def forward(
        self, x: Float[Tensor, "B T D"], state: RetNetState | None = None, *, cu_seqlens: Borders = None
    ) -> tuple[Float[Tensor, "B T D"], RetNetState]:
        """The parallel form."""
        check_features("retnet", x, self.d_model)
        packing = Packing.of("retnet", cu_seqlens, x)
        if state is not None:
            check_kind("retnet", state, RetNetState)
        h, length = (None, None) if state is None else state
        q, k, v, g = self._maps(x, positions(x, length, packing))
        y, h = decayed_attention(q, k, v, self.rates(), h, packing)
        return self.out_proj(self.norm(y.flatten(2), g)), RetNetState(h, advanced(x, length, packing))

    def step(self, x: Float[Tensor, "B D"], state: RetNetState) -> tuple[Float[Tensor, "B D"], RetNetState]:
        """The recurrent form."""
        check_features("retnet", x, self.d_model, "B")
        check_kind("retnet", state, RetNetState)
        q, k, v, g = (m[:, 0] for m in self._maps(x[:, None], state.length[:, None]))
        y, h = decayed_attention_step(q, k, v, self.rates(), state.h)
        return self.out_proj(self.norm(y.flatten(1), g)), RetNetState(h, state.length + 1)

    def rates(self) -> Float[Tensor, " H"]:
        """``-log(gamma)`` of each head."""
        weight = self.norm.weight
        head = torch.arange(self.heads, dtype=wide(weight), device=weight.device)
        return -torch.log1p(-torch.exp2(-5 - head))

    def _maps(self, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The rotated queries and keys ``(B, T, H, N)``, the values, and the gate ``(B, T, H P)``."""
        q, k, v, g = self.in_proj(x).split([self.d_keys, self.d_keys, self.d_values, self.d_values], -1)
        q, k, v = (m.unflatten(-1, (self.heads, -1)) for m in (q / math.sqrt(self.d_head), k, v))
        if self.config.rope is not None:
            q, k = (rotate(m, at, self.config.rope) for m in (q, k))
        return q, k, v, g
