"""The states of a linear-Gaussian model given all observations: a filter, and a loop back over time."""

from typing import NamedTuple

import torch
from torch import Tensor

from dualform.core.linalg import matvec, symmetric_part
from dualform.ops.kalman_filter import KalmanFilter, check_record, filtered, taken
from dualform.ops.op import Op

_WHERE = "kalman_smoother"


class SmoothedMoments(NamedTuple):
    """What is known of each state given all observations; ``lag_one_cov[:, t]`` is of state t with the one before."""

    loglik: Tensor  # (B, T)
    mean: Tensor  # (B, T, N)
    cov: Tensor  # (B, T, N, N)
    lag_one_cov: Tensor  # (B, T, N, N)
    initial_mean: Tensor  # (B, N)
    initial_cov: Tensor  # (B, N, N)


def kalman_smoother(
    A: Tensor,
    c: Tensor,
    Q: Tensor,
    C: Tensor,
    R: Tensor,
    y: Tensor,
    seen: Tensor,
    mean: Tensor,
    cov: Tensor,
) -> SmoothedMoments:
    """The states of the model of :func:`~dualform.ops.kalman_filter.kalman_filter` given y_1 .. y_T.

    From the filter's moments, m and P after an observation and m' and P' before it, from the last step back:

        before    r' = C^T F^-1 v + L^T r,     N' = C^T F^-1 C + L^T N L,     L = I - K C
        mean      m + P r                      cov      P - P N P
        earlier   r = A^T r',                  N = A^T N' A
        lag one   (I - P' N') A P_earlier

    It inverts no covariance of states, so that Q may be singular. Kernels compute in float64 throughout. That of CPUs
    replaces ``P - P N P`` where that would lose three digits or more, as after a vague start, by sums of squares: its
    covariances are positive semi-definite but for the rounding of the result.

    Args:
        A: as in :func:`~dualform.ops.kalman_filter.kalman_filter`, and so are the others.
        c: ``(B, T, N)``.
        Q: ``(B, T, N, N)``.
        C: ``(B, T, M, N)``.
        R: ``(B, T, M, M)``.
        y: ``(B, T, M)``.
        seen: ``(B, T, M)``.
        mean: ``(B, N)``.
        cov: ``(B, N, N)``.

    Returns:
        ``loglik`` as the filter has it, and the moments of the states 1 .. T, and of the state before the first step.
        Where a ``loglik`` is NaN, the moments have no meaning: on a GPU also in a series in which ``P - P N P`` loses
        three digits.

    Raises:
        ArgumentError: for shapes, dtypes or devices that do not fit together.

    References:
        Bryson and Frazier (1963), "Smoothing for linear and nonlinear dynamic systems"; de Jong (1989), "Smoothing and
        interpolation with the state-space model"; Rauch, Tung and Striebel (1965), "Maximum likelihood estimates of
        linear dynamic systems", for the sums of squares.
    """
    return SmoothedMoments(*kalman_smoother_op(KalmanSmoother(*taken(_WHERE, A, c, Q, C, R, y, seen, mean, cov))))


class KalmanSmoother(NamedTuple):
    """The arguments of the operator, as in :func:`kalman_smoother`; all in one dtype, and covariances symmetric."""

    A: Tensor  # (B, T, N, N)
    c: Tensor  # (B, T, N)
    Q: Tensor  # (B, T, N, N)
    C: Tensor  # (B, T, M, N)
    R: Tensor  # (B, T, M, M)
    y: Tensor  # (B, T, M)
    seen: Tensor  # (B, T, M)
    mean: Tensor  # (B, N)
    cov: Tensor  # (B, N, N)


def _reference(a: KalmanSmoother) -> tuple[Tensor, ...]:
    if not a.y.shape[1]:
        return *_fake(a)[:4], a.mean.clone(), a.cov.clone()
    loglik, means, covs, predicted_means, predicted_covs, *_ = filtered(KalmanFilter(*a, True))
    r, N = torch.zeros_like(a.mean), torch.zeros_like(a.cov)
    eye_n, eye_m = (torch.eye(size, dtype=N.dtype, device=N.device) for size in (N.shape[-1], a.y.shape[-1]))
    mean, cov, found, lags = means[:, -1], covs[:, -1], [], []
    for t in range(a.y.shape[1] - 1, -1, -1):
        A, seen, P = a.A[:, t], a.seen[:, t].unsqueeze(-1), predicted_covs[:, t]
        C, R = torch.where(seen, a.C[:, t], 0), torch.where(seen & seen.mT, a.R[:, t], eye_m)
        v = torch.where(a.seen[:, t], a.y[:, t], 0) - matvec(C, predicted_means[:, t])
        root, _ = torch.linalg.cholesky_ex(symmetric_part(C @ P @ C.mT) + R)
        L = eye_n - torch.cholesky_solve(C @ P, root).mT @ C
        r = (C.mT @ torch.cholesky_solve(v.unsqueeze(-1), root)).squeeze(-1) + matvec(L.mT, r)
        N = symmetric_part(C.mT @ torch.cholesky_solve(C, root)) + symmetric_part(L.mT @ N @ L)
        found.append((mean, cov))
        m, before = (means[:, t - 1], covs[:, t - 1]) if t else (a.mean, a.cov)
        lags.append((eye_n - P @ N) @ A @ before)
        r, N = matvec(A.mT, r), symmetric_part(A.mT @ N @ A)
        mean, cov = m + matvec(before, r), before - symmetric_part(before @ N @ before)
    steps = (torch.stack(x[::-1], 1) for x in (*zip(*found, strict=True), lags))
    return loglik, *steps, mean, cov


def _fake(a: KalmanSmoother) -> list[Tensor]:
    rows, length, _ = a.y.shape
    n = a.mean.shape[-1]
    shapes = [(rows, length), (rows, length, n), (rows, length, n, n), (rows, length, n, n), (rows, n), (rows, n, n)]
    return [a.mean.new_empty(shape) for shape in shapes]


def _check(a: KalmanSmoother) -> None:
    check_record(_WHERE, a)


kalman_smoother_op = Op(_WHERE, KalmanSmoother, _reference, fake=_fake, check=_check, outputs=6, stepwise=True)


def has_kernel(a: KalmanSmoother) -> bool:
    """Whether a compiled loop over time would run an eager call, which it has no gradient of."""
    wanted = torch.is_grad_enabled() and any(m.requires_grad for m in a)
    return kalman_smoother_op.has_kernel(a, wanted)
