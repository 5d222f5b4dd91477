"""What is asked of whole series: filtering, smoothing, likelihoods, draws and forecasts, in batches of any axes."""

import math
from typing import Any

import torch
from torch import Tensor

from dualform.core.calls import explained
from dualform.core.errors import ArgumentError
from dualform.core.linalg import as_tensors
from dualform.core.shapes import broadcast
from dualform.core.tree import tree_map
from dualform.gaussian.arrays import Door, lengths_of
from dualform.gaussian.belief import Belief, Gaussian
from dualform.gaussian.filtering import Form, run
from dualform.gaussian.forecasts import Forecast
from dualform.gaussian.initial import initial
from dualform.gaussian.passes import Blame, Pass, predict
from dualform.gaussian.recurrent import Innovation, Recurrent, after, innovation_of
from dualform.gaussian.results import Filtered, Laid, Rows, Smoothed
from dualform.gaussian.smoothing import (
    Posterior,
    by_kernel,
    check_determined,
    draw,
    is_chain,
    moments,
    posterior,
    simulate,
)
from dualform.gaussian.steps import Steps, Transition, ended


@explained
class Series(Recurrent):
    """Whole series of a model; see :class:`~dualform.gaussian.kalman.KalmanFilter`."""

    def filter(self, y: Any, state: Any = None, *, u: Any = None, lengths: Any = None) -> Filtered:
        """Filter one series or a batch.

        Args:
            y: ``(*batch, T, M)``, or one series ``(T, M)``, or ``(T,)`` for M = 1; a tensor, NumPy array, masked array,
                list, Series or DataFrame, in which NaN and None are missing. A model with batch axes is filtered with
                each of its parameters: the axes of both broadcast.
            state: the belief before the first observation, one row per series; None is the prior.
            u: inputs ``(*batch, T, U)`` of a model with B or D; there may be more steps than of y.
            lengths: how many steps each series of a batch has, of shape ``(*batch,)``; what follows is left out, and
                results there are NaN, log-likelihoods 0.

        Returns:
            With the axes of ``y``, and of its kind: arrays for arrays, and DataFrames where a result is ``(T, N)`` and
            y is one. Where a result has a gradient, tensors.

        Raises:
            ArgumentError: as :meth:`forward`, for lengths that do not fit, and where matrices that vary in time, or
                inputs, are fewer than the observations.
        """
        where = f"{type(self).__name__}.filter"
        series = self._filtered(where, y, state, u, lengths)
        found, extra = series.found, self._beyond(where, series)
        predicted = [
            torch.cat([z, more[:, None]], 1)
            for z, more in (
                (found.predicted_mean, extra.mean),
                (found.predicted_cov, extra.cov),
                (found.predicted_diffuse, extra.diffuse),
            )
        ]
        if series.lengths is not None:
            found, predicted = ended(found, series.lengths), ended(predicted, series.lengths + 1)
        loglik = found.loglik.nan_to_num() if series.lengths is not None else found.loglik
        out = [found.mean, found.cov, *predicted[:2], loglik.sum(-1), loglik, found.diffuse, predicted[2]]
        return Filtered(*self._out(series, *out, timed=True), convention=self._convention, form=series.form)

    def innovations(self, y: Any, state: Any = None, *, u: Any = None, lengths: Any = None) -> Innovation:
        """How far each observation is from its prediction by all before it, for diagnostics.

        If the model is right, they are independent of each other, and ``distance`` has the chi-squared distribution
        with as many degrees of freedom as there are observed components. Steps before which the state is diffuse have
        none: they are NaN.

        Args and errors are those of :meth:`filter`.

        Returns:
            innovation ``(*batch, T, M)``, NaN where missing; cov ``(*batch, T, M, M)``; distance and loglik
            ``(*batch, T)``.

        Raises:
            ArgumentError: as :meth:`filter`.
        """
        series = self._filtered(f"{type(self).__name__}.innovations", y, state, u, lengths)
        found, steps = series.found, series.steps
        seen = torch.where(steps.seen, steps.y, torch.nan)
        before = Belief(found.predicted_mean, found.predicted_cov, series.start.steps, found.predicted_diffuse[..., :0])
        out = innovation_of(before, seen, steps.C, steps.R, torch.zeros_like(seen))
        diffuse = (found.predicted_diffuse != 0).flatten(2).any(-1)
        cov = torch.where(diffuse[..., None, None], torch.nan, out.cov)
        ahead, distance = torch.where(diffuse[..., None], torch.nan, out.innovation), out.distance
        parts = [ahead, cov, torch.where(diffuse, torch.nan, distance), found.loglik]
        parts = parts if series.lengths is None else ended(parts, series.lengths)
        return Innovation(*self._out(series, *parts, timed=True))

    def log_likelihood(self, y: Any, state: Any = None, *, u: Any = None, lengths: Any = None, burn: int = 0) -> Tensor:
        """``log p(y_1 .. y_T)`` of the observed components, every constant included, ``(*batch,)``: a tensor.

        Args:
            y: as in :meth:`filter`.
            state: as in :meth:`filter`.
            u: as in :meth:`filter`.
            lengths: as in :meth:`filter`.
            burn: leaves out the terms of so many first steps, which is what goes with an approximately diffuse start.

        Raises:
            ArgumentError: as :meth:`filter`.
        """
        where = f"{type(self).__name__}.log_likelihood"
        if burn < 0:
            raise ArgumentError(f"{where}: burn is {burn}, expected 0 or more")
        series = self._filtered(where, y, state, u, lengths, moments=False)
        return series.found.loglik[:, burn:].sum(-1).reshape(series.full)

    def smooth(self, y: Any, state: Any = None, *, u: Any = None, lengths: Any = None) -> Smoothed:
        """The states given all observations, also from an exactly diffuse start and with singular noise.

        Args and errors are those of :meth:`filter`; besides, the observations have to determine what is diffuse.

        Raises:
            ArgumentError: as :meth:`filter`, and for a series that leaves a diffuse direction undetermined.
        """
        where = f"{type(self).__name__}.smooth"
        rows, states, lag, loglik, form = self._smooth(where, y, state, u, lengths)
        mean, cov = states.mean[:, 1:], states.cov[:, 1:]
        if rows.lengths is not None:
            mean, cov, lag = ended([mean, cov, lag], rows.lengths)
        out = [mean, cov, lag, loglik.sum(-1), states.mean[:, 0], states.cov[:, 0]]
        return Smoothed(*self._out(rows, *out, timed=True), convention=self._convention, form=form)

    def simulate_posterior(
        self,
        y: Any,
        draws: int = 1,
        state: Any = None,
        *,
        u: Any = None,
        lengths: Any = None,
        generator: torch.Generator | None = None,
    ) -> Any:
        """Draw paths of the states from their joint distribution given all observations; no gradients.

        The states are one Markov chain given the data (see :mod:`dualform.gaussian.smoothing`), from an exactly diffuse
        start too.

        Args:
            y: as in :meth:`filter`.
            draws: how many.
            state: as in :meth:`filter`.
            u: as in :meth:`filter`.
            lengths: as in :meth:`filter`.
            generator: source of randomness, on the model's device.

        Returns:
            ``(draws, *batch, T, N)``.

        Raises:
            ArgumentError: as :meth:`smooth`, and for a negative number of draws.
        """
        where = f"{type(self).__name__}.simulate_posterior"
        if draws < 0:
            raise ArgumentError(f"{where}: draws is {draws}, expected 0 or more")
        with torch.no_grad():
            series, chain = self._chain(where, y, state, u, lengths)
            paths = (
                draw(chain, draws, generator) if is_chain(chain) else self._corrected(series, chain, draws, generator)
            )
            if series.lengths is not None:
                paths = ended(paths.transpose(0, 1).transpose(1, 2), series.lengths).transpose(1, 2).transpose(0, 1)
            return series.door.out(paths.reshape(draws, *series.full, *paths.shape[2:]))[0]

    def forecast(self, y: Any, horizon: int, state: Any = None, *, u: Any = None, lengths: Any = None) -> Forecast:
        """Moments of the ``horizon`` observations after those of ``y``.

        Args:
            y: as in :meth:`filter`.
            horizon: how many steps, 1 or more.
            state: as in :meth:`filter`.
            u: inputs ``(*batch, T + horizon, U)``, those of the future included.
            lengths: as in :meth:`filter`; each series is continued from its own end.

        Returns:
            With the batch axes of ``y``. Matrices that vary in time need T + horizon steps.

        Raises:
            ArgumentError: as :meth:`filter`, for a horizon below 1, and where the observations leave a diffuse
                direction of the state undetermined.
        """
        where = f"{type(self).__name__}.forecast"
        if isinstance(horizon, bool) or not isinstance(horizon, int) or horizon < 1:
            raise ArgumentError(f"{where}: horizon is {horizon!r}, expected 1 or more steps")
        series = self._filtered(where, y, state, u, lengths)
        check_determined(where, series.last)
        mean, cov = self._ahead(where, series, horizon, self._future(where, series, horizon))
        return Forecast(*self._out(series, mean, cov))

    # What a kind of model has to say about steps beyond the data.

    def _ahead(self, where: str, series: Rows, horizon: int, u: Tensor | None) -> tuple[Tensor, Tensor]:
        """The moments of the observations to come, one row per series."""
        raise NotImplementedError

    def _next(self, where: str, series: Rows, last: Belief, u: Tensor | None) -> Transition | None:
        """The transition after the last observation, u ``(B, 0 or 1, U)``; None where it is not known."""
        raise NotImplementedError

    # What the methods share.

    @property
    def _convention(self) -> str:
        return "proper" if self.system.diffuse is None else self.system.convention

    def _out(self, series: Rows | Laid, *rows: Tensor, timed: bool = False) -> Any:
        """Results with the batch axes of the call, of the kind of its observations."""
        return series.door.out(*(value.reshape((*series.full, *value.shape[1:])) for value in rows), timed=timed)

    def _laid(self, where: str, y: Any, state: Any, u: Any, lengths: Any) -> Laid:
        """What a caller gave, as rows."""
        model = self.system
        door = Door(where, y, model.Q, model.d_obs)
        y = door.y
        try:
            full = tuple(broadcast(model.batch, y.shape[:-2]))
        except RuntimeError:
            raise ArgumentError(
                f"{where}: y has shape {tuple(y.shape)}, with the batch axes {tuple(y.shape[:-2])}; the model has "
                f"{tuple(model.batch)}"
            ) from None
        x = y.expand(*full, *y.shape[-2:]).reshape(math.prod(full), *y.shape[-2:])
        rows, length = x.shape[:2]
        start = self._check_state(where, rows, x, initial(where, model, full) if state is None else state)
        u = self._inputs(where, u, full, length, start)
        lengths = None if lengths is None else lengths_of(where, lengths, full, length, x.device)
        return Laid(door, full, start, x, lengths, u)

    def _filtered(self, where: str, y: Any, state: Any, u: Any, lengths: Any, moments: bool = True) -> Rows:
        """Without ``moments`` there may be only the likelihood."""
        laid = self._laid(where, y, state, u, lengths)
        start, lengths, length = laid.start, laid.lengths, laid.x.shape[1]
        found, steps, last, form = self._through(
            where, laid.x, start, laid.here, laid.full, laid.keep, lambda: None, moments
        )
        if moments:
            last = last._replace(steps=start.steps + length) if lengths is None else after(start, found, lengths)
        return Rows(laid.door, laid.full, start, found, steps, last, lengths, laid.u, form)

    def _smooth(
        self, where: str, y: Any, state: Any, u: Any, lengths: Any
    ) -> tuple[Laid | Rows, Gaussian, Tensor, Tensor, Form]:
        """The rows of a call, and what :meth:`_smoothed` says of them."""
        series, chain = self._chain(where, y, state, u, lengths)
        return series, *moments(chain, self.parallel), series.found.loglik, series.form

    def _smoothed(self, where: str, start: Belief, steps: Steps) -> tuple[Gaussian, Tensor, Tensor, Form]:
        """The moments of the states 0 .. T, covariances of neighbours, and the terms of the likelihood."""
        quick = by_kernel(start, steps, self._counted, self.parallel)
        if quick is not None:
            return *quick, "sequential"
        found, last, form = self._run(steps, start)
        check_determined(where, last)
        return *moments(posterior(start, found, steps, self.parallel), self.parallel), found.loglik, form

    def _run(
        self, steps: Steps, start: Belief, moments: bool = True, blame: Blame = lambda: None
    ) -> tuple[Pass, Belief, Form]:
        return run(steps, start, self.parallel, self._counted, blame, moments)

    def _inputs(self, where: str, u: Any, full: tuple[int, ...], length: int, start: Belief) -> Tensor | None:
        """Inputs as rows ``(rows, T or more, U)``."""
        if u is None:
            return self._check_inputs(where, None, (), start)
        u = as_tensors(where, model=self.system.Q, u=u)["u"]
        if u.dim() < 2 or u.shape[-2] < length:
            raise ArgumentError(f"{where}: u has shape {tuple(u.shape)}, expected (*batch, {length} or more, U)")
        try:
            u = u.expand(*full, *u.shape[-2:])
        except RuntimeError:
            raise ArgumentError(f"{where}: u has shape {tuple(u.shape)}, but the batch axes are {full}") from None
        u = u.reshape(len(start.mean), *u.shape[-2:])
        return self._check_inputs(where, u, u.shape[:2], start)

    def _future(self, where: str, series: Rows, horizon: int) -> Tensor | None:
        """The inputs of the steps after each series."""
        if series.u is None:
            return None
        rows, length = series.found.loglik.shape
        if series.u.shape[1] < length + horizon:
            raise ArgumentError(
                f"{where}: u has {series.u.shape[1]} steps, expected {length + horizon}: of {length} observations and "
                f"{horizon} to come"
            )
        first = series.u.new_full((rows,), length, dtype=torch.int64) if series.lengths is None else series.lengths
        index = first[:, None] + torch.arange(horizon, device=first.device)
        return series.u[torch.arange(rows, device=first.device)[:, None], index]

    def _beyond(self, where: str, series: Rows) -> Belief:
        """The belief at the step after the last of y; NaN where it is not known how to get there."""
        length = series.found.loglik.shape[1]
        start = series.start._replace(
            mean=series.found.mean[:, -1] if length else series.start.mean,
            cov=series.found.cov[:, -1] if length else series.start.cov,
            diffuse=series.found.diffuse[:, -1] if length else series.start.diffuse,
            steps=series.start.steps + length,
        )
        u = None if series.u is None else series.u[:, length : length + 1]
        move = self._next(where, series, start, u)
        if move is None:
            return start._replace(mean=start.mean * torch.nan, cov=start.cov * torch.nan)
        return predict(start, move)

    def _chain(self, where: str, y: Any, state: Any, u: Any, lengths: Any) -> tuple[Rows, Posterior]:
        """What the filter found, and the states given all data."""
        series = self._filtered(where, y, state, u, lengths)
        check_determined(where, series.last)
        return series, posterior(series.start, series.found, series.steps, self.parallel)

    def _corrected(self, series: Rows, chain: Posterior, draws: int, generator: torch.Generator | None) -> Tensor:
        """Draws of the model, moved by what the data differ from theirs (Durbin and Koopman 2002)."""
        path, y = simulate(series.start, series.steps, draws, generator)
        start, steps = (
            tree_map(lambda z: z.repeat(draws, *[1] * (z.dim() - 1)), part) for part in (series.start, series.steps)
        )
        steps = steps._replace(y=torch.where(steps.seen, y, 0))
        again, *_ = self._smoothed("simulate_posterior", start, steps)
        states, _ = moments(chain, self.parallel)
        return (path - again.mean[:, 1:]).unflatten(0, (draws, -1)) + states.mean[:, 1:]
