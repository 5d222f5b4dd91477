"""The discrete system of S5 and LRU: diagonal and complex, every input reaches every state."""

from typing import NamedTuple

import torch
from torch import Tensor

from dualform.core.discretize import hold
from dualform.core.dplr import as_complex, as_real, as_rotations
from dualform.core.packing import Borders
from dualform.core.system import StateSpace
from dualform.layers.mixer import exactly
from dualform.layers.spans import in_spans
from dualform.ops.linear_scan import linear_scan


class MimoSystem(NamedTuple):
    """``h_t = a h_{t-1} + B u_t``, ``s_t = Re(C h_t)``; u and s are real.

    A :class:`~dualform.layers.lti.System`; states are ``(rows, N)``. B and C are real matrices on the real and
    imaginary parts of states side by side, ``u @ into`` and ``h @ out``.
    """

    log_a: Tensor  # (N,), complex; it counts where intervals are given
    a: Tensor  # (N,), complex
    into: Tensor  # (D, 2 N)
    out: Tensor  # (2 N, D)

    @classmethod
    def of(cls, log_a: Tensor, a: Tensor, B: Tensor, C: Tensor) -> "MimoSystem":
        """From complex ``B`` ``(N, D)`` and ``C`` ``(D, N)``."""
        return cls(log_a, a, as_real(B.T), as_real(C.conj()).T)

    def step(self, u: Tensor, h: Tensor, interval: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``u`` ``(B, D)``, ``h`` ``(B, N)``, ``interval`` ``(B,)``."""
        with exactly(u.device.type):
            a, b = self.a, as_complex(u @ self.into)
            if interval is not None:
                a, weight = hold(self.log_a, interval[:, None])
                b = weight * b
            h = torch.addcmul(b, a, h)
            return as_real(h) @ self.out, h

    def run(self, u: Tensor, h: Tensor, cu_seqlens: Borders, intervals: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``u`` ``(B, T, D)``, ``h`` ``(rows, N)``, ``intervals`` ``(B, T)``; states are held one span at a time."""
        u = u.to(self.into.dtype)
        inputs, decay = ((u,), self.a) if intervals is None else ((u, intervals), self.log_a)
        weights = decay, self.into, self.out
        return in_spans(_span, h, inputs, weights, width=len(decay), packing=cu_seqlens)

    def dense(self, D: Tensor) -> list[StateSpace]:
        """One system for all channels."""
        return [StateSpace(as_rotations(self.a), self.into.T, self.out.T, torch.diag(D), dt=1.0)]


def _span(h: Tensor, cu_seqlens: Borders, u: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    """One span; ``rest`` is the intervals where there are any, then a or its logarithm, ``into`` and ``out``."""
    *intervals, a, into, out = rest
    b = as_complex(u @ into)
    if intervals:
        a, weight = hold(a, intervals[0][..., None])
        b = weight * b
    hs, h = linear_scan(a.expand_as(b), b, h, cu_seqlens=cu_seqlens)
    return as_real(hs) @ out, h
