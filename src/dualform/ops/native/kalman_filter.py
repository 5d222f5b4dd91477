"""The Kalman filter on a CPU and its gradient: series in the lanes of vectors, or the rows of one covariance."""

from typing import Any

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.ops.derivatives import outline
from dualform.ops.kalman_filter import KalmanFilter, kalman_filter_op
from dualform.ops.native import library
from dualform.ops.native.library import fresh, whole_steps
from dualform.ops.native.structs import KALMAN_FILTER
from dualform.ops.op import Backend

_MOST = 128  # states; products of larger matrices are those of PyTorch
MOMENTS = ("means", "covs", "predicted_means", "predicted_covs")
_GRADIENTS = {"A": "da", "c": "dshift", "Q": "dq", "C": "dc", "R": "dr", "y": "dy", "mean": "dmean", "cov": "dcov"}


def _forward(a: KalmanFilter) -> list[Tensor]:
    """The outputs, and the moments where they are not among these."""
    if a.moments:
        return filtered(a)
    loglik, *moments, mean, cov = filtered(a._replace(moments=True))
    return [loglik, *(m[:, :0].contiguous() for m in moments), mean, cov, *moments]


def filtered(a: KalmanFilter) -> list[Tensor]:
    """The outputs."""
    rows, length, _ = a.y.shape
    n, steps = a.mean.shape[-1], length if a.moments else 0
    shapes = [(rows, length), *[(rows, steps, n), (rows, steps, n, n)] * 2]
    loglik, *moments = (fresh(a.mean.new_empty(shape)) for shape in shapes)
    last = [m.clone(memory_format=torch.contiguous_format) for m in (a.mean, a.cov)]
    if a.y.numel() > 0 and n > 0:
        found = dict(zip(MOMENTS, moments, strict=True)) if a.moments else {}
        library.call(
            "kalman_filter", KALMAN_FILTER, **fields(a), loglik=loglik, last_mean=last[0], last_cov=last[1], **found
        )
    return [loglik, *moments, *last]


def fields(a: KalmanFilter) -> dict[str, Any]:
    """What every function reads."""
    rows, length, observed = a.y.shape
    sizes = {"rows": rows, "length": length, "states": a.mean.shape[-1], "observed": observed}
    views = {"a": a.A, "shift": a.c, "q": a.Q, "c": a.C, "r": a.R, "y": a.y}
    whole = {"seen": a.seen, "mean": a.mean, "cov": a.cov}
    return {
        "dtype": a.mean.dtype,
        **sizes,
        **{name: whole_steps(x) for name, x in views.items()},
        **{name: x.contiguous() for name, x in whole.items()},
    }


def _saved(a: KalmanFilter) -> list[Tensor]:
    rows, length, n = *a.y.shape[:2], a.mean.shape[-1]
    return [] if a.moments else [a.mean.new_empty(shape) for shape in [(rows, length, n), (rows, length, n, n)] * 2]


def _backward(grads: list[Tensor], kept: list[Tensor], a: KalmanFilter) -> dict[str, Tensor]:
    """Of an eager call, only the gradients that are wanted; the others are no numbers."""
    moments = kept[:4] if a.moments else kept[4:]
    came, expected = ([tuple(m.shape) for m in tensors] for tensors in (moments, _saved(a._replace(moments=False))))
    if came != expected or any(m.dtype != a.mean.dtype for m in moments):
        raise ArgumentError(f"kalman_filter_backward: the saved moments are {came}, expected {expected}")
    given = {name: getattr(a, name) for name in _GRADIENTS}
    wanted = [name for name, m in given.items() if m.requires_grad] or list(given)
    found = {name: given[name].new_empty(given[name].shape) for name in wanted}
    last = [g.contiguous() for g in grads[5:]]
    if a.y.numel() == 0 or not a.mean.shape[-1]:
        zeros = {name: torch.zeros_like(m) for name, m in given.items()}
        return zeros | {"mean": last[0], "cov": last[1]}
    back = {f"d{name}": g.contiguous() for name, g in zip(MOMENTS, grads[1:5], strict=True)} if a.moments else {}
    library.call(
        "kalman_filter_backward",
        KALMAN_FILTER,
        **fields(a),
        **{name: m.contiguous() for name, m in zip(MOMENTS, moments, strict=True)},
        **back,
        # What a backward does not write.
        loglik=grads[0].contiguous(),
        last_mean=last[0],
        last_cov=last[1],
        dloglik=grads[0].contiguous(),
        dlast_mean=last[0],
        dlast_cov=last[1],
        **{_GRADIENTS[name]: fresh(m) for name, m in found.items()},
    )
    return {name: found.get(name, outline(m)) for name, m in given.items()}


def refuses(a: Any) -> str | None:
    """Why no kernel runs a call, or None."""
    if not a.y.shape[-1] or not a.mean.shape[-1]:
        return "there are no observations, or no states"
    return f"it takes {_MOST} states" if a.mean.shape[-1] > _MOST else None


kalman_filter_op.add(
    Backend(
        "native",
        _forward,
        _backward,
        infer=filtered,
        saved=_saved,
        devices=("cpu",),
        refuses=refuses,
        missing=library.why_missing,
    )
)
