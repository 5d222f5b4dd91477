"""What attention layers share: a cache of what later tokens read, by rows or packed, growing or of constant size."""

from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.core.packing import Packing, readable
from dualform.core.ring import blank_where_full, held, write
from dualform.core.shapes import check_tensors, larger, once_per_shape
from dualform.layers.mixer import Mixer, check_kind
from dualform.layers.stream_step import StreamStep
from dualform.ops.attention import Past, attention, causal, over


class CachedAttention(Mixer):
    """Attention whose state is a NamedTuple of caches ``(B, S, ...)`` and of the lengths ``(B,)`` of its rows.

    Without a window caches grow with the context: the capacity S is ``max_len``, doubled whenever it is exceeded, and
    position p lies in slot p. With a window S is the window, constant, and position p lies in slot ``p mod S``. Slots
    that hold nothing yet are zero.

    A growing cache is asked how long its rows are, which waits for the device. A compiled program cannot ask: there
    the state keeps its capacity, or has room for T tokens per row where it had less, or for packed sequences none. A
    row that has seen more tokens than fit has outputs of NaN from then on: give ``max_len``.

    The state keeps the dtype it comes with: what is new is cast to it before anything reads it. Where no gradient is
    recorded, a step writes into the state that it is given, if that has memory of its own.
    """

    kind: ClassVar[type[Any]]
    """The class of the state."""
    window: int | None
    softcap: float | None
    heads: int
    d_sum: int
    """Width of the values that are summed."""

    @abstractmethod
    def _shapes(self) -> tuple[tuple[int, ...], ...]:
        """What each cache holds of one token."""

    @abstractmethod
    def _made(self, z: Tensor, positions: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Queries ``(B, T, H, P)`` and what the caches hold, of the projected inputs ``(B, T, ...)``."""

    @abstractmethod
    def _read(self, caches: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Keys ``(B, S, G, P)`` and values ``(B, S, G, V)`` of what caches hold."""

    def _fresh(self, q: Tensor, made: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``(B, T, H, V)`` of tokens that have no others before them."""
        return q, *self._read(made)

    def _asking(self, q: Tensor) -> Tensor:
        """The queries as the keys of :meth:`_read` want them."""
        return q

    def _found(self, y: Tensor) -> Tensor:
        """Sums of the values of :meth:`_read`, as sums ``(B, T, H, V)``."""
        return y

    @abstractmethod
    def _out(self, y: Tensor, z: Tensor) -> Tensor:
        """The outputs, of the sums of values ``(B, T, H, V)`` and the projected inputs."""

    def _empty(self, like: Tensor, rows: int, max_len: int = 0) -> Any:
        slots = self.window or max_len
        caches = [like.new_zeros(rows, slots, *shape) for shape in self._shapes()]
        return self.kind(*caches, torch.zeros(rows, dtype=torch.int64, device=like.device))

    def _attend(self, z: Tensor, state: Any, packing: Packing | None) -> tuple[Tensor, Any]:
        """Projected inputs ``(B, T, ...)`` to outputs."""
        rows = z.shape[0] if packing is None else packing.rows
        if z.numel() == 0:
            y = z.new_zeros(*z.shape[:2], self.heads, self.d_sum)
            return self._out(y, z), self._empty(z, rows) if state is None else state
        common = None if packing is None else packing.common
        if common is not None:  # a batch
            y, state = self._run(z.view(rows, common, -1), state, None)
            return y.reshape(*z.shape[:2], -1), state
        return self._run(z, state, packing)

    def _run(self, z: Tensor, state: Any, packing: Packing | None) -> tuple[Tensor, Any]:
        new = _layout(z, packing)
        q, made = self._made(z, new.at if state is None else state.length[new.row] + new.at)
        if state is not None:
            made = tuple(m.to(old.dtype) for m, old in zip(made, state[:-1], strict=True))
        if state is not None and packing is None and z.shape[1] == 1:
            y, after = self._decode(q, made, state, new)
        else:
            y, after = self._prefill(q, made, state, new)
        if self._bounded(after):
            y = blank_where_full(y, after.length, after[0].shape[1], new.row)
        return self._out(y, z), after

    def _decode(self, q: Tensor, made: tuple[Tensor, ...], state: Any, new: "_Layout") -> tuple[Tensor, Any]:
        """One token per row: written first, as the slot it takes is one it may not see."""
        slots, length = self._slots(state, new), state.length + new.added
        after = self._put(_grow(state, slots.end), made, new)
        seen = None if slots.level else (held(length, after[0].shape[1]) >= 0)[:, None, None, : slots.end]
        k, v = self._read(tuple(cache[:, : slots.end] for cache in after[:-1]))
        return self._found(over(self._asking(q), k, v, seen, softcap=self.softcap)), after

    def _prefill(self, q: Tensor, made: tuple[Tensor, ...], state: Any, new: "_Layout") -> tuple[Tensor, Any]:
        """Any number of tokens: they see the cache as it was, then each other."""
        slots, past = _Slots(True, 0, new.most), None
        if state is not None:
            slots = self._slots(state, new)
            if slots.start:
                length = state.length[:1] if slots.level else state.length
                past = Past(*self._read(tuple(cache[:, : slots.start] for cache in state[:-1])), length)
        options: dict[str, Any] = {"window": self.window, "cu_seqlens": new.packing, "softcap": self.softcap}
        if past is not None:
            y = self._found(attention(self._asking(q), *self._read(made), past, **options))
        elif self.window is None and new.packing is None:
            y = causal(*self._fresh(q, made), softcap=self.softcap)
        else:
            y = attention(*self._fresh(q, made), **options)
        if state is None and self.window is None and new.packing is None:
            return y, self.kind(*made, new.added)
        before = self._empty(made[0], new.added.shape[0]) if state is None else state
        if self.window is not None:
            return y, _turn(before, made, new)
        return y, self._put(_grow(before, slots.end), made, new)

    def _slots(self, state: Any, new: "_Layout") -> "_Slots":
        """A cache without a window asks how long its rows are; the answer waits for the device."""
        capacity = state[0].shape[1]
        if self.window is not None:
            return _Slots(False, capacity, capacity)
        if self._bounded(state):
            if new.packing is not None:
                return _Slots(False, capacity, capacity or new.most)
            end = larger(capacity, new.most)
            return _Slots(False, end - new.most, end)
        low, high, end = torch.stack([*state.length.aminmax(), (state.length + new.added).max()]).tolist()
        return _Slots(low == high, high, end)

    def _bounded(self, state: Any) -> bool:
        """Whether the cache keeps its capacity, as its lengths cannot be read."""
        return self.window is None and not readable(state.length)

    def _put(self, state: Any, made: tuple[Tensor, ...], new: "_Layout") -> Any:
        """Write the new tokens to their slots."""
        position = state.length[new.row] + new.at
        if self._bounded(state):
            position = position.clamp(max=state[0].shape[1] - 1)
        at = new.row.expand_as(position), position if self.window is None else position % self.window
        caches = [write(old, at, m) for old, m in zip(state[:-1], made, strict=True)]
        return self.kind(*caches, state.length + new.added)

    def _check_state(self, where: str, x: Tensor, state: Any, packing: Packing | None) -> None:
        if state is None:
            return
        check_kind(where, state, self.kind)
        rows, source = (x, "x") if packing is None else (packing.cu_seqlens[1:], "sequences")
        _check_caches(where, source, self.kind._fields, self.window, self._shapes(), rows, *state)


@once_per_shape
def _check_caches(
    where: str,
    source: str,
    names: tuple[str, ...],
    window: int | None,
    shapes: tuple[tuple[int, ...], ...],
    rows: Tensor,
    *state: Tensor,
) -> None:
    leaves = {source: (rows, "R ..."), "state.length": (state[-1], "R")}
    for name, cache, shape in zip(names, state[:-1], shapes, strict=False):
        leaves[f"state.{name}"] = cache, f"R {window or 'S'} {' '.join(map(str, shape))}"
    check_tensors(where, **leaves)


class CachedStep(StreamStep):
    """A step of a layer whose state is caches, of 16 bits too, and the lengths of rows.

    Caches that grow get room where a row needs it.
    """

    def fits(self, x: Tensor, state: Any) -> bool:
        """Whether the caches have dtypes that kernels read beside that of x."""
        if not isinstance(state, self.kind) or state.length.dtype != torch.int64 or not x.is_cpu:
            return False
        return all(m.dtype in (self.dtype, torch.bfloat16, torch.float16) for m in state[:-1])

    def roomy(self, record: Any, state: Any) -> Any:
        """The state with a slot for one more token in each row."""
        if record.ring or not state.length.numel():
            return state
        return _grow(state, int(state.length.max()) + 1)


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


def _grow(state: Any, capacity: int) -> Any:
    """Room for ``capacity`` positions, at least doubled where it must grow."""
    slots = state[0].shape[1]
    if torch.compiler.is_compiling():  # no branch on sizes: it would make a program for each case
        more = larger(capacity, slots) - slots
    else:
        more = max(capacity, 2 * slots) - slots if capacity > slots else 0
        if more == 0:
            return state
    caches = [F.pad(cache, (*(0, 0) * (cache.dim() - 2), 0, more)) for cache in state[:-1]]
    return type(state)(*caches, state.length)


def _turn(state: Any, made: tuple[Tensor, ...], new: _Layout) -> Any:
    """Write the new tokens to rings that they may turn more than once; always out of place."""
    length = state.length + new.added
    since = held(length, state[0].shape[1]) - state.length[:, None]  # >= 0: the slot holds a new token
    token, fresh = (new.begin[:, None] + since).clamp(min=0), since >= 0
    rings = [
        torch.where(fresh.view(*fresh.shape, *[1] * (old.dim() - 2)), m.flatten(0, 1)[token], old)
        for m, old in zip(made, state[:-1], strict=True)
    ]
    return type(state)(*rings, length)
