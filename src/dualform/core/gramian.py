"""Gramians of stable linear systems and the balanced coordinates they define, on plain matrices.

Factors F, with Gramian ``F F^*``, are computed directly: the Gramian itself would lose half of the digits of its small
eigenvalues, which are what model reduction is about.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError


class Balanced(NamedTuple):
    """Coordinates ``h = right z``, ``z = left h``, in which both Gramians are diagonal, with the Hankel values.

    States that are not both controllable and observable, to rounding, have no coordinate: rank counts the others.
    """

    left: Tensor  # (rank, N)
    right: Tensor  # (N, rank)
    hankel: Tensor  # (N,), Hankel singular values, greatest first


def gramian_factor(where: str, A: Tensor, B: Tensor, *, continuous: bool) -> Tensor:
    """F ``(N, <= N)`` of the controllability Gramian ``F F^*``; with ``A^*`` and ``C^*`` that of observability.

        continuous   A P + P A^* + B B^* = 0,   P = int_0^inf exp(A t) B B^* exp(A^* t) dt
        discrete     P = A P A^* + B B^*,       P = sum_k A^k B B^* (A^*)^k

    A continuous system has the Gramian of the discrete system that Cayley's transform makes of it. The discrete sum
    is doubled until the rest is below rounding, with a QR factorisation after each doubling.

    Raises:
        ArgumentError: for an unstable system, whose Gramian does not exist.

    References:
        Smith (1968), "Matrix equation XA + BX = C"; Antoulas (2005), "Approximation of large-scale dynamical
        systems", sections 4.3 and 6.4.
    """
    check_stable(where, A, continuous=continuous)
    if continuous:
        scale = torch.linalg.eigvals(A.detach()).abs().log().mean().exp()  # the geometric mean of the rates
        eye = torch.eye(len(A), dtype=A.dtype, device=A.device)
        solved = torch.linalg.solve(scale * eye - A, torch.cat([scale * eye + A, math.sqrt(2) * scale.sqrt() * B], -1))
        A, B = solved[:, : len(A)], solved[:, len(A) :]
    factor, power = B, A
    for _ in range(64):
        more = power @ factor
        factor = torch.linalg.qr(torch.cat([factor, more], -1).mH, mode="r")[1].mH
        if float(more.norm()) <= torch.finfo(A.dtype).eps * float(factor.norm()):
            return factor
        power = power @ power
    raise ArgumentError(f"{where}: the system is too close to instability for a Gramian: its sum does not converge")


def balance(where: str, A: Tensor, B: Tensor, C: Tensor, *, continuous: bool) -> Balanced:
    """The square root method, ``left`` and ``right`` from the SVD of ``G^* F`` for the two Gramian factors.

    Raises:
        ArgumentError: for an unstable system.

    References:
        Laub, Heath, Paige and Ward (1987), "Computation of system balancing transformations and other applications
        of simultaneous diagonalization algorithms", section III.
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
