"""Emissions that are mixtures of normal distributions."""

from typing import Any

import torch
from torch import Tensor, nn

from dualform.core.calls import explained
from dualform.core.errors import ArgumentError
from dualform.core.shapes import check_tensors
from dualform.discrete.clusters import clusters
from dualform.discrete.covariance import Kind, Prior
from dualform.discrete.emission import Emission, check_distribution, given, widened
from dualform.discrete.normal import GaussianEmission
from dualform.discrete.passes import logsumexp, safe_log


@explained
class MixtureEmission(Emission):
    """``p(y_t | z_t = k) = sum_c weights_kc N(mean_kc, Sigma_kc)``, with C components in each state.

    Missing values are those of :class:`~dualform.discrete.normal.GaussianEmission`. A fit takes the component of each
    observation as another hidden variable.

    Args:
        states: K.
        width: M.
        components: C.
        covariance: of each component; ``tied`` is one for all components of all states.
        floor: as there.
        prior: as there.

    Raises:
        ArgumentError: for options that make no sense.
    """

    def __init__(
        self,
        states: int,
        width: int = 1,
        components: int = 2,
        *,
        covariance: Kind = "full",
        floor: float = 1e-6,
        prior: Prior | None = None,
    ):
        super().__init__(states, width)
        if isinstance(components, bool) or not isinstance(components, int) or components < 1:
            raise ArgumentError(f"MixtureEmission: components is {components!r}, expected a whole number from 1")
        self.components = components
        self.normals = GaussianEmission(states * components, width, covariance=covariance, floor=floor, prior=prior)
        self.logits = nn.Parameter(torch.zeros(states, components, dtype=torch.float64))

    @classmethod
    def of(cls, weights: Any, means: Any, covs: Any) -> "MixtureEmission":
        """Emissions of given weights ``(K, C)``, means ``(K, C, M)`` and covariances ``(K, C, M, M)``.

        Raises:
            ArgumentError: for shapes that do not fit, or what is no distribution or no covariance.
        """
        where = "MixtureEmission.of"
        values = given(where, weights=weights, means=means, covs=covs)
        specs = {"weights": "K C", "means": "K C M", "covs": "K C M M"}
        check_tensors(where, **{name: (values[name], spec) for name, spec in specs.items()})
        check_distribution(where, "weights", values["weights"])
        states, components, width = values["means"].shape
        made = cls(states, width, components).to(values["means"].dtype)
        made.normals = GaussianEmission.of(values["means"].flatten(0, 1), values["covs"].flatten(0, 1))
        made.logits = nn.Parameter(safe_log(values["weights"]))
        return made

    @property
    def weights(self) -> Tensor:
        """``(K, C)``, summing to 1 over the last axis."""
        return widened(self.logits).softmax(-1)

    @property
    def means(self) -> Tensor:
        """``(K, C, M)``."""
        return widened(self.normals.means).unflatten(0, (self.states, -1))

    @property
    def covs(self) -> Tensor:
        """``(K, C, M, M)``."""
        return self.normals.covs.unflatten(0, (self.states, -1))

    def check(self, where: str, name: str, x: Tensor) -> None:
        self.normals.check(where, name, x)

    def log_prob(self, x: Tensor, before: Tensor, seen: Tensor) -> Tensor:
        return logsumexp(self._joint(x, before, seen), -1)

    def _joint(self, x: Tensor, before: Tensor, seen: Tensor) -> Tensor:
        """``log p(y_t, c | z_t = k)``, ``(B, T, K, C)``."""
        each = self.normals.log_prob(x, before, seen).unflatten(-1, (self.states, self.components))
        return each + widened(self.logits).log_softmax(-1)

    def prepare(self, x: Tensor) -> None:
        self.normals.prepare(x)

    @torch.no_grad()
    def maximise(self, x: Tensor, weights: Tensor, place: Tensor) -> None:
        nothing = x.new_zeros(1, 0, self.width)
        joint = self._joint(x[None], nothing, place[:1])[0]
        shares = (joint - logsumexp(joint, -1).unsqueeze(-1)).exp() * weights.unsqueeze(-1)
        self._take(x, shares, place)

    def _take(self, x: Tensor, shares: Tensor, place: Tensor) -> None:
        """The parameters of the greatest likelihood where the components ``(N, K, C)`` are known."""
        self.normals.maximise(x, shares.flatten(1), place)
        amount = shares.sum(0)
        total = amount.sum(-1, keepdim=True)
        self.logits.copy_(torch.where(total > 0, safe_log(amount / torch.where(total > 0, total, 1)), self.logits))

    def log_prior(self) -> Tensor:
        return self.normals.log_prior()

    @torch.no_grad()
    def draw(self, states: Tensor, generator: torch.Generator | None) -> Tensor:
        chances = self.weights[states].flatten(0, 1)
        component = torch.multinomial(chances, 1, generator=generator).view_as(states)
        return self.normals.draw(states * self.components + component, generator)

    def free_parameters(self) -> int:
        return self.states * (self.components - 1) + self.normals.free_parameters()

    @torch.no_grad()
    def guess(self, x: Tensor, generator: torch.Generator, attempt: int) -> Tensor:
        """Clusters, each of which is clustered again: those are the components that a fit starts from."""
        weights = super().guess(x, generator, attempt).to(self.normals.means.dtype)
        shares = weights.new_zeros(len(x), self.states, self.components)
        for k in range(self.states):
            here = weights[:, k] > 0
            if here.any():
                shares[here, k] = clusters(x[here], self.components, generator).to(shares.dtype)
        self._take(x, shares, torch.zeros(len(x), dtype=torch.int64, device=x.device))
        return weights
