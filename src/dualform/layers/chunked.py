"""One linear time-invariant system per channel, run in chunks of time.

    h_t = Abar h_{t-1} + Bbar u_t,   s_t = 2 Re(C h_t) + D u_t

Within a chunk of K tokens one matrix product maps the tokens and the state before them to the outputs, and another
the tokens to what they add to the state after them; between chunks the states are scanned. So states are held once
per chunk, the initial and the final state cost nothing extra, and everything is differentiable. How Abar acts, and
so how states are scanned, is a :class:`Transition`.

A state is N complex numbers per channel, one of each conjugate pair: S = 2 N real ones, the parts of each number side
by side. Inside this file the channels come first.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.core.dplr import as_complex, as_real
from dualform.core.packing import from_lengths, sequence_ids

SPAN = 256 * 64  # tokens of a row whose chunks run side by side; it bounds the memory of a long sequence
CHUNK = 64  # tokens per matrix product: two real numbers per pole and channel then weigh as much as the tokens


class Transition(ABC):
    """How a state moves on without input."""

    @abstractmethod
    def scan(self, added: Tensor, h: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The states before every chunk ``(D, M, S)`` and after the last ones ``(rows, D, N)``.

        Args:
            added: ``(D, B, L, S)``, what every chunk adds to the state; M = B L.
            h: ``(rows, D, N)``, complex, the states before the first chunks.
            cu_seqlens: ``(n + 1,)``, borders of sequences, counted in chunks; then B is 1 and there are n rows.
        """

    @abstractmethod
    def advance(self, h: Tensor, count: int | Tensor) -> Tensor:
        """``Abar^count h`` of ``(rows, D, N)``; ``count`` is less than a chunk, one number or one per row."""


class Tables(NamedTuple):
    """What a chunk of K tokens needs, per channel."""

    within: Tensor  # (D, K, K), from K tokens to K outputs
    after: Tensor  # (D, S, K), from the state before them to K outputs
    into: Tensor  # (D, K, S), from K tokens to what they add to the state after them
    transition: Transition


def toeplitz(kernel: Tensor) -> Tensor:
    """``(D, K, K)`` from the first K taps of an impulse response ``(D, K)``: what token i gives to output j."""
    chunk = kernel.shape[-1]
    later = torch.arange(chunk, device=kernel.device)
    return F.pad(kernel, (chunk, 0))[:, chunk + later - later[:, None]]


def run(u: Tensor, h: Tensor, borders: Tensor | None, tables: Tables) -> tuple[Tensor, Tensor]:
    """Outputs ``(B, T, D)`` and final states ``(rows, D, N)``.

    Args:
        u: ``(B, T, D)``, input.
        h: ``(rows, D, N)``, complex, initial states.
        borders: ``(n + 1,)``, int64, cumulative lengths of sequences end to end; then B is 1 and there are n rows.
        tables: of the systems.
    """
    u = u.permute(2, 0, 1)
    y, h = _whole(u, h, tables) if borders is None else _packed(u[:, 0], borders, h, tables)
    return y.permute(1, 2, 0), h


def _outputs(u: Tensor, before: Tensor, tables: Tables) -> Tensor:
    """Chunks ``(D, M, k)`` and the states before them ``(D, M, S)`` -> ``(D, M, k)``."""
    k = u.shape[2]
    return torch.baddbmm(torch.bmm(u, tables.within[:, :k, :k]), before, tables.after[..., :k])


def _added(u: Tensor, tables: Tables) -> Tensor:
    """What chunks ``(D, M, k)`` add to the states after them, ``(D, M, S)``."""
    return torch.bmm(u, tables.into[:, tables.into.shape[1] - u.shape[2] :])


def _whole(u: Tensor, h: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
    """``u`` ``(D, B, T)``: the full chunks, then the rest."""
    width, rows, length = u.shape
    chunk, transition = tables.within.shape[2], tables.transition
    full, rest = length // chunk, length % chunk
    grid = u[..., : full * chunk].reshape(width, rows * full, chunk).contiguous()
    before, h = transition.scan(_added(grid, tables).unflatten(1, (rows, full)), h)
    y = _outputs(grid, before, tables).view(width, rows, full * chunk)
    if rest == 0:
        return y, h
    end = u[..., full * chunk :].contiguous()
    y = torch.cat([y, _outputs(end, as_real(h).transpose(0, 1), tables)], 2)
    return y, transition.advance(h, rest) + as_complex(_added(end, tables)).transpose(0, 1)


def _packed(u: Tensor, borders: Tensor, h: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
    """``u`` ``(D, total)``, n sequences end to end.

    The full chunks of all sequences side by side, then the rests of all sequences, padded to a chunk.
    """
    chunk, transition, total = tables.within.shape[2], tables.transition, u.shape[1]
    at = torch.arange(chunk, device=u.device)
    lengths = borders.diff()
    chunks, rest = from_lengths(lengths // chunk), (lengths % chunk)[:, None]
    full = int(chunks[-1])
    owner = sequence_ids(chunks, full)
    begin = borders[owner] + chunk * (torch.arange(full, device=u.device) - chunks[owner])
    token = begin[:, None] + at
    grid = u[:, token]
    before, h = transition.scan(_added(grid, tables)[:, None], h, chunks)
    y = _outputs(grid, before, tables).flatten(1)

    token_left, keep_left = borders[1:, None] - rest + at, at < rest
    left = torch.where(keep_left, u[:, token_left.clamp(max=total - 1)], 0)
    right = torch.where(at >= chunk - rest, u[:, (borders[1:, None] - chunk + at).clamp(min=0)], 0)
    y = torch.cat([y, _outputs(left, as_real(h).transpose(0, 1), tables)[:, keep_left]], 1)
    order = torch.cat([token.flatten(), token_left[keep_left]]).argsort()
    h = transition.advance(h, rest[:, 0]) + as_complex(_added(right, tables)).transpose(0, 1)
    return y[:, None, order], h
