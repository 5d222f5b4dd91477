"""What all emissions of a hidden Markov model have in common."""

from typing import Any

import torch
from torch import Tensor, nn

from dualform.core.errors import ArgumentError
from dualform.core.linalg import as_tensors, check_finite, refuse
from dualform.core.shapes import wide
from dualform.discrete.clusters import clusters, moving_mean

_WINDOWS = ((1, True), (5, True), (1, False), (9, False), (1, False), (3, False))  # of attempts, and whether refined


class Emission(nn.Module):
    """``p(y_t | z_t)``: one distribution of an observation ``(M,)`` for each of K states.

    Parameters are float64 unless cast. They are unconstrained, so that any optimizer may move them; properties such as
    ``probs`` or ``means`` give the quantities they stand for.

    Args:
        states: K.
        width: M, the number of components of an observation.
        lags: how many earlier observations the distribution depends on.
    """

    def __init__(self, states: int, width: int = 1, lags: int = 0):
        super().__init__()
        for name, value, least in (("states", states, 1), ("width", width, 1), ("lags", lags, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ArgumentError(f"{type(self).__name__}: {name} is {value!r}, expected a whole number from {least}")
        self.states, self.width, self.lags = states, width, lags

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        lags = f", lags={self.lags}" if self.lags else ""
        return f"states={self.states}, width={self.width}{lags}"

    def log_prob(self, x: Tensor, before: Tensor, seen: Tensor) -> Tensor:
        """``log p(y_t | z_t = k)`` of the components that are not NaN, ``(B, T, K)``.

        Args:
            x: observations ``(B, T, M)``.
            before: the observations before them ``(B, lags, M)``, the last one last.
            seen: how many of those there are ``(B,)``.
        """
        raise NotImplementedError

    def check(self, where: str, name: str, x: Tensor) -> None:
        """Raise an ArgumentError for values that no state can emit.

        Raises:
            ArgumentError: for infinite values; emissions of counts and symbols add theirs.
        """
        if x.is_floating_point():
            refuse(where, name, x, x.detach().isinf(), "has infinite values", "NaN stands for a missing value")

    def maximise(self, x: Tensor, weights: Tensor, place: Tensor) -> None:
        """Move the parameters to the maximum of ``sum_tk weights_tk log p(y_t | z_t = k)``, priors included.

        Args:
            x: observations of all series end to end ``(N, M)``.
            weights: ``(N, K)``.
            place: of each observation in its series ``(N,)``, from 0.
        """
        raise NotImplementedError

    def prepare(self, x: Tensor) -> None:
        """Look at the observed data ``(N, M)`` once before a fit, for scales that floors are relative to."""

    def log_prior(self) -> Tensor:
        """What a prior adds to the log-likelihood that a fit maximises, up to a constant; without one, 0."""
        return next(self.parameters()).new_zeros(())

    def draw(self, states: Tensor, generator: torch.Generator | None) -> Tensor:
        """Observations ``(B, T, M)`` of given states ``(B, T)``; no gradients."""
        raise NotImplementedError

    def free_parameters(self) -> int:
        """How many numbers describe it."""
        return sum(p.numel() for p in self.parameters())

    def guess(self, x: Tensor, generator: torch.Generator, attempt: int) -> Tensor:
        """Weights ``(N, K)`` of data ``(N, M)`` that a fit may start from: clusters of k-means.

        Args:
            x: observations; NaN is missing.
            generator: of the first centres.
            attempt: every second one clusters means over neighbouring steps, in which states that last stand out; from
                the third on, centres are drawn at random.
        """
        window, refine = _WINDOWS[attempt % len(_WINDOWS)]
        return clusters(moving_mean(x, window), self.states, generator, refine)


def widened(parameter: Tensor) -> Tensor:
    """A parameter in the dtype that is computed in: float32 or wider."""
    return parameter.to(wide(parameter))


def given(where: str, **values: Any) -> dict[str, Tensor]:
    """Parameters that a caller gives, as finite tensors of one dtype, detached.

    Raises:
        ArgumentError: names one that is complex or not finite.
    """
    made = {name: value.detach() for name, value in as_tensors(where, **values).items()}
    for name, value in made.items():
        if value.is_complex():
            raise ArgumentError(f"{where}: {name} is complex, expected real numbers")
    check_finite(where, made)
    return made


def check_distribution(where: str, name: str, value: Tensor) -> None:
    """That the last axis holds probabilities that sum to 1.

    Raises:
        ArgumentError: names the first row that does not, and its sum.
    """
    refuse(where, name, value, value < 0, "has negative probabilities")
    total = value.sum(-1)
    wrong = (total - 1).abs() > 1e-5 if value.dtype == torch.float32 else (total - 1).abs() > 1e-8
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist()) if wrong.dim() else ()
        row = f" row {place[0] if len(place) == 1 else place} of" if place else ""
        hint = f"divide by the sum: {name} / {name}.sum(-1, keepdims=True)"
        raise ArgumentError(f"{where}:{row} {name} sums to {total[place].item():.6g}, expected 1", hint=hint)


def weighted_mean(x: Tensor, weights: Tensor, otherwise: Tensor) -> Tensor:
    """``(K, M)`` means of ``x`` ``(N, M)`` with weights ``(N, K)``, of what is not NaN; else of ``otherwise``."""
    seen = ~x.isnan()
    total = weights.mT @ seen.to(weights.dtype)
    summed = weights.mT @ torch.where(seen, x, 0)
    return torch.where(total > 0, summed / torch.where(total > 0, total, 1), otherwise)
