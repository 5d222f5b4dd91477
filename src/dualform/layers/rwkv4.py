"""RWKV-4: time mixing, an average under decays of channels, and channel mixing, a feed-forward with a state."""

import math
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dualform.core.options import options
from dualform.core.packing import Borders, Packing
from dualform.core.shapes import check_features, wide
from dualform.core.shift import shift
from dualform.core.tree import state_class
from dualform.layers.mamba import check_sizes
from dualform.layers.mixer import Hint, Mixer, check_state
from dualform.ops.wkv4 import nothing, wkv4


@options
class RWKV4Config:
    """The time mixing of RWKV-4.

    Args:
        d_inner: channels of the average; None is ``d_model``.
    """

    d_inner: int | None = None

    def build(self, d_model: int) -> "RWKV4":
        """The layer, freshly initialised."""
        return RWKV4(self, d_model)


@state_class
class RWKV4State(NamedTuple):
    """Constant in the length of the context."""

    x: Tensor  # (B, D), the last input
    h: Tensor  # (B, 2, d_inner), the average and the logarithm of the sum of its weights


class RWKV4(Mixer):
    """``r, k, v`` are maps of ``mix x_t + (1 - mix) x_{t-1}``, each with its own mix; ``y = out(s(r) wkv(k, v))``.

    ``s`` is the logistic function and ``wkv`` the average of :func:`~dualform.ops.wkv4.wkv4`, with the decay
    ``-exp(time_decay)`` of logarithms and the bonus ``time_first``. Before the first input there is zero.

    Raises:
        ConfigError: for a size below 1.

    References:
        Peng et al. (2023), arXiv:2305.13048, section 3.1; the initialisation is that of appendix E for a layer in the
        middle of a model.
    """

    hints: ClassVar[dict[str, Hint]] = {
        name: Hint(decay=False) for name in ("time_decay", "time_first", "mix_key", "mix_value", "mix_receptance")
    }

    def __init__(self, config: RWKV4Config, d_model: int):
        super().__init__()
        self.config, self.d_model = config, d_model
        self.d_inner = d_model if config.d_inner is None else config.d_inner
        check_sizes("rwkv4", d_model=d_model, d_inner=self.d_inner)
        place = torch.arange(self.d_inner) / max(1, self.d_inner - 1)
        self.time_decay = nn.Parameter(-5 + 8 * place**1.35)
        zigzag = (torch.arange(self.d_inner) + 1) % 3 - 1
        self.time_first = nn.Parameter(math.log(0.3) + 0.5 * zigzag)
        feature = torch.arange(d_model) / d_model
        self.mix_key = nn.Parameter(feature**0.5)
        self.mix_value = nn.Parameter(feature**0.5 + 0.15)
        self.mix_receptance = nn.Parameter(feature**0.25)
        self.key = nn.Linear(d_model, self.d_inner, bias=False)
        self.value = nn.Linear(d_model, self.d_inner, bias=False)
        self.receptance = nn.Linear(d_model, self.d_inner, bias=False)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def init_state(self, batch: int, *, max_len: int = 0) -> RWKV4State:
        """Zeros, and the average of nothing; ``max_len`` is ignored."""
        like = self.time_decay
        return RWKV4State(
            self.mix_key.new_zeros(batch, self.d_model, dtype=wide(self.mix_key)),
            nothing(like, batch, self.d_inner, wide(like)),
        )

    def forward(
        self, x: Float[Tensor, "B T D"], state: RWKV4State | None = None, *, cu_seqlens: Borders = None
    ) -> tuple[Float[Tensor, "B T D"], RWKV4State]:
        """The parallel form."""
        check_features("rwkv4", x, self.d_model)
        packing = Packing.of("rwkv4", cu_seqlens, x)
        state = check_state("rwkv4", state, self.init_state(x.shape[0] if packing is None else packing.rows))
        before, last = shift(x, state.x, packing)
        r, k, v = (
            project(torch.lerp(before, x, mix))
            for project, mix in (
                (self.receptance, self.mix_receptance),
                (self.key, self.mix_key),
                (self.value, self.mix_value),
            )
        )
        decay = -self.time_decay.to(wide(self.time_decay)).exp()
        y, h = wkv4(k, v, decay, self.time_first, initial_state=state.h, cu_seqlens=packing)
        return self.out_proj(r.sigmoid() * y), RWKV4State(last, h)


