"""What is scanned: the elements of :func:`dualform.core.scan.associative_scan` and how two of them combine."""

from typing import NamedTuple

import torch
from torch import Tensor

from dualform.core.linalg import matvec, symmetric_part


class Affine(NamedTuple):
    """The map ``h -> a h + b``, elementwise."""

    a: Tensor
    b: Tensor


def combine_affine(earlier: Affine, later: Affine) -> Affine:
    """First ``earlier``, then ``later``: ``h -> a_l (a_e h + b_e) + b_l``."""
    return Affine(later.a * earlier.a, later.a * earlier.b + later.b)


class GaussianElement(NamedTuple):
    """What observations between two times say about the states at both ends.

    With ``h`` the early state, ``p(h_late | y, h) = N(A h + b, C)`` and ``p(y | h) ~ exp(eta^T h - h^T J h / 2)``.
    A known distribution ``N(m, P)`` of the late state is the element ``(0, m, P, 0, 0)``; it forgets what was before.
    """

    A: Tensor  # (..., N, N)
    b: Tensor  # (..., N)
    C: Tensor  # (..., N, N), symmetric
    eta: Tensor  # (..., N)
    J: Tensor  # (..., N, N), symmetric


def known_state(mean: Tensor, cov: Tensor) -> GaussianElement:
    """The element of a state whose distribution ``N(mean, cov)`` is known."""
    zero = torch.zeros_like(cov)
    return GaussianElement(zero, mean, cov, zero[..., 0], zero)


def combine_gaussian(earlier: GaussianElement, later: GaussianElement) -> GaussianElement:
    """The element over both spans, by one solve with ``I + C_e J_l``, which is invertible for any C and J.

    References:
        Sarkka and Garcia-Fernandez (2021), "Temporal parallelization of Bayesian smoothers", arXiv:1905.13002,
        section IV, the operator of the linear Gaussian filter.
    """
    n = earlier.b.shape[-1]
    eye = torch.eye(n, dtype=earlier.b.dtype, device=earlier.b.device)
    middle = (earlier.b + matvec(earlier.C, later.eta)).unsqueeze(-1)
    right = torch.cat([earlier.A.expand_as(later.A), earlier.C.expand_as(later.C), middle], -1)
    solved, _ = torch.linalg.solve_ex(eye + earlier.C @ later.J, right)
    A, C, b = solved[..., :n], solved[..., n : 2 * n], solved[..., 2 * n]
    return GaussianElement(
        later.A @ A,
        matvec(later.A, b) + later.b,
        symmetric_part(later.A @ C @ later.A.mT) + later.C,
        matvec(A.mT, later.eta - matvec(later.J, earlier.b)) + earlier.eta,
        symmetric_part(A.mT @ later.J @ earlier.A) + earlier.J,
    )


@torch.no_grad()
def sharpened(J: Tensor, P: Tensor) -> Tensor:
    """Where J ``(B, T, N, N)`` outweighs what the filter ever knows by more than ``eps^-1/2``, ``(B, T)``.

    Observations have so little noise there that a state can be computed from them and the one before it, and errors
    grow from step to step; a moving average that is not invertible is the usual case. A vague start is none: P is the
    least of all.
    """
    J, P = (z.diagonal(dim1=-2, dim2=-1) for z in (J, P))  # one product per state, so that units do not matter
    return ~(J * P.amin(1, keepdim=True) <= torch.finfo(J.dtype).eps ** -0.5).all(-1)
