"""The Kalman smoother on a CPU, in float64: what the filter has left becomes the moments given all observations."""

import torch
from torch import Tensor

from dualform.ops.kalman_filter import KalmanFilter
from dualform.ops.kalman_loops import MOMENTS
from dualform.ops.kalman_smoother import KalmanSmoother, kalman_smoother_op
from dualform.ops.native import library
from dualform.ops.native.kalman_filter import LOOPS, fields, plural, refuses
from dualform.ops.native.structs import KALMAN_FILTER
from dualform.ops.op import Backend


def _forward(a: KalmanSmoother) -> list[Tensor]:
    A, c, Q, C, R, y, seen, *start = (m if m.dtype == torch.bool else m.double() for m in a)
    wide = KalmanFilter(A, c, Q, C, R, y, seen, start[0], start[1], True)
    loglik, *moments, mean, cov = LOOPS.filtered(wide)
    first = [m.clone(memory_format=torch.contiguous_format) for m in (wide.mean, wide.cov)]
    if a.y.numel() > 0:
        library.call(
            "kalman_smoother",
            KALMAN_FILTER,
            **fields(wide),
            loglik=loglik,
            last_mean=mean,
            last_cov=cov,
            **plural(dict(zip(MOMENTS, moments, strict=True))),
            first_mean=first[0],
            first_cov=first[1],
        )
    means, covs, _, lags = moments
    return [m.to(a.mean.dtype) for m in (loglik, means, covs, lags, *first)]


kalman_smoother_op.add(Backend("native", _forward, devices=("cpu",), refuses=refuses, missing=library.why_missing))
