"""Exponential smoothing in its innovations form: error, trend and season."""

import copy
import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dualform.core.calls import explained
from dualform.core.errors import ArgumentError
from dualform.gaussian.arrays import Door, lengths_of
from dualform.gaussian.constraints import Interval, constrained, places
from dualform.gaussian.estimated import Estimated
from dualform.gaussian.ets_equations import Kind, unfold
from dualform.gaussian.ets_rows import Rows, continued, first_states, log_likelihood, variance_of
from dualform.gaussian.forecasts import Forecast, SimulatedForecast
from dualform.gaussian.objective import Objective
from dualform.gaussian.optimize import minimize
from dualform.gaussian.recurrent import Innovation

_TRIES = {"alpha": (0.1, 0.4, 0.9), "beta_star": (0.01, 0.1), "gamma_star": (0.01, 0.1), "phi": (0.95,)}
"""Where estimation may begin. The likelihood has several maxima: one is looked for from each alpha."""
_MANY = 50
"""Of more series than these, one maximum each is looked for, from the best of the starts."""


@explained
class Ets(Estimated):
    """A class of exponential smoothing; made by :func:`ets`.

    With an additive error and no season, the class ETS(A,Ad,N) is

        y_t = l_{t-1} + phi b_{t-1} + e_t,                     e_t ~ N(0, variance)
        l_t = l_{t-1} + phi b_{t-1} + alpha e_t
        b_t = phi b_{t-1} + beta e_t

    A season adds ``s_{t-m}`` to the prediction, or multiplies it, and has ``s_t = s_{t-m} + gamma e_t``, or
    ``+ gamma e_t / (l_{t-1} + phi b_{t-1})``. With a multiplicative error ``y_t = prediction (1 + e_t)``. All of table
    2.2 of Hyndman et al. but the multiplicative trends is here.

    The parameters are ``alpha`` between 0 and 1, ``beta_star = beta / alpha``, ``gamma_star = gamma / (1 - alpha)`` and
    ``phi`` between 0.8 and 0.98, which are the usual bounds, and where the series begins: ``level``, ``slope`` and
    ``season``, the effects of the first m - 1 steps. Those of a period sum to 0, or to m where they multiply. ``set``
    also takes ``beta`` and ``gamma``. The variance is always the one that maximises the likelihood.

    A missing observation has the innovation 0: the states go on as they were expected to. The likelihood is that of
    the innovations that there are, which neglects that the first one after a gap varies more.

    Args:
        error: ``"additive"`` or ``"multiplicative"``; the letters of the literature, such as ``"A"``, are taken, too.
        trend: ``"none"``, ``"additive"`` or ``"damped"``.
        season: ``"none"``, ``"additive"`` or ``"multiplicative"``.
        period: m, the steps of a season.
        damped: True for ``trend="damped"``.
        initial: ``"estimated"``, with the other parameters, or ``"heuristic"``: by the first years, see
            :func:`~dualform.gaussian.ets_rows.first_states`.

    Raises:
        ArgumentError: for an unknown word, a season without a period of 2 steps or more and the other way round, and
            ``damped=True`` without a trend.

    References:
        Hyndman, Koehler, Ord and Snyder (2008), "Forecasting with exponential smoothing: the state space approach".
    """

    order_of_parameters = ("alpha", "beta_star", "gamma_star", "phi", "level", "slope", "season")
    alpha: Tensor
    beta_star: Tensor
    gamma_star: Tensor
    phi: Tensor
    level: Tensor
    slope: Tensor
    season: Tensor

    def __init__(
        self,
        error: str = "additive",
        trend: str | None = "none",
        season: str | None = "none",
        period: int | None = None,
        damped: bool = False,
        *,
        initial: str = "estimated",
    ):
        super().__init__()
        self.kind = Kind.named(error, trend, season, period, damped)
        if initial not in ("estimated", "heuristic"):
            raise ArgumentError(f"ets: initial is {initial!r}, expected 'estimated' or 'heuristic'")
        self.initial = initial
        constrained(self, "alpha", None, 0.3, Interval(0.0, 1.0))
        constrained(self, "level", None, 0.0, None)
        if self.kind.trend != "none":
            constrained(self, "beta_star", None, 0.1, Interval(0.0, 1.0))
            constrained(self, "slope", None, 0.0, None)
        if self.kind.trend == "damped":
            constrained(self, "phi", None, 0.9, Interval(0.8, 0.98))
        if self.kind.period:
            constrained(self, "gamma_star", None, 0.1, Interval(0.0, 1.0))
            constrained(
                self, "season", None, [float(self.kind.season == "multiplicative")] * (self.kind.period - 1), None
            )

    concentrated = 1
    """How many parameters the likelihood has been maximised over already: the variance."""

    @property
    def title(self) -> str:
        """The class as it is written, such as ``"ETS(A,Ad,M)"``."""
        return str(self.kind)

    @property
    def beta(self) -> Tensor:
        """The smoothing parameter of the slope, ``alpha beta_star``; 0 without a trend."""
        return self.alpha * self.beta_star if self.kind.trend != "none" else torch.zeros_like(self.alpha)

    @property
    def gamma(self) -> Tensor:
        """The smoothing parameter of the season, ``(1 - alpha) gamma_star``; 0 without a season."""
        return (1 - self.alpha) * self.gamma_star if self.kind.period else torch.zeros_like(self.alpha)

    def numbers(self) -> Tensor:
        """Alpha, beta, gamma, phi, level, slope and the m effects of the first season, ``(rows, 6 + m)``."""
        one, trend = torch.ones_like(self.alpha), self.kind.trend
        phi, slope = self.phi if trend == "damped" else one, 0 * one if trend == "none" else self.slope
        made = torch.stack([self.alpha, self.beta, self.gamma, phi, self.level, slope], -1)
        if self.kind.period:
            total = self.kind.period if self.kind.season == "multiplicative" else 0
            made = torch.cat([made, self.season, total - self.season.sum(-1, keepdim=True)], -1)
        return made if self.rows else made[None]

    def log_likelihood(self, y: Any, *, lengths: Any = None) -> Tensor:
        """The log-likelihood at the best variance ``(*batch,)``, every constant included; with gradients.

            -(n / 2) (log(2 pi sum e^2 / n) + 1) - sum log |k_t|

        with ``k_t = 1`` for an additive error and the prediction for a multiplicative one; n is the number of
        observations that are not missing.

        Args:
            y: ``(*batch, T, 1)``, or ``(T,)``; NaN is missing.
            lengths: how many steps each series of a batch has.

        Raises:
            ArgumentError: for values that are not positive in a class that multiplies, a series that the model has no
                row for, and lengths that do not fit.
        """
        call = self._call("log_likelihood", y, lengths)
        return log_likelihood(self.kind, *call.predicted(self.numbers())).reshape(call.full)

    @torch.no_grad()
    def innovations(self, y: Any, *, lengths: Any = None) -> Innovation:
        """How far each observation is from its prediction, the variance of that, and the terms of the likelihood.

        Args:
            y: as in :meth:`log_likelihood`.
            lengths: as there.

        Raises:
            ArgumentError: as :meth:`log_likelihood`.
        """
        call = self._call("innovations", y, lengths)
        e, size, seen = call.predicted(self.numbers())
        variance = variance_of(e, seen)
        k = size if self.kind.error == "multiplicative" else torch.ones_like(size)
        cov = variance[:, None] * k.square()
        terms = torch.where(seen, -(cov.log() + math.log(2 * math.pi) + e.square() / variance[:, None]) / 2, 0)
        ahead, distance = (torch.where(seen, value, torch.nan) for value in (e * k, e.square() / variance[:, None]))
        return Innovation(*call.out(ahead[..., None], cov[..., None, None], distance, terms, timed=True))

    @torch.no_grad()
    def forecast(
        self,
        y: Any,
        horizon: int,
        *,
        lengths: Any = None,
        draws: int = 2000,
        generator: torch.Generator | None = None,
    ) -> Forecast | SimulatedForecast:
        """Forecast the ``horizon`` observations after those of y.

        The mean is the path without further innovations, which is the expectation except where a season multiplies
        (there it differs by the order of the variance). Where the observations are linear in the innovations (an
        additive error, and no season that multiplies), variances are exact. Elsewhere paths are drawn.

        Args:
            y: as in :meth:`log_likelihood`.
            horizon: how many steps, 1 or more.
            lengths: as there; each series is continued from its own end.
            draws: how many paths.
            generator: source of randomness, on the CPU; one with the seed 0 by default, so that a call can be repeated.

        Returns:
            A :class:`~dualform.gaussian.forecasts.Forecast` or a
            :class:`~dualform.gaussian.forecasts.SimulatedForecast`; mean ``(*batch, horizon, 1)``.

        Raises:
            ArgumentError: as :meth:`log_likelihood`, for a horizon or draws below 1, and for a series without an
                observation.
        """
        for name, value in (("horizon", horizon), ("draws", draws)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(f"Ets.forecast: {name} is {value!r}, expected a whole number, 1 or more")
        call, numbers = self._call("forecast", y, lengths), self.numbers()
        if not call.seen.any(-1).all():
            raise ArgumentError("Ets.forecast: y has no observation, and the variance is not known")
        variance = variance_of(*call.predicted(numbers)[::2])
        now, m = call.states(numbers), self.kind.period
        ahead = unfold(self.kind, list(now.unbind(-1)), [0.0] * horizon, [0.0] * horizon).prediction
        mean = torch.stack(torch.broadcast_tensors(*ahead), -1)  # (R, horizon)
        if self.kind.linear:  # the effect of one innovation on what follows
            still = now.clone()
            still[:, 4:] = 0
            still[:, 4], still[:, 5] = numbers[:, 0], numbers[:, 1]
            if m:
                still[:, 5 + m] = numbers[:, 2]
            moved = unfold(self.kind, list(still.unbind(-1)), [0.0] * horizon, [0.0] * horizon).prediction
            effect = torch.stack(torch.broadcast_tensors(*moved), -1)[:, : horizon - 1].square().cumsum(-1)
            spread = variance[:, None] * (1 + torch.nn.functional.pad(effect, (1, 0)))
            return Forecast(*call.out(mean[..., None], spread[..., None, None]))
        noise = generator or torch.Generator().manual_seed(0)
        e = torch.randn(draws, *mean.shape, dtype=torch.float64, generator=noise).to(mean)
        paths = continued(self.kind, now, e * variance[:, None].sqrt())
        mean, cov = call.out(mean[..., None], paths.var(0)[..., None, None])
        (drawn,) = call.door.out(paths.reshape(draws, *call.full, horizon, 1))
        return SimulatedForecast(mean, cov, drawn)

    def fit(self, y: Any, method: Any = "lbfgs", **options: Any) -> Any:
        """Maximise the likelihood of a series: :func:`~dualform.gaussian.fitting.fit`, with its arguments.

        With ``initial="heuristic"``, level, slope and season are set by y, and stay so.

        Raises:
            ArgumentError: as :func:`~dualform.gaussian.fitting.fit`, for fewer than two periods, a series that does not
                change, and values that are not positive in a class that multiplies.
        """
        if self.initial == "heuristic":
            fixed, names = options.pop("fixed", ()), [place.name for place in places(self)]
            if not isinstance(fixed, Mapping):  # what stays as it is now
                fixed = {name: getattr(self, name, torch.zeros(())).detach().clone() for name in fixed}
            self.begin(self._call("fit", y, None).door.y)
            begun = {name: getattr(self, name).detach() for name in ("level", "slope", "season") if name in names}
            options["fixed"] = {**begun, **fixed}
        return super().fit(y, method, **options)

    @torch.no_grad()
    def begin(self, y: Any) -> None:
        """Set the parameters to where an optimiser may begin, by the series ``(T, 1)``; each row by its own.

        Raises:
            ArgumentError: for fewer than two periods, and a series that does not change.
        """
        call = self._call("begin", y, None)
        values = torch.where(call.seen, call.y, torch.nan)
        m = self.kind.period
        if values.shape[1] < max(2 * m, 3):
            raise ArgumentError(
                f"ets: y has {values.shape[1]} steps, expected {max(2 * m, 3)} or more", hint="two periods of a season"
            )
        still = values.nan_to_num(-math.inf).amax(1) <= values.nan_to_num(math.inf).amin(1)
        if still.any():
            row = f"row {int(still.nonzero()[0])} of y" if self.rows else "y"
            raise ArgumentError(f"ets: {row} does not change, and the likelihood has no maximum")
        level, slope, season = first_states(self.kind, values)
        begun = {"level": level, "slope": slope, "season": season[:, :-1]}
        have = {place.name: place for place in places(self)}
        for name, value in begun.items():
            if name in have:
                have[name].assign(value if self.rows else value[0])
        names = [name for name in _TRIES if name in have]
        tries = [dict(zip(names, at, strict=True)) for at in itertools.product(*(_TRIES[name] for name in names))]
        guesses = []
        for guess in tries:
            for name, value in guess.items():
                have[name].assign(value)
            guesses.append(self.numbers())
        likely = log_likelihood(self.kind, *call.predicted(torch.cat(guesses), len(tries)))
        likely = likely.reshape(len(_TRIES["alpha"]), -1, len(values)).nan_to_num(-math.inf)
        best = likely.argmax(1) + torch.arange(len(likely), device=likely.device)[:, None] * likely.shape[1]  # (S, R)
        if len(values) > _MANY:
            best = best.gather(0, likely.amax(1).argmax(0, keepdim=True))
        self._improve(values, {name: values.new_tensor([t[name] for t in tries])[best.flatten()] for name in names})

    def _improve(self, y: Tensor, starts: dict[str, Tensor]) -> None:
        """Go from S starts of each series ``(S R,)`` some way to the maximum, and set the parameters to the best."""
        one = self.row(0) if self.rows else copy.deepcopy(self)
        count = len(starts["alpha"]) // len(y)
        many = one.expand(len(starts["alpha"]))
        for mine, its in zip(places(self), places(many), strict=True):
            its.free.copy_(mine.free.expand(count, len(y), *its.free.shape[1:]).flatten(0, 1))
            if (value := starts.get(mine.name)) is not None:
                its.assign(value)
        held = ("level", "slope", "season") if self.initial == "heuristic" else ()
        free = [place for place in places(many) if place.name not in held]
        problem = Objective(many, y.repeat(count, 1)[..., None], free, {})
        with torch.enable_grad():
            found = minimize(problem, torch.ones_like(problem.point()), tolerance=1e-5, max_iter=150)
        problem.move(found.x)
        best = found.value.reshape(count, -1).nan_to_num(math.inf).argmin(0)
        at = best * len(y) + torch.arange(len(y), device=best.device)
        for mine, its in zip(places(self), places(many), strict=True):
            mine.free.copy_(its.free[at] if self.rows else its.free[at[0]])

    def typical(self, y: Tensor) -> dict[str, Tensor]:
        """The sizes of parameters that have a unit, for series ``(R, T, 1)``, each ``(R, 1)``."""
        seen = ~y[..., 0].isnan()
        n, x = seen.sum(-1, keepdim=True).clamp_min(2), y[..., 0].nan_to_num(0.0)
        mean = x.sum(-1, keepdim=True) / n
        size = (torch.where(seen, x - mean, 0).square().sum(-1, keepdim=True) / n).sqrt()
        size = torch.where(size > 0, size, 1)
        season = size / mean.abs() if self.kind.season == "multiplicative" else size
        return {"level": size, "slope": size / n.sqrt(), "season": season}

    @torch.no_grad()
    def set(self, **values: Any) -> "Estimated":
        """Set parameters to values; besides the parameters, ``beta`` and ``gamma``, and a season of m effects.

        m effects are brought to the sum that they have to have, which changes the level and the slope but no
        prediction.

        Raises:
            ArgumentError: for a name that is no parameter, another shape, or a value out of bounds.
        """
        names = {place.name for place in places(self)}
        beta, gamma, season = (values.pop(name, None) for name in ("beta", "gamma", "season"))
        if unknown := [n for n, z in (("beta", beta), ("gamma", gamma)) if z is not None and f"{n}_star" not in names]:
            raise ArgumentError(f"ets: {unknown[0]} is given, but the class is {self.kind}")
        super().set(**values)
        alpha = self.alpha
        if beta is not None:
            super().set(beta_star=torch.as_tensor(beta, dtype=alpha.dtype, device=alpha.device) / alpha)
        if gamma is not None:
            super().set(gamma_star=torch.as_tensor(gamma, dtype=alpha.dtype, device=alpha.device) / (1 - alpha))
        if season is not None:
            s, m = torch.as_tensor(season, dtype=alpha.dtype, device=alpha.device), self.kind.period
            if m and s.shape[-1:] == (m,):
                mean = s.mean(-1, keepdim=True)
                multiplied = self.kind.season == "multiplicative"
                by, s = mean[..., 0], (s / mean if multiplied else s - mean)[..., :-1]
                super().set(level=self.level * by if multiplied else self.level + by)
                if multiplied and self.kind.trend != "none":
                    super().set(slope=self.slope * by)
            super().set(season=s)
        return self

    def _call(self, name: str, y: Any, lengths: Any) -> Rows:
        where = f"Ets.{name}"
        door = Door(where, y, self.alpha, 1)
        full = tuple(door.y.shape[:-2])
        if self.rows is not None and full not in ((), (self.rows,)):
            raise ArgumentError(f"{where}: y has shape {tuple(door.y.shape)}, expected ({self.rows}, T, 1)")
        full = full if self.rows is None else (self.rows,)
        x = door.y[..., 0].expand(*full, -1).reshape(math.prod(full), -1)
        ends = None if lengths is None else lengths_of(where, lengths, full, x.shape[1], x.device)
        rows = Rows(self.kind, door, full, x.to(self.alpha), ends)
        bad = rows.seen & (rows.y <= 0)
        if "multiplicative" in self.kind and bad.any():
            raise ArgumentError(
                f"{where}: y has the value {rows.y[bad][0].item():g}, expected positive ones for {self.kind}",
                hint="the additive classes take any values",
            )
        return rows


def ets(
    error: str = "additive",
    trend: str | None = "none",
    season: str | None = "none",
    period: int | None = None,
    damped: bool = False,
    **options: Any,
) -> Ets:
    """Exponential smoothing in its innovations form; the arguments are those of :class:`Ets`.

    Args:
        error: ``"additive"`` or ``"multiplicative"``.
        trend: ``"none"``, ``"additive"`` or ``"damped"``.
        season: ``"none"``, ``"additive"`` or ``"multiplicative"``.
        period: the steps of a season.
        damped: True for ``trend="damped"``.
        options: ``initial``.

    Raises:
        ArgumentError: as :class:`Ets`.

    Example:
        >>> from dualform.gaussian import ets
        >>> str(ets("M", "Ad", "M", 12).kind)
        'ETS(M,Ad,M)'
    """
    return Ets(error, trend, season, period, damped, **options)