@options
class RWKVChannelConfig:
    """The channel mixing of RWKV.

    Args:
        d_hidden: the inner width; None is ``4 d_model``.
        receptance: whether a gate of the features multiplies the output, as in RWKV-4 to RWKV-6; RWKV-7 has none.
        previous: whether a mix is the share of the previous input, as RWKV-7 stores it, in place of that of the input.
    """

    d_hidden: int | None = None
    receptance: bool = True
    previous: bool = False

    def build(self, d_model: int) -> "RWKVChannel":
        """The layer, freshly initialised."""
        return RWKVChannel(self, d_model)


@state_class
class RWKVChannelState(NamedTuple):
    """Constant in the length of the context."""

    x: Tensor  # (B, D), the last input


class RWKVChannel(Mixer):
    """``y = s(R x^r_t) V relu(K x^k_t)^2``, where ``x^k_t = mix x_t + (1 - mix) x_{t-1}``, and ``x^r_t`` likewise.

    A feed-forward that sees the previous input, too, and so has a state. ``s`` is the logistic function. With
    ``previous`` it is ``x^k_t = (1 - mix) x_t + mix x_{t-1}``.

    Raises:
        ConfigError: for a size below 1.

    References:
        Peng et al. (2023), arXiv:2305.13048, equation 18; without receptance Peng et al. (2025), arXiv:2503.14456,
        equation 21.
    """

    residual: ClassVar[tuple[str, ...]] = ("value.weight",)
    hints: ClassVar[dict[str, Hint]] = {name: Hint(decay=False) for name in ("mix_key", "mix_receptance")}

    def __init__(self, config: RWKVChannelConfig, d_model: int):
        super().__init__()
        self.config, self.d_model = config, d_model
        hidden = 4 * d_model if config.d_hidden is None else config.d_hidden
        check_sizes("rwkv_channel", d_model=d_model, d_hidden=hidden)
        share = (torch.arange(d_model) / d_model) ** 0.5  # of the input
        share = 1 - share if config.previous else share
        self.mix_key = nn.Parameter(share)
        self.mix_receptance = nn.Parameter(share.clone()) if config.receptance else None
        self.key = nn.Linear(d_model, hidden, bias=False)
        self.receptance = nn.Linear(d_model, d_model, bias=False) if config.receptance else None
        self.value = nn.Linear(hidden, d_model, bias=False)

    def init_state(self, batch: int, *, max_len: int = 0) -> RWKVChannelState:
        """Zeros; ``max_len`` is ignored."""
        return RWKVChannelState(self.mix_key.new_zeros(batch, self.d_model, dtype=wide(self.mix_key)))

    def forward(
        self, x: Float[Tensor, "B T D"], state: RWKVChannelState | None = None, *, cu_seqlens: Borders = None
    ) -> tuple[Float[Tensor, "B T D"], RWKVChannelState]:
        """The parallel form."""
        check_features("rwkv_channel", x, self.d_model)
        packing = Packing.of("rwkv_channel", cu_seqlens, x)
        state = check_state("rwkv_channel", state, self.init_state(x.shape[0] if packing is None else packing.rows))
        before, last = shift(x, state.x, packing)
        start, end = (x, before) if self.config.previous else (before, x)
        y = self.value(F.relu(self.key(torch.lerp(start, end, self.mix_key))).square())
        if self.receptance is not None and self.mix_receptance is not None:
            y = self.receptance(torch.lerp(start, end, self.mix_receptance)).sigmoid() * y
        return y, RWKVChannelState(last)
