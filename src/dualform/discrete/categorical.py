"""Emissions that are symbols."""

from typing import Any

import torch
from torch import Tensor, nn

from dualform.core.calls import explained
from dualform.core.errors import ArgumentError
from dualform.core.linalg import refuse
from dualform.core.shapes import check_tensors
from dualform.discrete.emission import Emission, check_distribution, given, widened
from dualform.discrete.passes import safe_log


@explained
class CategoricalEmission(Emission):
    """Symbols: ``p(y_t = v | z_t = k) = probs[k, v]``; components of an observation are independent given the state.

    A symbol is a whole number from 0 to V - 1, of an integer or a floating dtype; NaN is missing.

    Args:
        states: K.
        symbols: V.
        width: M, how many symbols an observation has.
        prior: added to each expected count by a fit; above 0 it keeps probabilities above 0.

    Raises:
        ArgumentError: for numbers that make no sense.
    """

    def __init__(self, states: int, symbols: int, width: int = 1, *, prior: float = 0.0):
        super().__init__(states, width)
        if isinstance(symbols, bool) or not isinstance(symbols, int) or symbols < 1:
            raise ArgumentError(f"CategoricalEmission: symbols is {symbols!r}, expected a whole number from 1")
        if not prior >= 0:
            raise ArgumentError(f"CategoricalEmission: prior is {prior!r}, expected 0 or more")
        self.symbols, self.prior = symbols, prior
        self.logits = nn.Parameter(torch.randn(states, width, symbols, dtype=torch.float64))

    @classmethod
    def of(cls, probs: Any) -> "CategoricalEmission":
        """Emissions of given probabilities ``(K, V)``, or ``(K, M, V)``.

        Raises:
            ArgumentError: names the row that is no distribution.
        """
        value = given("CategoricalEmission.of", probs=probs)["probs"]
        value = value[:, None] if value.dim() == 2 else value
        check_tensors("CategoricalEmission.of", probs=(value, "K M V"))
        check_distribution("CategoricalEmission.of", "probs", value)
        made = cls(value.shape[0], value.shape[2], value.shape[1])
        made.logits = nn.Parameter(safe_log(value))
        return made

    @property
    def probs(self) -> Tensor:
        """``(K, M, V)``, summing to 1 over the last axis."""
        return widened(self.logits).softmax(-1)

    def check(self, where: str, name: str, x: Tensor) -> None:
        super().check(where, name, x)
        seen = torch.where(x.isnan(), 0, x.detach()) if x.is_floating_point() else x
        wrong = (seen < 0) | (seen >= self.symbols) | (seen != seen.floor())
        refuse(where, name, x, wrong, f"has values that are no symbols from 0 to {self.symbols - 1}")

    def log_prob(self, x: Tensor, before: Tensor, seen: Tensor) -> Tensor:
        log_probs = widened(self.logits).log_softmax(-1)
        index, known = self._symbols(x)
        found = torch.stack([log_probs[:, m].mT[index[..., m]] for m in range(self.width)], -1)  # (B, T, K, M)
        return torch.where(known.unsqueeze(-2), found, 0).sum(-1)

    def _symbols(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not x.is_floating_point():
            return x.long(), torch.ones_like(x, dtype=torch.bool)
        return torch.where(x.isnan(), 0, x).long(), ~x.isnan()

    @torch.no_grad()
    def maximise(self, x: Tensor, weights: Tensor, place: Tensor) -> None:
        index, seen = self._symbols(x)
        counts = []
        for m in range(self.width):
            count = weights.new_zeros(self.symbols, self.states)
            counts.append(count.index_add_(0, index[:, m], weights * seen[:, m, None]).mT)
        count = torch.stack(counts, 1) + self.prior
        total = count.sum(-1, keepdim=True)
        self.logits.copy_(torch.where(total > 0, safe_log(count / torch.where(total > 0, total, 1)), self.logits))

    def log_prior(self) -> Tensor:
        if not self.prior:
            return super().log_prior()
        return self.prior * self.logits.log_softmax(-1).sum()

    @torch.no_grad()
    def draw(self, states: Tensor, generator: torch.Generator | None) -> Tensor:
        chances = self.probs[states].flatten(0, 2)
        return torch.multinomial(chances, 1, generator=generator).view(*states.shape, self.width)

    def free_parameters(self) -> int:
        return self.states * self.width * (self.symbols - 1)

    def guess(self, x: Tensor, generator: torch.Generator, attempt: int) -> Tensor:
        """Random weights: symbols have no distances."""
        noise = torch.rand(self.symbols, self.states, generator=generator, dtype=torch.float64).clamp_min(1e-12)
        index, _ = self._symbols(x[:, 0])
        local = torch.rand(len(x), self.states, generator=generator, dtype=torch.float64).clamp_min(1e-12)
        weights = -noise.log().to(x.device)[index] - 0.1 * local.log().to(x.device)
        return weights / weights.sum(-1, keepdim=True)
