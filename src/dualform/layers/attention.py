"""Causal attention as a Recurrence: its state is the keys and values that later tokens may still see."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dualform.core.errors import ConfigError
from dualform.core.options import options
from dualform.core.packing import Borders, Packing, readable
from dualform.core.ring import blank_where_full, held, write
from dualform.core.shapes import check_tensors, larger, wide
from dualform.core.tree import state_class
from dualform.layers.mixer import Mixer, check_kind
from dualform.layers.rotary import rotate
from dualform.ops.attention import Past, attention, causal, over
from dualform.ops.causal_conv1d import causal_conv1d


@options
class AttentionConfig:
    """Sizes of an :class:`Attention`.

    Args:
        heads: query heads.
        kv_heads: key and value heads, each shared by ``heads / kv_heads`` query heads; None is ``heads``.
        d_head: width of a head; None is ``d_model / heads``.
        window: a token sees itself and the ``window - 1`` before it; None is all of them.
        rope: base of the rotary embedding; None for no positions at all.
        bias: whether the projections have one.
        d_rope: leading features of a head that are rotated; None is all of them.
        d_conv: W, width of a short convolution, with a bias, over queries, keys and values; 0 for none.
        d_out: width of the output; None is ``d_model``.
        scale: factor of the products of queries and keys; None is ``1 / sqrt(P)``.
    """

    heads: int = 8
    kv_heads: int | None = None
    d_head: int | None = None
    window: int | None = None
    rope: float | None = 10000.0
    bias: bool = False
    d_rope: int | None = None
    d_conv: int = 0
    d_out: int | None = None
    scale: float | None = None

    def build(self, d_model: int) -> "Attention":
        """The layer, freshly initialised."""
        return Attention(self, d_model)


@state_class
class AttentionState(NamedTuple):
    """Rotated keys and values of the tokens seen so far.

    Without a window it grows with the context: capacity S is ``max_len``, doubled whenever it is exceeded, and
    position p lies in slot p. With a window S is the window, constant, and position p lies in slot ``p mod S``.
    Slots that hold nothing yet are zero.

    A growing cache is asked how long its rows are, which waits for the device. A compiled program cannot ask: there
    the state keeps its capacity, or has room for T tokens per row where it had less, or for packed sequences none. A
    row that has seen more tokens than fit has outputs of NaN from then on: give ``max_len``.
    """

    k: Tensor  # (B, S, H, P), H key and value heads
    v: Tensor  # (B, S, H, P)
    length: Tensor  # (B,) int64, tokens each row has seen


@state_class
class ConvAttentionState(NamedTuple):
    """Of attention with a convolution in front."""

    conv: Tensor  # (B, (heads + 2 H) P, W-1), the last inputs of the convolution
    cache: AttentionState


class Attention(Mixer):
    """``y_t = W_out concat_h sum_{s <= t} softmax_s(q_t . k_s / sqrt(P)) v_s``, rotary, grouped-query, windowed.

    The state keeps the dtype it comes with: new keys and values are cast to it before anything reads them.
    Where no gradient is recorded, a step writes into the state that it is given, if that has memory of its own.
    With ``d_conv`` a causal convolution runs over q, k and v before the rotation, as in the hybrids of mamba-ssm.

    Raises:
        ConfigError: when ``heads`` does not divide ``d_model`` and no ``d_head`` is given, when ``kv_heads`` does
            not divide ``heads``, or when a size is below 1.

    References:
        Vaswani et al. (2017), arXiv:1706.03762, section 3.2; Ainslie et al. (2023), arXiv:2305.13245 (grouped
        queries); Beltagy et al. (2020), arXiv:2004.05150, section 3.1 (window).
    """

    def __init__(self, config: AttentionConfig, d_model: int):
        super().__init__()
        kv_heads = config.heads if config.kv_heads is None else config.kv_heads
        for name, size in (("heads", config.heads), ("kv_heads", kv_heads), ("window", config.window)):
            if size is not None and size < 1:
                raise ConfigError(f"attention: {name} is {size}, expected at least 1")
        if config.d_head is None and d_model % config.heads:
            raise ConfigError(
                f"attention: d_model {d_model} is not a multiple of heads {config.heads}",
                hint=f"set heads to a divisor of {d_model}, or set d_head",
            )
        if config.heads % kv_heads:
            raise ConfigError(
                f"attention: heads {config.heads} is not a multiple of kv_heads {kv_heads}",
                hint=f"set kv_heads to a divisor of {config.heads}",
            )
        d_head = d_model // config.heads if config.d_head is None else config.d_head
        if d_head < 1:
            raise ConfigError(f"attention: d_head is {d_head}, expected at least 1")
        if config.d_rope is not None and not 0 < config.d_rope <= d_head:
            raise ConfigError(f"attention: d_rope is {config.d_rope}, expected 1 to d_head = {d_head}")
        if config.d_out is not None and config.d_out < 1:
            raise ConfigError(f"attention: d_out is {config.d_out}, expected at least 1")
        if config.scale is not None and not 0 < config.scale < math.inf:
            raise ConfigError(f"attention: scale is {config.scale}, expected a positive number, or none")
        if config.d_conv < 0:
            raise ConfigError(f"attention: d_conv is {config.d_conv}, expected at least 0")
        if config.rope is not None and config.rope <= 0:
            raise ConfigError(
                f"attention: rope is {config.rope}, expected a base above 0", hint="leave it out, or set it to None"
            )
        self.d_model, self.heads, self.kv_heads, self.d_head = d_model, config.heads, kv_heads, d_head
        self.window, self.rope, self.d_rope = config.window, config.rope, config.d_rope or d_head
        self.scale = 1.0 if config.scale is None else config.scale * math.sqrt(d_head)  # of queries
        width, self.d_conv = (config.heads + 2 * kv_heads) * d_head, config.d_conv
        self.qkv_proj = nn.Linear(d_model, width, bias=config.bias)
        if self.d_conv:
            scale = math.sqrt(self.d_conv)
            self.conv_weight = nn.Parameter(torch.empty(width, self.d_conv).uniform_(-1, 1) / scale)
            self.conv_bias = nn.Parameter(torch.empty(width).uniform_(-1, 1) / scale)
        d_out = d_model if config.d_out is None else config.d_out
        self.out_proj = nn.Linear(config.heads * d_head, d_out, bias=config.bias)
        self.like: Tensor  # device and dtype, whatever wraps the maps
        self.register_buffer("like", torch.empty(0), persistent=False)

    def adapted(self) -> tuple[str, tuple[int, ...]]:
        """The map that low-rank matrices of a shared block are added to, and the rows of each of its pieces."""
        width = self.kv_heads * self.d_head
        return "qkv_proj", (self.heads * self.d_head, width, width)

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
        check_tensors("attention", x=(x, f"B T {self.d_model}"))
        packing = Packing.of("attention", cu_seqlens, x)
        conv = None
        if self.d_conv and state is not None:
            check_kind("attention", state, ConvAttentionState)
            conv, state = state
        self._check_state(x, state, packing)
        qkv = self.qkv_proj(x)
        if not self.d_conv:
            return self._attend(qkv, state, packing)
        qkv, conv = causal_conv1d(qkv, self.conv_weight, self.conv_bias, initial_state=conv, cu_seqlens=packing)
        y, cache = self._attend(qkv, state, packing)
        return y, ConvAttentionState(conv, cache)

    def _attend(
        self, qkv: Tensor, state: AttentionState | None, packing: Packing | None
    ) -> tuple[Tensor, AttentionState]:
        """Queries, keys and values ``(B, T, ...)``, before the rotation, to outputs."""
        rows = qkv.shape[0] if packing is None else packing.rows
        if qkv.numel() == 0:
            y = qkv.new_zeros(*qkv.shape[:2], self.heads * self.d_head)
            return self.out_proj(y), self._empty(qkv, rows) if state is None else state
        common = None if packing is None else packing.common
        if common is not None:  # a batch
            y, state = self._run(qkv.view(rows, common, -1), state, None)
            return y.reshape(*qkv.shape[:2], -1), state
        return self._run(qkv, state, packing)

    def _run(self, qkv: Tensor, state: AttentionState | None, packing: Packing | None) -> tuple[Tensor, AttentionState]:
        new = _layout(qkv, packing)
        q, k, v = self._heads(qkv, new.at if state is None else state.length[new.row] + new.at)
        if state is not None:
            k, v = k.to(state.k.dtype), v.to(state.v.dtype)
        if state is not None and packing is None and qkv.shape[1] == 1:
            y, after = self._decode(q, k, v, state, new)
        else:
            y, after = self._prefill(q, k, v, state, new)
        if self._bounded(after):
            y = blank_where_full(y, after.length, after.k.shape[1], new.row)
        return self.out_proj(y.flatten(-2)), after

    def _decode(
        self, q: Tensor, k: Tensor, v: Tensor, state: AttentionState, new: "_Layout"
    ) -> tuple[Tensor, AttentionState]:
        """One token per row: written first, as the slot it takes is one it may not see."""
        slots, length = self._slots(state, new), state.length + new.added
        after = self._put(_grow(state, slots.end), k, v, new)
        seen = None if slots.level else (held(length, after.k.shape[1]) >= 0)[:, None, None, : slots.end]
        return over(q, after.k[:, : slots.end], after.v[:, : slots.end], seen), after

    def _prefill(
        self, q: Tensor, k: Tensor, v: Tensor, state: AttentionState | None, new: "_Layout"
    ) -> tuple[Tensor, AttentionState]:
        """Any number of tokens: they see the cache as it was, then each other."""
        slots, past = _Slots(True, 0, new.most), None
        if state is not None:
            slots = self._slots(state, new)
            if slots.start:
                length = state.length[:1] if slots.level else state.length
                past = Past(state.k[:, : slots.start], state.v[:, : slots.start], length)
        if past is None and self.window is None and new.packing is None:
            y = causal(q, k, v)
        else:
            y = attention(q, k, v, past, window=self.window, cu_seqlens=new.packing)
        if state is None and self.window is None and new.packing is None:
            return y, AttentionState(k, v, new.added)
        before = self._empty(k, new.added.shape[0]) if state is None else state
        if self.window is not None:
            return y, _turn(before, k, v, new)
        return y, self._put(_grow(before, slots.end), k, v, new)

    def _heads(self, qkv: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The queries, keys and values of all heads, rotated."""
        qk, v = qkv.unflatten(-1, (-1, self.d_head)).split([self.heads + self.kv_heads, self.kv_heads], 2)
        if self.rope is not None:
            turned = rotate(qk[..., : self.d_rope], positions, self.rope)
            qk = turned if self.d_rope == self.d_head else torch.cat([turned, qk[..., self.d_rope :]], -1)
        q, k = qk.split([self.heads, self.kv_heads], 2)
        q = q if self.scale == 1 else self.scale * q
        return q, k.contiguous(), v.contiguous()

    def _empty(self, like: Tensor, rows: int, max_len: int = 0) -> AttentionState:
        k = like.new_zeros(rows, self.window or max_len, self.kv_heads, self.d_head)
        return AttentionState(k, k.clone(), torch.zeros(rows, dtype=torch.int64, device=like.device))

    def _slots(self, state: AttentionState, new: "_Layout") -> "_Slots":
        """A cache without a window asks how long its rows are; the answer waits for the device."""
        capacity = state.k.shape[1]
        if self.window is not None:
            return _Slots(False, capacity, capacity)
        if self._bounded(state):
            if new.packing is not None:
                return _Slots(False, capacity, capacity or new.most)
            end = larger(capacity, new.most)
            return _Slots(False, end - new.most, end)
        low, high, end = torch.stack([*state.length.aminmax(), (state.length + new.added).max()]).tolist()
        return _Slots(low == high, high, end)

    def _bounded(self, state: AttentionState) -> bool:
        """Whether the cache keeps its capacity, as its lengths cannot be read."""
        return self.window is None and not readable(state.length)

    def _put(self, state: AttentionState, k: Tensor, v: Tensor, new: "_Layout") -> AttentionState:
        """Write the new tokens to their slots."""
        position = state.length[new.row] + new.at
        if self._bounded(state):
            position = position.clamp(max=state.k.shape[1] - 1)
        at = new.row.expand_as(position), position if self.window is None else position % self.window
        return AttentionState(write(state.k, at, k), write(state.v, at, v), state.length + new.added)

    def _check_state(self, x: Tensor, state: AttentionState | None, packing: Packing | None) -> None:
        if state is not None:
            check_kind("attention", state, AttentionState)
            cache = f"R {self.window or 'S'} {self.kv_heads} {self.d_head}"
            rows = {"x": (x, "R ...")} if packing is None else {"sequences": (packing.cu_seqlens[1:], "R")}
            leaves = {"state.k": (state.k, cache), "state.v": (state.v, cache), "state.length": (state.length, "R")}
            check_tensors("attention", **rows, **leaves)


