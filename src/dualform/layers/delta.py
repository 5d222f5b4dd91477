"""What the layers of the delta rule share: maps, a short convolution, keys of length 1, a norm of every head."""

import math
from abc import abstractmethod
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dualform.core.errors import ConfigError
from dualform.core.packing import Borders, Packing
from dualform.core.shapes import check_features, wide
from dualform.core.tree import state_class
from dualform.layers.mamba import check_sizes
from dualform.layers.mixer import Hint, Mixer, check_kind
from dualform.ops.causal_conv1d import causal_conv1d, causal_conv1d_update
from dualform.ops.gated_delta_product import gated_delta_product, gated_delta_product_update

_EPS = 1e-6  # of the squared length of a key
Given = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]  # q, k, v, beta and logarithms of decays


@state_class
class DeltaState(NamedTuple):
    """Constant in the length of the context."""

    conv: Tensor  # (B, channels, W-1), the last inputs of the convolution
    h: Tensor  # (B, H, N, P), the values under all keys


@runtime_checkable
class Sizes(Protocol):
    """The options that all configs of these layers have."""

    @property
    def heads(self) -> int:
        """H."""
        ...

    @property
    def key_heads(self) -> int | None:
        """G; None is H."""
        ...

    @property
    def d_key(self) -> int | None:
        """N; None is D / H."""
        ...

    @property
    def d_value(self) -> int | None:
        """P; None is a multiple of N."""
        ...

    @property
    def d_conv(self) -> int:
        """W."""
        ...

    @property
    def norm_eps(self) -> float:
        """Of the norm of heads."""
        ...

    @property
    def negative(self) -> bool:
        """Whether beta reaches 2."""
        ...


