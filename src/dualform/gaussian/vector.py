"""Models of several series at once: vector autoregressions and dynamic factors."""

from typing import Any

import torch
from torch import Tensor

from dualform.core.calls import explained
from dualform.core.errors import ArgumentError
from dualform.gaussian.arrays import Door
from dualform.gaussian.built import Built
from dualform.gaussian.constraints import Positive, constrained
from dualform.gaussian.model import LinearGaussian
from dualform.gaussian.structural import companion


class _Vector(Built):
    """What models of several series share."""

    width: int

    @property
    def d_obs(self) -> int:
        """M, the number of series."""
        return self.width

    def typical(self, y: Tensor) -> dict[str, Tensor]:
        """The sizes of parameters, for y ``(R, T, M)``, each ``(R, 1)``."""
        size = y.nan_to_num(0.0).flatten(1).square().mean(1, keepdim=True).sqrt()
        size = torch.where(size > 0, size, 1)
        tenth = torch.full_like(size, 0.1)
        return {"intercept": size, "cholesky": 0.1 * size, "loadings": size, "coefficients": tenth, "transition": tenth}


@explained
class Var(_Vector):
    """A vector autoregression of order p of M series; made by :func:`var`.

        y_t = intercept + coefficients_1 y_{t-1} + .. + coefficients_p y_{t-p} + e_t,   e_t ~ N(0, covariance)

    Its parameters are ``intercept`` ``(M,)``, ``coefficients`` ``(p, M, M)`` and ``cholesky``, the lower triangle of
    the Cholesky factor of the covariance, row by row, as in statsmodels' VARMAX; ``set`` also takes ``covariance``.

    The coefficients are not constrained. The likelihood is exact: the state ``(y_t, .., y_{t-p+1})`` starts from its
    stationary distribution, there is none for coefficients that are not stationary, and towards those it falls to
    minus infinity, so that estimates are stationary. Values may be missing anywhere.

    Args:
        order: p, 1 or more.
        series: M, 1 or more.
        intercept: whether there is one.

    Raises:
        ArgumentError: for an order or a number of series that is not a whole number, 1 or more.

    References:
        Lütkepohl (2005), "New introduction to multiple time series analysis"; Durbin and Koopman (2012), section 3.4.
    """

    order_of_parameters = ("intercept", "coefficients", "cholesky")
    intercept: Tensor
    coefficients: Tensor
    cholesky: Tensor

    def __init__(self, order: int, series: int, *, intercept: bool = True):
        super().__init__()
        self.order, self.width = _whole("var", "order", order), _whole("var", "series", series)
        self.has_intercept = intercept
        if intercept:
            constrained(self, "intercept", None, [0.0] * series, None)
        constrained(self, "coefficients", None, torch.zeros(order, series, series), None)
        rows, columns = torch.tril_indices(series, series)
        constrained(self, "cholesky", None, (rows == columns).double(), None)

    @property
    def covariance(self) -> Tensor:
        """The covariance of the innovations ``(M, M)``."""
        factor = self._factor()
        return factor @ factor.mT

    def _factor(self) -> Tensor:
        M = self.width
        rows, columns = torch.tril_indices(M, M, device=self.cholesky.device)
        place = torch.nn.functional.one_hot(rows * M + columns, M * M).to(self.cholesky)
        return (self.cholesky @ place).unflatten(-1, (M, M))

    def build(self) -> LinearGaussian:
        """The linear-Gaussian model of the values that the parameters have now."""
        M, A, eye = self.width, companion(self.coefficients), self._eye(self.width * self.order)
        c: dict[str, Any] = (
            {"c": torch.nn.functional.pad(self.intercept, (0, len(eye) - M))} if self.has_intercept else {}
        )
        none = A.new_zeros(M, M)
        start = eye[:, :M]  # the noise reaches the newest values
        return LinearGaussian(A, eye[:M], self.covariance, none, P0="stationary", prior="first", S=start, **c)

    def _eye(self, n: int) -> Tensor:
        return torch.eye(n, dtype=self.coefficients.dtype, device=self.coefficients.device)

    def _begin(self, y: Any) -> None:
        """Set the parameters to least squares of the steps where nothing is missing."""
        values = Door("var", y, self.coefficients, self.width).y.to(self.coefficients)
        mean, phi, e = _regressed(values, self.order)
        if self.has_intercept:
            eye = self._eye(self.width)
            self.intercept.copy_((eye - phi.sum(0)) @ mean)
        self.coefficients.copy_(phi)
        cov = e.mT @ e / max(len(e), 1)
        floor = values.nan_to_num(0.0).square().mean().clamp_min(1e-12) * 1e-8
        self.set(covariance=cov + floor * self._eye(self.width))

    @torch.no_grad()
    def set(self, **values: Any) -> Any:
        """Set estimated parameters to values; besides them, the ``covariance``.

        Raises:
            ArgumentError: for a name that is no parameter, another shape, and a covariance that is not positive
                definite.
        """
        cov = values.pop("covariance", None)
        super().set(**values)
        if cov is not None:
            made = torch.as_tensor(cov, dtype=self.cholesky.dtype, device=self.cholesky.device)
            if made.shape[-2:] != (self.width, self.width):
                raise ArgumentError(
                    f"Var.set: covariance has shape {tuple(made.shape)}, expected ({self.width}, {self.width})"
                )
            factor, wrong = torch.linalg.cholesky_ex(made)
            if wrong.any():
                raise ArgumentError("Var.set: covariance is not positive definite")
            rows, columns = torch.tril_indices(self.width, self.width)
            super().set(cholesky=factor[..., rows, columns])
        return self


