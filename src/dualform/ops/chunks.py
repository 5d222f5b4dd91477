"""Time cut into chunks: the parallel form of a time-invariant system, without a Fourier transform.

Within a chunk of K tokens one matrix product maps the tokens and the state before them to the outputs, and another the
tokens to what they add to the state after them; between chunks only states pass on. The initial and the final states
cost nothing extra, and states are held once per chunk.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.core.packing import from_lengths, sequence_ids

CHUNK = 64  # tokens per matrix product: two real numbers per mode and channel then weigh as much as the tokens


def chunk_size(x: Tensor, cu_seqlens: Tensor | None, most: int = CHUNK) -> int:
    """K for ``(B, T, D)``: a power of two that holds ``most`` tokens, or the longest sequence if that is shorter."""
    longest = x.shape[1] if cu_seqlens is None else int(cu_seqlens.diff().max())
    return 1 << (max(1, min(most, longest)) - 1).bit_length()


class Chunks:
    """Every sequence cut into chunks of K tokens, all side by side: M chunks, the last of a sequence perhaps shorter.

    Within chunks channels come first. Differentiable by autograd.

    Args:
        x: ``(B, T, D)``, only looked at.
        cu_seqlens: ``(n + 1,)``, borders of the sequences of one row; None where every row is a sequence.
        size: K.
    """

    def __init__(self, x: Tensor, cu_seqlens: Tensor | None, size: int):
        (batch, length), device = x.shape[:2], x.device
        if cu_seqlens is None:
            borders = torch.arange(batch + 1, device=device) * length
        else:
            borders = cu_seqlens.to(device, torch.int64)
        lengths, self.size = borders.diff(), size
        self.cu_chunks = from_lengths((lengths + size - 1) // size)
        self.total = batch * -(-length // size) if cu_seqlens is None else int(self.cu_chunks[-1])  # M
        owner = sequence_ids(self.cu_chunks, self.total)
        self.index = torch.arange(self.total, device=device) - self.cu_chunks[owner]  # of a chunk in its sequence
        begin = borders[owner] + self.index * size
        self.count = torch.minimum(borders[owner + 1] - begin, torch.full_like(owner, size))  # tokens of a chunk
        every = torch.arange(len(lengths), device=device)
        self.filled = every[: batch * min(1, length)] if cu_seqlens is None else every[lengths > 0]  # not empty
        self.last = self.cu_chunks[1:][self.filled] - 1  # the last chunks of those
        self.shape, self.packed = (batch, length), cu_seqlens is not None
        self.places: tuple[Tensor, Tensor] | None = None  # of tokens in the line of chunks, left and right
        if self.total * size != batch * length:
            token = torch.arange(batch * length, device=device)
            chunk = torch.searchsorted(begin, token, right=True) - 1
            left = chunk * size + token - begin[chunk]
            self.places = left, left + size - self.count[chunk]

    def left(self, x: Tensor) -> Tensor:
        """``(B, T, D)`` -> ``(D, M, K)``; in a short chunk tokens first, zeros last."""
        return self._laid(x, 0)

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`left`, and the same with zeros first and tokens last; one tensor where no chunk is short."""
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
        first = self.cu_chunks[:-1][self.filled]
        return after.roll(1, dim).index_copy(dim, first, start.index_select(dim, self.filled))

    def after(self, before: Tensor, end: Tensor, dim: int = 0) -> Tensor:
        """From what is known before chunks, M along ``dim``, the same after; of the last of a sequence, its end."""
        return before.roll(-1, dim).index_copy(dim, self.last, end.index_select(dim, self.filled))

    def _laid(self, x: Tensor, side: int) -> Tensor:
        line = x.flatten(0, 1)
        if self.places is not None:
            line = line.new_zeros(self.total * self.size, line.shape[1]).index_copy(0, self.places[side], line)
        return line.T.reshape(line.shape[1], self.total, self.size)


def toeplitz(kernel: Tensor) -> Tensor:
    """``(D, K, K)`` from the first K taps of an impulse response ``(D, K)``: what token i gives to output j."""
    size = kernel.shape[-1]
    later = torch.arange(size, device=kernel.device)
    return F.pad(kernel, (size, 0))[:, size + later - later[:, None]]
