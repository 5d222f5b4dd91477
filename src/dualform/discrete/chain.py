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
