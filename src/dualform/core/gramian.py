"""Gramians of stable linear systems and the balanced coordinates they define, on plain matrices.

Model reduction works on factors F of the Gramian ``F F^*``. In the Gramian itself, half of the digits of its small
eigenvalues would be lost, and these decide which states may be dropped.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.linalg import symmetric_part

_DOUBLINGS = 64


class Balanced(NamedTuple):
    """Coordinates ``h = right z``, ``z = left h``, in which both Gramians are the same diagonal matrix.

    The rank is the number of states that are both controllable and observable, up to rounding; z leaves out the others.
    """

    left: Tensor  # (rank, N)
    right: Tensor  # (N, rank)
    hankel: Tensor  # (N,), Hankel singular values, greatest first


def gramian(where: str, A: Tensor, B: Tensor, *, continuous: bool) -> Tensor:
    """The controllability Gramian P ``(N, N)``; with ``A^*`` and ``C^*`` that of observability. Differentiable.

        continuous   A P + P A^* + B B^* = 0,   P = int_0^inf exp(A t) B B^* exp(A^* t) dt
        discrete     P = A P A^* + B B^*,       P = sum_k A^k B B^* (A^*)^k

    The number of terms in the discrete sum is doubled until the rest is below rounding. A continuous system has the
    same Gramian as its Cayley transform, a discrete system.

    Raises:
        ArgumentError: for an unstable system, whose Gramian does not exist.

    References:
        Smith (1968), "Matrix equation XA + BX = C"; Antoulas (2005), "Approximation of large-scale dynamical
        systems", chapters 4 and 6.
    """
    power, B = _stable_discrete(where, A, B, continuous)
    total = B @ B.mH
    for _ in range(_DOUBLINGS):
        more = power @ total @ power.mH
        total = total + more
        if _small(more, total):
            return symmetric_part(total) if not total.is_complex() else (total + total.mH) / 2
        power = power @ power
    raise _too_slow(where)


def gramian_factor(where: str, A: Tensor, B: Tensor, *, continuous: bool) -> Tensor:
    """F ``(N, <= N)`` with ``F F^*`` the Gramian of :func:`gramian`.

    The same sum, with a QR factorisation after each doubling.

    Raises:
        ArgumentError: for an unstable system.
    """
    power, factor = _stable_discrete(where, A, B, continuous)
    for _ in range(_DOUBLINGS):
        more = power @ factor
        factor = torch.linalg.qr(torch.cat([factor, more], -1).mH, mode="r")[1].mH
        if _small(more, factor):
            return factor
        power = power @ power
    raise _too_slow(where)


def balance(where: str, A: Tensor, B: Tensor, C: Tensor, *, continuous: bool) -> Balanced:
    """The square root method, ``left`` and ``right`` from the SVD of ``G^* F`` for the two Gramian factors.

    Raises:
        ArgumentError: for an unstable system.

    References:
        Laub, Heath, Paige and Ward (1987), "Computation of system balancing transformations and other applications
        of simultaneous diagonalization algorithms".
    """
    controllability = gramian_factor(where, A, B, continuous=continuous)
    observability = gramian_factor(where, A.mH, C.mH, continuous=continuous)
    U, hankel, Vh = torch.linalg.svd(observability.mH @ controllability, full_matrices=False)
    floor = len(A) * torch.finfo(hankel.dtype).eps * hankel[:1]
    rank = int((hankel > floor).sum())
    root = hankel[:rank].sqrt()
    hankel = torch.nn.functional.pad(hankel, (0, len(A) - len(hankel)))
    return Balanced((observability @ (U[:, :rank] / root)).mH, controllability @ (Vh[:rank].mH / root), hankel)


def check_stable(where: str, A: Tensor, *, continuous: bool) -> None:
    """Every pole in the open left half plane, or in the open unit disc.

    Raises:
        ArgumentError: names the worst pole.
    """
    poles = torch.linalg.eigvals(A.detach())
    margin = poles.real if continuous else poles.abs() - 1
    if len(poles) and float(margin.max()) >= 0:
        worst = complex(poles[margin.argmax()])
        region = "the open left half plane" if continuous else "the open unit disc"
        raise ArgumentError(f"{where}: the system is not stable: the pole {worst:.4g} is not in {region}")


def _stable_discrete(where: str, A: Tensor, B: Tensor, continuous: bool) -> tuple[Tensor, Tensor]:
    """The discrete system with the same Gramian."""
    check_stable(where, A, continuous=continuous)
    if not continuous:
        return A, B
    scale = torch.linalg.eigvals(A.detach()).abs().log().mean().exp()  # the geometric mean of the rates
    eye = scale * torch.eye(len(A), dtype=A.dtype, device=A.device)
    return torch.linalg.solve(eye - A, torch.cat([eye + A, (2 * scale).sqrt() * B], -1)).split([len(A), B.shape[1]], -1)


def _small(more: Tensor, total: Tensor) -> bool:
    return float(more.detach().norm()) <= torch.finfo(total.dtype).eps * float(total.detach().norm())


def _too_slow(where: str) -> ArgumentError:
    return ArgumentError(f"{where}: the system is too close to instability for its Gramian to be summed")
