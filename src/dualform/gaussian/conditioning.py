"""A normal distribution with diffuse directions, given observations that are taken one number at a time.

The distribution is ``N(m, P + kappa Z Z^T)`` in the limit of infinite kappa. An observation ``y = z^T h + e`` with a
variance r has the innovation variance ``F = z^T P z + r`` and its diffuse part ``|w|^2`` with ``w = Z^T z``. The gain
is

    K = Z w / |w|^2    where w is not 0, and Z loses the direction w,
    K = P z / F        elsewhere,

and both cases update ``m + K (y - z^T m)`` and ``(I - K z^T) P (I - K z^T)^T + K r K^T``, which stays positive
semi-definite. For the first case this is the exact diffuse filter; Z Z^T is its ``P_inf``, kept as a factor so that its
rank falls by exactly one.

References:
    Durbin and Koopman (2012), "Time series analysis by state space methods", sections 5.2, 6.4 and 7.2.5.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dualform.core.linalg import matvec, symmetric_part


class Conditioned(NamedTuple):
    """The distribution after the observations, and the terms of their likelihood.

    ``log p(y) = -(distance + log_det + n log(2 pi)) / 2`` for n numbers, up to the convention for those that are
    ``resolved``, which determine a diffuse direction.
    """

    mean: Tensor  # (..., N, J)
    cov: Tensor  # (..., N, N)
    diffuse: Tensor  # (..., N, K)
    distance: Tensor  # (...), the sum of v^2 / F over the others, of the first column of y
    log_det: Tensor  # (...)
    resolved: Tensor  # (...), how many numbers determined a direction
    failed: Tensor  # (...), bool: a number had no variance


def condition(mean: Tensor, cov: Tensor, diffuse: Tensor, C: Tensor, R: Tensor, y: Tensor) -> Conditioned:
    """Condition on ``y = C h + e``, ``e ~ N(0, R)``, for J columns of y and of the mean at once.

    A number without any variance, up to rounding, is redundant: it changes nothing, and counts as ``failed``.

    Args:
        mean: ``(..., N, J)``.
        cov: P ``(..., N, N)``.
        diffuse: Z ``(..., N, K)``.
        C: ``(..., M, N)``.
        R: ``(..., M, M)``, may be singular.
        y: ``(..., M, J)``.
    """
    unit, variances = ldl(R)
    C = torch.linalg.solve_triangular(unit, C, upper=False, unitriangular=True)
    y = torch.linalg.solve_triangular(unit, y, upper=False, unitriangular=True)
    eps = torch.finfo(cov.dtype).eps
    largest = cov.detach().diagonal(dim1=-2, dim2=-1).abs()
    zero = torch.zeros((), dtype=cov.dtype, device=cov.device)
    distance = log_det = zero.expand(cov.shape[:-2])
    resolved, failed = torch.zeros_like(distance), torch.zeros_like(distance, dtype=torch.bool)
    for i in range(C.shape[-2]):
        z, r = C[..., i, :], variances[..., i]
        z = z.expand(cov.shape[:-1])
        Pz = matvec(cov, z)
        F = (z * Pz).sum(-1) + r
        usual = F.detach() > 64 * eps * ((z.square() * largest).sum(-1) + r).detach()
        safe = torch.where(usual, F, 1)
        gain = torch.where(usual[..., None], Pz / safe[..., None], 0)
        determines = torch.zeros_like(usual)
        if diffuse.shape[-1]:
            determines, toward, size, left = _determine(diffuse, z)
            gain = torch.where(determines[..., None], toward, gain)
            diffuse = torch.where(determines[..., None, None], left, diffuse)
            log_det = log_det + torch.where(determines, size.log(), 0)
            resolved = resolved + determines.to(resolved.dtype)
        usual = usual & ~determines
        v = y[..., i, :] - (z.unsqueeze(-2) @ mean).squeeze(-2)
        mean = mean + gain.unsqueeze(-1) * v.unsqueeze(-2)
        half = cov - gain.unsqueeze(-1) * Pz.unsqueeze(-2)
        cov = half - matvec(half, z).unsqueeze(-1) * gain.unsqueeze(-2)
        cov = symmetric_part(cov + r[..., None, None] * gain.unsqueeze(-1) * gain.unsqueeze(-2))
        distance = distance + torch.where(usual, v[..., 0].square() / safe, 0)
        log_det = log_det + torch.where(usual, safe.log(), 0)
        failed = failed | ~(usual | determines)
        largest = torch.maximum(largest, cov.detach().diagonal(dim1=-2, dim2=-1).abs())
    return Conditioned(mean, cov, diffuse, distance, log_det, resolved, failed)


def _determine(Z: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Whether z sees a diffuse direction; then the gain, ``|w|^2``, and Z without that direction.

    The Householder reflection of w onto its greatest coordinate turns Z so that one column is the direction; it is set
    to zero exactly.
    """
    w = matvec(Z.mT, z)
    size, scale = w.square().sum(-1), z.square().sum(-1) * Z.square().sum((-2, -1))
    determines = size.detach() > torch.finfo(Z.dtype).eps * scale.detach()
    place = torch.nn.functional.one_hot(w.detach().abs().argmax(-1), Z.shape[-1]).to(Z.dtype)
    w = torch.where(determines[..., None], w, place)
    size = w.square().sum(-1)
    sign = torch.where((w * place).sum(-1) < 0, -1.0, 1.0).to(Z.dtype)
    u = w + (sign * size.sqrt())[..., None] * place
    turned = Z - (2 / u.square().sum(-1))[..., None, None] * matvec(Z, u).unsqueeze(-1) * u.unsqueeze(-2)
    return determines, matvec(Z, w) / size[..., None], size, turned * (1 - place).unsqueeze(-2)


def ldl(R: Tensor) -> tuple[Tensor, Tensor]:
    """``R = L diag(r) L^T`` of a covariance ``(..., M, M)``, maybe singular: L with ones on its diagonal, and r."""
    size, columns, pivots = R.shape[-1], [], []
    eps = torch.finfo(R.dtype).eps
    least = size * eps * R.detach().diagonal(dim1=-2, dim2=-1)
    eye = torch.eye(size, dtype=R.dtype, device=R.device)
    for j in range(size):
        pivot = R[..., j, j]
        regular = pivot.detach() > least[..., j]
        below = torch.where(
            regular[..., None], R[..., j] / torch.where(regular, pivot, 1)[..., None] * (eye[j].cumsum(0) - eye[j]), 0
        )
        column = below + eye[j]
        pivot = torch.where(regular, pivot, 0)
        R = R - pivot[..., None, None] * column.unsqueeze(-1) * column.unsqueeze(-2)
        columns.append(column)
        pivots.append(pivot)
    if not size:
        return R, R[..., 0]
    return torch.stack(columns, -1), torch.stack(pivots, -1)
