"""Linear-Gaussian state space models: their parameters, and samples from them."""

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualform.core.calls import explained
from dualform.core.errors import ArgumentError
from dualform.core.linalg import as_tensors, check_finite, matvec, symmetric_part
from dualform.core.shapes import check_tensors
from dualform.core.tree import state_class
from dualform.ops.device import usable_device


@state_class
class Gaussian(NamedTuple):
    """A normal distribution; as the state of a filter, with the batch first in both."""

    mean: Tensor  # (..., N)
    cov: Tensor  # (..., N, N)


@explained
@dataclass(frozen=True, init=False, repr=False, eq=False)
class LinearGaussian:
    """A linear-Gaussian state space model.

        h_t = A h_{t-1} + q_t,   q_t ~ N(0, Q),   t = 1 .. T
        y_t = C h_t + r_t,       r_t ~ N(0, R)
        h_0 ~ N(m0, P0)

    **m0 and P0 describe the state before the first transition**, one step before the first observation, so that a
    prior and a state left by an earlier run are the same thing: ``h_1 ~ N(A m0, A P0 A^T + Q)``. Many libraries
    (statsmodels, pykalman, dynamax) give the moments of h_1 in their place; with those, begin with
    :meth:`dualform.gaussian.kalman.KalmanFilter.update` of the first observation, which needs no transition.

    Q and P0 may be singular. R may be, as long as every observation has some uncertainty before it is made:
    ``C P C^T + R`` is positive definite for the predicted covariance P.

    Args:
        A: transition ``(N, N)``.
        C: emission ``(M, N)``.
        Q: covariance of the process noise ``(N, N)``.
        R: covariance of the observation noise ``(M, M)``.
        m0: prior mean ``(N,)``.
        P0: prior covariance ``(N, N)``.

    Tensors, NumPy arrays and nested lists are taken (see :func:`dualform.core.linalg.as_tensors` for their dtype);
    tensors may require gradients.

    Raises:
        ArgumentError: for shapes that do not fit, values that are not finite, and covariances that are not
            symmetric or have a negative eigenvalue, both beyond rounding.

    Example:
        >>> import dualform as df
        >>> level = df.LinearGaussian([[1.0]], [[1.0]], [[1469.1]], [[15099.0]], [0.0], [[1e7]])
    """

    A: Tensor
    C: Tensor
    Q: Tensor
    R: Tensor
    m0: Tensor
    P0: Tensor

    def __init__(self, A: Any, C: Any, Q: Any, R: Any, m0: Any, P0: Any):
        given = as_tensors("LinearGaussian", A=A, C=C, Q=Q, R=R, m0=m0, P0=P0)
        specs = {"A": "N N", "C": "M N", "Q": "N N", "R": "M M", "m0": "N", "P0": "N N"}
        check_tensors("LinearGaussian", **{name: (given[name], spec) for name, spec in specs.items()})
        if given["A"].is_complex():
            raise ArgumentError("LinearGaussian: complex values, expected real ones")
        check_finite("LinearGaussian", given)
        for name, value in given.items():
            if name in ("Q", "R", "P0") and value.device.type != "meta" and not torch.compiler.is_compiling():
                _check_covariance(name, value.detach())
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        m, n = self.C.shape
        return f"LinearGaussian(N={n}, M={m}, {str(self.A.dtype).removeprefix('torch.')}, {self.A.device})"

    def to(self, *args: Any, **kwargs: Any) -> "LinearGaussian":
        """The model with every tensor moved or cast, with the arguments of ``torch.Tensor.to``.

        Raises:
            ArgumentError: for a device that is not there.
        """
        for device in (value for value in (*args, *kwargs.values()) if isinstance(value, str | torch.device)):
            usable_device(device, f"LinearGaussian.to: device {str(device)!r}", numbers=False)
        return LinearGaussian(*(getattr(self, field.name).to(*args, **kwargs) for field in fields(self)))

    @torch.no_grad()
    def sample(self, length: int, batch: int = 1, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw observations and the states behind them; no gradients.

        Args:
            length: T, the number of steps.
            batch: B, the number of independent series.
            generator: source of randomness, on the model's device.

        Returns:
            ``y`` ``(B, T, M)`` and ``h`` ``(B, T, N)``.

        Raises:
            ArgumentError: for a negative length or batch.
        """
        if length < 0 or batch < 0:
            raise ArgumentError(f"sample: length {length} and batch {batch}, expected 0 or more")
        m, n = self.C.shape

        def normal(cov: Tensor, *shape: int) -> Tensor:
            noise = torch.randn(*shape, generator=generator, dtype=cov.dtype, device=cov.device)
            return noise @ _root(cov).mT

        h, states = self.m0 + normal(self.P0, batch, n), []
        for q in normal(self.Q, batch, length, n).unbind(1):
            h = matvec(self.A, h) + q
            states.append(h)
        states = torch.stack(states, 1) if states else h.new_zeros(batch, 0, n)
        return matvec(self.C, states) + normal(self.R, batch, length, m), states


def _root(cov: Tensor) -> Tensor:
    """A square root ``L L^T`` of a covariance that may be singular."""
    values, vectors = torch.linalg.eigh(symmetric_part(cov))
    return vectors * values.clamp_min(0).sqrt()


def _check_covariance(name: str, value: Tensor) -> None:
    if not value.numel():
        return
    tolerance = torch.finfo(value.dtype).eps ** 0.5 * value.abs().max()
    skew = (value - value.mT).abs().max()
    if skew > tolerance:
        raise ArgumentError(
            f"LinearGaussian: {name} is not symmetric: it differs from its transpose by {skew.item():.3g}",
            hint=f"a covariance is expected; ({name} + {name}.mT) / 2 is its symmetric part",
        )
    smallest = torch.linalg.eigvalsh(symmetric_part(value))[0]
    if smallest < -tolerance:
        raise ArgumentError(
            f"LinearGaussian: {name} is not a covariance: it has the negative eigenvalue {smallest.item():.3g}",
            hint="parametrise it as L @ L.mT to stay positive semi-definite",
        )
