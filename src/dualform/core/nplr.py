"""HiPPO matrices as normal plus low rank, rotated to diagonal plus low rank; and the diagonal systems of S4D.

The normal part of every measure here is a multiple of the identity plus a skew-symmetric matrix, so a unitary matrix
diagonalises it, and its eigenvalues come in conjugate pairs. One of each pair is kept throughout, the one with
positive imaginary part, smallest first; the other half is its conjugate.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.hippo import legs_diagonal, transition


class NPLR(NamedTuple):
    """The HiPPO system ``(A, B)`` in the coordinates that make its normal part diagonal.

        A = Vf (diag(Lf) - sum_r Pf_r Pf_r^*) Vf^*,   B = Vf Bf,   Xf = X and its conjugate, side by side

    Vf is unitary. S4 runs on ``Lambda``, ``P`` and ``B`` alone; V takes its state back to the HiPPO coefficients.
    """

    Lambda: Tensor  # (N/2,) complex128
    P: Tensor  # (rank, N/2)
    B: Tensor  # (N/2,), real and not negative: that fixes the phases of V
    V: Tensor  # (N, N/2)


def low_rank(measure: str, n: int) -> Tensor:
    """The real rows ``P`` ``(rank, N)`` that make ``A + P^T P`` of a measure normal, float64.

    The rank is 1 for LegS, the Laguerre family and the truncated Fourier measures, 2 for LegT, and 0 for the
    measures that are normal already.

    Raises:
        ArgumentError: for a measure without such a form, listing those that have one.

    References:
        Gu, Goel and Re (2022), "Efficiently modeling long sequences with structured state spaces",
        arXiv:2111.00396, Theorem 1 and appendix C.1.
    """
    if measure not in LOW_RANK:
        raise ArgumentError(
            f"low_rank: measure {measure!r} has no normal-plus-low-rank form here", hint=f"one of {', '.join(LOW_RANK)}"
        )
    return LOW_RANK[measure](n, transition(measure, n)[1])


def nplr(measure: str, n: int) -> NPLR:
    """The normal-plus-low-rank form of a HiPPO measure, in complex128.

    Args:
        measure: a key of :data:`LOW_RANK`.
        n: state size, even.

    Raises:
        ArgumentError: for a measure without such a form, listing those that have one, or an odd size.

    References:
        arXiv:2111.00396, Theorem 1, where it is written ``V Lambda V^* - P Q^T``; with ``Q = P`` the form is stable
        for any P, Goel, Gu, Donahue and Re (2022), "It's raw! Audio generation with state-space models",
        arXiv:2202.09729.
    """
    with torch.device("cpu"):  # a model that is built on the meta device has shapes only, and eigenvalues need values
        P = low_rank(measure, n)
        A, B = transition(measure, n)
        Lambda, V = skew_pairs(A + P.mT @ P)
        rotated = V.mH @ B.to(V.dtype)
        size = rotated.abs()
        phase = torch.where(size > 1e-12 * size.max(), rotated / size, torch.ones_like(rotated))
        V = V * phase
        form = Lambda, P.to(V.dtype) @ V.conj(), size.to(V.dtype), V
    return NPLR(*(matrix.to(torch.get_default_device()) for matrix in form))


def skew_pairs(normal: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``(N/2,)`` and vectors ``(N, N/2)``, one of each pair, of ``c I`` plus a skew-symmetric matrix.

    The vectors and their conjugates together are orthonormal, for eigenvalues equal to c too.

    Raises:
        ArgumentError: for an odd size, whose eigenvalues do not all have a partner.
    """
    n = normal.shape[-1]
    if n % 2:
        raise ArgumentError(f"skew_pairs: the state size is {n}, expected an even number: eigenvalues come in pairs")
    skew = ((normal - normal.mT) / 2).to(torch.complex128)
    imaginary, vectors = torch.linalg.eigh(-1j * skew)
    tiny = 1e-13 * n * max(float(imaginary.abs().max()), 1.0)
    null = vectors[:, imaginary.abs() <= tiny]
    positive = vectors[:, imaginary > tiny]
    if zeros := null.shape[1]:
        # The null space of a real matrix has a real basis; two of its vectors make up one complex vector of a pair.
        basis = torch.linalg.svd(torch.cat([null.real, null.imag], 1))[0][:, :zeros]
        positive = torch.cat([torch.complex(basis[:, 0::2], basis[:, 1::2]) / math.sqrt(2), positive], 1)
    values = imaginary[n // 2 :].clamp_min(0)
    return torch.complex(normal.diagonal().mean().to(torch.float64).expand_as(values), values), positive


def diagonal(init: str, n: int) -> Tensor:
    """The poles that a diagonal system of state size N starts from, ``(N // 2,)`` complex128.

    With ``k = 0 .. N/2 - 1``; for all but ``real`` the conjugates are meant as well.

        legs   the normal part of HiPPO-LegS, see :func:`dualform.core.hippo.legs_diagonal`
        lin    -1/2 + i pi k
        inv    -1/2 + i (N / pi) (N / (2k + 1) - 1)
        inv2   -1/2 + i (N / pi) (N / (k + 1) - 1)
        quad   -1/2 + i (2k + 1)^2 / pi
        real   -(k + 1)

    Args:
        init: a key of :data:`DIAGONALS`.
        n: state size, even.

    Raises:
        ArgumentError: for an unknown init, listing those that exist, or a size that is odd or below 2.

    References:
        Gu, Goel, Gupta and Re (2022), "On the parameterization and initialization of diagonal state space models",
        arXiv:2206.11893, section 4: equations (8), S4D-Inv, and (9), S4D-Lin; ``inv2`` and ``quad`` are those of the
        ablations and of the reference implementation of S4.
    """
    if init not in DIAGONALS:
        raise ArgumentError(f"diagonal: init {init!r} is unknown", hint=f"one of {', '.join(DIAGONALS)}")
    if n < 2 or n % 2:
        raise ArgumentError(f"diagonal: the state size is {n}, expected an even number: poles come in pairs")
    return DIAGONALS[init](n)


def _laguerre_rank(n: int, _: Tensor) -> Tensor:
    return torch.full((1, n), math.sqrt(0.5), dtype=torch.float64)


def _legendre_window_rank(n: int, B: Tensor) -> Tensor:
    """The even and the odd degrees apart: ``A_nk`` is antisymmetric where their parity differs."""
    odd = torch.arange(n) % 2
    return torch.stack([B * odd, B * (1 - odd)]) * math.sqrt(2)


def _no_rank(n: int, B: Tensor) -> Tensor:
    return B.new_zeros(0, n)


LOW_RANK: dict[str, Callable[[int, Tensor], Tensor]] = {
    "legs": lambda n, B: B[None] * math.sqrt(0.5),
    "legsd": _no_rank,
    "legt": _legendre_window_rank,
    "lagt": _laguerre_rank,
    "tlagt": _laguerre_rank,
    "glagt": _laguerre_rank,
    "fout": lambda n, B: B[None],
    "fourier2": lambda n, B: B[None] * math.sqrt(0.5),
    "fourier_decay": lambda n, B: B[None] * math.sqrt(2),
    "foud": _no_rank,
}


def _poles(imaginary: Callable[[int, Tensor], Tensor]) -> Callable[[int], Tensor]:
    def poles(n: int) -> Tensor:
        values = imaginary(n, torch.arange(n // 2, dtype=torch.float64))
        return torch.complex(torch.full_like(values, -0.5), values)

    return poles


DIAGONALS: dict[str, Callable[[int], Tensor]] = {
    "legs": legs_diagonal,
    "lin": _poles(lambda n, k: math.pi * k),
    "inv": _poles(lambda n, k: n / math.pi * (n / (2 * k + 1) - 1)),
    "inv2": _poles(lambda n, k: n / math.pi * (n / (k + 1) - 1)),
    "quad": _poles(lambda n, k: (2 * k + 1).square() / math.pi),
    "real": lambda n: -(torch.arange(n // 2, dtype=torch.float64) + 1).to(torch.complex128),
}
