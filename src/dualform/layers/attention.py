"""Causal attention as a Recurrence: its state is the keys and values that later tokens may still see."""

import math
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dualform.core.errors import ConfigError
from dualform.core.options import options
from dualform.core.packing import Borders, Packing
from dualform.core.shapes import check_features, wide
from dualform.core.tree import state_class
from dualform.layers.cached import CachedAttention, CachedStep
from dualform.layers.mixer import check_kind
from dualform.layers.norms import check_norm_kind, make_norm
from dualform.layers.projection import project
from dualform.layers.quantized import group_of
from dualform.layers.rotary import RotaryConfig, rotate
from dualform.layers.stream_step import StreamStep, runs_as_stream_step, size_of, weights_of, wide_of
from dualform.ops.attention_step import AttentionStep, attention_step_op
from dualform.ops.causal_conv1d import causal_conv1d


@options
class AttentionConfig:
    """Sizes of an :class:`Attention`.

    Args:
        heads: query heads.
        kv_heads: key and value heads, each shared by ``heads / kv_heads`` query heads; None is ``heads``.
        d_head: P, width of a head; None is ``d_model / heads``.
        window: a token sees itself and the ``window - 1`` before it; None is all of them.
        rope: base of the rotary embedding, or all its options; None for no positions at all.
        bias: whether the projections have one.
        d_rope: leading features of a head that are rotated; None is all of them.
        d_conv: W, width of a short convolution, with a bias, over queries, keys and values; 0 for none.
        d_out: width of the output; None is ``d_model``.
        scale: factor of the products of queries and keys; None is ``1 / sqrt(P)``.
        d_value: width of a head's values; None is P.
        qk_norm: kind of a norm of queries and of one of keys, such as ``rms``, ``rms_offset`` or ``layer``; None for
            none.
        qk_norm_over: whether it is taken over each head, with one weight for all, or over ``all`` heads at once.
        qk_norm_after: whether it comes after the rotation.
        norm_eps: epsilon of these norms.
        gate: whether outputs are multiplied by ``sigmoid(W_gate x)`` before the last map.
        softcap: c, which bounds the scores s, products of queries and keys, to ``c tanh(s / c)``; None for no bound.
        out_bias: whether the last map has a bias; None is ``bias``.
    """

    heads: int = 8
    kv_heads: int | None = None
    d_head: int | None = None
    window: int | None = None
    rope: float | RotaryConfig | None = 10000.0
    bias: bool = False
    d_rope: int | None = None
    d_conv: int = 0
    d_out: int | None = None
    scale: float | None = None
    d_value: int | None = None
    qk_norm: str | None = None
    qk_norm_over: Literal["head", "all"] = "head"
    qk_norm_after: bool = False
    norm_eps: float = 1e-6
    gate: bool = False
    softcap: float | None = None
    out_bias: bool | None = None

    def build(self, d_model: int) -> "Attention":
        """The layer, freshly initialised."""
        return Attention(self, d_model)


@state_class
class AttentionState(NamedTuple):
    """Rotated keys and values of the tokens seen so far; see :class:`~dualform.layers.cached.CachedAttention`."""

    k: Tensor  # (B, S, H, P), H key and value heads
    v: Tensor  # (B, S, H, V)
    length: Tensor  # (B,) int64, tokens each row has seen


@state_class
class ConvAttentionState(NamedTuple):
    """Of attention with a convolution in front."""

    conv: Tensor  # (B, (heads + H) P + H V, W-1), the last inputs of the convolution
    cache: AttentionState