@explained
class DynamicFactor(_Vector):
    """K factors behind M series; made by :func:`dynamic_factor`.

        y_t = intercept + loadings f_t + eps_t,                       eps_t ~ N(0, diag(variances))
        f_t = transition_1 f_{t-1} + .. + transition_p f_{t-p} + eta_t,   eta_t ~ N(0, I)

    Its parameters are ``intercept`` ``(M,)``, if there is one, ``loadings`` ``(M, K)``, ``variances`` ``(M,)`` and
    ``transition`` ``(p, K, K)``. The last is not constrained, and stays stationary as it does in :class:`Var`. The
    factors start from their stationary distribution. The sign of a factor is arbitrary; several can be rotated into
    each other without a change of the likelihood, so that their loadings have no standard errors, and a fit says that a
    parameter is not determined.

    Args:
        factors: K, 1 or more, and fewer than M.
        order: p, 1 or more.
        series: M.
        intercept: whether there is one; statsmodels has none, and expects series without their means.

    Raises:
        ArgumentError: for numbers that are not whole or too small, and as many factors as series.

    References:
        Stock and Watson (2011), "Dynamic factor models"; Durbin and Koopman (2012), section 3.7.
    """

    order_of_parameters = ("intercept", "loadings", "variances", "transition")
    intercept: Tensor
    loadings: Tensor
    variances: Tensor
    transition: Tensor

    def __init__(self, factors: int, order: int, series: int, *, intercept: bool = False):
        super().__init__()
        self.factors, self.order = (
            _whole("dynamic_factor", "factors", factors),
            _whole("dynamic_factor", "order", order),
        )
        self.width, self.has_intercept = _whole("dynamic_factor", "series", series), intercept
        if factors >= series:
            raise ArgumentError(f"dynamic_factor: {factors} factors of {series} series, expected fewer factors")
        if intercept:
            constrained(self, "intercept", None, [0.0] * series, None)
        constrained(self, "loadings", None, torch.ones(series, factors), None)
        constrained(self, "variances", None, [1.0] * series, Positive())
        constrained(self, "transition", None, torch.zeros(order, factors, factors), None)

    def build(self) -> LinearGaussian:
        """The linear-Gaussian model of the values that the parameters have now."""
        A, K = companion(self.transition), self.factors
        C = torch.nn.functional.pad(self.loadings, (0, A.shape[-1] - K))
        eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        d: dict[str, Any] = {"d": self.intercept} if self.has_intercept else {}
        R = torch.diag_embed(self.variances)
        return LinearGaussian(A, C, eye[:K, :K], R, P0="stationary", prior="first", S=eye[:, :K], **d)

    def _begin(self, y: Any) -> None:
        """Set the parameters to principal components, and to the autoregression of these."""
        values = Door("dynamic_factor", y, self.loadings, self.width).y.to(self.loadings)
        mean = values.nanmean(0).nan_to_num(0.0)
        x = torch.where(values.isnan(), mean, values) - mean
        scale = x.square().mean(0).sqrt()
        scale = torch.where(scale > 0, scale, 1)
        U, size, V = torch.linalg.svd(x / scale, full_matrices=False)
        K = min(self.factors, len(size))
        f = U[:, :K] * len(x) ** 0.5
        loadings = torch.zeros_like(self.loadings)
        loadings[:, :K] = scale[:, None] * V[:K].mT * size[:K] / len(x) ** 0.5
        _, phi, e = _regressed(torch.nn.functional.pad(f, (0, self.factors - K)), self.order)
        spread = e.square().mean(0).sqrt().clamp_min(0.1)
        # Factors in the unit of their innovations.
        self.transition.copy_(phi * spread / spread[:, None])
        self.loadings.copy_(loadings * spread)
        self.variances = (x - f @ loadings[:, :K].mT).square().mean(0).clamp_min(1e-2 * scale.square())
        if self.has_intercept:
            self.intercept.copy_(mean)


