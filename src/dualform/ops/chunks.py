"""Time cut into chunks: what the parallel forms that are matrix products share.

A chunk is K consecutive steps of one sequence; the last of a sequence may be shorter, and no chunk crosses a border.
Within a chunk one matrix product maps inputs to outputs; between chunks only states pass on.
"""

from collections.abc import Callable
from functools import cached_property
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.core.packing import Borders, Packing, from_lengths, once, sequence_ids

CHUNK = 64  # steps per matrix product: two real numbers per mode and channel then weigh as much as the steps


def chunk_size(x: Tensor, packing: Borders, most: int = CHUNK) -> int:
    """K for ``(B, T, D)``: a power of two that holds ``most`` steps, or the longest sequence if that is shorter."""
    packing = Packing.of("chunk_size", packing, x)
    longest = x.shape[1] if packing is None else packing.longest
    return 1 << (max(1, min(most, longest)) - 1).bit_length()


class Chunks:
    """Every sequence cut into chunks of K steps, all side by side: M chunks, the last of a sequence perhaps shorter.

    Nothing here waits for a device. Differentiable by autograd.

    Args:
        x: ``(B, T, ...)``, only looked at.
        packing: of the sequences of one row; None where every row is a sequence.
        size: K.
    """

    def __init__(self, x: Tensor, packing: Borders, size: int):
        batch, length = x.shape[:2]
        packing = Packing.of("chunks", packing, x)
        self.shape, self.size, self.packed, self.device = (batch, length), size, packing is not None, x.device
        if packing is None:
            self._host = torch.arange(batch + 1, device="cpu") * length
            self.in_row, everything = -(-length // size), slice(None)  # chunks of a row
            self.starts = {0: everything} if self.in_row else {}  # states that enter a chunk of every row from outside
            self.stops = {self.in_row - 1: everything} if self.in_row else {}  # and those that leave with it
        else:
            self._host = packing.host_borders()
            edges = [(i, *pair) for i, pair in enumerate(pairwise(self.line.host_borders().tolist()))]
            self.in_row = edges[-1][2]
            self.starts = {begin: slice(i, i + 1) for i, begin, end in edges if begin < end}
            self.stops = {end - 1: slice(i, i + 1) for i, begin, end in edges if begin < end}
        self.total = batch * self.in_row  # M

    # What follows is made where it is needed first: not every form needs it, and each takes some launches.

    @cached_property
    def line(self) -> Packing:
        """The sequences, where a chunk is one step of them."""
        return Packing.of_host(from_lengths((self._host.diff() + self.size - 1) // self.size), self.device)

    @cached_property
    def _sequences(self) -> tuple[Tensor, Tensor]:
        """Of each chunk, where its sequence begins and ends."""
        borders, owner = Packing.of_host(self._host, self.device).cu_seqlens, self._owner
        return borders[owner], borders[owner + 1]

    @cached_property
    def _owner(self) -> Tensor:
        return sequence_ids(self.line.cu_seqlens, self.total)

    @cached_property
    def index(self) -> Tensor:
        """Of a chunk, which one of its sequence it is, ``(M,)``."""
        return torch.arange(self.total, device=self.device) - self.line.cu_seqlens[self._owner]

    @cached_property
    def _begins(self) -> Tensor:
        return self._sequences[0] + self.index * self.size

    @cached_property
    def count(self) -> Tensor:
        """Steps of each chunk, ``(M,)``."""
        rest = self._sequences[1] - self._begins
        return torch.minimum(rest, torch.full_like(rest, self.size))

    @cached_property
    def _not_empty(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.line.not_empty()

    @property
    def filled(self) -> Tensor:
        """Sequences with steps."""
        return self._not_empty[0]

    @property
    def first(self) -> Tensor:
        """Their first chunks."""
        return self._not_empty[1]

    @property
    def last(self) -> Tensor:
        """Their last chunks."""
        return self._not_empty[2]

    @cached_property
    def places(self) -> tuple[Tensor, Tensor] | None:
        """Of steps in the line of chunks, left and right; None where no chunk is short."""
        if self.total * self.size == self.shape[0] * self.shape[1]:
            return None
        step = torch.arange(self.shape[0] * self.shape[1], device=self.device)
        chunk = torch.searchsorted(self._begins, step, right=True) - 1
        left = chunk * self.size + step - self._begins[chunk]
        return left, left + self.size - self.count[chunk]

    @classmethod
    def of(cls, x: Tensor, packing: Packing | None, size: int) -> "Chunks":
        """The chunks of ``x``; of one packing made once, for all ops that cut alike."""
        if packing is None or packing.host is None:
            return cls(x, packing, size)
        return once(packing.host, ("chunks", size, x.device), lambda: cls(x, packing, size))

    def cut(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``(B, T, ...)`` -> ``(B, M / B, K, ...)``; in a short chunk steps first, zeros last."""
        line = x.flatten(0, 1)
        if self.places is None:
            out = line.to(dtype)
        else:
            out = line.new_zeros(self.total * self.size, *line.shape[1:], dtype=dtype)
            out = out.index_copy(0, self.places[0], line.to(dtype))
        return out.unflatten(0, (self.shape[0], self.in_row, self.size))

    def join(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`cut`."""
        line = x.flatten(0, 2)
        return (line if self.places is None else line[self.places[0]]).unflatten(0, self.shape)

    def carry(self, step: Callable[[int, Tensor], Tensor], h0: Tensor) -> tuple[Tensor, Tensor]:
        """The states that enter every chunk, ``(B, M / B, ...)``, and those that leave the last chunk of a sequence.

        Args:
            step: ``(s, h)``, the number of a chunk in its row and the states ``(B, ...)`` that enter it, to those that
                leave it.
            h0: ``(rows, ...)``, the states that enter the first chunk of a sequence; one without steps keeps it.
        """
        h, entered, final = h0[:0], [], list(h0.split(1)) if self.packed else [h0]
        for s in range(self.in_row):
            h = h0[self.starts[s]] if s in self.starts else h
            entered.append(h)
            h = step(s, h)
            if s in self.stops:
                final[self.stops[s].start or 0] = h
        if not entered:
            return h0.new_empty(self.shape[0], 0, *h0.shape[1:]), h0.clone()
        return torch.stack(entered, 1), torch.cat(final)

    def left(self, x: Tensor) -> Tensor:
        """``(B, T, D)`` -> ``(D, M, K)``; in a short chunk steps first, zeros last."""
        return self._laid(x, 0)

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`left`, and the same with zeros first and steps last; one tensor where no chunk is short."""
        left = self._laid(x, 0)
        return left, left if self.places is None else self._laid(x, 1)

    def tokens(self, left: Tensor, right: Tensor | None = None) -> Tensor:
        """The inverse of :meth:`left`, plus that of the other of :meth:`both`: ``(D, M, K)`` -> ``(B, T, D)``."""
        if self.places is None:
            found = (left if right is None else left + right).flatten(1).T
        else:
            found = left.flatten(1).T[self.places[0]]
            found = found if right is None else found + right.flatten(1).T[self.places[1]]
        return found.unflatten(0, self.shape)

    def before(self, after: Tensor, start: Tensor, dim: int = 0) -> Tensor:
        """From states after chunks, M along ``dim``, those before; of the first of a sequence, its start."""
        return after.roll(1, dim).index_copy(dim, self.first, start.index_select(dim, self.filled))

    def after(self, before: Tensor, end: Tensor, dim: int = 0) -> Tensor:
        """From what is known before chunks, M along ``dim``, the same after; of the last of a sequence, its end."""
        return before.roll(-1, dim).index_copy(dim, self.last, end.index_select(dim, self.filled))

    def _laid(self, x: Tensor, side: int) -> Tensor:
        line = x.flatten(0, 1)
        if self.places is not None:
            line = line.new_zeros(self.total * self.size, line.shape[1]).index_copy(0, self.places[side], line)
        return line.T.reshape(line.shape[1], self.total, self.size)


def toeplitz(kernel: Tensor) -> Tensor:
    """``(D, K, K)`` from the first K taps of an impulse response ``(D, K)``: what step i gives to output j."""
    size = kernel.shape[-1]
    later = torch.arange(size, device=kernel.device)
    return F.pad(kernel, (size, 0))[:, size + later - later[:, None]]
