"""Particle filters: a nonlinear model by weighted states, resampled where few of them carry the weight."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.func import vmap

from dualform.core.calls import explained
from dualform.core.errors import ArgumentError
from dualform.core.options import brief
from dualform.gaussian.nonlinear import NonlinearGaussian
from dualform.gaussian.parameters import one_of
from dualform.gaussian.sampling import Known, Particles, SampledFilter


@explained
class ParticleFilter(SampledFilter):
    """The bootstrap and the auxiliary particle filter of a nonlinear model, with systematic resampling.

    K states with weights stand for the distribution of a state, whatever its shape. A step draws ``x_k ~ N(f(x_k), Q)``
    and multiplies the weight of each by the density ``p(y | x_k)``; the sum of the products estimates ``p(y_t | y_1 ..
    y_{t-1})``. The product of these estimates is unbiased; its logarithm, which is what is told, is a little too small
    on average. Where the effective number of states ``1 / sum of w^2`` is below ``threshold K``, they are resampled
    before they move: each is copied ``K w`` times, up to rounding, by one uniform number (systematic resampling), and
    all weights are equal again.

    The auxiliary filter (Pitt and Shephard 1999) resamples before every observation, by the weights times ``p(y |
    f(x_k))``, and divides the weights by that afterwards: states are copied that the observation speaks for. It is
    better where Q is small and the observation precise, and worse where Q is large.

    **No gradients**: resampling has none. R is positive definite, unless ``log_density`` is given.

    Args:
        model: a :class:`~dualform.gaussian.nonlinear.NonlinearGaussian`; its method does not matter.
        size: K.
        proposal: ``"bootstrap"`` or ``"auxiliary"``.
        threshold: from 0, never, to 1, before every step.
        log_density: ``log p(y | x)`` of an observation ``(M,)`` and ``h`` of a state ``(M,)``, in place of the normal
            one with the covariance R: for counts or heavy tails. Missing components are NaN; where all are, it is not
            asked. Mapped over rows and states by :func:`torch.func.vmap`.

    Raises:
        ArgumentError: for another model, fewer than 2 states, or a threshold outside of 0 to 1.

    Example:
        >>> import torch
        >>> import dualform as df
        >>> model = df.NonlinearGaussian(torch.sin, lambda x: x**2, Q=[[0.1]], R=[[0.1]], m0=[1.0], P0=0.5)
        >>> seeded = torch.Generator().manual_seed(0)
        >>> found = df.gaussian.ParticleFilter(model, 500).filter([0.4, None, 0.3], generator=seeded)
        >>> found.effective.shape
        torch.Size([3])

    References:
        Gordon, Salmond and Smith (1993), "Novel approach to nonlinear/non-Gaussian Bayesian state estimation"; Pitt and
        Shephard (1999), "Filtering via simulation: auxiliary particle filters"; Kitagawa (1996), "Monte Carlo filter
        and smoother for non-Gaussian nonlinear state space models", for systematic resampling.
    """

    def __init__(
        self,
        model: NonlinearGaussian,
        size: int = 1000,
        *,
        proposal: Literal["bootstrap", "auxiliary"] = "bootstrap",
        threshold: float = 0.5,
        log_density: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):
        super().__init__(model, size)
        self.proposal = one_of("ParticleFilter", "proposal", proposal, ("bootstrap", "auxiliary"))
        if not 0 <= threshold <= 1:
            raise ArgumentError(f"ParticleFilter: threshold is {threshold:g}, expected 0 to 1")
        if log_density is not None and not callable(log_density):
            raise ArgumentError(f"ParticleFilter: log_density is {brief(log_density)}, expected a function of y and h")
        self.threshold, self.log_density = threshold, log_density

    @torch.no_grad()
    def _observe(
        self, where: str, time: int | None, state: Particles, u: Tensor | None, known: Known
    ) -> tuple[Tensor, Particles]:
        (ahead, noise), steps = self._led(state, u, known.Q), state.steps + 1
        auxiliary = self.proposal == "auxiliary"
        score = (
            self._density(where, self._seen(ahead, u, steps), known) if auxiliary else torch.zeros_like(ahead[..., 0])
        )
        first = state.log_weights + score
        total = first.logsumexp(-1, keepdim=True)
        chances = (first - total).exp()
        few = 1 / chances.square().sum(-1) < self.threshold * self.size
        again = few | known.seen.any(-1) if auxiliary else few
        ancestors = systematic(chances, known.generator)
        copied = total - math.log(self.size) - score.gather(1, ancestors)
        weights = torch.where(again[:, None], copied, state.log_weights)
        moved = ahead.gather(1, ancestors.unsqueeze(-1).expand_as(ahead))
        x = torch.where(again[:, None, None], moved, ahead)
        x = x + torch.randn(x.shape, generator=known.generator, dtype=x.dtype, device=x.device) @ noise.mT
        weights = weights + self._density(where, self._seen(x, u, steps), known)
        loglik = weights.logsumexp(-1)
        if not torch.compiler.is_compiling() and not loglik.isfinite().all():
            row = int((~loglik.isfinite()).nonzero()[0])
            place = f"row {row}" + ("" if time is None else f", time {time}")
            if weights.isnan().any():
                raise ArgumentError(
                    f"{where}: the density of a state is NaN at {place}", hint="do the states overflow?"
                )
            hint = "more states, a larger R, or a model under which it is possible"
            raise ArgumentError(f"{where}: no state explains the observation at {place}", hint=hint)
        return loglik, Particles(x, weights - loglik[:, None], steps)

    def _density(self, where: str, h: Tensor, known: Known) -> Tensor:
        """``log p(y | h)`` of what is seen, ``(B, K)``."""
        if self.log_density is not None:
            y = torch.where(known.seen, known.y, torch.nan)
            found = vmap(vmap(self.log_density, in_dims=(None, 0)))(y, h)
            if found.shape != h.shape[:2]:
                raise ArgumentError(
                    f"{where}: log_density returns the shape {tuple(found.shape[2:])}, expected a number without axes"
                )
            return torch.where(known.seen.any(-1, keepdim=True), found, 0)
        root, failed = torch.linalg.cholesky_ex(known.R)
        if not torch.compiler.is_compiling() and failed.any():
            raise ArgumentError(f"{where}: R is not positive definite", hint="a density needs noise in every component")
        away = torch.where(known.seen.unsqueeze(1), known.y.unsqueeze(1) - h, 0)
        white = torch.linalg.solve_triangular(root, away.mT, upper=False)
        numbers = known.seen.to(h.dtype).sum(-1) * math.log(2 * math.pi)
        constant = root.diagonal(dim1=-2, dim2=-1).log().sum(-1) + numbers / 2
        return -white.square().sum(-2) / 2 - constant[:, None]


def systematic(chances: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Indices ``(B, K)`` drawn with the chances of each row: ``i`` occurs ``K p_i`` times, rounded up or down.

    Args:
        chances: ``(B, K)``, rows with the sum 1.
        generator: source of randomness; one uniform number is drawn for each row.
    """
    rows, count = chances.shape
    start = torch.rand(rows, 1, generator=generator, dtype=chances.dtype, device=chances.device)
    places = (torch.arange(count, device=chances.device) + start) / count
    return torch.searchsorted(chances.cumsum(-1), places, right=True).clamp_max(count - 1)
