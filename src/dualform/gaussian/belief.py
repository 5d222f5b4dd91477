"""What is known of a state: a normal distribution, and the state that a Kalman filter carries."""

from typing import Any, NamedTuple

from torch import Tensor

from dualform.core.tree import state_class


@state_class
class Gaussian(NamedTuple):
    """A normal distribution."""

    mean: Tensor  # (..., N)
    cov: Tensor  # (..., N, N)


@state_class
class Belief(NamedTuple):
    """The state of a Kalman filter: the distribution of h, and how many transitions led to it.

    It is ``N(mean, cov + kappa diffuse diffuse^T)`` in the limit of infinite kappa. K, the number of diffuse
    directions, is that of the model's start, 0 for most; a direction that the data have determined is a column of
    zeros.

    ``steps`` counts the times that have been reached. It says which of the matrices that vary in time comes next, and,
    under ``prior="first"``, that a belief with 0 steps is that of the first observation already.
    """

    mean: Tensor  # (B, N)
    cov: Tensor  # (B, N, N)
    steps: Tensor  # (B,), int64
    diffuse: Tensor  # (B, N, K)


def is_belief(value: Any) -> bool:
    """Whether a state is a :class:`Belief`, of four parts, and not a :class:`Gaussian`, of two."""
    return isinstance(value, tuple) and len(value) == 4
