"""The parallel form of S4: chunks of time, and between them dense powers of the discrete state matrix."""

from typing import NamedTuple

import torch
from torch import Tensor

from dualform.core.dplr import DPLR, as_complex, as_real
from dualform.layers.mixer import exactly
from dualform.ops.chunks import CHUNK, Chunks, chunk_size, toeplitz

SPAN = 256 * 64  # tokens of a row whose chunks run side by side; it bounds the memory of a long sequence
_IN_TURN = 16  # states up to which a loop is quicker than squaring the matrix once more


class _Tables(NamedTuple):
    """What a chunk of K tokens needs, per channel; S = 2 N."""

    within: Tensor  # (D, K, K), from K tokens to K outputs
    after: Tensor  # (D, S, K), from the state before them to K outputs
    into: Tensor  # (D, K, S), from K tokens to what they add to the state after them


class LowRank(DPLR):
    """A :class:`~dualform.core.dplr.DPLR` as a structured :class:`~dualform.layers.structured.System`.

    Diagonalising Abar would make the scan of states cheaper, but the eigenvectors of HiPPO matrices are exponentially
    ill-conditioned in N.
    """

    def run(self, u: Tensor, h: Tensor, cu_seqlens: Tensor | None, C: Tensor) -> tuple[Tensor, Tensor]:
        """``2 Re(C h)`` ``(B, T, D)`` and the final states ``(rows, D, N)``; a long row goes span by span."""
        u, states, outputs = u.to(h.real.dtype), as_real(h).transpose(0, 1), []
        with exactly(u.device.type):
            tables = self._tables(C, chunk_size(u, cu_seqlens, CHUNK))
            for part in u.split(SPAN, 1) if cu_seqlens is None else [u]:
                y, states = self._span(part, states, cu_seqlens, tables)
                outputs.append(y)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1), as_complex(states).transpose(0, 1)

    def _tables(self, C: Tensor, size: int) -> _Tables:
        column, row = as_real(self.B)[:, None], as_real(2 * C.conj())[:, None]
        after = self.orbit(self.moved(row, 0, adjoint=True), size, adjoint=True)
        kernel = torch.cat([row, after[:, :-1]], 1) @ column.mT
        return _Tables(toeplitz(kernel[..., 0]), after.mT, self.orbit(column, size).flip(1))

    def _span(self, u: Tensor, h: Tensor, cu_seqlens: Tensor | None, tables: _Tables) -> tuple[Tensor, Tensor]:
        """:meth:`run` with states ``(D, rows, S)``."""
        size = tables.within.shape[-1]
        chunks, level = Chunks(u, cu_seqlens, size), size.bit_length() - 1
        left, right = chunks.both(u)
        added = torch.bmm(right, tables.into)
        before = self._prefix(chunks, chunks.before(added, h, 1), level)
        y = torch.baddbmm(torch.bmm(left, tables.within), before, tables.after)
        count = chunks.count[chunks.last] if chunks.packed else (u.shape[1] - 1) % size + 1
        last = self._advance(before.index_select(1, chunks.last), count, level) + added.index_select(1, chunks.last)
        return chunks.tokens(y), h.index_copy(1, chunks.filled, last)

    def _advance(self, h: Tensor, count: int | Tensor, level: int) -> Tensor:
        """``Abar^count h``, the count at most ``2^level``, one number or one per row."""
        for bit in range(level + 1):
            if isinstance(count, Tensor):
                h = torch.where((count >> bit & 1)[:, None] > 0, self.moved(h, bit), h)
            elif count >> bit & 1:
                h = self.moved(h, bit)
        return h

    def _prefix(self, chunks: Chunks, v: Tensor, level: int) -> Tensor:
        """The states before every chunk of ``2^level`` tokens, ``(D, M, S)``, from what enters each by itself."""
        if not chunks.packed:
            v = v.unflatten(1, (chunks.shape[0], -1))
            return self._sums(v, level, None).flatten(1, 2)
        return self._sums(v[:, None], level, chunks.index)[:, 0]

    def _sums(self, v: Tensor, level: int, since: Tensor | None) -> Tensor:
        """``h_i = v_i + Abar^(2^level) h_{i-1}``, ``(D, R, L, S)``.

        Pairs are added up, whose transition is the square, until few are left.

        Args:
            v: what is added.
            level: see the formula.
            since: ``(L,)``, elements since the first one of a sequence; None for one sequence.
        """
        length = v.shape[2]

        def carried(h: Tensor, to: slice) -> Tensor:
            h = self.moved(h.flatten(1, 2), level).view_as(h)
            return h if since is None else torch.where((since[to] > 0)[:, None], h, 0)

        if length <= _IN_TURN:
            states = [v[:, :, :1]]
            for i in range(1, length):
                states.append(v[:, :, i : i + 1] + carried(states[-1], slice(i, i + 1)))
            return torch.cat(states, 2)
        even, odd = v[:, :, 0::2], v[:, :, 1::2]
        pairs = odd + carried(even[:, :, : length // 2], slice(1, None, 2))
        odd = self._sums(pairs, level + 1, None if since is None else since[1::2] // 2)
        even = torch.cat([v[:, :, :1], even[:, :, 1:] + carried(odd[:, :, : (length - 1) // 2], slice(2, None, 2))], 2)
        both = torch.stack([even[:, :, : length // 2], odd], 3).flatten(2, 3)
        return both if length % 2 == 0 else torch.cat([both, even[:, :, -1:]], 2)
