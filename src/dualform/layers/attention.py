"""Causal attention as a Recurrence: its state is the keys and values that later tokens may still see."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dualform.core.errors import ConfigError
from dualform.core.options import options
from dualform.core.packing import check_cu_seqlens, sequence_ids
from dualform.core.shapes import check_tensors
from dualform.core.tree import state_class
from dualform.layers.mixer import Mixer
from dualform.layers.ring import held, write
from dualform.layers.rotary import rotate

_SCORES = 2**26  # how many scores (rows x heads x queries x keys) one masked call may span


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
    """

    heads: int = 8
    kv_heads: int | None = None
    d_head: int | None = None
    window: int | None = None
    rope: float | None = 10000.0
    bias: bool = False

    def build(self, d_model: int) -> "Attention":
        """The layer, freshly initialised."""
        return Attention(self, d_model)


@state_class
class AttentionState(NamedTuple):
    """Rotated keys and values of the tokens seen so far.

    Without a window it grows with the context: capacity S is ``max_len``, doubled whenever it is exceeded, and
    position p lies in slot p. With a window S is the window, constant, and position p lies in slot ``p mod S``.
    Slots that hold nothing yet are zero.
    """

    k: Tensor  # (B, S, H, P), H key and value heads
    v: Tensor  # (B, S, H, P)
    length: Tensor  # (B,) int64, tokens each row has seen


class Attention(Mixer):
    """``y_t = W_out concat_h sum_{s <= t} softmax_s(q_t . k_s / sqrt(P)) v_s``, rotary, grouped-query, windowed.

    The state keeps the dtype it comes with: new keys and values are cast to it before anything reads them.
    Where no gradient is recorded, a step writes into the memory of the state it is given, as a state is used once.

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
        if config.rope is not None and config.rope <= 0:
            raise ConfigError(
                f"attention: rope is {config.rope}, expected a base above 0", hint="leave it out, or set it to None"
            )
        self.d_model, self.heads, self.kv_heads, self.d_head = d_model, config.heads, kv_heads, d_head
        self.window, self.rope = config.window, config.rope
        self.qkv_proj = nn.Linear(d_model, (config.heads + 2 * kv_heads) * d_head, bias=config.bias)
        self.out_proj = nn.Linear(config.heads * d_head, d_model, bias=config.bias)
        self.like: Tensor  # device and dtype, whatever wraps the maps
        self.register_buffer("like", torch.empty(0), persistent=False)

    def init_state(self, batch: int, *, max_len: int = 0) -> AttentionState:
        """An empty cache: room for ``max_len`` tokens, or for the window."""
        return self._empty(self.like, batch, max_len)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: AttentionState | None = None,
        *,
        cu_seqlens: Int[Tensor, " n"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], AttentionState]:
        """The whole sequence. Memory grows with T, not with T squared, whatever the window, packing or state."""
        check_tensors("attention", x=(x, f"B T {self.d_model}"))
        new = _layout(x, cu_seqlens)
        self._check_state(x, state, len(new.added))
        q, k, v = self._project(x, new.at if state is None else state.length[new.row] + new.at)
        if state is not None:
            k, v = k.to(state.k.dtype), v.to(state.v.dtype)
        if x.numel() == 0:
            y, after = q, self._empty(k, len(new.added)) if state is None else state
        elif new.longest == 1 and state is not None:
            y, after = self._decode(q, k, v, state, new)
        else:
            y, after = self._prefill(q, k, v, state, new)
        return self.out_proj(y.flatten(-2)), after

    def _decode(
        self, q: Tensor, k: Tensor, v: Tensor, state: AttentionState, new: "_Layout"
    ) -> tuple[Tensor, AttentionState]:
        """At most one token per row: written first, as the slot it takes is one it may not see."""
        extent, end = self._extent(state, new), state.length + new.added
        after = self._put(_grow(state, extent.end), k, v, new)
        mask = None
        if not extent.level or new.lengths is not None:
            mask = (held(end, after.k.shape[1]) >= 0)[:, None, None, : extent.end]

        def attend(rows: Rows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = after.k[rows][:, : extent.end], after.v[rows][:, : extent.end]
            return _attention(q, keys, values, attn_mask=None if mask is None else mask[rows])

        return _by_rows(attend, q, k, v, new), after

    def _prefill(
        self, q: Tensor, k: Tensor, v: Tensor, state: AttentionState | None, new: "_Layout"
    ) -> tuple[Tensor, AttentionState]:
        """Any number of tokens: they see the cache as it was, then each other."""
        before = self._empty(k, len(new.added)) if state is None else state
        extent = _Extent(True, 0, new.longest) if state is None else self._extent(before, new)
        past, length = extent.start, before.length[:1] if extent.level else before.length
        filled = held(length, before.k.shape[1])[:, :past]

        def attend(rows: Rows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if past == 0 and (self.window is None or q.shape[1] <= self.window):
                return _attention(q, k, v, is_causal=True)
            own = slice(None) if extent.level else rows
            at = length[own, None] + torch.arange(q.shape[1], device=q.device)
            keys = torch.cat([before.k[rows][:, :past], k], 1) if past else k
            values = torch.cat([before.v[rows][:, :past], v], 1) if past else v
            return _banded(q, keys, values, at, torch.cat([filled[own], at], 1), past, self.window)

        y = _by_rows(attend, q, k, v, new)
        if self.window is not None:
            return y, _turn(before, k, v, new)
        if state is None and new.lengths is None:
            return y, AttentionState(k, v, new.added)
        return y, self._put(_grow(before, extent.end), k, v, new)

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.d_head))
        qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], 2)
        qk = qk if self.rope is None else rotate(qk, positions, self.rope)
        q, k = qk.split([self.heads, self.kv_heads], 2)
        return q, k.contiguous(), v.contiguous()

    def _empty(self, like: Tensor, rows: int, max_len: int = 0) -> AttentionState:
        k = like.new_zeros(rows, self.window or max_len, self.kv_heads, self.d_head)
        return AttentionState(k, k.clone(), torch.zeros(rows, dtype=torch.int64, device=like.device))

    def _extent(self, state: AttentionState, new: "_Layout") -> "_Extent":
        capacity = state.k.shape[1]
        if self.window is not None:
            return _Extent(False, capacity, capacity)
        if torch.compiler.is_compiling() or state.k.device.type == "meta":
            end = max(capacity, new.longest)  # lengths are trusted: a write past the capacity fails on the device
            return _Extent(False, end - new.longest, end)
        low, high, end = torch.stack([*state.length.aminmax(), (state.length + new.added).max()]).tolist()
        return _Extent(low == high, high, end)

    def _put(self, state: AttentionState, k: Tensor, v: Tensor, new: "_Layout") -> AttentionState:
        """Write the new tokens to their slots, in place where no gradient is recorded."""
        position = state.length[new.row] + new.at
        at = new.row.expand_as(position), position if self.window is None else position % self.window
        return AttentionState(write(state.k, at, k), write(state.v, at, v), state.length + new.added)

    def _check_state(self, x: Tensor, state: AttentionState | None, rows: int) -> None:
        if state is not None:
            spec = f"{rows} {self.window or 'S'} {self.kv_heads} {self.d_head}"
            names = {"state.k": (state.k, spec), "state.v": (state.v, spec), "state.length": (state.length, f"{rows}")}
            check_tensors("attention", x=(x, "* * *"), **names)


Rows = slice | Tensor


class _Layout(NamedTuple):
    """Where the new tokens ``(B, T)`` belong."""

    row: Tensor  # (B, 1) or (1, T), row of the state
    at: Tensor  # (1, T), how many new tokens of the same row came before
    begin: Tensor  # (rows,), place of a row's first token among the B * T
    added: Tensor  # (rows,), how many tokens a row receives
    lengths: list[int] | None  # the same, where the rows are packed
    longest: int


class _Extent(NamedTuple):
    """Slots of a cache that matter."""

    level: bool  # whether all rows are known to have seen equally many tokens
    start: int  # slots that hold the past
    end: int  # slots needed once the new tokens are written


def _layout(x: Tensor, cu_seqlens: Tensor | None) -> _Layout:
    (batch, length), device = x.shape[:2], x.device
    at = torch.arange(length, device=device)[None]
    if cu_seqlens is None:
        row, added = torch.arange(batch, device=device), torch.full((batch,), length, device=device)
        return _Layout(row[:, None], at, row * length, added, None, length)
    check_cu_seqlens("attention", cu_seqlens, batch, length)
    borders = cu_seqlens.to(device, torch.int64)
    row, added = sequence_ids(borders, length)[None], borders.diff()
    lengths = added.tolist()
    return _Layout(row, at - borders[row], borders[:-1], added, lengths, max(lengths))


def _attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Softmax attention of ``q`` ``(B, T, H, P)`` over ``k`` and ``v`` ``(B, S, H', P)`` in the dtype of ``q``."""
    q, k, v = (z.to(q.dtype).transpose(1, 2) for z in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **options).transpose(1, 2)


