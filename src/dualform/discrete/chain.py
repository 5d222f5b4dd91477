"""Markov chains by themselves."""

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError


def stationary_distribution(A: Tensor) -> Tensor:
    """``pi A = pi`` of ``(K, K)``, by ``pi (I - A + 1) = 1`` with a matrix and a vector of ones.

    Raises:
        ArgumentError: where there are several.

    References:
        Zucchini, MacDonald and Langrock (2016), "Hidden Markov models for time series", section 1.3.
    """
    ones = torch.ones_like(A[0])
    system = torch.eye(len(A), dtype=A.dtype, device=A.device) - A + 1
    solution, failed = torch.linalg.solve_ex(system.mT, ones)
    if not torch.compiler.is_compiling() and bool(failed):
        hint = "let every state be reached from every other"
        raise ArgumentError("HiddenMarkov: transition has several stationary distributions", hint=hint)
    return solution


def draw_path(start: Tensor, A: Tensor, length: int, generator: torch.Generator | None) -> Tensor:
    """Paths ``(B, T)``, int64, drawn from a start ``(B, K)`` and transitions ``(K, K)``, or ``(B, T, K, K)``."""
    batch, states = start.shape
    drawn = torch.rand(length, batch, 1, generator=generator, dtype=start.dtype, device=start.device)
    until, moves, row = start.cumsum(-1), A.cumsum(-1), torch.arange(batch, device=start.device)
    path = start.new_empty(batch, length, dtype=torch.int64)
    for t, part in enumerate(drawn):
        now = torch.searchsorted(until.contiguous(), part * until[:, -1:]).squeeze(-1).clamp(max=states - 1)
        path[:, t] = now
        until = moves[now] if moves.dim() == 2 else moves[row, t, now]
    return path
