"""Multi-head latent attention: keys and values of all heads are made of one narrow vector, which the cache holds."""

import math
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dualform.core.errors import ConfigError
from dualform.core.options import options
from dualform.core.packing import Borders, Packing
from dualform.core.shapes import check_features
from dualform.core.tree import state_class
from dualform.layers.cached import CachedAttention
from dualform.layers.norm import RMSNorm
from dualform.layers.rotary import RotaryConfig, rotate


@options
class MLAConfig:
    """Sizes of an :class:`MLA`.

    Args:
        heads: H.
        d_head: P, width of the part of a query and of a key that is a head's own.
        d_rope: R, width of the part that is rotated; its key is shared by all heads. 0 for none.
        d_value: V, width of a head's values.
        d_latent: C, width of the vector that keys and values are made of.
        d_query: width of a vector that queries are made of; None where they are made of the input.
        rope: base of the rotary embedding, or all its options; None for no positions at all.
        bias: whether the maps of the input, and the last one, have a bias.
        norm_eps: epsilon of the norms of both vectors.
        scale: factor of the products of queries and keys; None is ``1 / sqrt(P + R)``.
        window: a token sees itself and the ``window - 1`` before it; None is all of them.
    """

    heads: int = 8
    d_head: int = 32
    d_rope: int = 16
    d_value: int = 32
    d_latent: int = 64
    d_query: int | None = None
    rope: float | RotaryConfig | None = 10000.0
    bias: bool = False
    norm_eps: float = 1e-6
    scale: float | None = None
    window: int | None = None

    def build(self, d_model: int) -> "MLA":
        """The layer, freshly initialised."""
        return MLA(self, d_model)


@state_class
class LatentState(NamedTuple):
    """The latents and rotated keys of the tokens seen so far; see :class:`~dualform.layers.cached.CachedAttention`."""

    latent: Tensor  # (B, S, C + R)
    length: Tensor  # (B,) int64, tokens each row has seen


