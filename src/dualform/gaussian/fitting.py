"""Maximum likelihood for any model with parameters, and what it found."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from dualform.core.calls import explained
from dualform.core.errors import ArgumentError
from dualform.core.options import suggestion
from dualform.gaussian.arrays import Door
from dualform.gaussian.constraints import kind, places
from dualform.gaussian.diagnostics import Diagnostics, diagnose
from dualform.gaussian.em import maximize_by_em
from dualform.gaussian.objective import Objective, rows_of
from dualform.gaussian.optimize import descend, minimize
from dualform.gaussian.parameters import Parameters

_GAIN = 1e-6
"""By how much a Newton step may still promise to raise the log-likelihood at a maximum, in nats."""
_METHODS = {"lbfgs": "L-BFGS", "em": "EM", "adam": "Adam"}
_FLAT = 1e-8
"""The least curvature of a maximum, in parameters in which each alone has the curvature 1."""


@dataclass(frozen=True)
class Fit:
    """A maximum of a likelihood, or what was found in its place; ``print(fit.summary())`` shows it.

    ``converged`` is judged by exact second derivatives: the gradient is zero but for a Newton step that promises less
    than 1e-6 nats, and the Hessian is negative definite, both in the parameters that are not at a bound. ``message``
    says what else it is. Standard errors are from the inverse of that Hessian, by the delta method for constrained
    parameters; those of parameters at a bound are NaN, as there is no such approximation.

    ``aic`` is ``-2 log_likelihood + 2 k`` and ``bic`` ``-2 log_likelihood + k log n``. With the convention
    "statsmodels" of an exactly diffuse start, k counts the diffuse states besides the parameters and n all
    observations; with "kfas" k is the number of parameters, and n leaves out as many observations.
    """

    y: Any
    names: list[str]
    values: Tensor  # (K,)
    standard_errors: Tensor  # (K,)
    covariance: Tensor  # (K, K)
    log_likelihood: float
    n_obs: int  # numbers that are not missing
    n_diffuse: int
    convention: str
    converged: bool
    message: str
    at_bound: list[str]
    iterations: int
    evaluations: int
    options: dict[str, Any] = field(default_factory=dict, repr=False)
    fitted: Any = field(default=None, repr=False)  # the model, or that of all rows as it was left
    row: int | None = None  # among those

    @cached_property
    def model(self) -> Any:
        """The model as it was fitted; one of many is taken from among them when it is asked for."""
        return self.fitted if self.row is None else self.fitted.row(self.row)

    @property
    def aic(self) -> float:
        """Akaike's information criterion."""
        return 2 * self._counted[0] - 2 * self.log_likelihood

    @property
    def aicc(self) -> float:
        """Akaike's criterion corrected for short series: ``aic + 2 k (k + 1) / (n - k - 1)``; infinite if n < k + 2."""
        k, n = self._counted
        return self.aic + 2 * k * (k + 1) / (n - k - 1) if n > k + 1 else math.inf

    @property
    def bic(self) -> float:
        """Schwarz's information criterion."""
        k, n = self._counted
        return k * math.log(n) - 2 * self.log_likelihood

    @property
    def _counted(self) -> tuple[int, int]:
        k, d = len(self.names) + getattr(self.model, "concentrated", 0), self.n_diffuse
        if self.convention == "statsmodels":
            return k + d, self.n_obs
        return k, self.n_obs - d - getattr(self.model, "burn", 0)

    def __getitem__(self, name: str) -> float:
        """A parameter by its name.

        Raises:
            ArgumentError: for an unknown name.
        """
        if name not in self.names:
            raise ArgumentError(f"Fit: {name!r} is no estimated parameter", hint=suggestion(name, self.names))
        return self.values[self.names.index(name)].item()

    def forecast(self, horizon: int, **options: Any) -> Any:
        """Forecast what follows the series, by the model as it was fitted.

        Args:
            horizon: how many steps, 1 or more.
            options: of the model's ``forecast``, besides those of the fit.

        Raises:
            ArgumentError: as the model's ``forecast``.
        """
        return self.model.forecast(self.y, horizon, **{**self.options, **options})

    def diagnostics(self, lags: int | None = None) -> Diagnostics:
        """Tests of the standardised innovations, whose p-values are small where the model is not right.

        Args:
            lags: of the Ljung-Box test.

        Raises:
            ArgumentError: for a model of several observations at a time, and as
                :func:`~dualform.gaussian.diagnostics.diagnose`.
        """
        with torch.no_grad():
            series = self.model.innovations(self._tensor(), **self.options)
        if series.innovation.dim() != 2 or series.innovation.shape[-1] != 1:
            raise ArgumentError(
                f"Fit.diagnostics: innovations have shape {tuple(series.innovation.shape)}, expected (T, 1)"
            )
        standard = series.innovation[:, 0] / series.cov[:, 0, 0].sqrt()
        standard[: getattr(self.model, "burn", 0)] = torch.nan
        return diagnose(standard, lags)

    def _tensor(self) -> Tensor:
        return Door("Fit.diagnostics", self.y, _like(self.model), _width(self.model)).y

    def summary(self, lags: int | None = None) -> str:
        """A table of the parameters, the criteria and the diagnostics.

        Args:
            lags: of the Ljung-Box test.
        """
        width = max([len(name) for name in self.names] + [9])
        title = getattr(self.model, "title", kind(self.model))
        head = [
            f"{title}, {self.n_obs} observations, {self.n_diffuse} diffuse states",
            f"log-likelihood {self.log_likelihood:.4f} ({self.convention}), AIC {self.aic:.3f}, BIC {self.bic:.3f}",
            ("converged: " if self.converged else "NOT CONVERGED: ") + self.message,
            "",
            f"{'':{width}}  {'estimate':>12}  {'std. error':>12}  {'95 % from':>12}  {'to':>12}",
        ]
        rows = []
        for name, value, error in zip(self.names, self.values.tolist(), self.standard_errors.tolist(), strict=True):
            low, high = value - 1.959964 * error, value + 1.959964 * error
            shown = "  ".join("            " if math.isnan(v) else f"{v:12.6g}" for v in (error, low, high))
            note = "  at its bound" if name in self.at_bound else ""
            rows.append(f"{name:{width}}  {value:12.6g}  {shown}{note}".rstrip())
        try:
            found = self.diagnostics(lags)
        except ArgumentError:  # several components, or too few innovations
            return "\n".join([*head, *rows])
        tests = [
            (f"Ljung-Box, {found.lags} lags", found.ljung_box, ""),
            ("Jarque-Bera", found.normality, f"skewness {found.skewness:.2f}, kurtosis {found.kurtosis:.2f}"),
            ("heteroskedasticity", found.heteroskedasticity, "last third / first third"),
        ]
        lines = [f"{name:20}  {t.value:10.3f}  p = {t.p_value:.3f}  {more}".rstrip() for name, t, more in tests]
        return "\n".join([*head, *rows, "", *lines])


