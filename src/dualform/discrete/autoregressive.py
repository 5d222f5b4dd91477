"""Emissions that depend on the observations before them."""

from typing import Any

import torch
from torch import Tensor, nn

from dualform.core.calls import explained
from dualform.core.errors import ArgumentError
from dualform.core.linalg import matvec, refuse
from dualform.core.shapes import check_tensors
from dualform.discrete.covariance import Covariances, Kind, Prior
from dualform.discrete.emission import Emission, given, widened
from dualform.discrete.normal import check_covariances, data_variance

_RIDGE = 1e-9  # of a regression, relative to the size of what it regresses on


@explained
class AutoregressiveEmission(Emission):
    """``p(y_t | z_t = k, y_{t-1}, ...) = N(bias_k + sum_l weights_kl y_{t-l}, Sigma_k)``: regimes of a time series.

    The likelihood is conditional on the first L observations of a series, as in regression: a step without L
    observations before it has log-likelihood 0 in every state. Missing values are refused: what they say depends on
    the distribution of the whole past.

    Args:
        states: K.
        width: M.
        lags: L.
        covariance: of the noise, as in :class:`~dualform.discrete.normal.GaussianEmission`.
        floor: as there.
        prior: as there.

    Raises:
        ArgumentError: for options that make no sense.

    References:
        Hamilton (1989), "A new approach to the economic analysis of nonstationary time series and the business cycle".
    """

    def __init__(
        self,
        states: int,
        width: int = 1,
        lags: int = 1,
        *,
        covariance: Kind = "full",
        floor: float = 1e-6,
        prior: Prior | None = None,
    ):
        super().__init__(states, width, lags)
        if not lags:
            raise ArgumentError("AutoregressiveEmission: lags is 0", hint="without lags it is a GaussianEmission")
        self.covariance = Covariances("AutoregressiveEmission", states, width, covariance, floor, prior)
        self.weights = nn.Parameter(0.1 * torch.randn(states, lags, width, width, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(states, width, dtype=torch.float64))

    @classmethod
    def of(cls, weights: Any, bias: Any, covs: Any) -> "AutoregressiveEmission":
        """Emissions of given weights ``(K, L, M, M)``, bias ``(K, M)`` and covariances ``(K, M, M)``.

        Raises:
            ArgumentError: for shapes that do not fit, or what is no covariance.
        """
        where = "AutoregressiveEmission.of"
        values = given(where, weights=weights, bias=bias, covs=covs)
        specs = {"weights": "K L M M", "bias": "K M", "covs": "K M M"}
        check_tensors(where, **{name: (values[name], spec) for name, spec in specs.items()})
        check_covariances(where, values["covs"])
        states, lags, width, _ = values["weights"].shape
        made = cls(states, width, lags).to(values["bias"].dtype)
        made.weights, made.bias = nn.Parameter(values["weights"]), nn.Parameter(values["bias"])
        made.covariance.set(values["covs"])
        return made

    @property
    def covs(self) -> Tensor:
        """``Sigma_k`` of the noise, ``(K, M, M)``."""
        return self.covariance()

    def check(self, where: str, name: str, x: Tensor) -> None:
        super().check(where, name, x)
        refuse(where, name, x, x.detach().isnan(), "has missing values, which an autoregressive emission cannot have")

    def log_prob(self, x: Tensor, before: Tensor, seen: Tensor) -> Tensor:
        past, known = self._past(x, before, seen)
        error = x.unsqueeze(-2) - self._mean(past)
        return torch.where(known.unsqueeze(-1), self.covariance.log_normal(error), 0)

    def _past(self, x: Tensor, before: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """``y_{t-1}, y_{t-2}, ...`` ``(B, T, L, M)``, and where there are L of them ``(B, T)``."""
        line, length = torch.cat([before.to(x.dtype), x], 1), x.shape[1]
        past = torch.stack([line[:, self.lags - i : self.lags - i + length] for i in range(1, self.lags + 1)], 2)
        return past, seen[:, None] + torch.arange(length, device=x.device) >= self.lags

    def _mean(self, past: Tensor) -> Tensor:
        return torch.einsum("klij,btlj->btki", widened(self.weights), past) + widened(self.bias)

    def prepare(self, x: Tensor) -> None:
        self.covariance.data_variance.copy_(data_variance(x))

    @torch.no_grad()
    def maximise(self, x: Tensor, weights: Tensor, place: Tensor) -> None:
        here = (place >= self.lags).nonzero()[:, 0]
        past = x[here[:, None] - torch.arange(1, self.lags + 1, device=x.device)]  # (n, L, M)
        y, w = x[here], weights[here]
        u = torch.cat([y.new_ones(len(y), 1), past.flatten(1)], 1)
        scatters, total = [], w.sum(0)
        for k in range(self.states):
            gram = (u * w[:, k, None]).mT @ u
            if total[k] > 0:
                ridge = _RIDGE * gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny)
                found = torch.linalg.solve(gram + torch.diag(ridge), (u * w[:, k, None]).mT @ y)  # (1 + L M, M)
                self.bias[k].copy_(found[0])
                self.weights[k].copy_(found[1:].unflatten(0, (self.lags, self.width)).mT)
            error = y - self._mean(past[:, None])[:, 0, k]
            scatters.append((error * w[:, k, None]).mT @ error)
        scatter = torch.stack(scatters)
        scatter = scatter if self.covariance.dense else torch.diag_embed(scatter.diagonal(dim1=-2, dim2=-1))
        self.covariance.maximise(scatter, total[:, None].expand(-1, self.width))

    def log_prior(self) -> Tensor:
        return self.covariance.log_prior()

    @torch.no_grad()
    def draw(self, states: Tensor, generator: torch.Generator | None) -> Tensor:
        """The observations before the first are taken as 0."""
        batch, length = states.shape
        kind = {"dtype": self.bias.dtype, "device": states.device}
        noise = torch.randn(batch, length, self.width, generator=generator, **kind)
        noise = matvec(self.covariance.cholesky()[states], noise)
        past, out = torch.zeros(batch, self.lags, self.width, **kind), []
        for t in range(length):
            z = states[:, t]
            y = self.bias[z] + torch.einsum("blij,blj->bi", self.weights[z], past) + noise[:, t]
            past = torch.cat([y[:, None], past[:, :-1]], 1)
            out.append(y)
        return torch.stack(out, 1) if out else noise

    def free_parameters(self) -> int:
        return self.weights.numel() + self.bias.numel() + self.covariance.free_parameters()

    def guess(self, x: Tensor, generator: torch.Generator, attempt: int) -> Tensor:
        """Clusters of observations together with those before them."""
        line = [torch.cat([x[:1].expand(i, -1), x[:-i]]) if i else x for i in range(min(self.lags + 1, len(x)))]
        return super().guess(torch.cat(line, 1), generator, attempt)