def _banded(q: Tensor, k: Tensor, v: Tensor, q_at: Tensor, k_at: Tensor, past: int, window: int | None) -> Tensor:
    """Masked attention in blocks of queries, each over the keys it may see.

    ``past`` keys in any order come before those of the queries' own tokens; positions ``(B or 1, ...)`` decide
    what is seen, and a negative one is an empty slot.
    """
    (batch, length, heads), span = q.shape[:3], k.shape[1]
    block = length if window is None else min(length, max(window, 256))
    while block > 16 and batch * heads * block * (span if window is None else min(span, window + block)) > _SCORES:
        block = (block + 1) // 2
    out = []
    for i in range(0, length, block):
        first, last = 0 if window is None or i < window - 1 else past + i - window + 1, past + i + block
        at, seen_at = q_at[:, i : i + block, None], k_at[:, None, first:last]
        seen = (seen_at >= 0) & (seen_at <= at)
        if window is not None:
            seen &= seen_at > at - window
        out.append(_attention(q[:, i : i + block], k[:, first:last], v[:, first:last], attn_mask=seen[:, None]))
    return torch.cat(out, 1)


def _by_rows(attend: Callable[[Rows, Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, new: _Layout):
    """Run ``attend(rows, q, k, v)`` on tokens laid out as rows ``(rows, longest, ...)``, padded on the right.

    Packed sequences of like length share a call, so that padding at most doubles their size.
    """
    if new.lengths is None:
        return attend(slice(None), q, k, v)
    alike: dict[int, list[int]] = {}
    for i, length in enumerate(new.lengths):
        if length:
            alike.setdefault((length - 1).bit_length(), []).append(i)
    out, order = [], []
    for group in alike.values():
        rows = torch.tensor(group, device=q.device)
        at = torch.arange(max(new.lengths[i] for i in group), device=q.device)
        token, keep = new.begin[rows, None] + at, at < new.added[rows, None]
        inside = token.clamp(max=q.shape[1] - 1)
        y = attend(rows if len(group) < len(new.lengths) else slice(None), q[0, inside], k[0, inside], v[0, inside])
        out.append(y[keep])
        order.append(token[keep])
    return torch.cat(out)[torch.cat(order).argsort()][None]


def _grow(state: AttentionState, capacity: int) -> AttentionState:
    """Room for ``capacity`` positions, at least doubled where it must grow."""
    slots = state.k.shape[1]
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