@explained
def fit(
    model: nn.Module,
    y: Any,
    method: Literal["lbfgs", "em", "adam"] = "lbfgs",
    *,
    fixed: Mapping[str, Any] | Collection[str] = (),
    start: Mapping[str, Any] | Literal["data", "current"] = "data",
    max_iter: int | None = None,
    **options: Any,
) -> Any:
    """Maximise the log-likelihood over the parameters of a model, which keeps what was found.

    A model that was expanded, ``model.expand(B)``, is fitted to B series at once, each with parameters of its own: one
    pass of the filter takes them all, and each has its own line search.

    Args:
        model: a sum of components, :class:`~dualform.gaussian.sarimax.Sarimax`, a ``LinearGaussian`` of
            ``nn.Parameter``, or any module with ``log_likelihood(y)``. Its parameters stay within their constraints by
            ``torch.nn.utils.parametrize``.
        y: as in :meth:`~dualform.gaussian.series.Series.filter`.
        method: ``"lbfgs"``, with gradients by automatic differentiation; ``"em"``, by moments of the smoothed states
            (:func:`~dualform.gaussian.em.maximize_by_em` says for which parameters), which never lowers the likelihood
            and comes slowly to the maximum; or ``"adam"``, whose steps do not ask whether the likelihood rises.
        fixed: names of parameters that stay as they are, or a mapping to the values they get.
        start: where to begin: ``"data"``, where the model guesses by y; ``"current"``, at the present values; or a
            mapping of some values, besides the guess.
        max_iter: how many directions of L-BFGS, 200 by default; how many iterations of EM, or steps of Adam, 1000 by
            default.
        options: of ``log_likelihood``, such as ``u``, or ``lengths`` of several series.

    Returns:
        What was found, converged or not: a :class:`Fit`, or a list of them for an expanded model.

    Raises:
        ArgumentError: for an unknown method or name, a model without parameters to estimate, series that are not as
            many as the rows of the model, one without a number, and where the likelihood has no value at the start.

    References:
        Durbin and Koopman (2012), "Time series analysis by state space methods", chapter 7.
    """
    if method not in _METHODS:
        raise ArgumentError(f"fit: method is {method!r}", hint=suggestion(str(method), [*_METHODS]))
    count = (200 if method == "lbfgs" else 1000) if max_iter is None else max_iter
    if isinstance(start, str) and start not in ("data", "current"):
        raise ArgumentError(f"fit: start is {start!r}, expected 'data', 'current' or a mapping of values")
    known = {place.name: place for place in places(model)}
    for name in [*fixed, *(start if isinstance(start, Mapping) else ())]:
        if name not in known:
            raise ArgumentError(f"fit: {name!r} is no estimated parameter", hint=suggestion(name, [*known]))
    kept = {name: known[name].value.detach().clone() for name in fixed}
    values = Door("fit", y, _like(model), _width(model)).y
    if values.isnan().all():
        raise ArgumentError("fit: y has no observation, all values are missing")
    rows = rows_of(model)
    if values.dim() != (3 if rows else 2) or (rows and len(values) != rows):
        wanted = f"({rows}, T, M), a series for each row of the model" if rows else "one series (T, M)"
        raise ArgumentError(
            f"fit: y has shape {tuple(values.shape)}, expected {wanted}", hint="model.expand(B) fits B series at once"
        )
    if "lengths" in options:
        keep = torch.arange(values.shape[-2]) < torch.as_tensor(options["lengths"])[:, None]
        values = torch.where(keep.to(values.device)[..., None], values, torch.nan)
    if rows and (empty := values.isnan().flatten(1).all(1)).any():
        raise ArgumentError(f"fit: row {int(empty.nonzero()[0])} of y has no observation, all values are missing")
    if start != "current":
        getattr(model, "begin", lambda y: None)(values)
    for name, value in {
        **kept,
        **(start if isinstance(start, Mapping) else {}),
        **(fixed if isinstance(fixed, Mapping) else {}),
    }.items():
        known[name].assign(value)
    free = [place for name, place in known.items() if name not in fixed]
    if not free:
        how = (
            "torch.nn.Parameter(...) as a matrix"
            if isinstance(model, Parameters)
            else "a number fixes one, None leaves it"
        )
        raise ArgumentError("fit: the model has no parameter to estimate", hint=how)
    problem = Objective(model, values, free, options)
    begin = torch.ones_like(problem.point())
    if not problem(begin)[0].isfinite().all():
        problem.value()  # raises what is wrong
        raise ArgumentError("fit: the likelihood is not finite where the optimiser begins", hint="start={...}")
    if method == "em":
        with torch.no_grad():
            reached = maximize_by_em(model, values, free, options, count)
        found = reached.converged, len(reached.log_likelihood) - 1, len(reached.log_likelihood)
    else:
        least = (minimize if method == "lbfgs" else descend)(problem, begin, max_iter=count)
        problem.move(least.x)
        found = least.converged, least.iterations, least.evaluations
    prepared = getattr(model, "prepared", lambda y: y)(values)
    fits = _judged(problem, prepared, ~found[0], found[1:], _METHODS[method])
    return fits if problem.rows else fits[0]