class MLA(CachedAttention):
    """Attention with keys ``[U_h c_s, r_s]`` and values ``W_h c_s``, ``c_s = rms(W_c x_s)`` and ``r_s = rot(W_r x_s)``.

    Queries are ``[q_h, rot(q'_h)]``, of ``x_t`` or, with ``d_query``, of ``rms(W_q x_t)``. The state holds c and r:
    C + R numbers per token, whatever the number of heads. Where there is a past, the maps of keys and values are
    applied to the queries and to the sums instead: ``q_h . U_h c_s = (U_h^T q_h) . c_s``, so that no key or value of
    the past is ever made. ``kv_up`` holds ``U_h`` above ``W_h``, head by head.

    Raises:
        ConfigError: for a size that is out of range.

    References:
        DeepSeek-AI (2024), arXiv:2405.04434, section 2.1 and appendix C.
    """

    kind: ClassVar[type[Any]] = LatentState
    softcap = None

    def __init__(self, config: MLAConfig, d_model: int):
        super().__init__()
        _check(config)
        c = config
        self.d_model, self.config, self.heads, self.d_sum, self.window = d_model, c, c.heads, c.d_value, c.window
        self.rope = RotaryConfig(c.rope) if isinstance(c.rope, int | float) else c.rope
        self.width = c.d_head + c.d_rope
        self.scale = 1.0 if c.scale is None else c.scale * math.sqrt(self.width)  # of queries
        if c.d_query is None:
            self.q_proj = nn.Linear(d_model, c.heads * self.width, bias=c.bias)
        else:
            self.q_down = nn.Linear(d_model, c.d_query, bias=c.bias)
            self.q_norm = RMSNorm(c.d_query, c.norm_eps)
            self.q_up = nn.Linear(c.d_query, c.heads * self.width, bias=False)
        self.kv_down = nn.Linear(d_model, c.d_latent + c.d_rope, bias=c.bias)
        self.kv_norm = RMSNorm(c.d_latent, c.norm_eps)
        self.kv_up = nn.Linear(c.d_latent, c.heads * (c.d_head + c.d_value), bias=False)
        self.out_proj = nn.Linear(c.heads * c.d_value, d_model, bias=c.bias)

    def init_state(self, batch: int, *, max_len: int = 0) -> LatentState:
        """An empty cache, with room for ``max_len`` tokens or for the window."""
        return self._empty(self.kv_norm.weight, batch, max_len)

    def forward(
        self, x: Float[Tensor, "B T D"], state: LatentState | None = None, *, cu_seqlens: Borders = None
    ) -> tuple[Float[Tensor, "B T D"], LatentState]:
        """The whole sequence. Memory grows with T, not with T squared, whatever the window, packing or state."""
        check_features("mla", x, self.d_model)
        packing = Packing.of("mla", cu_seqlens, x)
        self._check_state("mla", x, state, packing)
        q = self.q_proj(x) if self.config.d_query is None else self.q_up(self.q_norm(self.q_down(x)))
        return self._attend(torch.cat([q, self.kv_down(x)], -1), state, packing)

    def _shapes(self) -> tuple[tuple[int, ...], ...]:
        return ((self.config.d_latent + self.config.d_rope,),)

    def _made(self, z: Tensor, positions: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        c = self.config
        q, latent, shared = z.split([c.heads * self.width, c.d_latent, c.d_rope], -1)
        q = q.unflatten(-1, (c.heads, self.width))
        if self.rope is not None and c.d_rope:
            own, turning = q.split([c.d_head, c.d_rope], -1)
            q = torch.cat([own, rotate(turning, positions, self.rope)], -1)
            shared = rotate(shared[:, :, None], positions, self.rope)[:, :, 0]
        return q if self.scale == 1 else self.scale * q, (torch.cat([self.kv_norm(latent), shared], -1),)

    def _fresh(self, q: Tensor, made: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of each head, which take fewer products than latents where all of them are new."""
        c = self.config
        latent, shared = made[0].to(q.dtype).split([c.d_latent, c.d_rope], -1)
        k, v = self.kv_up(latent).unflatten(-1, (c.heads, -1)).split([c.d_head, c.d_value], -1)
        return q, torch.cat([k, shared[:, :, None].expand(*k.shape[:3], -1)], -1), v

    def _read(self, caches: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        k = caches[0][:, :, None]
        return k, k[..., : self.config.d_latent]

    def _asking(self, q: Tensor) -> Tensor:
        own, turned = q.split([self.config.d_head, self.config.d_rope], -1)
        q = torch.cat([torch.einsum("bthp,hpc->bthc", own, self._maps()[0]), turned], -1)
        return math.sqrt(q.shape[-1] / self.width) * q  # products are divided by the root of their length

    def _found(self, y: Tensor) -> Tensor:
        return torch.einsum("bthc,hvc->bthv", y, self._maps()[1])

    def _out(self, y: Tensor, z: Tensor) -> Tensor:
        return self.out_proj(y.flatten(-2))

    def _maps(self) -> tuple[Tensor, Tensor]:
        """The matrices U ``(H, P, C)`` and W ``(H, V, C)``, whatever wraps them."""
        weight: Any = self.kv_up.weight
        if type(self.kv_up) is not nn.Linear:
            like = self.kv_norm.weight
            weight = self.kv_up(torch.eye(len(like), device=like.device, dtype=like.dtype)).mT
        own, values = weight.unflatten(0, (self.heads, -1)).split([self.config.d_head, self.config.d_value], 1)
        return own, values


def _check(c: MLAConfig) -> None:
    for name in ("heads", "d_head", "d_value", "d_latent", "d_query", "window"):
        size = getattr(c, name)
        if size is not None and size < 1:
            raise ConfigError(f"mla: {name} is {size}, expected at least 1")
    if c.d_rope < 0:
        raise ConfigError(f"mla: d_rope is {c.d_rope}, expected a width, or 0 for no part that is rotated")
    for name in ("scale", "norm_eps"):
        value = getattr(c, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"mla: {name} is {value}, expected a positive number, or none")
    if not isinstance(c.rope, RotaryConfig) and c.rope is not None and c.rope <= 0:
        raise ConfigError(f"mla: rope is {c.rope}, expected a base above 0", hint="leave it out, or set it to None")
