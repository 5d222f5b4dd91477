"""Linear-Gaussian models in continuous time, observed at any times, discretised exactly."""

from typing import Any, Literal, NamedTuple, Unpack

import numpy as np
import torch
from torch import Tensor

from dualform.core.calls import explained
from dualform.core.discretize import discretize_dense, discretize_noise
from dualform.core.errors import ArgumentError
from dualform.core.linalg import as_tensors, check_finite
from dualform.core.shapes import broadcast
from dualform.gaussian.belief import Belief
from dualform.gaussian.forecasts import Forecast
from dualform.gaussian.initial import stationary
from dualform.gaussian.model import LinearGaussian
from dualform.gaussian.parameters import Parameters, Terms
from dualform.gaussian.recurrent import Innovation, Updated
from dualform.gaussian.results import Filtered, Smoothed


class Interval(NamedTuple):
    """A transition over an interval: ``h' = A h + c + B u + q``, ``q ~ N(0, Q)``."""

    A: Tensor  # (..., N, N)
    Q: Tensor  # (..., N, N)
    c: Tensor | None  # (..., N)
    B: Tensor | None  # (..., N, U)


@explained
class ContinuousLinearGaussian(Parameters):
    """A linear-Gaussian model in continuous time, an ``nn.Module``.

        dh = (A h + c + B u) dt + S dw,      w of the spectral density Q
        y_k = C h(t_k) + d + D u_k + eps_k,  eps_k ~ N(0, R)

    Between observations the state moves by ``exp(A dt)``, and its noise has the covariance of Van Loan's integral:
    exact for any interval, without a step size. An input u_k is constant over the interval that leads to t_k.

    ``at(times)`` is the :class:`~dualform.gaussian.model.LinearGaussian` of those times, whose matrices vary in time;
    the methods with ``times`` are its methods.

    Args:
        A: drift ``(N, N)``, in 1 / (the unit of time).
        C: emission ``(M, N)``.
        Q: spectral density of the noise ``(N, N)``, or ``(K, K)`` with S; the covariance that it adds per unit of time.
        R: covariance of the observation noise ``(M, M)``.
        m0: prior mean ``(N,)``.
        P0: prior covariance; a number, ``"stationary"`` or ``"diffuse"``, as in ``LinearGaussian``.
        prior: ``"first"``: m0 and P0 are of the state at the first observation. ``"before"``: at the time that the
            methods are given as ``start``.
        terms: c, d, B, D, S, ``diffuse`` and ``convention``, as in ``LinearGaussian``; ``time_varying`` may name C, R,
            d and D, whose axis of time is that of the observations.

    Raises:
        ArgumentError: as ``LinearGaussian``.

    Example:
        >>> import dualform as df
        >>> walk = df.gaussian.ContinuousLinearGaussian([[0.0]], [[1.0]], [[2.0]], [[0.5]], P0="diffuse")
        >>> walk.smooth([1.0, 2.0, 1.5], times=[0.0, 0.1, 3.0]).mean.shape
        torch.Size([3, 1])

    References:
        Jazwinski (1970), "Stochastic processes and filtering theory", chapter 7; Van Loan (1978), "Computing integrals
        involving the matrix exponential"; Jones (1980), "Maximum likelihood fitting of ARMA models to time series with
        missing observations", for irregular times.
    """

    def __init__(
        self,
        A: Any,
        C: Any,
        Q: Any,
        R: Any,
        m0: Any = None,
        P0: Any = None,
        *,
        prior: Literal["before", "first"] = "first",
        **terms: Unpack[Terms],
    ):
        super().__init__({"A": A, "C": C, "Q": Q, "R": R, "m0": m0, "P0": P0}, prior, terms)
        if moving := [name for name in self.time_varying if name not in "CRdD"]:
            raise ArgumentError(
                f"ContinuousLinearGaussian: {moving[0]} varies in time, expected only C, R, d and D to",
                hint="a drift that changes is a transition of its own for each interval: LinearGaussian",
            )

    def over(self, dt: Any) -> Interval:
        """The transition over intervals ``dt`` ``(...)``, whose axes stand after those of a batch of models.

        Raises:
            ArgumentError: for an interval that is negative or not finite.
        """
        where = f"{type(self).__name__}.over"
        dt = as_tensors(where, model=self.A, dt=dt)["dt"].to(self.A)
        check_finite(where, {"dt": dt})
        if (dt < 0).any():
            raise ArgumentError(f"{where}: dt is {dt[dt < 0][0].item():g}, expected 0 or more", hint="sort by time")
        S, Q = self.S, self.Q
        return self._over(self.A, Q if S is None else S @ Q @ S.mT, self.c, self.B, dt)

    def at(self, times: Any, *, start: float | Tensor | None = None) -> LinearGaussian:
        """The model at times ``(*batch, T)``, in the order of the observations.

        Args:
            times: they may stand still, as where two sensors report at once, but not go back.
            start: of the prior; with ``prior="before"`` only, there it is needed.

        Raises:
            ArgumentError: for times that go back or are not finite, and a start that is missing or not asked for.
        """
        return self._at(f"{type(self).__name__}.at", times, start, None)

    def filter(
        self, y: Any, times: Any, *, start: Any = None, state: Any = None, u: Any = None, lengths: Any = None
    ) -> Filtered:
        """:meth:`LinearGaussian.filter` of observations y ``(*batch, T, M)`` at times ``(T,)`` or ``(*batch, T)``.

        Raises:
            ArgumentError: as :meth:`at` and ``LinearGaussian.filter``.
        """
        return self._at(f"{type(self).__name__}.filter", times, start, lengths, y).filter(
            y, state, u=u, lengths=lengths
        )

    def log_likelihood(
        self, y: Any, times: Any, *, start: Any = None, u: Any = None, lengths: Any = None, burn: int = 0
    ) -> Tensor:
        """:meth:`LinearGaussian.log_likelihood` of observations at times.

        Raises:
            ArgumentError: as :meth:`filter`.
        """
        model = self._at(f"{type(self).__name__}.log_likelihood", times, start, lengths, y)
        return model.log_likelihood(y, u=u, lengths=lengths, burn=burn)

    def smooth(self, y: Any, times: Any, *, start: Any = None, u: Any = None, lengths: Any = None) -> Smoothed:
        """:meth:`LinearGaussian.smooth` of observations at times; a missing observation asks for a state between them.

        Raises:
            ArgumentError: as :meth:`filter`.
        """
        return self._at(f"{type(self).__name__}.smooth", times, start, lengths, y).smooth(y, u=u, lengths=lengths)

    def simulate_posterior(
        self,
        y: Any,
        times: Any,
        draws: int = 1,
        *,
        start: Any = None,
        u: Any = None,
        lengths: Any = None,
        generator: torch.Generator | None = None,
    ) -> Any:
        """:meth:`LinearGaussian.simulate_posterior` of observations at times.

        Raises:
            ArgumentError: as :meth:`filter`.
        """
        model = self._at(f"{type(self).__name__}.simulate_posterior", times, start, lengths, y)
        return model.simulate_posterior(y, draws, u=u, lengths=lengths, generator=generator)

    def forecast(self, y: Any, times: Any, ahead: Any, *, start: Any = None, u: Any = None) -> Forecast:
        """Moments of observations at the times ``ahead`` ``(*batch, horizon)``, after those of y at ``times``.

        Raises:
            ArgumentError: as :meth:`filter`, and where there are no times ahead.
        """
        where = f"{type(self).__name__}.forecast"
        given = as_tensors(where, times=times, ahead=ahead)
        _check_count(where, given["times"], y)
        batch = broadcast(given["times"].shape[:-1], given["ahead"].shape[:-1])
        both = torch.cat([value.expand(*batch, value.shape[-1]) for value in given.values()], -1)
        return self._at(where, both, start, None).forecast(y, given["ahead"].shape[-1], u=u)

    def sample(
        self, times: Any, batch: int = 1, *, start: Any = None, u: Any = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw observations at times, and the states behind them, as :meth:`LinearGaussian.sample`.

        Raises:
            ArgumentError: as :meth:`at`.
        """
        model = self._at(f"{type(self).__name__}.sample", times, start, None)
        return model.sample(model.A.shape[-3], batch, u=u, generator=generator)

    # One observation after the other.

    def init_state(self, batch: int) -> Belief:
        """The prior, for each row: under ``prior="first"`` at the first observation, which :meth:`update` takes."""
        return self._still().init_state(batch)

    def predict(self, belief: Any, dt: Any, *, u: Tensor | None = None) -> Belief:
        """The belief after an interval: a number, or one for each row ``(B,)``.

        Under ``prior="first"`` too, the transition is made: where the prior is of the first observation, that is given
        to :meth:`update` as it is.

        Raises:
            ArgumentError: as :meth:`over`, and for a belief that does not fit.
        """
        step, still = self.over(dt), self._still()
        matrices: dict[str, Tensor] = {"A": step.A, "Q": step.Q}
        c = step.c
        if u is not None and step.B is not None:
            moved = (step.B @ u.to(step.B).unsqueeze(-1)).squeeze(-1)
            c = moved if c is None else c + moved
        elif u is not None or step.B is not None:
            raise ArgumentError(f"{type(self).__name__}.predict: inputs u and B travel together: give both or none")
        if c is not None:
            matrices["c"] = c
        if len(belief) == 4:
            belief = belief._replace(steps=belief.steps.clamp_min(1))
        return still.predict(belief, **matrices)

    def update(
        self, belief: Any, y: Any, *, C: Any = None, R: Any = None, d: Any = None, u: Tensor | None = None
    ) -> Updated:
        """:meth:`LinearGaussian.update`.

        Raises:
            ArgumentError: as there.
        """
        return self._still(u).update(belief, y, C=C, R=R, d=d, u=u)

    def innovation(
        self, belief: Any, y: Any, *, C: Any = None, R: Any = None, d: Any = None, u: Tensor | None = None
    ) -> Innovation:
        """:meth:`LinearGaussian.innovation`.

        Raises:
            ArgumentError: as there.
        """
        return self._still(u).innovation(belief, y, C=C, R=R, d=d, u=u)

    # What the methods share.

    def _over(self, A: Tensor, Q: Tensor, c: Tensor | None, B: Tensor | None, dt: Tensor) -> Interval:
        Abar, Qbar = discretize_noise(A, Q, dt)
        driven = [value for value in (None if c is None else c.unsqueeze(-1), B) if value is not None]
        if not driven:
            return Interval(Abar, Qbar, None, None)
        axes = broadcast(A.shape[:-2], *(value.shape[:-2] for value in driven))
        both = torch.cat([value.expand(*axes, *value.shape[-2:]) for value in driven], -1)
        _, moved = discretize_dense(A.expand(*axes, *A.shape[-2:]), both, dt)
        if c is None:
            return Interval(Abar, Qbar, None, moved)
        return Interval(Abar, Qbar, moved[..., 0], None if B is None else moved[..., 1:])

    def _at(self, where: str, times: Any, start: Any, lengths: Any, y: Any = None) -> LinearGaussian:
        if getattr(getattr(times, "dtype", None), "kind", "") == "M":
            raise ArgumentError(
                f"{where}: times are dates, expected numbers in the unit of the model",
                hint="such as days: (times - times[0]) / numpy.timedelta64(1, 'D')",
            )
        given = as_tensors(where, times=times) if start is None else as_tensors(where, times=times, start=start)
        t = given["times"].to(self.A.device)
        if t.dim() == 0:
            raise ArgumentError(f"{where}: times is one number, expected (T,) or (*batch, T)")
        _check_count(where, t, y)
        if (start is None) != (self.prior == "first"):
            needed = "none with prior='first'" if start is not None else "the time of the prior, with prior='before'"
            raise ArgumentError(f"{where}: start is {start}, expected {needed}")
        first = t[..., :1] if start is None else given["start"].to(t).unsqueeze(-1).expand(*t.shape[:-1], 1)
        dt = torch.cat([first, t], -1).diff(dim=-1)
        if lengths is not None:
            last = torch.as_tensor(lengths, device=t.device)[..., None]
            dt = torch.where(torch.arange(t.shape[-1], device=t.device) < last, dt, 0)
        check_finite(where, {"times": torch.where(dt.isfinite(), 0, t.expand(dt.shape))})
        if (dt < 0).any():
            place = (dt < 0).nonzero()[0].tolist()
            late, t = place[-1], t.expand(dt.shape)[tuple(place[:-1])]
            before = f"the one before, {t[late - 1]:g}" if late else f"the start, {first.flatten()[0]:g}"
            row = ", ".join(str(index) for index in place)
            raise ArgumentError(
                f"{where}: times[{row}] is {t[late]:g}, earlier than {before}", hint="sort the observations by time"
            )
        Q = self.Q if self.S is None else self.S @ self.Q @ self.S.mT
        c, B = (None if value is None else value.unsqueeze(-k) for value, k in ((self.c, 2), (self.B, 3)))
        step = self._over(self.A.unsqueeze(-3), Q.unsqueeze(-3), c, B, dt.to(self.A))
        varying = (*self.time_varying, *(name for name, value in zip("AQcB", step, strict=True) if value is not None))
        return self._discrete(step, varying)

    def _still(self, u: Tensor | None = None) -> LinearGaussian:
        """A model that sees as this one does, and does not move: for the two halves of a step."""
        eye = torch.eye(self.d_state, dtype=self.A.dtype, device=self.A.device)
        return self._discrete(Interval(eye, torch.zeros_like(eye), None, None), self.time_varying, seen=u is not None)

    def _discrete(self, step: Interval, varying: tuple[str, ...], seen: bool = True) -> LinearGaussian:
        m0, P0 = self.m0, self.P0
        if self.stationary:
            size = self.A.detach().abs().sum(-1).amax()
            dt = torch.where(size > 0, 1 / size, 1.0)
            one = self.over(dt)
            rest = LinearGaussian.like(self, (), A=one.A, Q=one.Q, c=one.c, B=None, S=None)
            m0, P0 = stationary(type(self).__name__, rest, "exp(A dt)")
        made = LinearGaussian.like(
            self, varying, A=step.A, Q=step.Q, c=step.c, B=step.B, S=None, m0=m0, P0=P0, D=self.D if seen else None
        )
        made.stationary = False
        return made


def _check_count(where: str, times: Tensor, y: Any) -> None:
    """There is a time for each observation, and no other."""
    try:
        shape: tuple[int, ...] = tuple(np.shape(y)) if isinstance(y, list | tuple) else tuple(getattr(y, "shape", ()))
    except ValueError:  # ragged lists, which are explained where they are read
        return
    if shape and (count := shape[0 if len(shape) < 3 else -2]) != times.shape[-1]:
        raise ArgumentError(f"{where}: there are {times.shape[-1]} times, but {count} observations")