class _Layout(NamedTuple):
    """Where the new tokens ``(B, T)`` belong."""

    row: Tensor  # (B, 1) or (1, T), row of the state
    at: Tensor  # (1, T), how many new tokens of the same row came before
    begin: Tensor  # (rows,), place of a row's first token among the B * T
    added: Tensor  # (rows,), how many tokens a row receives
    most: int  # how many the longest row receives, or T where that is not known
    packing: Packing | None


class _Slots(NamedTuple):
    """Slots of a cache that matter."""

    level: bool  # whether all rows are known to have seen equally many tokens
    start: int  # slots that hold the past
    end: int  # slots needed once the new tokens are written


def _layout(x: Tensor, packing: Packing | None) -> _Layout:
    (batch, length), device = x.shape[:2], x.device
    if packing is None:
        row = torch.arange(batch, device=device)
        at = torch.arange(length, device=device)[None]
        return _Layout(row[:, None], at, row * length, torch.full_like(row, length), length, None)
    (ids, at), most = packing.places(length), packing.longest if packing.known else length
    return _Layout(ids[None], at[None], packing.cu_seqlens[:-1], packing.cu_seqlens.diff(), most, packing)


def _grow(state: AttentionState, capacity: int) -> AttentionState:
    """Room for ``capacity`` positions, at least doubled where it must grow."""
    slots = state.k.shape[1]
    if torch.compiler.is_compiling():  # no branch on sizes: it would make a program for each case
        more = larger(capacity, slots) - slots
    else:
        more = max(capacity, 2 * slots) - slots if capacity > slots else 0
        if more == 0:
            return state
    return AttentionState(F.pad(state.k, (0, 0, 0, 0, 0, more)), F.pad(state.v, (0, 0, 0, 0, 0, more)), state.length)


def _turn(state: AttentionState, k: Tensor, v: Tensor, new: _Layout) -> AttentionState:
    """Write the new tokens to a ring that they may turn more than once; always out of place."""
    length = state.length + new.added
    since = held(length, state.k.shape[1]) - state.length[:, None]  # >= 0: the slot holds a new token
    token, fresh = (new.begin[:, None] + since).clamp(min=0), (since >= 0)[..., None, None]
    ring = [torch.where(fresh, z.flatten(0, 1)[token], old) for z, old in ((k, state.k), (v, state.v))]
    return AttentionState(ring[0], ring[1], length)
