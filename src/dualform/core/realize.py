"""One system in other coordinates: diagonal, diagonal plus low rank, companion. The response stays the same.

All of them work on continuous and on discrete systems alike. Of each conjugate pair only the member with positive
imaginary part is kept, and the output is ``y = 2 Re(C h) + D u``, as in S4, S4D and S5.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.linalg import orbit
from dualform.core.nplr import skew_pairs
from dualform.core.system import StateSpace


class Diagonal(NamedTuple):
    """A real system in its modes: ``h' = Lambda h + B u``, or its discrete form, and ``y = 2 Re(C h) + D u``.

    One mode stands for a conjugate pair; a real pole is one mode too, with half of its C.
    """

    Lambda: Tensor  # (modes,) complex, by imaginary part, smallest first: real poles come first
    B: Tensor  # (modes, inputs)
    C: Tensor  # (outputs, modes)
    D: Tensor  # (outputs, inputs), real
    dt: float | Tensor | None = None

    def dense(self) -> StateSpace:
        """The real system: a real pole is a state, a pair ``a +- i b`` the block ``[[a, -b], [b, a]]``."""
        single = self.Lambda.imag == 0
        rate, turn = torch.diag(self.Lambda.real), torch.diag(self.Lambda.imag)
        keep = torch.cat([torch.ones_like(single), ~single])
        return StateSpace(
            torch.cat([torch.cat([rate, -turn], 1), torch.cat([turn, rate], 1)])[keep][:, keep],
            torch.cat([self.B.real, self.B.imag])[keep],
            2 * torch.cat([self.C.real, -self.C.imag], 1)[:, keep],
            self.D,
            self.dt,
        )


class DPLR(NamedTuple):
    """A real system of even size in the form of S4: ``A = diag(Lambda) - sum_r P_r P_r^*`` and ``y = 2 Re(C h) + D u``.

    In A, Lambda and P stand for themselves and their conjugates: ``P^*`` couples h and its conjugate.
    """

    Lambda: Tensor  # (N/2,) complex
    P: Tensor  # (rank, N/2)
    B: Tensor  # (N/2, inputs)
    C: Tensor  # (outputs, N/2)
    D: Tensor  # (outputs, inputs), real
    dt: float | Tensor | None = None

    def dense(self) -> StateSpace:
        """The real system in the orthonormal coordinates ``sqrt(2) (Re h, Im h)``."""
        rate, turn = torch.diag(self.Lambda.real), torch.diag(self.Lambda.imag)
        P = math.sqrt(2) * torch.cat([self.P.real, self.P.imag], 1)
        return StateSpace(
            torch.cat([torch.cat([rate, -turn], 1), torch.cat([turn, rate], 1)]) - P.mT @ P,
            math.sqrt(2) * torch.cat([self.B.real, self.B.imag]),
            math.sqrt(2) * torch.cat([self.C.real, -self.C.imag], 1),
            self.D,
            self.dt,
        )


def to_diagonal(system: StateSpace) -> Diagonal:
    """The modes of a real system, by the eigenvectors of A.

    Raises:
        ArgumentError: for a complex system, or an A whose eigenvectors have a condition number above ``eps^-1/2``, as
            those of HiPPO-LegS have from N = 12 on.
    """
    _need_real("to_diagonal", system)
    poles, V = torch.linalg.eig(system.A)
    condition = float(torch.linalg.cond(V.detach()))
    if not condition < torch.finfo(system.A.dtype).eps ** -0.5:
        raise ArgumentError(
            f"to_diagonal: A is not diagonalisable to working precision: the condition of its eigenvectors is "
            f"{condition:.1g}",
            hint="to_dplr() is accurate for every A; in float64 the condition may be greater",
        )
    B = torch.linalg.solve(V, system.B.to(V.dtype))
    C = system.C.to(V.dtype) @ V
    half = (poles.imag >= 0).nonzero()[:, 0]
    half = half[torch.argsort(poles.imag[half], stable=True)]
    poles, B, C = poles[half], B[half], C[:, half]
    return Diagonal(poles, B, torch.where(poles.imag == 0, C / 2, C), system.D, system.dt)


def to_dplr(system: StateSpace) -> DPLR:
    """A as normal plus low rank, rotated by a unitary matrix to diagonal plus low rank: accurate for every real A.

    ``(A + A^T) / 2 = c I - P^T P`` with c its greatest eigenvalue, so that ``A + P^T P`` is ``c I`` plus a
    skew-symmetric matrix. The rank of P follows from A: 1 for HiPPO-LegS, 2 for LegT, up to N - 1 in general.

    Raises:
        ArgumentError: for a complex system, or one of odd size.

    References:
        Gu, Goel and Re (2022), "Efficiently modeling long sequences with structured state spaces",
        arXiv:2111.00396, Theorem 1.
    """
    _need_real("to_dplr", system)
    n = len(system.A)
    if n % 2:
        raise ArgumentError(f"to_dplr: the state size is {n}, expected an even number: eigenvalues come in pairs")
    A = system.A.to(torch.float64)
    values, vectors = torch.linalg.eigh((A + A.mT) / 2)
    below = values[-1] - values
    rows = below > n * torch.finfo(system.A.dtype).eps * values.abs().max()
    P = (below[rows].sqrt() * vectors[:, rows]).mT
    Lambda, V = skew_pairs(A + P.mT @ P)
    P, B, C = P.to(V.dtype) @ V.conj(), V.mH @ system.B.to(V.dtype), system.C.to(V.dtype) @ V
    narrow = torch.promote_types(system.A.dtype, torch.complex64)
    return DPLR(Lambda.to(narrow), P.to(narrow), B.to(narrow), C.to(narrow), system.D, system.dt)


def to_companion(system: StateSpace) -> StateSpace:
    """The controllability form of a system of one input: A is a companion matrix, and B the first unit vector.

        A = [[0, .., 0, -a_0], [1, .., 0, -a_1], .., [0, .., 1, -a_{N-1}]],   C = [C B, C A B, .., C A^(N-1) B]

    with ``z^N + a_{N-1} z^(N-1) + .. + a_0`` the characteristic polynomial of A. The coefficients are ill-conditioned
    functions of the poles: a form for theory, for shift-like systems, and for N up to about 20.

    Raises:
        ArgumentError: for a system of several inputs.

    References:
        Kailath (1980), "Linear systems", section 2.3; the parametrisation of Zhang et al. (2023), "Effectively
        modeling time series with simple discrete state spaces", arXiv:2303.09489.
    """
    n, inputs = system.B.shape
    if inputs != 1:
        raise ArgumentError(
            f"to_companion: the system has {inputs} inputs, expected 1",
            hint="take one input at a time, as in StateSpace(A, B[:, :1], C, D[:, :1], dt)",
        )
    wide = torch.complex128
    polynomial = torch.ones(1, dtype=wide, device=system.A.device)
    for pole in torch.linalg.eigvals(system.A.to(wide)):
        polynomial = torch.nn.functional.pad(polynomial, (1, 0)) - pole * torch.nn.functional.pad(polynomial, (0, 1))
    coefficients = polynomial[:-1] if system.A.is_complex() else polynomial[:-1].real
    A = torch.diag(torch.ones(n - 1, dtype=system.A.dtype, device=system.A.device), -1)
    A = torch.cat([A[:, :-1], -coefficients.to(A.dtype)[:, None]], 1)
    C = (system.C @ orbit(system.A, system.B, n))[..., 0].mT
    return StateSpace(A, torch.eye(n, 1, dtype=A.dtype, device=A.device), C, system.D, system.dt)


def _need_real(where: str, system: StateSpace) -> None:
    if system.A.is_complex():
        raise ArgumentError(f"{where}: the system is complex, expected a real one, whose poles come in pairs")
