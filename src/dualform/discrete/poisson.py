"""Emissions that are counts."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from dualform.core.calls import explained
from dualform.core.errors import ArgumentError
from dualform.core.linalg import refuse
from dualform.core.shapes import check_tensors
from dualform.discrete.emission import Emission, given, weighted_mean, widened

_LEAST = 1e-10  # a rate of 0 would make every count but 0 impossible


@explained
class PoissonEmission(Emission):
    """Counts: ``p(y_t | z_t = k) = rate_k^y exp(-rate_k) / y!``; components are independent given the state.

    A component that is NaN is missing.

    Args:
        states: K.
        width: M, how many counts an observation has.
        prior: shape and rate ``(a, b)`` of a gamma distribution, the prior of each rate; None is none.

    Raises:
        ArgumentError: for numbers that make no sense.
    """

    def __init__(self, states: int, width: int = 1, *, prior: tuple[float, float] | None = None):
        super().__init__(states, width)
        if prior is not None and not (prior[0] >= 1 and prior[1] >= 0):
            raise ArgumentError(f"PoissonEmission: prior is {prior}, expected a shape from 1 and a rate from 0")
        self.prior = prior
        self.log_rates = nn.Parameter(torch.randn(states, width, dtype=torch.float64))

    @classmethod
    def of(cls, rates: Any) -> "PoissonEmission":
        """Emissions of given rates ``(K,)``, or ``(K, M)``.

        Raises:
            ArgumentError: for a rate that is not positive.
        """
        value = given("PoissonEmission.of", rates=rates)["rates"]
        value = value[:, None] if value.dim() == 1 else value
        check_tensors("PoissonEmission.of", rates=(value, "K M"))
        refuse("PoissonEmission.of", "rates", value, value <= 0, "has values that are not positive")
        made = cls(*value.shape)
        made.log_rates = nn.Parameter(value.log())
        return made

    @property
    def rates(self) -> Tensor:
        """``(K, M)``, the mean counts."""
        return widened(self.log_rates).exp()

    def check(self, where: str, name: str, x: Tensor) -> None:
        super().check(where, name, x)
        seen = torch.where(x.isnan(), 0, x.detach()) if x.is_floating_point() else x
        refuse(where, name, x, (seen < 0) | (seen != seen.floor()), "has values that are no counts, 0, 1, 2 ...")

    def log_prob(self, x: Tensor, before: Tensor, seen: Tensor) -> Tensor:
        log_rates = widened(self.log_rates)
        x = x if x.is_floating_point() else x.to(log_rates.dtype)
        known = ~x.isnan()
        x, there = torch.where(known, x, 0), known.to(x.dtype)
        constant = (torch.lgamma(x + 1) * there).sum(-1, keepdim=True)
        return x @ log_rates.mT - there @ log_rates.exp().mT - constant

    @torch.no_grad()
    def maximise(self, x: Tensor, weights: Tensor, place: Tensor) -> None:
        x = x.to(weights.dtype)
        if self.prior is None:
            rates = weighted_mean(x, weights, self.rates)
        else:
            shape, rate = self.prior
            seen = ~x.isnan()
            total = weights.mT @ seen.to(weights.dtype)
            counted = weights.mT @ torch.where(seen, x, 0)
            rates = torch.where(total + rate > 0, (counted + shape - 1) / (total + rate), self.rates)
        self.log_rates.copy_(rates.clamp_min(_LEAST).log())

    def log_prior(self) -> Tensor:
        if self.prior is None:
            return super().log_prior()
        shape, rate = self.prior
        constant = shape * math.log(rate) - math.lgamma(shape) if rate else 0.0
        return ((shape - 1) * self.log_rates - rate * self.rates + constant).sum()

    @torch.no_grad()
    def draw(self, states: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.poisson(self.rates[states], generator=generator)

    def guess(self, x: Tensor, generator: torch.Generator, attempt: int) -> Tensor:
        """Clusters of the square roots, whose deviation does not depend on the rate."""
        return super().guess(x.sqrt(), generator, attempt)
