"""The discrete system of S5 and LRU: diagonal and complex, every input reaches every state."""

from typing import NamedTuple

import torch
from torch import Tensor

from dualform.core.discretize import hold
from dualform.core.dplr import as_real, as_rotations
from dualform.core.packing import Packing
from dualform.core.system import StateSpace
from dualform.ops.dispatch import exactly
from dualform.ops.mimo_ssm import mimo_ssm


class MimoSystem(NamedTuple):
    """``h_t = a h_{t-1} + B u_t``, ``s_t = Re(C h_t)``; u and s are real.

    A :class:`~dualform.layers.lti.System`; states are ``(rows, N)``.
    """

    log_a: Tensor  # (N,), complex; it counts where intervals are given
    a: Tensor  # (N,), complex
    B: Tensor  # (N, D), complex
    C: Tensor  # (D, N), complex

    def step(self, u: Tensor, h: Tensor, interval: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``u`` ``(B, D)``, ``h`` ``(B, N)``, ``interval`` ``(B,)``."""
        with exactly(u.device.type):
            a, b = self.a, u.to(h.dtype) @ self.B.T
            if interval is not None:
                a, weight = hold(self.log_a, interval[:, None])
                b = weight * b
            h = torch.addcmul(b, a, h)
            return (h @ self.C.T).real, h

    def run(
        self, u: Tensor, h: Tensor, packing: Packing | None, intervals: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``u`` ``(B, T, D)``, ``h`` ``(rows, N)``, ``intervals`` ``(B, T)``."""
        decay = self.a if intervals is None else self.log_a
        return mimo_ssm(u, decay, self.B, self.C, h, intervals=intervals, cu_seqlens=packing)

    def dense(self, D: Tensor) -> list[StateSpace]:
        """One system for all channels."""
        matrices = as_rotations(self.a), as_real(self.B.T).T, as_real(self.C.conj()), torch.diag(D)
        return [StateSpace(*matrices, dt=1.0)]
