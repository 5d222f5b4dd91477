"""Maximum likelihood for any model with parameters, and what it found."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dualform.core.calls import explained
from dualform.core.errors import ArgumentError
from dualform.core.options import suggestion
from dualform.gaussian.arrays import Door
from dualform.gaussian.constraints import Place, kind, places
from dualform.gaussian.diagnostics import Diagnostics, diagnose
from dualform.gaussian.optimize import minimize

_GAIN = 1e-6
"""By how much a Newton step may still promise to raise the log-likelihood at a maximum, in nats."""
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

    model: Any
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

    @property
    def aic(self) -> float:
        """Akaike's information criterion."""
        return 2 * self._counted[0] - 2 * self.log_likelihood

    @property
    def bic(self) -> float:
        """Schwarz's information criterion."""
        k, n = self._counted
        return k * math.log(n) - 2 * self.log_likelihood

    @property
    def _counted(self) -> tuple[int, int]:
        k, d = len(self.names), self.n_diffuse
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
        head = [
            f"{kind(self.model)}, {self.n_obs} observations, {self.n_diffuse} diffuse states",
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
    method: Literal["lbfgs"] = "lbfgs",
    *,
    fixed: Mapping[str, Any] | Collection[str] = (),
    start: Mapping[str, Any] | Literal["data", "current"] = "data",
    max_iter: int = 200,
    **options: Any,
) -> Fit:
    """Maximise the log-likelihood of one series over the parameters of a model, which keeps what was found.

    Args:
        model: a sum of components, :class:`~dualform.gaussian.sarimax.Sarimax`, a ``LinearGaussian`` of
            ``nn.Parameter``, or any module with ``log_likelihood(y)``. Its parameters stay within their constraints by
            ``torch.nn.utils.parametrize``.
        y: as in :meth:`~dualform.gaussian.series.Series.filter`.
        method: ``"lbfgs"``, with gradients by automatic differentiation.
        fixed: names of parameters that stay as they are, or a mapping to the values they get.
        start: where to begin: ``"data"``, where the model guesses by y; ``"current"``, at the present values; or a
            mapping of some values, besides the guess.
        max_iter: how many directions of L-BFGS.
        options: of ``log_likelihood``, such as ``u``.

    Returns:
        What was found, converged or not: see :class:`Fit`.

    Raises:
        ArgumentError: for an unknown method or name, a model without parameters to estimate, a batch of series, a
            series without a number, and where the likelihood has no value at the start.

    References:
        Durbin and Koopman (2012), "Time series analysis by state space methods", chapter 7.
    """
    if method != "lbfgs":
        raise ArgumentError(f"fit: method is {method!r}", hint="'lbfgs' is known")
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
    if values.dim() != 2:
        raise ArgumentError(f"fit: y has shape {tuple(values.shape)}, expected one series (T, M)")
    if start != "current":
        getattr(model, "begin", lambda y: None)(y)
    for name, value in {
        **kept,
        **(start if isinstance(start, Mapping) else {}),
        **(fixed if isinstance(fixed, Mapping) else {}),
    }.items():
        known[name].assign(value)
    free = [place for name, place in known.items() if name not in fixed]
    if not free:
        raise ArgumentError("fit: the model has no parameter to estimate", hint="a number fixes one, None leaves it")
    problem = _Problem(model, y, free, options)
    begin = problem.point()
    if not math.isfinite(problem(torch.ones_like(begin))[0].item()):
        problem.value()  # raises what is wrong
        raise ArgumentError("fit: the likelihood is not finite where the optimiser begins", hint="start={...}")
    found = minimize(problem, torch.ones_like(begin), max_iter=max_iter)
    problem.move(found.x)
    return _judged(problem, bool(found.converged), found.iterations, found.evaluations)


