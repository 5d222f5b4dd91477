"""The discrete system of S4D, DSS, H3 and HyenaModal: diagonal, one input and one output per channel."""

from typing import NamedTuple

import torch
from torch import Tensor

from dualform.core.discretize import hold
from dualform.core.dplr import as_real, as_rotations
from dualform.core.packing import Packing
from dualform.core.system import StateSpace
from dualform.ops.diagonal_ssm import diagonal_ssm
from dualform.ops.irregular_ssm import irregular_ssm
from dualform.ops.vandermonde import vandermonde_kernel


class DiagonalSystem(NamedTuple):
    """``h_t = a h_{t-1} + b u_t``, ``s_t = Re(C h_t)`` per channel; u and s are real.

    A :class:`~dualform.layers.lti.System`; states are ``(rows, D, N)``. Where one pole of each conjugate pair is
    given, C is twice the output vector.
    """

    log_a: Tensor  # (D, N), complex; it counts where intervals are given, and for the kernel
    a: Tensor  # (D, N), complex
    b: Tensor  # (D, N), complex
    C: Tensor  # (D, N), complex

    def step(self, u: Tensor, h: Tensor, interval: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``u`` ``(B, D)``, ``h`` ``(B, D, N)``, ``interval`` ``(B,)``."""
        a, b = self.a, self.b
        if interval is not None:
            a, weight = hold(self.log_a, interval[:, None, None])
            b = weight * b
        u = u.unsqueeze(-1).unsqueeze(-1)
        h = torch.view_as_complex(torch.addcmul(torch.view_as_real(a * h), torch.view_as_real(b), u))
        return (self.C * h).sum(-1).real, h

    def run(
        self, u: Tensor, h: Tensor, packing: Packing | None, intervals: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``u`` ``(B, T, D)``, ``h`` ``(rows, D, N)``, ``intervals`` ``(B, T)``.

        Outputs have the dtype of u, and with intervals that of the states.
        """
        if intervals is not None:
            return irregular_ssm(u, intervals, self.log_a, self.b, self.C / 2, h, cu_seqlens=packing)
        b = _reached(self.b)
        s, last = diagonal_ssm(u, self.a, self.C * b / 2, h / b, cu_seqlens=packing)
        return s, last * b

    def kernel(self, length: int) -> Tensor:
        """``Re(C a^l b)`` for ``l < length``, ``(D, length)``."""
        log_a = torch.complex(self.log_a.real.clamp_min(-300), self.log_a.imag)  # a may be zero
        return vandermonde_kernel(log_a, self.C * self.b / 2, length)

    def dense(self, D: Tensor) -> list[StateSpace]:
        """One system per channel."""
        matrices = as_rotations(self.a), as_real(self.b), as_real(self.C.conj()), D
        return [StateSpace(*channel, dt=1.0) for channel in zip(*matrices, strict=True)]


def _reached(b: Tensor) -> Tensor:
    """``b``, but small instead of zero where it vanishes beside the other modes of its channel.

    ``diagonal_ssm`` takes the states divided by b.
    """
    size, info = b.detach().abs(), torch.finfo(b.dtype)
    least = (info.eps * size.amax(-1, keepdim=True)).clamp_min(info.tiny**0.5)
    return b + 2 * least * (size < least)
