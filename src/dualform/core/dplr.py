"""The discrete system of S4: a state matrix that is diagonal plus low rank, under the bilinear rule."""

import torch
from torch import Tensor


class DPLR:
    """``h_t = Abar h_{t-1} + Bbar u_t`` per channel, discretised by the bilinear rule.

        Abar = (I - dt/2 A)^-1 (I + dt/2 A),   Bbar = (I - dt/2 A)^-1 dt B,   A = diag(Lambda) - sum_r P_r P_r^*

    where Lambda, P and B stand for themselves and their conjugates. By Woodbury's identity Abar is the identity plus
    a diagonal plus a matrix of low rank again,

        Abar - I = diag(e) - a S b^*,   R = (I - dt/2 Lambda)^-1,   e = dt Lambda R,   a = R P,   b = R^* P,
                                        S = 2 (2 / dt + P^* R P)^-1

    so that a step costs ``O(N)``. Everything here works with ``Abar - I``, whose rounding errors are relative to the
    step size: of the powers of a rounded Abar they would grow with time.

    Args:
        Lambda: ``(D, N)``, complex, with negative real part.
        P: ``(rank, D, N)``, complex.
        B: ``(D, N)``, complex.
        dt: ``(D,)``, positive.

    References:
        Gu, Goel and Re (2022), arXiv:2111.00396, section 3 and appendix C.2; Goel, Gu, Donahue and Re (2022),
        arXiv:2202.09729, section 4.1, on the sign that makes A stable: with ``Q = P`` it is a contraction.
    """

    def __init__(self, Lambda: Tensor, P: Tensor, B: Tensor, dt: Tensor):
        step = dt[:, None]
        R = 1 / (1 - step / 2 * Lambda)
        self.e, self.a, self.b = step * Lambda * R, R * P, R.conj() * P
        inner = 2 * torch.einsum("rdn,qdn->drq", P.conj(), self.a).real
        eye = torch.eye(len(P), dtype=dt.dtype, device=dt.device)
        self.S = 2 * torch.linalg.inv_ex(2 / dt[:, None, None] * eye + inner).inverse
        self.B = step * (R * B - self._low_rank(B[None])[0] / 2)
        self._changes: list[Tensor] = []

    def step(self, u: Tensor, h: Tensor) -> Tensor:
        """The next states: ``u`` ``(B, D)``, ``h`` ``(B, D, N)``."""
        return h + (self.e * h - self._low_rank(h) + self.B * u[..., None])

    def kernel(self, C: Tensor, length: int) -> Tensor:
        """``2 Re(C Abar^l Bbar)`` for ``l < length``, ``(D, length)``, in two levels of powers."""
        level = max(0, length - 1).bit_length() // 2
        block = 1 << level
        inner = self.orbit(as_real(self.B)[:, None], block)
        outer = self.orbit(as_real(2 * C.conj())[:, None], -(-length // block), level, adjoint=True)
        return torch.bmm(outer, inner.mT).flatten(1)[:, :length]

    def change(self, level: int) -> Tensor:
        """``Abar^(2^level) - I`` for row vectors, ``(D, S, S)``, by squaring: ``(I + E)^2 - I = 2 E + E E``."""
        if not self._changes:
            self._changes.append(self._dense())
        while len(self._changes) <= level:
            last = self._changes[-1]
            self._changes.append(torch.baddbmm(last, last, last, beta=2))
        return self._changes[level]

    def moved(self, v: Tensor, level: int, *, adjoint: bool = False) -> Tensor:
        """States ``(D, M, S)``, or functionals of them, ``2^level`` steps on."""
        change = self.change(level)
        return torch.baddbmm(v, v, change.mT if adjoint else change)

    def orbit(self, v: Tensor, count: int, level: int = 0, *, adjoint: bool = False) -> Tensor:
        """``v``, ``v`` moved by ``2^level`` steps, by twice as many, ..: ``(D, 1, S)`` -> ``(D, count, S)``."""
        while v.shape[1] < count:
            v, level = torch.cat([v, self.moved(v, level, adjoint=adjoint)], 1), level + 1
        return v[:, :count]

    def _low_rank(self, h: Tensor) -> Tensor:
        """``a S b^* h`` of ``(B, D, N)``."""
        reached = 2 * torch.einsum("rdn,bdn->bdr", self.b.conj(), h).real
        weights = torch.einsum("drq,bdq->bdr", self.S, reached)
        return torch.einsum("bdr,rdn->bdn", weights.to(h.dtype), self.a)

    def _dense(self) -> Tensor:
        """``(Abar - I)^T`` on states as S = 2 N real numbers."""
        (width, n), e = self.e.shape, self.e
        turn = torch.stack([e.real, e.imag, -e.imag, e.real], 1).view(width, 2, 2, n)
        diagonal = torch.diag_embed(turn).permute(0, 3, 1, 4, 2).reshape(width, 2 * n, 2 * n)
        a, b = (as_real(m).transpose(0, 1) for m in (self.a, self.b))
        return diagonal - 2 * b.mT @ self.S.mT @ a


def as_real(h: Tensor) -> Tensor:
    """Complex ``(..., N)`` -> real ``(..., S)``, S = 2 N, the parts of each number side by side."""
    return torch.view_as_real(h).flatten(-2)


def as_complex(v: Tensor) -> Tensor:
    """The inverse of :func:`as_real`."""
    return torch.view_as_complex(v.unflatten(-1, (-1, 2)))
