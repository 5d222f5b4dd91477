"""What calls with whole series give: the filter, the smoother, and their rows in between."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualform.gaussian.arrays import Door
from dualform.gaussian.belief import Belief
from dualform.gaussian.filtering import Form
from dualform.gaussian.passes import Pass
from dualform.gaussian.steps import Steps


class Filtered(NamedTuple):
    """What the filter knows: ``p(h_t | y_1 .. y_t)``, and the same one step earlier.

    ``predicted_mean[k]`` and ``predicted_cov[k]`` are of the state at observation k + 1 given the first k, for k = 0 ..
    T. The last of them is NaN where matrices that vary in time, or inputs, end with the observations. A covariance has
    the part ``kappa diffuse diffuse^T`` besides, with infinite kappa, as long as a start is diffuse.

    ``convention`` says how observations that determine a diffuse direction count in the log-likelihood: each
    ``-(log F_inf + log 2 pi) / 2`` with "statsmodels", and ``-log(F_inf) / 2`` with "kfas". It is "proper" without
    diffuse directions, where there is no choice. ``form`` is "sequential" or "parallel", by which of the two the filter
    ran.
    """

    mean: Any  # (..., T, N)
    cov: Any  # (..., T, N, N)
    predicted_mean: Any  # (..., T + 1, N)
    predicted_cov: Any  # (..., T + 1, N, N)
    log_likelihood: Any  # (...)
    loglik: Any  # (..., T), the terms of it
    diffuse: Any  # (..., T, N, K)
    predicted_diffuse: Any  # (..., T + 1, N, K)
    convention: str
    form: str


class Smoothed(NamedTuple):
    """Moments of ``p(h_t | y_1 .. y_T)``; ``lag_one_cov[t]`` is ``Cov(h_t, h_{t-1})``, for t = 1 .. T.

    ``initial_mean`` and ``initial_cov`` are of the state before the first transition, h_0. Under ``prior="first"``
    there is no such transition, and h_0 is h_1.
    """

    mean: Any  # (..., T, N)
    cov: Any  # (..., T, N, N)
    lag_one_cov: Any  # (..., T, N, N)
    log_likelihood: Any  # (...)
    initial_mean: Any  # (..., N)
    initial_cov: Any  # (..., N, N)
    convention: str
    form: str


class Laid(NamedTuple):
    """One call: its rows."""

    door: Door
    full: tuple[int, ...]
    start: Belief
    x: Tensor  # (rows, T, M)
    lengths: Tensor | None
    u: Tensor | None  # (rows, T or more, U)

    @property
    def here(self) -> Tensor | None:
        """The inputs at the times of the observations."""
        return None if self.u is None else self.u[:, : self.x.shape[1]]

    @property
    def keep(self) -> tuple[Tensor, Tensor] | None:
        """Which steps have an observation, and which a transition, where rows have lengths of their own."""
        if self.lengths is None:
            return None
        time = torch.arange(self.x.shape[1], device=self.x.device)
        return time < self.lengths[:, None], time <= self.lengths[:, None]


class Rows(NamedTuple):
    """One call: its rows, and what the filter found."""

    door: Door
    full: tuple[int, ...]
    start: Belief
    found: Pass
    steps: Steps
    last: Belief
    lengths: Tensor | None
    u: Tensor | None
    form: Form
