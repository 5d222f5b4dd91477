"""Seasonal autoregressive integrated moving averages with covariates."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dualform.core.calls import explained
from dualform.core.errors import ArgumentError
from dualform.core.linalg import as_tensors, check_finite, least_squares
from dualform.core.shapes import broadcast, wide
from dualform.gaussian.arrays import Door
from dualform.gaussian.built import Built
from dualform.gaussian.constraints import Positive, Stationary, constrained, places, to_partial
from dualform.gaussian.initial import discrete_lyapunov
from dualform.gaussian.model import LinearGaussian
from dualform.gaussian.structural import diagonal
from dualform.ops.arma_likelihood import ArmaLikelihood, arma_likelihood_op, has_kernel


class Orders(NamedTuple):
    """The orders of a model, with the period of the season."""

    p: int
    d: int
    q: int
    P: int
    D: int
    Q: int
    s: int


@explained
class Sarimax(Built):
    """A seasonal ARIMA model of a series, or of what a regression leaves of it; made by :func:`sarimax`.

        y_t = X_t beta + n_t,   phi(L) Phi(L^s) (1 - L)^d (1 - L^s)^D n_t = intercept + theta(L) Theta(L^s) eps_t
        phi(L) = 1 - phi_1 L - .. - phi_p L^p,   theta(L) = 1 + theta_1 L + .. + theta_q L^q,   eps_t ~ N(0, variance)

    Its parameters are ``intercept``, ``beta``, ``ar``, ``ma``, ``seasonal_ar``, ``seasonal_ma`` and ``variance``, those
    of them that there are. ``ar`` and ``seasonal_ar`` are stationary, ``ma`` and ``seasonal_ma`` invertible, by the
    partial autocorrelations that are behind them.

    The state is that of Harvey: what differencing needs of the past, ``d + s D`` numbers that start exactly diffuse,
    and the ARMA process, which starts from its stationary distribution.

    Args:
        order: ``(p, d, q)``.
        seasonal_order: ``(P, D, Q, s)``.
        exog: covariates X ``(T, K)``, or ``(T,)`` for one; with the steps that are forecast.
        intercept: whether there is one.
        simple_differencing: differences y and X instead of keeping that in the state. All results are then of the
            differenced series, forecasts too, and a missing value makes several.
        approximate: a variance, such as 1e6, for the start of what is otherwise exactly diffuse; the first ``d + s D``
            terms are then left out of the log-likelihood. This is statsmodels' default.
        convention: of the log-likelihood from the exactly diffuse start. ``"kfas"``, the default, is the log-likelihood
            of the differenced series where none of the first observations is missing; ``"statsmodels"`` differs by a
            constant.

    Raises:
        ArgumentError: for orders that are negative or not whole, a season shorter than 2 steps, both
            ``simple_differencing`` and ``approximate``, and covariates that are not finite.

    References:
        Box and Jenkins (1976), "Time series analysis: forecasting and control"; Harvey (1989), section 3.3; Durbin and
        Koopman (2012), section 3.4.
    """

    begins_at_once = True
    order_of_parameters = ("intercept", "beta", "ar", "ma", "seasonal_ar", "seasonal_ma", "variance")
    intercept: Tensor
    beta: Tensor
    variance: Tensor
    X: Tensor | None

    def __init__(
        self,
        order: tuple[int, int, int],
        seasonal_order: tuple[int, int, int, int] = (0, 0, 0, 0),
        exog: Any = None,
        *,
        intercept: bool = False,
        simple_differencing: bool = False,
        approximate: float | None = None,
        convention: str = "kfas",
    ):
        super().__init__()
        self.orders = o = _orders(order, seasonal_order)
        if simple_differencing and approximate is not None:
            raise ArgumentError("sarimax: simple_differencing leaves no start to be approximate, expected one of both")
        if convention not in ("kfas", "statsmodels"):
            raise ArgumentError(f"sarimax: convention is {convention!r}, expected 'kfas' or 'statsmodels'")
        self.simple, self.approximate, self.convention = simple_differencing, approximate, convention
        X = None
        if exog is not None:
            given = exog.to_numpy(dtype="float64") if hasattr(exog, "iloc") else exog
            X = as_tensors("sarimax", exog=given)["exog"].to(torch.float64)
            X = X[:, None] if X.dim() == 1 else X
            check_finite("sarimax", {"exog": X}, "a covariate cannot be missing")
            constrained(self, "beta", None, [0.0] * X.shape[1], None)
        self.register_buffer("X", X)
        self.has_intercept = intercept
        if intercept:
            constrained(self, "intercept", None, 0.0, None)
        self.groups = {"ar": o.p, "ma": o.q, "seasonal_ar": o.P, "seasonal_ma": o.Q}
        for name, count in self.groups.items():
            if count:
                constrained(self, name, None, [0.0] * count, Stationary(-1 if name.endswith("ma") else 1))
        constrained(self, "variance", None, 1.0, Positive())

    @property
    def burn(self) -> int:
        """How many of the first terms the log-likelihood leaves out: ``d + s D`` of an approximately diffuse start."""
        return 0 if self.approximate is None else self.orders.d + self.orders.s * self.orders.D

    def build(self) -> LinearGaussian:
        """The linear-Gaussian model of the values that the parameters have now."""
        return self._built(self.simple)

    def _polynomials(self) -> tuple[Tensor, Tensor]:
        """``phi(L) Phi(L^s)`` and ``theta(L) Theta(L^s)``, multiplied out, 1 included."""
        one, parts = self.variance.new_ones(1), []
        for sign, name in ((-1, "ar"), (1, "ma")):
            factors = []
            for group in (name, f"seasonal_{name}"):
                rest = sign * getattr(self, group) if self.groups[group] else one[:0]
                factors.append(torch.cat([torch.ones_like(rest[..., :1]) if len(rest) else one, rest], -1))
            parts.append(_product(factors[0], factors[1], self.orders.s))
        return parts[0], parts[1]

    def _built(self, simple: bool) -> LinearGaussian:
        o, one, (ar, ma) = self.orders, self.variance.new_ones(1), self._polynomials()
        r = max(ar.shape[-1] - 1, ma.shape[-1])
        eye = torch.eye(r, dtype=one.dtype, device=one.device)
        first = eye[0]
        column = nn.functional.pad(-ar[..., 1:], (0, r - ar.shape[-1] + 1))
        A = torch.cat([column.unsqueeze(-1), eye[:, : r - 1].expand(*column.shape, r - 1)], -1)
        S = nn.functional.pad(ma, (0, r - ma.shape[-1]))
        Q = self.variance[..., None, None] * S.unsqueeze(-1) * S.unsqueeze(-2)
        c = first * self.intercept.unsqueeze(-1) if self.has_intercept else None
        lags, see = (one.new_zeros(0, 0), one[:0]) if simple else _differencing(o, one)
        n = len(lags)
        # What is kept of the past, but for mere delays, takes in the new value of the ARMA process.
        entering = one[:0] if simple else _entering(o, one)
        whole = diagonal([lags, A]) + nn.functional.pad(entering[:, None] * first, (n, 0, 0, r))
        terms: dict[str, Any] = {}
        if c is not None:
            terms["c"] = nn.functional.pad(c, (n, 0))
        if (X := self.X) is not None:
            X = difference(X, o) if simple else X
            terms |= {"d": X @ self.beta.unsqueeze(-1), "time_varying": ("d",)}
        P0: Any = "stationary"
        if n and self.approximate is None:
            terms |= {"diffuse": [True] * n + [False] * r, "convention": self.convention}
        elif self.approximate is not None:
            known = discrete_lyapunov("sarimax", A, Q)
            P0 = diagonal([self.approximate * torch.eye(n, dtype=one.dtype, device=one.device), known])
            if c is not None:
                m = torch.linalg.solve(eye - A, c.unsqueeze(-1)).squeeze(-1)
                terms["m0"] = nn.functional.pad(m, (n, 0))
        noise = diagonal([one.new_zeros(n, n), Q])
        return LinearGaussian(
            whole, torch.cat([see, first])[None], noise, one.new_zeros(1, 1), P0=P0, prior="first", **terms
        )

    def prepared(self, y: Any) -> Any:
        """The series as it is filtered: differenced with ``simple_differencing``."""
        return difference(Door("sarimax", y, self.variance, 1).y, self.orders) if self.simple else y

    def log_likelihood(self, y: Any, **options: Any) -> Tensor:
        """:meth:`~dualform.gaussian.series.Series.log_likelihood` of the model; ``burn`` is its own by default.

        Of a series without missing values, that of the differenced series is computed where it is the same, which is
        the smaller model; on a CPU by :func:`~dualform.ops.arma_likelihood.arma_likelihood`, a few operations for each
        number of the state. In a model that was expanded it is NaN for a row without a stationary distribution.
        """
        if not options and self.approximate is None and (self.simple or self.convention == "kfas"):
            y = Door("sarimax", y, self.variance, 1).y
            if not y.isnan().any() and y.shape[-2] > self.orders.d + self.orders.s * self.orders.D:
                w = difference(y, self.orders)
                found = self._quickly(w)
                return self._built(True).log_likelihood(w) if found is None else found
        return super().log_likelihood(y, **{"burn": self.burn, **options})

    def _quickly(self, w: Tensor) -> Tensor | None:
        """The log-likelihood of complete differenced series ``(..., T, 1)``; None where no kernel computes it."""
        (ar, ma), X, w = self._polynomials(), self.X, w[..., 0]
        if X is not None:
            if len(X := difference(X, self.orders)) < w.shape[-1]:
                return None
            w = w - self.beta @ X[: w.shape[-1]].mT
        if self.has_intercept:
            w = w - (self.intercept / ar.sum(-1)).unsqueeze(-1)
        parts = [-ar[..., 1:], ma[..., 1:], self.variance.unsqueeze(-1), w]
        full, dtype = broadcast(*(part.shape[:-1] for part in parts)), wide(self.variance, w)
        rows = math.prod(full)
        ar, ma, variance, w = (x.to(dtype).expand(*full, x.shape[-1]).reshape(rows, x.shape[-1]) for x in parts)
        record = ArmaLikelihood(ar, ma, variance[:, 0], w)
        if not has_kernel(record):
            return None
        found = arma_likelihood_op(record)[0].reshape(full)
        return found if found.isfinite().all() or (self.rows and w.isfinite().all()) else None

    def _begin(self, y: Any) -> None:
        """Set the parameters to least squares estimates of the differenced series, those of each row by itself.

        References:
            Hannan and Rissanen (1982), "Recursive estimation of mixed autoregressive-moving average order".
        """
        o = self.orders
        w = difference(Door("sarimax", y, self.variance, 1).y.to(self.variance), o)[..., 0]
        seen = ~w.isnan()
        some = seen.any(-1)
        if not some.any():  # nothing is left of so few values
            return
        if self.X is not None:
            X = difference(self.X, o)[: w.shape[-1]]
            beta = least_squares(X * seen.unsqueeze(-1), w.nan_to_num(0.0))
            self.beta.copy_(beta)
            w = w - beta @ X.mT
        w = torch.where(seen, w, w.nanmean(-1, keepdim=True)).nan_to_num(0.0)
        mean = w.mean(-1) if self.has_intercept else torch.zeros_like(w[..., 0])
        w = residual = w - mean.unsqueeze(-1)
        lags = {
            name: [(o.s if name.startswith("s") else 1) * i for i in range(1, k + 1)] for name, k in self.groups.items()
        }
        found = {name: w.new_zeros(*w.shape[:-1], len(at)) for name, at in lags.items()}
        length, longest = w.shape[-1], max([0, *(k for at in lags.values() for k in at)])
        count = min(longest + max(5, o.s // 2), length // 3)
        if longest and length - count - longest > 3 * sum(self.groups.values()):
            shocks = _residual(w, [(w, k) for k in range(1, count + 1)])[1]
            columns = [(shocks if name.endswith("ma") else w, k) for name, at in lags.items() for k in at]
            solution, residual = _residual(w, columns)
            found = dict(zip(found, solution.split([len(at) for at in lags.values()], -1), strict=True))
        for place in places(self):
            if (value := found.get(place.name)) is not None:
                inside = to_partial(place.constraint.sign * value).abs().amax(-1, keepdim=True) < 0.95
                place.assign(torch.where(inside, value, 0))
        variance = residual.square().mean(-1).clamp_min(torch.finfo(w.dtype).tiny)
        self.variance = torch.where(some, variance, self.variance)
        if self.has_intercept:
            for name in ("ar", "seasonal_ar"):
                mean = mean * (1 - getattr(self, name).sum(-1)) if self.groups[name] else mean
            self.intercept.copy_(mean)


def sarimax(
    order: tuple[int, int, int],
    seasonal_order: tuple[int, int, int, int] = (0, 0, 0, 0),
    exog: Any = None,
    **options: Any,
) -> Sarimax:
    """A seasonal ARIMA model with covariates; the arguments are those of :class:`Sarimax`.

    Args:
        order: ``(p, d, q)``.
        seasonal_order: ``(P, D, Q, s)``.
        exog: covariates ``(T, K)``.
        options: ``intercept``, ``simple_differencing``, ``approximate`` and ``convention``.

    Raises:
        ArgumentError: as :class:`Sarimax`.

    Example:
        >>> from dualform.gaussian import sarimax
        >>> airline = sarimax((0, 1, 1), (0, 1, 1, 12))
        >>> list(airline.values())
        ['ma', 'seasonal_ma', 'variance']
    """
    return Sarimax(order, seasonal_order, exog, **options)


def difference(values: Tensor, orders: Orders) -> Tensor:
    """``(1 - L)^d (1 - L^s)^D`` of values ``(..., T, M)``, which become fewer by ``d + s D``."""
    for _ in range(orders.D):
        values = values[..., orders.s :, :] - values[..., : -orders.s, :]
    return values.diff(n=orders.d, dim=-2) if orders.d else values


def _orders(order: Any, seasonal: Any) -> Orders:
    for name, given, form in (("order", order, "(p, d, q)"), ("seasonal_order", seasonal, "(P, D, Q, s)")):
        fits = isinstance(given, tuple | list) and len(given) == form.count(",") + 1
        if not fits or any(isinstance(k, bool) or not isinstance(k, int) or k < 0 for k in given):
            raise ArgumentError(f"sarimax: {name} is {given!r}, expected {form}, whole numbers of 0 or more")
    made = Orders(*order, *seasonal)
    if (made.P or made.D or made.Q) and made.s < 2:
        raise ArgumentError(f"sarimax: the season has {made.s} steps, expected 2 or more", hint="(P, D, Q, s)")
    return made


def _product(a: Tensor, b: Tensor, s: int) -> Tensor:
    """The coefficients of ``a(L) b(L^s)``."""
    n = b.shape[-1]
    parts = [nn.functional.pad(b[..., i : i + 1] * a, (s * i, s * (n - 1 - i))) for i in range(n)]
    return torch.stack(parts).sum(0)


def _differencing(o: Orders, one: Tensor) -> tuple[Tensor, Tensor]:
    """How what is kept of the past moves by itself, and what of it a new observation contains.

    The k-th of the first d is ``(1 - L)^k y`` one step ago; then, for each j below D, ``(1 - L)^d (1 - L^s)^j y`` of
    one to s steps ago.
    """
    n = o.d + o.s * o.D
    A, see = one.new_zeros(n, n), one.new_zeros(n)
    oldest = [o.d + o.s * (j + 1) - 1 for j in range(o.D)]
    see[: o.d] = 1
    see[oldest] = 1
    for k in range(o.d):
        A[k, k : o.d] = 1
        A[k, oldest] = 1
    for j in range(o.D):
        top = o.d + o.s * j
        A[top, oldest[j:]] = 1
        for i in range(1, o.s):
            A[top + i, top + i - 1] = 1
    return A, see


def _entering(o: Orders, one: Tensor) -> Tensor:
    """Which of them take in the new value of the differenced series."""
    entering = one.new_zeros(o.d + o.s * o.D)
    entering[: o.d] = 1
    entering[[o.d + o.s * j for j in range(o.D)]] = 1
    return entering


def _residual(w: Tensor, columns: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Least squares of w on series that are delayed: the coefficients, and what is left, 0 where it begins."""
    most, length = max(k for _, k in columns), w.shape[-1]
    X = torch.stack([series[..., most - k : length - k] for series, k in columns], -1)
    solution = least_squares(X, w[..., most:])
    return solution, nn.functional.pad(w[..., most:] - (X @ solution.unsqueeze(-1)).squeeze(-1), (most, 0))
