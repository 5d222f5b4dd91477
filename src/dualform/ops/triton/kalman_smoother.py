"""The Kalman smoother in Triton, in float64: a program walks back along time with a few series."""

import torch
from torch import Tensor

from dualform.ops.kalman_filter import KalmanFilter, Moments
from dualform.ops.kalman_smoother import KalmanSmoother, kalman_smoother_op
from dualform.ops.triton.kalman_filter import LOOPS, Plan, refuses
from dualform.ops.triton.support import add_backend, kernels

_LOSS = 1e3  # of a variance by what is observed later: with more of it, P - P N P has lost three digits


def _forward(a: KalmanSmoother) -> list[Tensor]:
    A, c, Q, C, R, y, seen, *start = (m if m.dtype == torch.bool else m.double() for m in a)
    wide = KalmanFilter(A, c, Q, C, R, y, seen, start[0], start[1], True)
    known = Moments(*LOOPS.filtered(wide))
    means, covs, lags = (torch.empty_like(m) for m in (known.mean, known.cov, known.cov))
    first = [m.clone(memory_format=torch.contiguous_format) for m in (wide.mean, wide.cov)]
    loglik = known.loglik
    if y.numel() > 0:
        plan = Plan(wide)
        views, strides = plan.read("a", "c", "r", "y", "seen")
        lost = torch.empty(len(y), dtype=torch.int32, device=y.device)
        kernels("kalman_filter").smooth[plan.grid](
            *views, wide.mean.contiguous(), wide.cov.contiguous(),
            known.mean, known.cov, known.predicted_mean, known.predicted_cov, means, covs, lags, *first, lost,
            *plan.sizes, *strides, LOSS=_LOSS, **(plan.flags | ({"num_warps": 4} if plan.flags["BN"] == 16 else {})),
        )  # fmt: skip
        loglik = loglik.masked_fill(lost[:, None] != 0, torch.nan)
    return [m.to(a.mean.dtype) for m in (loglik, means, covs, lags, *first)]


add_backend(kalman_smoother_op, forward=_forward, refuses=refuses)
