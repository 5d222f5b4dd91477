"""The Kalman filter on a CPU and its gradient: series in the lanes of vectors, or the rows of one covariance."""

from typing import Any

from torch import Tensor

from dualform.ops.kalman_filter import KalmanFilter, Moments, kalman_filter_op
from dualform.ops.kalman_loops import MOMENTS, Loops, why_none
from dualform.ops.layout import whole_steps
from dualform.ops.native import library
from dualform.ops.native.library import fresh
from dualform.ops.native.structs import KALMAN_FILTER
from dualform.ops.op import Backend

_MOST = 128  # states; products of larger matrices are those of PyTorch
_GRADIENTS = {"A": "da", "c": "dshift", "Q": "dq", "C": "dc", "R": "dr", "y": "dy", "mean": "dmean", "cov": "dcov"}


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


def plural(moments: dict[str, Tensor]) -> dict[str, Tensor]:
    """The moments of all steps by the names that the kernels have for them."""
    return {f"{name}s": m for name, m in moments.items()}


def _forward(a: KalmanFilter, found: Moments) -> None:
    moments = {name: fresh(getattr(found, name)) for name in MOMENTS} if a.moments else {}
    last = {"last_mean": found.last_mean, "last_cov": found.last_cov}
    library.call("kalman_filter", KALMAN_FILTER, **fields(a), loglik=found.loglik, **last, **plural(moments))


def _backward(a: KalmanFilter, moments: dict[str, Tensor], grads: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    library.call(
        "kalman_filter_backward",
        KALMAN_FILTER,
        **fields(a),
        **plural(moments),
        # What a backward does not write.
        loglik=grads["loglik"],
        last_mean=grads["last_mean"],
        last_cov=grads["last_cov"],
        **{f"d{name}s" if name in MOMENTS else f"d{name}": g for name, g in grads.items()},
        **{_GRADIENTS[name]: fresh(m) for name, m in found.items()},
    )


LOOPS = Loops(_forward, _backward)


def refuses(a: Any) -> str | None:
    """Why no kernel runs a call, or None."""
    return why_none(a, _MOST)


kalman_filter_op.add(
    Backend("native", devices=("cpu",), refuses=refuses, missing=library.why_missing, **LOOPS.functions())
)
