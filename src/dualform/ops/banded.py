"""A causal convolution with many taps as matrix products: chunks of K steps, each behind the K steps before it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.core.packing import Packing
from dualform.ops.chunks import CHUNK, Chunks


class Banded:
    """``y_t = sum_j weight_j x_{t - (W-1) + j}`` per channel, and its gradients.

    The frame of a chunk is the chunk before it, or what the state holds, and the chunk itself; its product with a
    banded matrix is the outputs. A value that is not finite may reach earlier outputs of its own sequence in its chunk.

    Args:
        x: ``(B, T, D)``.
        weight: ``(D, W)``; the last column multiplies the current input.
        state: ``(rows, D, W-1)``, the inputs before the first, oldest first.
        packing: of the sequences of one row; None where every row is a sequence.
    """

    def __init__(self, x: Tensor, weight: Tensor, state: Tensor, packing: Packing | None):
        self.taps, self.size = weight.shape[1], max(CHUNK, 1 << (weight.shape[1] - 1).bit_length())
        self.chunks, size = Chunks.of(x, packing, self.size), self.size
        left, start = self.chunks.left(x), F.pad(state, (size - state.shape[2], 0)).transpose(0, 1)
        self.frames = torch.cat([self.chunks.before(left, start, 1), left], 2)  # (D, M, 2 K)
        steps = torch.arange(2 * size, device=x.device)
        self.column = size - 1 + (size + steps[:size] - steps[:, None])  # of the lag of an output behind an input
        padded = F.pad(weight.flip(1), (size - 1, 2 * size - self.taps))  # by lag, from 1 - K to 2 K - 1
        self.band = padded[:, self.column]  # (D, 2 K, K)

    def forward(self) -> Tensor:
        """``(B, T, D)``."""
        return self.chunks.tokens(torch.bmm(self.frames, self.band))

    def backward(self, dy: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of x, state and weight from that of y."""
        chunks, size, g = self.chunks, self.size, self.chunks.left(dy)
        before, own = torch.bmm(g, self.band.mT).split(size, 2)
        nothing = own.new_zeros(len(own), rows, size)
        dx = chunks.tokens(own + chunks.after(before, nothing, 1))
        dstate = nothing.index_copy(1, chunks.filled, before.index_select(1, chunks.first))
        by_lag = own.new_zeros(len(own), 3 * size - 1)
        by_lag.index_add_(1, self.column.flatten(), torch.bmm(self.frames.mT, g).flatten(1))
        dweight = by_lag[:, size - 1 : size - 1 + self.taps].flip(1)
        return dx, dstate[..., size - self.taps + 1 :].transpose(0, 1), dweight
