"""The Kalman filter on a CPU: series in the lanes of vectors, or the rows of one covariance."""

import torch
from torch import Tensor

from dualform.ops.kalman_filter import KalmanFilter, kalman_filter_op
from dualform.ops.layout import inner_contiguous
from dualform.ops.native import library
from dualform.ops.native.library import fresh
from dualform.ops.native.structs import KALMAN_FILTER
from dualform.ops.op import Backend

_MOST = 128  # states; products of larger matrices are those of PyTorch


def _forward(a: KalmanFilter) -> list[Tensor]:
    rows, length, observed = a.y.shape
    n = a.mean.shape[-1]
    shapes = [(rows, length), *[(rows, length if a.moments else 0, n), (rows, length if a.moments else 0, n, n)] * 2]
    loglik, *moments = (fresh(a.mean.new_empty(shape)) for shape in shapes)
    last = [m.clone(memory_format=torch.contiguous_format) for m in (a.mean, a.cov)]
    if a.y.numel() > 0 and n > 0:
        names = ("means", "covs", "predicted_means", "predicted_covs") if a.moments else ()
        library.call(
            "kalman_filter",
            KALMAN_FILTER,
            dtype=a.mean.dtype,
            rows=rows,
            length=length,
            states=n,
            observed=observed,
            a=_view(a.A),
            shift=_view(a.c),
            q=_view(a.Q),
            c=_view(a.C),
            r=_view(a.R),
            y=_view(a.y),
            seen=a.seen.contiguous(),
            mean=a.mean.contiguous(),
            cov=a.cov.contiguous(),
            loglik=loglik,
            **dict(zip(names, moments, strict=False)),
            last_mean=last[0],
            last_cov=last[1],
        )
    return [loglik, *moments, *last]


def _view(x: Tensor) -> Tensor:
    """The tensor with its axes after time contiguous; what is constant is not spread out."""
    one = x[: 1 if x.stride(0) == 0 else None, : 1 if x.stride(1) == 0 else None]
    return inner_contiguous(one.resolve_neg(), x.dim() - 2).expand(x.shape)


def _refuses(a: KalmanFilter) -> str | None:
    if not a.y.shape[-1] or not a.mean.shape[-1]:
        return "there are no observations, or no states"
    return f"it takes {_MOST} states" if a.mean.shape[-1] > _MOST else None


kalman_filter_op.add(Backend("native", _forward, devices=("cpu",), refuses=_refuses, missing=library.why_missing))
