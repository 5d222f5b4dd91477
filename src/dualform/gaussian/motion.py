"""Models of motion in continuous time, of which positions are observed.

The state has the positions first, then the velocities, then the accelerations: ``(x, y, vx, vy)`` in two dimensions.
The noise acts on the last derivative and is discretised exactly, for intervals of any length.

    tracker = constant_velocity(noise=0.5, R=0.1)
    belief = tracker.init_state(1)
    belief = tracker.update(belief, [[3.0, 4.0]]).belief
    belief = tracker.update(tracker.predict(belief, dt=0.2), [[3.1, 4.3]]).belief

References:
    Bar-Shalom, Li and Kirubarajan (2001), "Estimation with applications to tracking and navigation", sections 6.2 and
    11.7; Li and Jilkov (2003), "Survey of maneuvering target tracking, part I: dynamic models".
"""

from typing import Any

import torch
from torch import Tensor

from dualform.core.calls import explained
from dualform.core.errors import ArgumentError
from dualform.core.linalg import as_tensors
from dualform.gaussian.continuous import ContinuousLinearGaussian


@explained
def constant_velocity(
    noise: Any, R: Any, *, dims: int = 2, m0: Any = None, P0: Any = "diffuse"
) -> ContinuousLinearGaussian:
    """A velocity that changes by white noise: ``x'' = w``.

    Args:
        noise: spectral density of the acceleration, in length^2 / time^3: what the variance of a velocity grows by per
            unit of time. A number, or a batch of them ``(*batch,)``.
        R: covariance of a measured position, ``(dims, dims)``; a number times the identity.
        dims: of space.
        m0: prior mean of the state ``(2 dims,)``.
        P0: its covariance, at the first observation; unknown by default, so that the first two positions determine it.

    Raises:
        ArgumentError: for dims below 1 and whatever ``ContinuousLinearGaussian`` refuses.
    """
    return _derivatives("constant_velocity", 2, dims, (noise, R, m0, P0))


@explained
def constant_acceleration(
    noise: Any, R: Any, *, dims: int = 2, m0: Any = None, P0: Any = "diffuse"
) -> ContinuousLinearGaussian:
    """An acceleration that changes by white noise: ``x''' = w``.

    Args:
        noise: spectral density of the jerk, in length^2 / time^5. A number, or a batch of them ``(*batch,)``.
        R: as in :func:`constant_velocity`.
        dims: of space.
        m0: prior mean of the state ``(3 dims,)``.
        P0: its covariance, as in :func:`constant_velocity`.

    Raises:
        ArgumentError: as :func:`constant_velocity`.
    """
    return _derivatives("constant_acceleration", 3, dims, (noise, R, m0, P0))


@explained
def coordinated_turn(rate: Any, noise: Any, R: Any, *, m0: Any = None, P0: Any = "diffuse") -> ContinuousLinearGaussian:
    """A velocity in the plane that turns at a known rate, and changes by white noise besides.

        vx' = -rate vy + wx,   vy' = rate vx + wy

    Args:
        rate: in radians per unit of time, to the left where positive. A number, or a batch of them ``(*batch,)``,
            such as of hypotheses.
        noise: as in :func:`constant_velocity`.
        R: as in :func:`constant_velocity`, ``(2, 2)``.
        m0: prior mean of the state ``(4,)``.
        P0: its covariance, as in :func:`constant_velocity`.

    Raises:
        ArgumentError: as :func:`constant_velocity`.
    """
    model = _derivatives("coordinated_turn", 2, 2, (noise, R, m0, P0))
    turning = as_tensors("coordinated_turn", like=model.A, rate=rate)["rate"]
    turn = torch.zeros_like(model.A)
    turn[2, 3], turn[3, 2] = -1, 1
    model.A = model.A + turning[..., None, None] * turn
    return model


def _derivatives(where: str, order: int, dims: int, given: tuple[Any, Any, Any, Any]) -> ContinuousLinearGaussian:
    """``dims`` chains of integrators, with noise at the last."""
    noise, R, m0, P0 = given
    if dims < 1:
        raise ArgumentError(f"{where}: dims is {dims}, expected 1 or more")
    made = as_tensors(where, noise=noise, R=R)
    density, R = made["noise"], made["R"]
    eye = torch.eye(dims, dtype=R.dtype, device=R.device)
    R = R * eye if R.dim() == 0 else R
    one = torch.eye(order, dtype=R.dtype, device=R.device)
    A: Tensor = torch.kron(torch.diag(torch.ones(order - 1, dtype=R.dtype, device=R.device), 1), eye)
    C, S = torch.kron(one[:1], eye), torch.kron(one[:, -1:], eye)
    return ContinuousLinearGaussian(A, C, density[..., None, None] * eye, R, m0, P0, S=S)