class _Problem:
    """The negative log-likelihood over scaled unconstrained parameters: 1 where the optimiser begins."""

    def __init__(self, model: Any, y: Any, free: list[Place], options: dict[str, Any]):
        self.model, self.y, self.options, self.free = model, y, options, free
        self.tensors: list[Tensor] = [place.free for place in free]
        begin = self.point()
        floors = [torch.full((1, p.free.numel()), getattr(p.constraint, "floor", 0.0)) for p in free]
        sizes = torch.maximum(begin.abs(), torch.cat(floors, 1).to(begin))
        self.scale = torch.where(sizes > 0, sizes, 1.0)
        self.offset = begin - self.scale

    def point(self) -> Tensor:
        return torch.cat([tensor.detach().reshape(1, -1).double() for tensor in self.tensors], 1)

    @torch.no_grad()
    def move(self, z: Tensor) -> None:
        x, at = (self.offset + self.scale * z)[0], 0
        for tensor in self.tensors:
            tensor.copy_(x[at : at + tensor.numel()].view(tensor.shape))
            at += tensor.numel()

    def value(self) -> Tensor:
        with torch.enable_grad():
            return -self.model.log_likelihood(self.y, **self.options)

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        self.move(z)
        try:
            value = self.value()
            gradient = self.flat(torch.autograd.grad(value, self.tensors, allow_unused=True))
        except ArgumentError:  # a covariance that is not positive definite, a model that is not stationary
            return z.new_full((1,), torch.inf), torch.zeros_like(z)
        return value.detach().double().reshape(1), gradient[None] * self.scale

    def flat(self, gradients: Any) -> Tensor:
        pairs = zip(gradients, self.tensors, strict=True)
        return torch.cat([(torch.zeros_like(t) if g is None else g).reshape(-1).double() for g, t in pairs])

    def hessian(self) -> tuple[float, Tensor, Tensor]:
        """The log-likelihood, its gradient and its Hessian, in the unconstrained parameters."""
        value = -self.value()
        gradient = self.flat(torch.autograd.grad(value, self.tensors, create_graph=True, allow_unused=True))
        rows = [self.flat(torch.autograd.grad(g, self.tensors, retain_graph=True, allow_unused=True)) for g in gradient]
        H = torch.stack(rows)
        return value.item(), gradient.detach(), (H + H.mT) / 2

    def jacobian(self) -> tuple[Tensor, Tensor]:
        """The constrained values, and their derivatives by the unconstrained ones."""
        with torch.enable_grad():
            values = self.constrained()
            rows = [
                self.flat(torch.autograd.grad(v, self.tensors, retain_graph=True, allow_unused=True)) for v in values
            ]
        return values.detach(), torch.stack(rows)

    def bending(self, weights: Tensor) -> Tensor:
        """The Hessian of a weighted sum of the constrained values, by the unconstrained ones."""
        with torch.enable_grad():
            total = (weights * self.constrained()).sum()
            gradient = self.flat(torch.autograd.grad(total, self.tensors, create_graph=True, allow_unused=True))
            if not gradient.requires_grad:
                return torch.zeros(len(weights), len(weights), dtype=weights.dtype, device=weights.device)
            rows = [
                self.flat(torch.autograd.grad(g, self.tensors, retain_graph=True, allow_unused=True)) for g in gradient
            ]
        return torch.stack(rows)

    def constrained(self) -> Tensor:
        """The constrained values in a row."""
        return torch.cat([place.value.reshape(-1).double() for place in self.free])

    def names(self) -> list[str]:
        parts = []
        for place in self.free:
            shape = place.value.shape
            index = [tuple(i + 1 for i in at) for at in torch.ones(shape).nonzero().tolist()]
            parts += [f"{place.name}[{', '.join(map(str, at))}]" if at else place.name for at in index]
        return parts

    def at_bound(self, scale: float) -> Tensor:
        flags = []
        for place, tensor in zip(self.free, self.tensors, strict=True):
            check: Callable[..., Tensor] | None = getattr(place.constraint, "at_bound", None)
            flags.append(
                torch.zeros(tensor.numel(), dtype=torch.bool)
                if check is None
                else check(tensor, scale).reshape(-1).cpu()
            )
        return torch.cat(flags)


def _judged(problem: _Problem, converged: bool, iterations: int, evaluations: int) -> Fit:
    """What the optimiser left, judged by the Hessian there."""
    model, y = problem.model, problem.y
    prepared = getattr(model, "prepared", lambda y: y)(y)
    numbers = Door("fit", prepared, _like(model), _width(model)).y
    seen = numbers[~numbers.isnan()]
    bound = problem.at_bound(seen.var().item() if seen.numel() > 1 else 1.0)
    log_likelihood, gradient, H = problem.hessian()
    values, J = problem.jacobian()
    names, inner = problem.names(), ~bound
    # The curvature in the constrained values; that of the constraints themselves would count while a slope is left.
    weights = torch.zeros_like(gradient)
    if inner.any():
        weights[inner] = torch.linalg.lstsq(J[inner][:, inner].mT, gradient[inner, None]).solution[:, 0]
    information, slope = (problem.bending(weights) - H)[inner][:, inner], gradient[inner]
    size = information.diagonal().clamp_min(torch.finfo(H.dtype).tiny).rsqrt()
    curvatures, axes = torch.linalg.eigh(size[:, None] * information * size)
    covariance = torch.full_like(H, torch.nan)
    good = bool((curvatures > _FLAT).all())
    if good:
        half = size[:, None] * axes * curvatures.rsqrt()
        gain = (half.mT @ slope).square().sum().item() / 2
        covariance = (J[:, inner] @ half) @ (J[:, inner] @ half).mT
        good = gain < _GAIN
        message = f"a Newton step would gain {gain:.1e} nats"
    else:
        message = "the Hessian is not negative definite: a parameter is not determined, or this is a saddle"
    pull = (gradient * problem.point()[0])[bound].abs()
    if (pull > 100 * _GAIN).any():
        good, message = (
            False,
            f"the likelihood still rises on the way to a bound, by about {pull.max().item():.1e} nats",
        )
    if (H.diagonal()[bound] > _GAIN).any():
        good, message = False, "the likelihood rises where a parameter leaves its bound"
    if not good and not converged:
        message += f", after {iterations} iterations of L-BFGS"
    if bound.any():
        message += f"; at the bound: {', '.join(name for name, b in zip(names, bound.tolist(), strict=True) if b)}"
    errors = covariance.diagonal().clamp_min(0).sqrt().masked_fill(bound, torch.nan)
    system = model.build() if hasattr(model, "build") else model
    convention = "proper" if getattr(system, "diffuse", None) is None else system.convention
    return Fit(
        model=model,
        y=y,
        names=names,
        values=values,
        standard_errors=errors,
        covariance=covariance.masked_fill(bound[:, None] | bound, torch.nan),
        log_likelihood=log_likelihood,
        n_obs=seen.numel(),
        n_diffuse=0 if getattr(system, "diffuse", None) is None else system.diffuse.shape[-1],
        convention=convention,
        converged=good,
        message=message,
        at_bound=[name for name, b in zip(names, bound.tolist(), strict=True) if b],
        iterations=iterations,
        evaluations=evaluations,
        options=problem.options,
    )


def _like(model: nn.Module) -> Tensor:
    return next(tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point())


def _width(model: Any) -> int:
    return getattr(model, "d_obs", 1)
