"""How the states of S4 are scanned: between chunks of time, dense powers of the discrete state matrix."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.core.dplr import DPLR, as_complex, as_real
from dualform.core.packing import sequence_ids
from dualform.layers.chunked import CHUNK, Tables, Transition, toeplitz

_IN_TURN = 16  # states up to which a loop is quicker than squaring the matrix once more


class LowRank(DPLR):
    """A :class:`~dualform.core.dplr.DPLR` as a structured :class:`~dualform.layers.structured.System`."""

    def tables(self, C: Tensor, D: Tensor, longest: int) -> Tables:
        """What a chunk of sequences up to ``longest`` needs, for the outputs ``2 Re(C h) + D u``."""
        level = (min(CHUNK, longest) - 1).bit_length()
        chunk = 1 << level
        column, row = as_real(self.B), as_real(2 * C.conj())
        after = self.orbit(self.moved(row[:, None], 0, adjoint=True), chunk, adjoint=True)
        kernel = torch.cat([row[:, None], after[:, :-1]], 1) @ column[..., None]
        kernel = kernel[..., 0] + F.pad(D[:, None], (0, chunk - 1))
        into = self.orbit(column[:, None], chunk).flip(1)
        return Tables(toeplitz(kernel), after.mT, into, Dense(self, level))


class Dense(Transition):
    """Chunks of ``2^level`` tokens, from one to the next by a dense matrix per channel.

    Diagonalising Abar would make this cheaper, but the eigenvectors of HiPPO matrices are exponentially
    ill-conditioned in N. The scan adds up states in pairs, whose transition is the square, until few are left.
    """

    def __init__(self, system: DPLR, level: int):
        self.system, self.level = system, level

    def scan(self, added: Tensor, h: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        start = as_real(h).transpose(0, 1)
        if cu_seqlens is None:
            states = self._prefix(torch.cat([start[:, :, None], added], 2), 0, None)
            return states[:, :, :-1].flatten(1, 2), as_complex(states[:, :, -1]).transpose(0, 1)
        rows, length = start.shape[1], added.shape[2]
        each = torch.arange(rows, device=h.device)
        first = cu_seqlens[:-1] + each  # each sequence is its initial state, then what its chunks add
        place = torch.arange(length, device=h.device) + sequence_ids(cu_seqlens, length) + 1
        order = torch.cat([first, place]).argsort()
        index = torch.arange(rows + length, device=h.device)
        since = index - first[torch.searchsorted(first, index, right=True) - 1]
        states = self._prefix(torch.cat([start, added[:, 0]], 1)[:, None, order], 0, since)[:, 0]
        return states[:, place - 1], as_complex(states[:, cu_seqlens[1:] + each]).transpose(0, 1)

    def advance(self, h: Tensor, count: int | Tensor) -> Tensor:
        v = as_real(h).transpose(0, 1)
        for bit in range(self.level):
            if isinstance(count, Tensor):
                v = torch.where((count >> bit & 1)[:, None] > 0, self.system.moved(v, bit), v)
            elif count >> bit & 1:
                v = self.system.moved(v, bit)
        return as_complex(v).transpose(0, 1)

    def _prefix(self, v: Tensor, depth: int, since: Tensor | None) -> Tensor:
        """``h_i = v_i + Abar^(K 2^depth) h_{i-1}``, ``(D, R, L, S)``; K is the length of a chunk.

        Args:
            v: what is added.
            depth: how often states were paired already.
            since: ``(L,)``, elements since the first one of a sequence, before pairing; None for one sequence.
        """
        length = v.shape[2]

        def carried(h: Tensor, to: slice) -> Tensor:
            h = self.system.moved(h.flatten(1, 2), self.level + depth).view_as(h)
            return h if since is None else torch.where((since[to] >= 1 << depth)[:, None], h, 0)

        if length <= _IN_TURN:
            states = [v[:, :, :1]]
            for i in range(1, length):
                states.append(v[:, :, i : i + 1] + carried(states[-1], slice(i, i + 1)))
            return torch.cat(states, 2)
        even, odd = v[:, :, 0::2], v[:, :, 1::2]
        pairs = odd + carried(even[:, :, : length // 2], slice(1, None, 2))
        odd = self._prefix(pairs, depth + 1, None if since is None else since[1::2])
        even = torch.cat([v[:, :, :1], even[:, :, 1:] + carried(odd[:, :, : (length - 1) // 2], slice(2, None, 2))], 2)
        both = torch.stack([even[:, :, : length // 2], odd], 3).flatten(2, 3)
        return both if length % 2 == 0 else torch.cat([both, even[:, :, -1:]], 2)
