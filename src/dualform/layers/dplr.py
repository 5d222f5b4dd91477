"""The parallel form of S4: chunks of time, and between them dense powers of the discrete state matrix."""

from typing import NamedTuple

import torch
from torch import Tensor

from dualform.core.dplr import DiscreteDPLR, as_complex, as_real
from dualform.core.system import StateSpace
from dualform.layers.mixer import exactly
from dualform.ops.chunks import CHUNK, Chunks, chunk_size, toeplitz

SPAN = 256 * 64  # tokens of a row whose chunks run side by side; it bounds the memory of a long sequence
_IN_TURN = 16  # states up to which a loop is quicker than squaring the matrix once more


class _Tables(NamedTuple):
    """What a chunk of K tokens needs, per channel; S = 2 N."""

    within: Tensor  # (D, K, K), from K tokens to K outputs
    after: Tensor  # (D, S, K), from the state before them to K outputs
    into: Tensor  # (D, K, S), from K tokens to what they add to the state after them


class DPLRSystem(NamedTuple):
    """``h_t = Abar h_{t-1} + Bbar u_t``, ``s_t = Re(C h_t)`` per channel: a :class:`~dualform.layers.lti.System`.

    Diagonalising Abar would make the scan of states cheaper, but the eigenvectors of HiPPO matrices are exponentially
    ill-conditioned in N.
    """

    system: DiscreteDPLR
    C: Tensor  # (D, N), complex, twice the output vector, as one of each conjugate pair of states is given

    def step(self, u: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """``u`` ``(B, D)``, ``h`` ``(B, D, N)``."""
        h = self.system.step(u, h)
        return (self.C * h).sum(-1).real, h

    def run(self, u: Tensor, h: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """``u`` ``(B, T, D)``, ``h`` ``(rows, D, N)``; a long row goes span by span."""
        u, states, outputs = u.to(h.real.dtype), as_real(h).transpose(0, 1), []
        with exactly(u.device.type):
            chunked = _Chunked(self, chunk_size(u, cu_seqlens, CHUNK))
            for part in u.split(SPAN, 1) if cu_seqlens is None else [u]:
                y, states = chunked.span(part, states, cu_seqlens)
                outputs.append(y)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1), as_complex(states).transpose(0, 1)

    def kernel(self, length: int) -> Tensor:
        """``Re(C Abar^l Bbar)`` for ``l < length``, ``(D, length)``."""
        return self.system.kernel(self.C / 2, length)

    def dense(self, D: Tensor) -> list[StateSpace]:
        """One system per channel."""
        change = self.system.powers().change(0).mT
        A = torch.eye(change.shape[-1], dtype=change.dtype) + change
        matrices = A, as_real(self.system.B), as_real(self.C.conj()), D
        return [StateSpace(*channel, dt=1.0) for channel in zip(*matrices, strict=True)]


class _Chunked:
    """The parallel form on chunks of K steps."""

    def __init__(self, system: DPLRSystem, size: int):
        self.powers = powers = system.system.powers()
        column, row = as_real(system.system.B)[:, None], as_real(system.C.conj())[:, None]
        after = powers.orbit(powers.moved(row, 0, adjoint=True), size, adjoint=True)
        kernel = torch.cat([row, after[:, :-1]], 1) @ column.mT
        self.tables = _Tables(toeplitz(kernel[..., 0]), after.mT, powers.orbit(column, size).flip(1))

    def span(self, u: Tensor, h: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs and final states ``(D, rows, S)``."""
        tables = self.tables
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
                h = torch.where((count >> bit & 1)[:, None] > 0, self.powers.moved(h, bit), h)
            elif count >> bit & 1:
                h = self.powers.moved(h, bit)
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
            h = self.powers.moved(h.flatten(1, 2), level).view_as(h)
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
