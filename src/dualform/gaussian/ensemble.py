"""The ensemble Kalman filter: a nonlinear model by many states that all move, with the Kalman gain of their moments."""

import math
from typing import Literal

import torch
from torch import Tensor

from dualform.core.calls import explained
from dualform.core.errors import ArgumentError
from dualform.core.linalg import symmetric_part
from dualform.gaussian.linearization import root_of
from dualform.gaussian.nonlinear import NonlinearGaussian
from dualform.gaussian.parameters import one_of
from dualform.gaussian.sampling import Known, Particles, SampledFilter


@explained
class EnsembleFilter(SampledFilter):
    """The ensemble Kalman filter of a nonlinear model: K states of equal weight.

    Every state makes the transition with noise of its own. With the anomalies X and Y, the deviations of states and of
    what they let expect from their means, divided by ``sqrt(K - 1)``, an observation moves them by

        S = Y Y^T + R,   G = X Y^T S^-1

        "perturbed"     x_k = x_k + G (y + e_k - h(x_k)),  e_k ~ N(0, R)
        "square_root"   mean = mean + G (y - mean of h),   X = X - X Y^T S^-T/2 (S^1/2 + R^1/2)^-1 Y

    In the first form (Burgers et al. 1998) every state sees an observation with noise of its own. The second (Whitaker
    and Hamill 2002, with Cholesky factors as roots) draws nothing, and its anomalies have exactly the covariance
    ``(I - G H) P`` of the Kalman filter for a linear h.

    Nothing but K states is held, so that N may be large; the covariance has a rank below K. No gain is localised. With
    few states and long series, spread is lost, for which ``inflation`` makes up. The log-likelihood is that of the
    normal distributions ``N(mean of h, S)``. Results have gradients, with the draws held fixed.

    Args:
        model: a :class:`~dualform.gaussian.nonlinear.NonlinearGaussian`; its method does not matter.
        size: K.
        form: ``"perturbed"`` or ``"square_root"``.
        inflation: what deviations from the mean are multiplied by before each observation, 1 or more.

    Raises:
        ArgumentError: for another model, fewer than 2 states, or an inflation below 1.

    Example:
        >>> import torch
        >>> import dualform as df
        >>> model = df.NonlinearGaussian(torch.sin, lambda x: x**2, Q=[[0.1]], R=[[0.1]], m0=[1.0], P0=0.5)
        >>> found = df.gaussian.EnsembleFilter(model, 50).filter([0.4, None, 0.3])
        >>> found.mean.shape
        torch.Size([3, 1])

    References:
        Evensen (1994), "Sequential data assimilation with a nonlinear quasi-geostrophic model using Monte Carlo methods
        to forecast error statistics"; Burgers, van Leeuwen and Evensen (1998), "Analysis scheme in the ensemble Kalman
        filter"; Whitaker and Hamill (2002), "Ensemble data assimilation without perturbed observations".
    """

    def __init__(
        self,
        model: NonlinearGaussian,
        size: int = 100,
        *,
        form: Literal["perturbed", "square_root"] = "perturbed",
        inflation: float = 1.0,
    ):
        super().__init__(model, size)
        self.form = one_of("EnsembleFilter", "form", form, ("perturbed", "square_root"))
        if not 1 <= inflation < math.inf:
            raise ArgumentError(f"EnsembleFilter: inflation is {inflation:g}, expected 1 or more")
        self.inflation = inflation

    @property
    def _correction(self) -> float:
        return self.size / (self.size - 1)

    def _observe(
        self, where: str, time: int | None, state: Particles, u: Tensor | None, known: Known
    ) -> tuple[Tensor, Particles]:
        (x, moves), steps = self._led(state, u, known.Q), state.steps + 1
        x = x + torch.randn(x.shape, generator=known.generator, dtype=x.dtype, device=x.device) @ moves.mT
        mean, scale = x.mean(1, keepdim=True), (self.size - 1) ** 0.5
        x = mean + self.inflation * (x - mean) if self.inflation != 1 else x
        h = torch.where(known.seen.unsqueeze(1), self._seen(x, u, steps), 0)
        center = h.mean(1, keepdim=True)
        X, Y = ((x - mean) / scale).mT, ((h - center) / scale).mT
        S = symmetric_part(Y @ Y.mT) + known.R
        root, failed = torch.linalg.cholesky_ex(S)
        bad = (failed != 0) | ~S.isfinite().flatten(1).all(1)
        if not torch.compiler.is_compiling() and bad.any():
            place = f"row {int(bad.nonzero()[0])}" + ("" if time is None else f", time {time}")
            raise ArgumentError(
                f"{where}: the covariance of the expected observation is not positive definite at {place}",
                hint="add noise to R; or the states overflow",
            )
        away = known.y - center.squeeze(1)
        white = torch.linalg.solve_triangular(root, away.unsqueeze(-1), upper=False).squeeze(-1)
        numbers = known.seen.to(x.dtype).sum(-1) * math.log(2 * math.pi)
        loglik = -(white.square().sum(-1) + numbers) / 2 - root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        unit, deviation = root_of(known.R)
        noise = unit * deviation.unsqueeze(-2)
        cross = Y @ X.mT  # (B, M, N)
        gain = torch.cholesky_solve(cross, root)
        if self.form == "perturbed":
            e = torch.randn(h.shape, generator=known.generator, dtype=x.dtype, device=x.device) @ noise.mT
            x = x + ((known.y.unsqueeze(1) + e) * known.seen.unsqueeze(1) - h) @ gain
        else:
            half = torch.linalg.solve_triangular(root, cross, upper=False)
            half = torch.linalg.solve_triangular((root + noise).mT, half, upper=True)
            x = x + away.unsqueeze(1) @ gain - scale * Y.mT @ half
        return loglik, Particles(x, state.log_weights, steps)
