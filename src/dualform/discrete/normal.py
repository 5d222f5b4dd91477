"""Emissions that are normally distributed."""

from typing import Any

import torch
from torch import Tensor, nn

from dualform.core.calls import explained
from dualform.core.linalg import matvec, refuse, symmetric_part
from dualform.core.shapes import check_tensors
from dualform.discrete.covariance import Covariances, Kind, Prior
from dualform.discrete.emission import Emission, given, weighted_mean, widened


@explained
class GaussianEmission(Emission):
    """``p(y_t | z_t = k) = N(mean_k, Sigma_k)``.

    A component that is NaN is missing: the others have their marginal distribution, and a fit uses the distribution
    of what is missing given them.

    Args:
        states: K.
        width: M.
        covariance: ``full``; ``diagonal``; ``spherical``, one variance for all components of a state; or ``tied``, one
            full covariance for all states.
        floor: the smallest variance that a fit gives, in any direction, relative to that of the data. It keeps a state
            from shrinking to one observation.
        prior: ``(weight, variance)``: a fit sees so many more observations of that variance in each state.

    Raises:
        ArgumentError: for options that make no sense.
    """

    def __init__(
        self, states: int, width: int = 1, *, covariance: Kind = "full", floor: float = 1e-6, prior: Prior | None = None
    ):
        super().__init__(states, width)
        self.covariance = Covariances("GaussianEmission", states, width, covariance, floor, prior)
        self.means = nn.Parameter(torch.randn(states, width, dtype=torch.float64))

    @classmethod
    def of(cls, means: Any, covs: Any) -> "GaussianEmission":
        """Emissions of given means ``(K, M)`` and full covariances ``(K, M, M)``, or variances ``(K, M)``.

        Raises:
            ArgumentError: for shapes that do not fit, or what is no covariance.
        """
        where = "GaussianEmission.of"
        values = given(where, means=means, covs=covs)
        diagonal = values["covs"].dim() == 2
        check_tensors(where, means=(values["means"], "K M"), covs=(values["covs"], "K M" if diagonal else "K M M"))
        sigma = torch.diag_embed(values["covs"]) if diagonal else values["covs"]
        check_covariances(where, sigma)
        made = cls(*values["means"].shape, covariance="diagonal" if diagonal else "full").to(sigma.dtype)
        made.means = nn.Parameter(values["means"])
        made.covariance.set(sigma)
        return made

    @property
    def covs(self) -> Tensor:
        """``Sigma_k``, ``(K, M, M)``."""
        return self.covariance()

    def log_prob(self, x: Tensor, before: Tensor, seen: Tensor) -> Tensor:
        return self.covariance.log_normal(x.unsqueeze(-2) - widened(self.means))

    def prepare(self, x: Tensor) -> None:
        self.covariance.data_variance.copy_(data_variance(x))

    @torch.no_grad()
    def maximise(self, x: Tensor, weights: Tensor, place: Tensor) -> None:
        x = x.to(weights.dtype)
        if not self.covariance.dense:
            self.means.copy_(weighted_mean(x, weights, self.means))
            seen = ~x.isnan()
            square = torch.where(seen, x, 0)
            total = weights.mT @ seen.to(weights.dtype)
            each = zip(weights.mT, self.means, strict=True)
            error = [w @ torch.where(seen, square - mean, 0).square() for w, mean in each]
            self.covariance.maximise(torch.diag_embed(torch.stack(error)), total)
            return
        means, scatters, total = [], [], weights.sum(0)
        full, spare = self._completed(x)
        for k in range(self.states):
            w, y = weights[:, k], full if full.dim() == 2 else full[:, k]
            mean = w @ y / total[k] if total[k] > 0 else self.means[k]
            error = y - mean
            scatter = (error * w[:, None]).mT @ error
            means.append(mean)
            scatters.append(scatter if spare is None else scatter + spare(k, w))
        self.means.copy_(torch.stack(means))
        self.covariance.maximise(torch.stack(scatters), total[:, None].expand(-1, self.width))

    def _completed(self, x: Tensor) -> tuple[Tensor, Any]:
        """What is missing, by its mean given the rest and the state ``(N, K, M)``; and the covariance left in it."""
        known = ~x.isnan()
        if known.all():
            return x, None
        sigma = self.covs
        patterns, which = known.unique(dim=0, return_inverse=True)
        each = torch.arange(self.states, device=x.device)
        full = torch.where(known, x, 0).unsqueeze(1).expand(-1, self.states, -1).clone()
        left = sigma.new_zeros(len(patterns), *sigma.shape)
        for i, pattern in enumerate(patterns):
            rows, part, lost = (m.nonzero().squeeze(1) for m in (which == i, pattern, ~pattern))
            across = sigma[:, part[:, None], lost]
            gain = torch.linalg.solve(sigma[:, part[:, None], part], across).mT
            error = x[rows][:, None, part] - self.means[:, part]
            full[rows[:, None, None], each[:, None], lost] = self.means[:, lost] + matvec(gain, error)
            left[i][:, lost[:, None], lost] = symmetric_part(sigma[:, lost[:, None], lost] - gain @ across)

        def spare_of(k: int, w: Tensor) -> Tensor:
            amount = w.new_zeros(len(patterns)).index_add_(0, which, w)
            return (amount[:, None, None] * left[:, k]).sum(0)

        return full, spare_of

    def log_prior(self) -> Tensor:
        return self.covariance.log_prior()

    @torch.no_grad()
    def draw(self, states: Tensor, generator: torch.Generator | None) -> Tensor:
        kind = {"dtype": self.means.dtype, "device": states.device}
        noise = torch.randn(*states.shape, self.width, generator=generator, **kind)
        return self.means[states] + matvec(self.covariance.cholesky()[states], noise)

    def free_parameters(self) -> int:
        return self.means.numel() + self.covariance.free_parameters()


def check_covariances(where: str, sigma: Tensor) -> None:
    """That matrices ``(K, M, M)`` are symmetric and positive definite.

    Raises:
        ArgumentError: names the first state whose matrix is not.
    """
    skew = (sigma - sigma.mT).abs().amax((-1, -2))
    wrong = skew > torch.finfo(sigma.dtype).eps ** 0.5 * sigma.abs().amax((-1, -2))
    refuse(where, "the asymmetry of covs", skew, wrong, "is not 0")
    smallest = torch.linalg.eigvalsh(symmetric_part(sigma))[..., 0]
    refuse(where, "the smallest eigenvalue of covs", smallest, smallest <= 0, "is not positive")


def data_variance(x: Tensor) -> Tensor:
    """The variance of each column of ``(N, M)`` that is not NaN, 1 where it is 0."""
    variance = (x - x.nanmean(0)).square().nanmean(0)
    return torch.where(variance > 0, variance, 1)
