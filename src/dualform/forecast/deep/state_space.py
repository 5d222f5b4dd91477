"""Deep state space models: a network writes the parameters of a linear-Gaussian model of each series."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualform.core.calls import explained
from dualform.core.errors import ArgumentError, DualformError
from dualform.core.linalg import as_tensors, check_finite
from dualform.core.options import suggestion
from dualform.forecast.deep.network import BACKBONES
from dualform.gaussian.components import Irregular, Level, Seasonal, Trend
from dualform.gaussian.forecasts import Forecast
from dualform.gaussian.model import LinearGaussian
from dualform.gaussian.structural import Structural
from dualform.models.config import ModelConfig
from dualform.models.heads import StepRegressor

_FLOOR = 1e-3  # the least deviation of a noise, in units of the deviation of the series
_BEGIN = {"level": 0.1, "slope": 0.01, "season": 0.05, "observation": 0.5}  # deviations of a new model, as above


@explained
class DeepStateSpace(nn.Module):
    """A structural model of each series, whose parameters a mixer writes by covariates and the identity of the series.

        h_t = A h_{t-1} + S diag(q_t) eta_t,      y_t = C h_t + d_t + r_t eps_t,      h_1 ~ N(m, diag(p)^2)
        (q_t, r_t, d_t) = heads of mixer(x_1 .. x_t, series),   (m, p) = heads of its first output

    A, C and S are those of a level, or a level with a slope, and a season; eta and eps are standard normal. So noise
    may grow before a holiday, and d_t moves with the covariates, while what is known of a series is a Gaussian belief
    as in any model of :mod:`dualform.gaussian`: missing values, exact likelihood, smoothing and forecasts are those of
    :class:`~dualform.gaussian.model.LinearGaussian`. The weights maximise that likelihood over all series together.
    Each series has the mean 0 and the deviation 1 inside of the model.

    Args:
        covariates: K, how many numbers are known of each step, those to come included.
        season: of the series, 1 for none.
        trend: whether there is a slope.
        series: how many series there are that the model tells apart; 0 where it reads the covariates alone, and then it
            forecasts series that it was not fitted to.
        backbone: ``"s4d"``, ``"s5"`` or ``"mamba"``.
        width: of the stream of the mixer.
        layers: of it.

    Raises:
        ArgumentError: for sizes out of range, and an unknown backbone.

    Example:
        >>> import torch
        >>> from dualform.forecast import DeepStateSpace
        >>> model = DeepStateSpace(2, season=7)
        >>> y, x = torch.randn(5, 60), torch.randn(5, 67, 2)
        >>> model.fit(y, x, steps=2).forecast(y, 7, x).mean.shape
        torch.Size([5, 7, 1])

    References:
        Rangapuram, Seeger, Gasthaus, Stella, Wang and Januschowski (2018), "Deep state space models for time series
        forecasting", NeurIPS: sections 3 and 4. There the mixer is an LSTM, and the covariates have no direct effect.
    """

    moved: Tensor  # (noises, N), the states that have noise of their own

    def __init__(
        self,
        covariates: int,
        *,
        season: int = 1,
        trend: bool = True,
        series: int = 0,
        backbone: str = "s4d",
        width: int = 32,
        layers: int = 2,
    ):
        super().__init__()
        where = type(self).__name__
        for name, value, least in (("covariates", covariates, 1), ("season", season, 1), ("series", series, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ArgumentError(f"{where}: {name} is {value!r}, expected a number of {least} or more")
        if backbone not in BACKBONES:
            raise ArgumentError(f"{where}: backbone is {backbone!r}", hint=suggestion(str(backbone), [*BACKBONES]))
        self.covariates, self.season = covariates, season
        parts = [Trend() if trend else Level(), *([Seasonal(season)] if season > 1 else []), Irregular()]
        with torch.no_grad():
            self.form = Structural(*parts).build()
        moved = self.form.Q.diagonal().nonzero()[:, 0]
        self.register_buffer("moved", F.one_hot(moved, self.form.d_state).double(), persistent=False)
        names = ["level", *(["slope"] if trend else []), *(["season"] if season > 1 else []), "observation"]
        self.identity = nn.Embedding(series, 4) if series else None
        config = ModelConfig(0, width, {"M": (BACKBONES[backbone],)}, "M" * layers)
        self.mixer = StepRegressor(config, len(names) + 1, inputs=covariates + (4 if series else 0))
        self.start = nn.Linear(width, 2 * self.form.d_state)
        begin = torch.tensor([_BEGIN[name] for name in names])
        with torch.no_grad():
            for head in (self.mixer.head, self.start):
                head.weight.mul_(0.1)
                head.bias.zero_()
            self.mixer.head.bias[: len(names)] = torch.log(torch.expm1(begin))
        self.double()

    def system(self, x: Any, series: Any = None) -> LinearGaussian:
        """The models of series in their scaled unit, a batch of B with noise that varies in time; with gradients.

        Args:
            x: covariates ``(B, T, K)``, or ``(T, K)`` for all series.
            series: ``(B,)``, the number of each series, from 0; of a model that tells them apart.

        Raises:
            ArgumentError: for shapes that do not fit, values that are not finite, and series that are not there.
        """
        made = self._covariates("system", x, None, 0)
        return self._system(made, self._rows("system", series, len(made)))

    def log_likelihood(self, y: Any, x: Any, series: Any = None) -> Tensor:
        """``log p(y)`` of each series ``(B,)``, in its own unit, with gradients.

        Args:
            y: ``(B, T)``; NaN where missing.
            x: as in :meth:`system`, of T steps or more.
            series: as in :meth:`system`.

        Raises:
            ArgumentError: as :meth:`system`, and for a series without two different numbers.
        """
        z, scale, _ = self._scaled("log_likelihood", y)
        made = self._covariates("log_likelihood", x, len(z), z.shape[1])
        system = self._system(made, self._rows("log_likelihood", series, len(z)))
        count = (~z.isnan()).sum(1)
        return system.log_likelihood(z.unsqueeze(-1)) - count * scale.log()

    def fit(
        self,
        y: Any,
        x: Any,
        series: Any = None,
        *,
        steps: int = 200,
        batch: int = 32,
        lr: float = 5e-3,
        seed: int = 0,
        tell: Callable[[int, float], None] = lambda step, loss: None,
    ) -> "DeepStateSpace":
        """Maximise the likelihood of series over all weights, by AdamW; returns the model.

        Args:
            y: ``(B, T)``; NaN where missing, as before the beginning of shorter series.
            x: as in :meth:`system`, of T steps or more.
            series: as in :meth:`system`.
            steps: updates of the weights.
            batch: series in each.
            lr: the peak learning rate.
            seed: of the order of the series.
            tell: called with how many steps are done, and the loss: nats per number, of scaled series.

        Raises:
            ArgumentError: as :meth:`log_likelihood`.
            DualformError: where the loss is not finite.
        """
        from dualform.train.optim import build_optimizer, schedule
        from dualform.train.recipe import Optim

        z, _, _ = self._scaled("fit", y)
        made = self._covariates("fit", x, len(z), z.shape[1])[:, : z.shape[1]]
        numbers = self._rows("fit", series, len(z))
        plan = Optim(lr=lr, weight_decay=0.01, warmup=min(20, steps // 5))
        optimizer, source = build_optimizer(self, plan), torch.Generator().manual_seed(seed)
        self.train()
        for step in range(steps):
            rows = torch.randperm(len(z), generator=source)[:batch]
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * schedule(plan, step, step / steps)
            optimizer.zero_grad()
            part = z[rows]
            system = self._system(made[rows], None if numbers is None else numbers[rows])
            loss = -system.log_likelihood(part.unsqueeze(-1)).sum() / (~part.isnan()).sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters(), plan.clip)
            optimizer.step()
            if not math.isfinite(loss.item()):
                raise DualformError(f"DeepStateSpace.fit: the loss is {loss.item()} after step {step}", hint="lower lr")
            tell(step + 1, loss.item())
        return self.eval()

    @torch.no_grad()
    def forecast(self, y: Any, horizon: int, x: Any, series: Any = None) -> Forecast:
        """Moments of the ``horizon`` observations after those of ``y``, ``(B, horizon, 1)``.

        Args:
            y: ``(B, T)``; NaN where missing.
            horizon: how many steps, 1 or more.
            x: covariates of T + horizon steps, as in :meth:`system`.
            series: as in :meth:`system`.

        Raises:
            ArgumentError: as :meth:`log_likelihood`, and for a horizon below 1.
        """
        if isinstance(horizon, bool) or not isinstance(horizon, int) or horizon < 1:
            raise ArgumentError(f"DeepStateSpace.forecast: horizon is {horizon!r}, expected 1 or more steps")
        z, scale, centre = self._scaled("forecast", y)
        made = self._covariates("forecast", x, len(z), z.shape[1] + horizon)[:, : z.shape[1] + horizon]
        system = self._system(made, self._rows("forecast", series, len(z)))
        found = system.forecast(z.unsqueeze(-1), horizon)
        centre, scale = centre[:, None, None], scale[:, None, None]
        return Forecast(centre + scale * found.mean, scale.square()[..., None] * found.cov)

    # What they share.

    def _system(self, x: Tensor, numbers: Tensor | None) -> LinearGaussian:
        if self.identity is not None and numbers is not None:
            x = torch.cat([x, self.identity(numbers)[:, None].expand(-1, x.shape[1], -1)], -1)
        h, _ = self.mixer.features(x)
        out = self.mixer.head(h)
        variances = (_FLOOR + F.softplus(out[..., :-1])).square()
        m0, spread = self.start(h[:, 0]).chunk(2, -1)
        return LinearGaussian.like(
            self.form,
            ("Q", "R", "d"),
            Q=torch.diag_embed(variances[..., :-1] @ self.moved),
            R=variances[..., -1:, None],
            d=out[..., -1:],
            m0=m0,
            P0=torch.diag_embed((_FLOOR + F.softplus(spread)).square()),
            diffuse=None,
        )

    def _scaled(self, where: str, y: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Series with mean 0 and deviation 1, their scales, and their centres."""
        z = as_tensors(f"DeepStateSpace.{where}", y=y)["y"].double()
        if z.dim() != 2:
            raise ArgumentError(f"DeepStateSpace.{where}: y has shape {tuple(z.shape)}, expected (B, T)")
        if z.isinf().any():
            row, time = z.isinf().nonzero()[0].tolist()
            raise ArgumentError(
                f"DeepStateSpace.{where}: y is infinite in series {row}, step {time}", hint="NaN is missing"
            )
        centre = z.nanmean(1)
        scale = (z - centre[:, None]).square().nanmean(1).sqrt()
        if not (scale > 0).all():
            row = int((~(scale > 0)).nonzero()[0])
            raise ArgumentError(
                f"DeepStateSpace.{where}: series {row} has no two different numbers", hint="leave it out"
            )
        return (z - centre[:, None]) / scale[:, None], scale, centre

    def _covariates(self, where: str, x: Any, rows: int | None, steps: int) -> Tensor:
        made = as_tensors(f"DeepStateSpace.{where}", x=x)["x"].double()
        if made.dim() == 2:
            made = made.expand(rows or 1, *made.shape)
        fits = made.dim() == 3 and made.shape[-1] == self.covariates and made.shape[1] >= steps
        if not fits or (rows is not None and len(made) != rows):
            raise ArgumentError(
                f"DeepStateSpace.{where}: x has shape {tuple(made.shape)}, expected ({rows or 'B'}, {steps} or more, "
                f"{self.covariates}), or without the first axis for all series"
            )
        check_finite(f"DeepStateSpace.{where}", {"x": made})
        return made

    def _rows(self, where: str, series: Sequence[int] | Tensor | None, rows: int) -> Tensor | None:
        if self.identity is None:
            if series is not None:
                raise ArgumentError(f"DeepStateSpace.{where}: series is given, but the model does not tell them apart")
            return None
        count = self.identity.num_embeddings
        made = torch.arange(rows) if series is None else torch.as_tensor(series)
        if made.shape != (rows,) or made.dtype != torch.int64 or not ((made >= 0) & (made < count)).all():
            raise ArgumentError(
                f"DeepStateSpace.{where}: series is {made.tolist()}, expected {rows} numbers from 0 to {count - 1}"
            )
        return made
