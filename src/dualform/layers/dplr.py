"""The discrete system of S4: diagonal plus low rank, one input and one output per channel."""

from typing import NamedTuple

import torch
from torch import Tensor

from dualform.core.dplr import DiscreteDPLR, as_real
from dualform.core.packing import Packing
from dualform.core.system import StateSpace
from dualform.ops.dplr_ssm import dplr_ssm


class DPLRSystem(NamedTuple):
    """``h_t = Abar h_{t-1} + Bbar u_t``, ``s_t = Re(C h_t)`` per channel: a :class:`~dualform.layers.lti.System`."""

    system: DiscreteDPLR
    C: Tensor  # (D, N), complex, twice the output vector, as one of each conjugate pair of states is given

    def step(self, u: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """``u`` ``(B, D)``, ``h`` ``(B, D, N)``."""
        h = self.system.step(u, h)
        return (self.C * h).sum(-1).real, h

    def run(self, u: Tensor, h: Tensor, packing: Packing | None) -> tuple[Tensor, Tensor]:
        """``u`` ``(B, T, D)``, ``h`` ``(rows, D, N)``."""
        return dplr_ssm(u, self.system, self.C / 2, h, cu_seqlens=packing)

    def kernel(self, length: int) -> Tensor:
        """``Re(C Abar^l Bbar)`` for ``l < length``, ``(D, length)``."""
        return self.system.kernel(self.C / 2, length)

    def dense(self, D: Tensor) -> list[StateSpace]:
        """One system per channel."""
        change = self.system.powers().change(0).mT
        A = torch.eye(change.shape[-1], dtype=change.dtype) + change
        matrices = A, as_real(self.system.B), as_real(self.C.conj()), D
        return [StateSpace(*channel, dt=1.0) for channel in zip(*matrices, strict=True)]
