"""The discrete system of S4: a state matrix that is diagonal plus low rank, under the bilinear rule."""

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor


class DiscreteDPLR(NamedTuple):
    """``h_t = Abar h_{t-1} + Bbar u_t`` per channel, discretised by the bilinear rule.

        Abar = (I - dt/2 A)^-1 (I + dt/2 A),   Bbar = (I - dt/2 A)^-1 dt B,   A = diag(Lambda) - sum_r P_r P_r^*

    where Lambda, P and B stand for themselves and their conjugates. By Woodbury's identity Abar is the identity plus
    a diagonal plus a matrix of low rank again,

        Abar - I = diag(e) - a b^*,   R = (I - dt/2 Lambda)^-1,   e = dt Lambda R,
                                      a = 2 R P (2 / dt + P^* R P)^-1,   b = R^* P

    so that a step costs ``O(N)``. All formulas here use ``Abar - I``, whose rounding errors are relative to the step
    size: the powers of a rounded Abar would have errors that grow with time.

    The continuous system is :class:`~dualform.core.realize.DPLR`.

    References:
        Gu, Goel and Re (2022), arXiv:2111.00396, section 3 and appendix C.2; Goel, Gu, Donahue and Re (2022),
        arXiv:2202.09729, section 4.1, on the sign that makes A stable: with ``Q = P`` it is a contraction.
    """

    e: Tensor  # (D, N), complex
    a: Tensor  # (rank, D, N), complex
    b: Tensor  # (rank, D, N), complex
    B: Tensor  # (D, N), complex, Bbar

    @classmethod
    def of(cls, Lambda: Tensor, P: Tensor, B: Tensor, dt: Tensor) -> "DiscreteDPLR":
        """Discretise.

        Args:
            Lambda: ``(D, N)``, complex, with negative real part.
            P: ``(rank, D, N)``, complex.
            B: ``(D, N)``, complex.
            dt: ``(D,)``, positive.
        """
        dtype = reduce(torch.promote_types, (P.dtype, B.dtype, dt.dtype), Lambda.dtype)
        Lambda, P, B = Lambda.to(dtype), P.to(dtype), B.to(dtype)
        dt = dt.to(P.real.dtype)
        step = dt[:, None]
        R = 1 / (1 - step / 2 * Lambda)
        inner = 2 * torch.einsum("rdn,qdn->drq", P.conj(), R * P).real
        eye = torch.eye(len(P), dtype=dt.dtype, device=dt.device)
        S = 2 * torch.linalg.inv_ex(2 / dt[:, None, None] * eye + inner).inverse
        a, b = R * torch.einsum("drq,rdn->qdn", S.to(P.dtype), P), R.conj() * P
        return cls(step * Lambda * R, a, b, step * (R * B - _low_rank(a, b, B[None])[0] / 2))

    def step(self, u: Tensor, h: Tensor) -> Tensor:
        """The next states: ``u`` ``(B, D)``, ``h`` ``(B, D, N)``."""
        return h + (self.e * h - _low_rank(self.a, self.b, h) + self.B * u[..., None])

    def kernel(self, C: Tensor, length: int) -> Tensor:
        """``2 Re(C Abar^l Bbar)`` for ``l < length``, ``(D, length)``, with ``l = 2^level j + i``."""
        level, powers = max(0, length - 1).bit_length() // 2, self.powers()
        block = 1 << level
        inner = powers.orbit(as_real(self.B)[:, None], block)
        outer = powers.orbit(as_real(2 * C.conj())[:, None], -(-length // block), level, adjoint=True)
        return torch.bmm(outer, inner.mT).flatten(1)[:, :length]

    def powers(self) -> "Powers":
        """Abar as dense matrices on states of ``S = 2 N`` real numbers."""
        a, b = (as_real(m).transpose(0, 1) for m in (self.a, self.b))
        return Powers([(as_rotations(self.e) - 2 * a.mT @ b).mT])


class Powers:
    """``Abar^(2^level)`` for row vectors of real numbers, each made by squaring when it is first asked for.

    Args:
        changes: ``(Abar^(2^level) - I)^T`` for level = 0, 1, .., ``(D, S, S)`` each; at least the first.
    """

    def __init__(self, changes: list[Tensor]):
        self.changes = changes

    def change(self, level: int) -> Tensor:
        """``(Abar^(2^level) - I)^T``, ``(D, S, S)``; a square is ``(I + E)^2 - I = 2 E + E E``."""
        while len(self.changes) <= level:
            last = self.changes[-1]
            self.changes.append(torch.baddbmm(last, last, last, beta=2))
        return self.changes[level]

    def moved(self, v: Tensor, level: int, *, adjoint: bool = False) -> Tensor:
        """States ``(D, M, S)``, or with ``adjoint`` functionals of states, ``2^level`` steps on."""
        change = self.change(level)
        return torch.baddbmm(v, v, change.mT if adjoint else change)

    def orbit(self, v: Tensor, count: int, level: int = 0, *, adjoint: bool = False) -> Tensor:
        """``v`` moved by 0, 1, .. times ``2^level`` steps: ``(D, 1, S)`` -> ``(D, count, S)``."""
        while v.shape[1] < count:
            v, level = torch.cat([v, self.moved(v, level, adjoint=adjoint)], 1), level + 1
        return v[:, :count]


def _low_rank(a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    """``a b^* h`` of ``(B, D, N)``; h and b stand for themselves and their conjugates."""
    reached = 2 * (b.conj()[:, None] * h).sum(-1).real  # (rank, B, D)
    return (reached[..., None] * a[:, None]).sum(0)


def as_real(h: Tensor) -> Tensor:
    """Complex ``(..., N)`` -> real ``(..., S)``, S = 2 N, the parts of each number side by side."""
    return torch.view_as_real(h.resolve_conj()).flatten(-2)


def as_complex(v: Tensor) -> Tensor:
    """The inverse of :func:`as_real`."""
    return torch.view_as_complex(v.unflatten(-1, (-1, 2)).contiguous())


def as_rotations(z: Tensor) -> Tensor:
    """``(..., N)`` complex -> ``(..., S, S)`` real: ``as_rotations(z) @ as_real(h)`` is ``as_real(z * h)``."""
    turn = torch.stack([z.real, -z.imag, z.imag, z.real], -2).unflatten(-2, (2, 2))  # (..., 2, 2, N)
    n = z.dim() - 1
    return torch.diag_embed(turn).movedim((n, n + 1), (-3, -1)).flatten(-4, -3).flatten(-2)