def var(order: int, series: int, *, intercept: bool = True) -> Var:
    """A vector autoregression; the arguments are those of :class:`Var`.

    Args:
        order: p, 1 or more.
        series: M, the number of series.
        intercept: whether there is one.

    Raises:
        ArgumentError: as :class:`Var`.

    Example:
        >>> from dualform.gaussian import var
        >>> {name: tuple(value.shape) for name, value in var(2, 3).values().items()}
        {'intercept': (3,), 'coefficients': (2, 3, 3), 'cholesky': (6,)}
    """
    return Var(order, series, intercept=intercept)


def dynamic_factor(factors: int, order: int, series: int, *, intercept: bool = False) -> DynamicFactor:
    """Factors behind several series; the arguments are those of :class:`DynamicFactor`.

    Args:
        factors: K, fewer than M.
        order: p, 1 or more, of the autoregression of the factors.
        series: M, the number of series.
        intercept: whether there is one.

    Raises:
        ArgumentError: as :class:`DynamicFactor`.

    Example:
        >>> from dualform.gaussian import dynamic_factor
        >>> list(dynamic_factor(1, 2, 4).values())
        ['loadings', 'variances', 'transition']
    """
    return DynamicFactor(factors, order, series, intercept=intercept)


def _regressed(y: Tensor, p: int) -> tuple[Tensor, Tensor, Tensor]:
    """Means ``(M,)``, coefficients ``(p, M, M)`` by least squares, drawn to 0 until stationary, and residuals."""
    mean = y.nanmean(0).nan_to_num(0.0)
    x, M = y - mean, y.shape[-1]
    lags = torch.cat([x[p - k : len(x) - k] for k in range(1, p + 1)], 1)
    whole = ~(lags.isnan().any(1) | x[p:].isnan().any(1))
    phi = y.new_zeros(p, M, M)
    if whole.sum() > 2 * p * M:
        found = torch.linalg.lstsq(lags[whole], x[p:][whole], driver="gelsd").solution
        phi = found.reshape(p, M, M).mT
    else:
        whole, lags = ~x[p:].isnan().any(1), torch.zeros_like(lags)
    while torch.linalg.eigvals(companion(phi)).abs().max() >= 0.99:
        phi = 0.95 * phi
    return mean, phi, x[p:][whole] - lags[whole] @ phi.mT.flatten(0, 1)


def _whole(where: str, name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentError(f"{where}: {name} is {value!r}, expected a whole number, 1 or more")
    return value
