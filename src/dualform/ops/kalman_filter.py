"""The Kalman filter, a step after the other."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.linalg import matvec, symmetric_part
from dualform.core.shapes import check_real, check_tensors, once_per_shape, wide
from dualform.ops.op import Op
from dualform.ops.state import check_dtype

_WHERE = "kalman_filter"


class Moments(NamedTuple):
    """What the filter finds at each step; without moments, those have no steps."""

    loglik: Tensor  # (B, T)
    mean: Tensor  # (B, T, N)
    cov: Tensor  # (B, T, N, N)
    predicted_mean: Tensor  # (B, T, N)
    predicted_cov: Tensor  # (B, T, N, N)
    last_mean: Tensor  # (B, N)
    last_cov: Tensor  # (B, N, N)


def kalman_filter(
    A: Tensor,
    c: Tensor,
    Q: Tensor,
    C: Tensor,
    R: Tensor,
    y: Tensor,
    seen: Tensor,
    mean: Tensor,
    cov: Tensor,
    *,
    moments: bool = True,
) -> Moments:
    """Filter ``h_t = A h_{t-1} + c + q``, ``y_t = C h_t + r`` with ``q ~ N(0, Q)`` and ``r ~ N(0, R)``.

        predict   m = A m + c,            P = A P A^T + Q
        update    F = C P C^T + R,        K = P C^T F^-1
                  m = m + K (y - C m),    P = (I - K C) P (I - K C)^T + K R K^T     (Joseph)
                  log p = -(v^T F^-1 v + log |F| + M log(2 pi)) / 2,   v = y - C m

    What is constant in time, or the same in all rows, may be an expanded view, which is not copied. Everything is
    computed in float32, or in float64 where an argument is; of Q, R and cov the symmetric parts are taken.

    Args:
        A: ``(B, T, N, N)``.
        c: ``(B, T, N)``.
        Q: ``(B, T, N, N)``, may be singular.
        C: ``(B, T, M, N)``.
        R: ``(B, T, M, M)``, may be singular.
        y: ``(B, T, M)``, finite.
        seen: ``(B, T, M)``, bool: where it is false an observation is missing, and y is not used.
        mean: ``(B, N)``, of the state before the first step.
        cov: ``(B, N, N)``.
        moments: whether the moments of every step are wanted.

    Returns:
        ``loglik`` (B, T), of the observed components of each step, NaN where F is not positive definite, but for
        rounding; what the other results are from there on is not said. The moments after each observation, and those
        before it; those after the last.

    Raises:
        ArgumentError: for shapes, dtypes or devices that do not fit together.

    References:
        Kalman (1960), "A new approach to linear filtering and prediction problems"; Bucy and Joseph (1968), "Filtering
        for stochastic processes with applications to guidance".
    """
    given = taken(_WHERE, A, c, Q, C, R, y, seen, mean, cov)
    return Moments(*kalman_filter_op(KalmanFilter._make((*given, moments))))


class KalmanFilter(NamedTuple):
    """The arguments of the operator, as in :func:`kalman_filter`; all in one dtype, and covariances symmetric."""

    A: Tensor  # (B, T, N, N)
    c: Tensor  # (B, T, N)
    Q: Tensor  # (B, T, N, N)
    C: Tensor  # (B, T, M, N)
    R: Tensor  # (B, T, M, M)
    y: Tensor  # (B, T, M)
    seen: Tensor  # (B, T, M)
    mean: Tensor  # (B, N)
    cov: Tensor  # (B, N, N)
    moments: bool


def taken(where: str, *given: Tensor) -> tuple[Tensor, ...]:
    """What a caller gave, A to cov, checked, in one dtype, and with covariances that are symmetric."""
    _check_inputs(where, *given)
    A, c, Q, C, R, y, seen, mean, cov = given
    dtype = wide(A, c, Q, C, R, y, mean, cov)
    A, c, Q, C, R, y, mean, cov = (m.to(dtype) for m in (A, c, Q, C, R, y, mean, cov))
    Q, R, cov = (symmetric_part(m) for m in (Q, R, cov))
    return A, c, Q, C, R, y, seen, mean, cov


@once_per_shape
def _check_inputs(
    where: str,
    A: Tensor,
    c: Tensor,
    Q: Tensor,
    C: Tensor,
    R: Tensor,
    y: Tensor,
    seen: Tensor,
    mean: Tensor,
    cov: Tensor,
) -> None:
    check_tensors(
        where,
        A=(A, "B T N N"),
        c=(c, "B T N"),
        Q=(Q, "B T N N"),
        C=(C, "B T M N"),
        R=(R, "B T M M"),
        y=(y, "B T M"),
        seen=(seen, "B T M"),
        mean=(mean, "B N"),
        cov=(cov, "B N N"),
    )
    check_real(where, A=A, c=c, Q=Q, C=C, R=R, y=y, mean=mean, cov=cov)
    if seen.dtype != torch.bool:
        raise ArgumentError(f"{where}: seen is {seen.dtype}, expected torch.bool", hint="seen = ~y.isnan()")


def check_record(where: str, a: Any) -> None:
    """A record A to cov, whatever comes behind these, of one dtype.

    Raises:
        ArgumentError: names the argument that does not fit.
    """
    _check_inputs(where, *a[:9])
    check_dtype(where, a.A.dtype)
    for name, m in zip(a._fields, a, strict=True):
        if isinstance(m, Tensor) and m.dtype not in (a.A.dtype, torch.bool):
            raise ArgumentError(f"{where}: {name} is {m.dtype}, but A is {a.A.dtype}", hint=f"{name}.to({a.A.dtype})")


def _check(a: KalmanFilter) -> None:
    check_record(_WHERE, a)


def filtered(a: KalmanFilter) -> tuple[Tensor, ...]:
    """The reference: the formulas of :func:`kalman_filter`, a step after the other."""
    m, P, terms, found = a.mean, a.cov, [], ([], [], [], [])
    eye_n, eye_m = (torch.eye(size, dtype=P.dtype, device=P.device) for size in (P.shape[-1], a.y.shape[-1]))
    for t in range(a.y.shape[1]):
        A, seen = a.A[:, t], a.seen[:, t].unsqueeze(-1)
        # What is missing is made uninformative: zero rows of C, rows and columns of the identity in R.
        C, R = torch.where(seen, a.C[:, t], 0), torch.where(seen & seen.mT, a.R[:, t], eye_m)
        m, P = matvec(A, m) + a.c[:, t], symmetric_part(A @ P @ A.mT) + a.Q[:, t]
        before = m, P
        F = symmetric_part(C @ P @ C.mT) + R
        root, failed = torch.linalg.cholesky_ex(F)
        pivots, sizes = (z.detach().diagonal(dim1=-2, dim2=-1) for z in (root, F))
        wrong = (failed != 0) | (pivots.square() <= 16 * torch.finfo(F.dtype).eps * sizes).any(-1)
        v = (torch.where(a.seen[:, t], a.y[:, t], 0) - matvec(C, m)).unsqueeze(-1)
        K = torch.cholesky_solve(C @ P, root).mT
        white = torch.linalg.solve_triangular(root, v, upper=False)
        count = a.seen[:, t].to(P.dtype).sum(-1)
        term = white.square().sum((-2, -1)) / 2 + root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        terms.append(torch.where(wrong, torch.nan, -term - count * (math.log(2 * math.pi) / 2)))
        left = eye_n - K @ C
        m, P = m + (K @ v).squeeze(-1), symmetric_part(left @ P @ left.mT) + symmetric_part(K @ R @ K.mT)
        for all_steps, now in zip(found, (m, P, *before), strict=True):
            all_steps.append(now)
    loglik = torch.stack(terms, 1) if terms else m.new_zeros(m.shape[0], 0)
    if not a.moments or not terms:
        _, *none = _fake(a._replace(y=a.y[:, :0]))[:5]
        return loglik, *none, m.clone(), P.clone()
    return loglik, *(torch.stack(all_steps, 1) for all_steps in found), m.clone(), P.clone()


def _fake(a: KalmanFilter) -> list[Tensor]:
    rows, length, _ = a.y.shape
    n, steps = a.mean.shape[-1], length if a.moments else 0
    shapes = [(rows, length), *[(rows, steps, n), (rows, steps, n, n)] * 2, (rows, n), (rows, n, n)]
    return [a.mean.new_empty(shape) for shape in shapes]


kalman_filter_op = Op(
    _WHERE, KalmanFilter, filtered, fake=_fake, check=_check, outputs=7, keeps=(1, 2, 3, 4), stepwise=True
)


def has_kernel(a: KalmanFilter) -> bool:
    """Whether a compiled loop over time would run an eager call, and the one back where a gradient is wanted."""
    wanted = torch.is_grad_enabled() and any(isinstance(m, Tensor) and m.requires_grad for m in a)
    return kalman_filter_op.has_kernel(a, wanted)