class DeltaMixer(Mixer):
    """The part of a layer of the delta rule that is the same in all of them.

    ``q, k, v = silu(conv(in(u)))``; q and k are divided by their lengths; ``beta = sigmoid(b)``, twice that with
    ``negative``; ``y = out(norm(S^T q / sqrt(N)))``, the norm over each head by itself. A layer says what decays, and
    what gates the norm.

    Args:
        kind: of layer, first word of every error.
        config: its options.
        d_model: D.
        expand: P for each N, where the config has none.
        writes: J, in each step.

    Raises:
        ConfigError: for a size below 1, an epsilon that is no positive number, and where heads do not divide.
    """

    hints: ClassVar[dict[str, Hint]] = {"A_log": Hint(decay=False), "dt_bias": Hint(decay=False)}

    def __init__(self, kind: str, config: Sizes, d_model: int, *, expand: int = 1, writes: int = 1):
        super().__init__()
        c, self.kind, self.d_model, self.writes = config, kind, d_model, writes
        check_sizes(kind, d_model=d_model, heads=c.heads, d_conv=c.d_conv)
        if c.d_key is None and d_model % c.heads:
            raise ConfigError(
                f"{kind}: d_model {d_model} is not a multiple of heads {c.heads}",
                hint=f"set heads to a divisor of {d_model}, or set d_key",
            )
        self.heads, self.key_heads = c.heads, c.heads if c.key_heads is None else c.key_heads
        self.d_key = d_model // c.heads if c.d_key is None else c.d_key
        self.d_value = expand * self.d_key if c.d_value is None else c.d_value
        check_sizes(kind, key_heads=self.key_heads, d_key=self.d_key, d_value=self.d_value)
        if c.heads % self.key_heads:
            raise ConfigError(
                f"{kind}: heads {c.heads} is not a multiple of key_heads {self.key_heads}",
                hint=f"set key_heads to a divisor of {c.heads}",
            )
        if not 0 < c.norm_eps < math.inf:
            raise ConfigError(f"{kind}: norm_eps is {c.norm_eps}, expected a small positive number")
        keys, self.d_inner = self.key_heads * self.d_key, self.heads * self.d_value
        self.parts = (keys, writes * keys, writes * self.d_inner)  # of the convolution: q, k, v
        self.rest = (writes * self.heads, *self.extra())
        self.most = 2.0 if c.negative else 1.0  # that beta can be
        self.in_proj = nn.Linear(d_model, sum(self.parts) + sum(self.rest), bias=False)
        self.conv_weight = nn.Parameter(torch.empty(sum(self.parts), c.d_conv).uniform_(-1, 1) / math.sqrt(c.d_conv))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    @abstractmethod
    def extra(self) -> tuple[int, ...]:
        """Widths of what the first map makes besides q, k, v and b, once all sizes are known."""

    @abstractmethod
    def gates(self, extra: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor | None]:
        """The logarithms of decays ``(..., H)`` or ``(..., H, N)``, and what gates the norm, ``(..., H P)``."""

    @abstractmethod
    def normalised(self, y: Tensor, gate: Tensor | None) -> Tensor:
        """The norm of what the heads read, ``(..., H, P)``, with its gate, which has the same shape."""

    def init_state(self, batch: int, *, max_len: int = 0) -> DeltaState:
        """Zeros; ``max_len`` is ignored."""
        new, dtype = self.conv_weight.new_zeros, wide(self.conv_weight)
        return DeltaState(
            conv=new(batch, self.conv_weight.shape[0], self.conv_weight.shape[1] - 1, dtype=dtype),
            h=new(batch, self.heads, self.d_key, self.d_value, dtype=dtype),
        )

    def forward(
        self, x: Float[Tensor, "B T D"], state: DeltaState | None = None, *, cu_seqlens: Borders = None
    ) -> tuple[Tensor, DeltaState]:
        """The parallel form."""
        check_features(self.kind, x, self.d_model)
        packing = Packing.of(self.kind, cu_seqlens, x)
        if state is not None:
            check_kind(self.kind, state, DeltaState)
        conv, h = (None, None) if state is None else state
        qkv, *rest = self._map(x)
        qkv, conv = causal_conv1d(qkv, self.conv_weight, activation="silu", initial_state=conv, cu_seqlens=packing)
        given, gate = self._given(qkv, tuple(rest))
        y, h = gated_delta_product(*given, scale=self.d_key**-0.5, initial_state=h, cu_seqlens=packing)
        return self._out(y, gate), DeltaState(conv, h)

    def step(self, x: Float[Tensor, "B D"], state: DeltaState) -> tuple[Tensor, DeltaState]:
        """The recurrent form."""
        check_features(self.kind, x, self.d_model, "B")
        check_kind(self.kind, state, DeltaState)
        qkv, *rest = self._map(x)
        qkv, conv = causal_conv1d_update(qkv, state.conv, self.conv_weight, activation="silu")
        given, gate = self._given(qkv, tuple(rest))
        y, h = gated_delta_product_update(state.h, *given, scale=self.d_key**-0.5)
        return self._out(y, gate), DeltaState(conv, h)

    def _map(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.in_proj(x).split([sum(self.parts), *self.rest], -1)

    def _given(self, qkv: Tensor, rest: tuple[Tensor, ...]) -> tuple[Given, Tensor | None]:
        """The arguments of the delta rule, and the gate."""
        q, k, v = qkv.split(self.parts, -1)
        q = _of_length_1(q.unflatten(-1, (self.key_heads, -1)))
        k = _of_length_1(k.unflatten(-1, (self.writes, self.key_heads, -1)))
        v, b = v.unflatten(-1, (self.writes, self.heads, -1)), rest[0].unflatten(-1, (self.writes, -1))
        log_decay, gate = self.gates(rest[1:])
        return (q, k, v, self.most * b.to(wide(b)).sigmoid(), log_decay), gate

    def _out(self, y: Tensor, gate: Tensor | None) -> Tensor:
        gate = None if gate is None else gate.unflatten(-1, (self.heads, -1))
        return self.out_proj(self.normalised(y, gate).flatten(-2))


def log_decay(steps: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """``-exp(A_log) softplus(steps + dt_bias)``, in float32 or wider."""
    steps = F.softplus(steps.to(wide(steps)) + dt_bias)
    return -A_log.to(wide(A_log)).exp() * steps


def _of_length_1(m: Tensor) -> Tensor:
    """Divided by its length, which is computed in float32 or wider; rounded once."""
    exact = m.to(wide(m))
    return (exact * (exact.square().sum(-1, keepdim=True) + _EPS).rsqrt()).to(m.dtype)