class Attention(CachedAttention):
    """``y_t = W_out concat_h sum_{s <= t} softmax_s(q_t . k_s / sqrt(P)) v_s``, rotary, grouped-query, windowed.

    Queries, keys, values and, with ``gate``, what gates them are the rows of one matrix, ``qkv_proj``, in this order.
    With ``d_conv`` a causal convolution runs over q, k and v before their norms and the rotation, as in the hybrids of
    mamba-ssm. For the state see :class:`~dualform.layers.cached.CachedAttention`.

    Raises:
        ConfigError: when ``heads`` does not divide ``d_model`` and no ``d_head`` is given, when ``kv_heads`` does
            not divide ``heads``, when a size is below 1, or for another option that is out of range.

    References:
        Vaswani et al. (2017), arXiv:1706.03762, section 3.2; Ainslie et al. (2023), arXiv:2305.13245 (grouped
        queries); Beltagy et al. (2020), arXiv:2004.05150, section 3.1 (window); Dehghani et al. (2023),
        arXiv:2302.05442, section 2 (norm of queries and keys); Qiu et al. (2025), arXiv:2505.06708 (gate).
    """

    kind: ClassVar[type[Any]] = AttentionState

    def __init__(self, config: AttentionConfig, d_model: int):
        super().__init__()
        c, kv_heads, d_head = _checked(config, d_model)
        self.d_model, self.heads, self.kv_heads, self.d_head = d_model, c.heads, kv_heads, d_head
        self.rope = RotaryConfig(c.rope) if isinstance(c.rope, int | float) else c.rope
        self.window, self.d_rope, self.softcap = c.window, c.d_rope or d_head, c.softcap
        self.d_sum = d_head if c.d_value is None else c.d_value
        self.scale = 1.0 if c.scale is None else c.scale * math.sqrt(d_head)  # of queries
        self.d_conv, self.gate = c.d_conv, c.gate
        width = (c.heads + kv_heads) * d_head + kv_heads * self.d_sum
        gates = c.heads * self.d_sum if c.gate else 0
        self.qkv_proj = nn.Linear(d_model, width + gates, bias=c.bias)
        if self.d_conv:
            scale = math.sqrt(self.d_conv)
            self.conv_weight = nn.Parameter(torch.empty(width, self.d_conv).uniform_(-1, 1) / scale)
            self.conv_bias = nn.Parameter(torch.empty(width).uniform_(-1, 1) / scale)
        self.norm_over, self.norm_after = c.qk_norm_over, c.qk_norm_after
        self.q_norm, self.k_norm = None, None
        if c.qk_norm is not None:
            whole = c.qk_norm_over == "all"
            self.q_norm = make_norm(c.qk_norm, c.heads * d_head if whole else d_head, c.norm_eps)
            self.k_norm = make_norm(c.qk_norm, kv_heads * d_head if whole else d_head, c.norm_eps)
        d_out = d_model if c.d_out is None else c.d_out
        self.out_proj = nn.Linear(c.heads * self.d_sum, d_out, bias=c.bias if c.out_bias is None else c.out_bias)
        self.like: Tensor  # device and dtype, whatever wraps the maps
        self.register_buffer("like", torch.empty(0), persistent=False)

    def adapted(self) -> tuple[str, tuple[int, ...]]:
        """The map that low-rank matrices of a shared block are added to, and the rows of each of its pieces."""
        rows = (self.heads * self.d_head, self.kv_heads * self.d_head, self.kv_heads * self.d_sum)
        return "qkv_proj", (*rows, self.heads * self.d_sum) if self.gate else rows

    def init_state(self, batch: int, *, max_len: int = 0) -> Any:
        """An empty cache, with room for ``max_len`` tokens or for the window; before it zeros for a convolution."""
        cache = self._empty(self.like, batch, max_len)
        if not self.d_conv:
            return cache
        conv = self.like.new_zeros(batch, self.conv_weight.shape[0], self.d_conv - 1, dtype=wide(self.like))
        return ConvAttentionState(conv, cache)

    def forward(
        self, x: Float[Tensor, "B T D"], state: Any = None, *, cu_seqlens: Borders = None
    ) -> tuple[Float[Tensor, "B T D"], Any]:
        """The whole sequence. Memory grows with T, not with T squared, whatever the window, packing or state."""
        check_features("attention", x, self.d_model)
        packing = Packing.of("attention", cu_seqlens, x)
        conv = None
        if self.d_conv and state is not None:
            check_kind("attention", state, ConvAttentionState)
            conv, state = state
        self._check_state("attention", x, state, packing)
        qkv = project(self.qkv_proj, x)
        if not self.d_conv:
            return self._attend(qkv, state, packing)
        width = self.conv_weight.shape[0]
        mixed, conv = causal_conv1d(
            qkv[..., :width], self.conv_weight, self.conv_bias, initial_state=conv, cu_seqlens=packing
        )
        y, cache = self._attend(torch.cat([mixed, qkv[..., width:]], -1) if self.gate else mixed, state, packing)
        return y, ConvAttentionState(conv, cache)

    def prepare_residual(self, norm: Any) -> StreamStep | None:
        """By :func:`dualform.ops.attention_step.attention_step`, on a CPU: without a convolution, norms and a gate."""
        simple = not self.d_conv and not self.gate and self.q_norm is None and self.k_norm is None
        maps = self.qkv_proj, self.out_proj
        if not simple or type(self) is not Attention or not runs_as_stream_step(norm, self, *maps, devices=("cpu",)):
            return None
        if self.out_proj.weight.shape[0] != self.d_model:
            return None
        rope = self.rope or RotaryConfig()
        turning = rope.frequencies(0 if self.rope is None else self.d_rope // 2, norm.weight.device, torch.float64)
        into, in_bias, *rest = weights_of(*maps)
        weights = [wide_of(norm.weight), into, in_bias, turning, *rest]
        factor = self.scale / math.sqrt(self.d_head)
        turns = rope.interleaved, factor, self.softcap or 0.0, float(rope.size())
        options = self.heads, self.window is not None, *turns, norm.eps, group_of(self.qkv_proj)
        record = lambda *given: AttentionStep._make([*given, *weights, *options, False])  # noqa: E731
        return CachedStep(attention_step_op, record, AttentionState, wide(norm.weight), size_of(self))

    def _shapes(self) -> tuple[tuple[int, ...], ...]:
        return (self.kv_heads, self.d_head), (self.kv_heads, self.d_sum)

    def _made(self, z: Tensor, positions: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The queries, keys and values of all heads, rotated."""
        split = [(self.heads + self.kv_heads) * self.d_head, self.kv_heads * self.d_sum]
        qk, v = z[..., : sum(split)].split(split, -1)
        qk = qk.unflatten(-1, (-1, self.d_head))
        if not self.norm_after:
            qk = self._normed(qk)
        if self.rope is not None:
            turned = rotate(qk[..., : self.d_rope], positions, self.rope)
            qk = turned if self.d_rope == self.d_head else torch.cat([turned, qk[..., self.d_rope :]], -1)
        if self.norm_after:
            qk = self._normed(qk)
        q, k = qk.split([self.heads, self.kv_heads], 2)
        q = q if self.scale == 1 else self.scale * q
        return q, (k.contiguous(), v.unflatten(-1, (-1, self.d_sum)).contiguous())

    def _normed(self, qk: Tensor) -> Tensor:
        """Queries and keys ``(B, T, heads, P)`` after their norms, if there are any."""
        if self.q_norm is None or self.k_norm is None:
            return qk
        pair = qk.split([self.heads, self.kv_heads], 2)
        if self.norm_over == "head":
            return torch.cat([norm(m) for norm, m in zip((self.q_norm, self.k_norm), pair, strict=True)], 2)
        flat = [norm(m.flatten(2)) for norm, m in zip((self.q_norm, self.k_norm), pair, strict=True)]
        return torch.cat(flat, -1).view_as(qk)

    def _read(self, caches: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        k, v = caches
        return k, v

    def _out(self, y: Tensor, z: Tensor) -> Tensor:
        y = y.flatten(-2)
        return project(self.out_proj, y * z[..., -y.shape[-1] :].sigmoid() if self.gate else y)


def _checked(c: AttentionConfig, d_model: int) -> tuple[AttentionConfig, int, int]:
    """The config, the number of key heads and the width of a head."""
    kv_heads = c.heads if c.kv_heads is None else c.kv_heads
    named = {"heads": c.heads, "kv_heads": kv_heads, "window": c.window, "d_value": c.d_value, "d_out": c.d_out}
    for name, size in named.items():
        if size is not None and size < 1:
            raise ConfigError(f"attention: {name} is {size}, expected at least 1")
    if c.d_head is None and d_model % c.heads:
        raise ConfigError(
            f"attention: d_model {d_model} is not a multiple of heads {c.heads}",
            hint=f"set heads to a divisor of {d_model}, or set d_head",
        )
    if c.heads % kv_heads:
        raise ConfigError(
            f"attention: heads {c.heads} is not a multiple of kv_heads {kv_heads}",
            hint=f"set kv_heads to a divisor of {c.heads}",
        )
    d_head = d_model // c.heads if c.d_head is None else c.d_head
    if d_head < 1:
        raise ConfigError(f"attention: d_head is {d_head}, expected at least 1")
    if c.d_rope is not None and not 0 < c.d_rope <= d_head:
        raise ConfigError(f"attention: d_rope is {c.d_rope}, expected 1 to d_head = {d_head}")
    for name in ("scale", "softcap", "norm_eps"):
        value = getattr(c, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"attention: {name} is {value}, expected a positive number, or none")
    if c.d_conv < 0:
        raise ConfigError(f"attention: d_conv is {c.d_conv}, expected at least 0")
    if not isinstance(c.rope, RotaryConfig) and c.rope is not None and c.rope <= 0:
        raise ConfigError(
            f"attention: rope is {c.rope}, expected a base above 0", hint="leave it out, or set it to None"
        )
    check_norm_kind("attention: qk_norm", c.qk_norm)
    return c, kv_heads, d_head