def _judged(problem: Objective, numbers: Tensor, stopped: Tensor, counts: tuple[int, int], method: str) -> list[Fit]:
    """What the optimiser left in each row, judged by the Hessian there."""
    series = (numbers if problem.rows else numbers[None]).flatten(1)
    seen = ~series.isnan()
    n = seen.sum(1)
    away = torch.where(seen, series - series.nanmean(1, keepdim=True), 0)
    scale = torch.where(n > 1, away.double().square().sum(1) / (n - 1).clamp_min(1), 1.0)
    log_likelihood, gradient, H = problem.hessian()
    values, J = problem.jacobian()
    bound = problem.at_bound(scale)
    held = bound.unsqueeze(-1) | bound.unsqueeze(-2)
    unit = torch.diag_embed(bound.to(J.dtype))
    # The curvature in the constrained values; that of the constraints themselves would count while a slope is left.
    slopes = torch.where(held, unit, J).mT.cpu(), torch.where(bound, 0, gradient).unsqueeze(-1).cpu()
    weights = torch.linalg.lstsq(*slopes).solution.squeeze(-1).to(gradient)
    information = problem.bending(torch.where(bound, 0, weights)) - H
    at = _Points(*(x.cpu() for x in (gradient, H, J, torch.where(held, unit, information), bound, problem.reach())))
    covariance, good, messages = at.verdicts()
    system = problem.model.build() if hasattr(problem.model, "build") else problem.model
    diffuse = getattr(system, "diffuse", None)
    lengths = torch.as_tensor(problem.options.get("lengths", [problem.y.shape[-2]] * len(values))).tolist()
    covariance, names, found = covariance.to(values.device), problem.names(), []
    fitted = problem.model.all_rows() if problem.rows else problem.model
    errors = covariance.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    rows = zip(log_likelihood.tolist(), n.tolist(), stopped.tolist(), at.bound.tolist(), good, messages, strict=True)
    for row, (reached, count, cut, at_bound, converged, message) in enumerate(rows):
        if not converged and cut:
            message += f", after {counts[0]} iterations of {method}"
        bounds = [name for name, b in zip(names, at_bound, strict=True) if b]
        message += f"; at the bound: {', '.join(bounds)}" if bounds else ""
        found.append(
            Fit(
                y=problem.y[row, : lengths[row]] if problem.rows else problem.y,
                names=names,
                values=values[row],
                standard_errors=errors[row],
                covariance=covariance[row],
                log_likelihood=reached,
                n_obs=count,
                n_diffuse=0 if diffuse is None else diffuse.shape[-1],
                convention="proper" if diffuse is None else system.convention,
                converged=converged,
                message=message,
                at_bound=bounds,
                iterations=counts[0],
                evaluations=counts[1],
                options={k: v for k, v in problem.options.items() if k != "lengths"},
                fitted=fitted,
                row=row if problem.rows else None,
            )
        )
    return found


class _Points(NamedTuple):
    """Where each of R series was left: derivatives of the log-likelihood there."""

    gradient: Tensor  # (R, K), by the unconstrained parameters
    H: Tensor  # (R, K, K)
    J: Tensor  # (R, K, K), of the constrained values
    information: Tensor  # (R, K, K), the negative curvature in the constrained values; the identity at bounds
    bound: Tensor  # (R, K), bool
    reach: Tensor  # (R, K), how far the bounds are

    def verdicts(self) -> tuple[Tensor, list[bool], list[str]]:
        """The covariances of the constrained values, NaN at bounds; which rows are a maximum; and a word on each."""
        bound, slope = self.bound, torch.where(self.bound, 0, self.gradient)
        size = self.information.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(slope.dtype).tiny).rsqrt()
        curved = size.unsqueeze(-1) * self.information * size.unsqueeze(-2)
        regular = curved.isfinite().flatten(1).all(1)
        eye = torch.eye(curved.shape[-1], dtype=curved.dtype)
        curvatures, axes = torch.linalg.eigh(torch.where(regular[:, None, None], curved, -eye))
        concave = (curvatures > _FLAT).all(1)
        half = size.unsqueeze(-1) * axes * torch.where(concave[:, None], curvatures, 1).rsqrt().unsqueeze(-2)
        gain = (half.mT @ slope.unsqueeze(-1)).square().sum((-2, -1)) / 2
        root = torch.where(bound.unsqueeze(-2), 0, self.J) @ half
        covariance = torch.where(concave[:, None, None], root @ root.mT, torch.nan)
        covariance = covariance.masked_fill(bound.unsqueeze(-1) | bound.unsqueeze(-2), torch.nan)
        pull = torch.where(bound, self.gradient * self.reach, 0).abs().amax(1)
        rising = ((self.H.diagonal(dim1=-2, dim2=-1) > _GAIN) & bound).any(1)
        good = concave & (gain < _GAIN) & ~(pull > 100 * _GAIN) & ~rising
        rows = zip(concave.tolist(), gain.tolist(), pull.tolist(), rising.tolist(), strict=True)
        return covariance, good.tolist(), [_word(*row) for row in rows]


def _word(concave: bool, gain: float, pull: float, rising: bool) -> str:
    """What the derivatives at a point say of it."""
    if rising:
        return "the likelihood rises where a parameter leaves its bound"
    if pull > 100 * _GAIN:
        return f"the likelihood still rises on the way to a bound, by about {pull:.1e} nats"
    if not concave:
        return "the Hessian is not negative definite: a parameter is not determined, or this is a saddle"
    return f"a Newton step would gain {gain:.1e} nats"


def _like(model: nn.Module) -> Tensor:
    return next(tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point())


def _width(model: Any) -> int:
    return getattr(model, "d_obs", 1)
