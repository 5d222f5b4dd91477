"""Components of a time series: levels, trends, seasons, cycles, autoregressions, regressions and noise.

Each is a block of a state space model, ``h' = A h + eta``, of which ``C h`` is a summand of the series:

    >>> import dualform as df
    >>> from dualform.gaussian import Irregular, Level, Seasonal
    >>> model = Level() + Seasonal(12) + Irregular()

A number in place of a parameter fixes it, and None leaves it to be estimated: ``Level(variance=0.0)`` is a constant.

References:
    Harvey (1989), "Forecasting, structural time series models and the Kalman filter", chapter 2; Durbin and Koopman
    (2012), "Time series analysis by state space methods", chapter 3.
"""

import math
from typing import Any

import torch
from torch import Tensor

from dualform.core.calls import explained
from dualform.core.errors import ArgumentError
from dualform.core.linalg import as_tensors, check_finite, least_squares
from dualform.gaussian.constraints import Interval, Positive, Stationary, constrained
from dualform.gaussian.structural import Block, Component, companion


@explained
class Irregular(Component):
    """White noise: ``eps_t ~ N(0, variance)``.

    Args:
        variance: 0 or more.

    Raises:
        ArgumentError: for a negative variance.
    """

    name = "irregular"
    variance: Tensor

    def __init__(self, variance: Any = None):
        super().__init__()
        constrained(self, "variance", variance, 1.0, Positive())

    @property
    def shares(self) -> dict[str, float]:
        """Half of the variance of the changes."""
        return {"variance": 0.5}

    def block(self) -> Block:
        """No state, but noise of the observation."""
        none = self.variance.new_zeros(0)
        return Block(none.new_zeros(0, 0), none, none.new_zeros(0, 0), [], R=self.variance)


@explained
class Level(Component):
    """A random walk: ``mu_t = mu_{t-1} + eta_t``, ``eta_t ~ N(0, variance)``, from an exactly diffuse start.

    Args:
        variance: 0 or more; 0 for a constant.

    Raises:
        ArgumentError: for a negative variance.
    """

    name = "level"
    variance: Tensor

    def __init__(self, variance: Any = None):
        super().__init__()
        constrained(self, "variance", variance, 1.0, Positive())

    def block(self) -> Block:
        """One state."""
        one = self.variance.new_ones(1, 1)
        return Block(one, one[0], self.variance[..., None, None] * one, [True])


@explained
class Trend(Component):
    """A level with a slope, the local linear trend; or a damped one.

        mu_t = mu_{t-1} + beta_{t-1} + eta_t,      eta_t ~ N(0, level_variance)
        beta_t = damping beta_{t-1} + zeta_t,      zeta_t ~ N(0, slope_variance)

    The level starts exactly diffuse. So does the slope, except for a damped one, which starts from its stationary
    distribution.

    Args:
        level_variance: 0 or more; 0 for a smooth trend.
        slope_variance: 0 or more; 0 for a constant slope.
        damped: whether the slope is damped.
        damping: between 0 and 1, of a damped trend.

    Raises:
        ArgumentError: for a negative variance, and a damping outside of 0 .. 1 or without ``damped``.
    """

    name = "trend"
    level_variance: Tensor
    slope_variance: Tensor
    damping: Tensor

    def __init__(
        self, level_variance: Any = None, slope_variance: Any = None, *, damped: bool = False, damping: Any = None
    ):
        super().__init__()
        constrained(self, "level_variance", level_variance, 1.0, Positive())
        constrained(self, "slope_variance", slope_variance, 0.1, Positive())
        self.damped = damped
        if damped:
            constrained(self, "damping", _fraction("Trend", "damping", damping), 0.9, Interval(0.0, 1.0))
        elif damping is not None:
            raise ArgumentError("Trend: damping is given, but the trend is not damped", hint="damped=True")

    @property
    def shares(self) -> dict[str, float]:
        """The slope changes less than the level."""
        return {"level_variance": 0.1, "slope_variance": 0.01}

    def block(self) -> Block:
        """Two states."""
        level, slope = self.level_variance, self.slope_variance
        damping = self.damping if self.damped else torch.ones_like(slope)
        zero, one = torch.zeros_like(damping), torch.ones_like(damping)
        A = torch.stack([torch.stack([one, one], -1), torch.stack([zero, damping], -1)], -2)
        level, slope = torch.broadcast_tensors(level, slope)
        return Block(
            A, level.new_tensor([1.0, 0.0]), torch.diag_embed(torch.stack([level, slope], -1)), [True, not self.damped]
        )


@explained
class Seasonal(Component):
    """A season whose effects over one period sum to white noise: ``s_t = -(s_{t-1} + .. + s_{t-period+1}) + eta_t``.

    Args:
        period: 2 or more steps.
        variance: 0 or more; 0 for a season that is always the same.

    Raises:
        ArgumentError: for a period below 2 or a negative variance.
    """

    name = "seasonal"
    variance: Tensor

    def __init__(self, period: int, variance: Any = None):
        super().__init__()
        self.period = _whole("Seasonal", "period", period, 2)
        constrained(self, "variance", variance, 1.0, Positive())

    def block(self) -> Block:
        """``period - 1`` states."""
        n = self.period - 1
        A = torch.diag(self.variance.new_ones(n - 1), -1)
        A[0] = -1
        first = torch.eye(n, dtype=A.dtype, device=A.device)[0]
        return Block(A, first, self.variance[..., None, None] * torch.outer(first, first), [True] * n)


@explained
class TrigonometricSeasonal(Component):
    """A season as a sum of harmonics, waves of the frequencies ``2 pi j / period``, that share one variance.

    Args:
        period: 2 or more steps; it need not be whole.
        harmonics: how many, up to half of the period; all by default.
        variance: 0 or more.

    Raises:
        ArgumentError: for a period below 2, a number of harmonics outside of 1 .. period / 2, or a negative variance.
    """

    name = "seasonal"
    variance: Tensor

    def __init__(self, period: float, harmonics: int | None = None, variance: Any = None):
        super().__init__()
        if not period >= 2:
            raise ArgumentError(f"TrigonometricSeasonal: period is {period}, expected 2 or more steps")
        most = math.floor(period / 2)
        self.period = float(period)
        self.harmonics = most if harmonics is None else _whole("TrigonometricSeasonal", "harmonics", harmonics, 1)
        if self.harmonics > most:
            raise ArgumentError(
                f"TrigonometricSeasonal: harmonics is {harmonics}, expected at most {most}, half of the period"
            )
        constrained(self, "variance", variance, 1.0, Positive())

    def block(self) -> Block:
        """Two states per harmonic, but one for that of two steps."""
        like, waves = self.variance, []
        for j in range(1, self.harmonics + 1):
            turn = 2 * math.pi * j / self.period
            wave = _rotation(like.new_tensor(turn), like.new_tensor(1.0))
            waves.append(wave[:1, :1] if 2 * j == self.period else wave)
        A = torch.block_diag(*waves)
        C = torch.cat([like.new_tensor([1.0, 0.0])[: len(wave)] for wave in waves])
        Q = self.variance[..., None, None] * torch.eye(len(A), dtype=A.dtype, device=A.device)
        return Block(A, C, Q, [True] * len(A))


@explained
class Cycle(Component):
    """A wave that changes, of a period that is estimated.

        (c_t, c*_t) = damping [[cos w, sin w], [-sin w, cos w]] (c_{t-1}, c*_{t-1}) + noise,   w = 2 pi / period

    Both noises have the same variance. A damped cycle is stationary, and starts so; one with
    ``damping=1.0`` is diffuse.

    Args:
        period: in steps; a number is fixed.
        bounds: of an estimated period.
        damping: above 0, up to 1; a number is fixed, and 1.0 is no damping.
        variance: 0 or more.
        diffuse: True for a diffuse start of a damped cycle, too, as statsmodels has it.

    Raises:
        ArgumentError: for a period below 2 or not within the bounds, and a damping or a variance out of range.
    """

    name = "cycle"
    period: Tensor
    damping: Tensor
    variance: Tensor

    def __init__(
        self,
        period: Any = None,
        *,
        bounds: tuple[float, float] = (2.0, 100.0),
        damping: Any = None,
        variance: Any = None,
        diffuse: bool = False,
    ):
        super().__init__()
        if bounds[0] < 2 or (not isinstance(period, Tensor) and period is not None and not period >= 2):
            raise ArgumentError(f"Cycle: period {period}, bounds {bounds}, expected 2 or more steps")
        constrained(self, "period", period, math.sqrt(bounds[0] * bounds[1]), Interval(*bounds))
        constrained(self, "damping", _fraction("Cycle", "damping", damping), 0.9, Interval(0.0, 1.0))
        constrained(self, "variance", variance, 1.0, Positive())
        self.diffuse = diffuse or (damping is not None and bool((torch.as_tensor(damping) == 1).any()))

    def block(self) -> Block:
        """Two states."""
        A = _rotation(2 * math.pi / self.period, self.damping)
        Q = self.variance[..., None, None] * torch.eye(2, dtype=A.dtype, device=A.device)
        return Block(A, A.new_tensor([1.0, 0.0]), Q, [self.diffuse] * 2)


@explained
class Autoregressive(Component):
    """A stationary autoregression: ``x_t = phi_1 x_{t-1} + .. + phi_p x_{t-p} + eta_t``, from its own distribution.

    Args:
        order: p, 1 or more.
        coefficients: ``(p,)``; estimated by default, by their partial autocorrelations, so that they stay stationary.
        variance: of eta, 0 or more.

    Raises:
        ArgumentError: for an order below 1, coefficients that are not as many, or a negative variance.
    """

    name = "ar"
    coefficients: Tensor
    variance: Tensor

    def __init__(self, order: int = 1, *, coefficients: Any = None, variance: Any = None):
        super().__init__()
        self.order = _whole("Autoregressive", "order", order, 1)
        constrained(self, "coefficients", coefficients, [0.0] * order, Stationary())
        if self.coefficients.shape[-1:] != (order,):
            raise ArgumentError(
                f"Autoregressive: coefficients have shape {tuple(self.coefficients.shape)}, expected ({order},)"
            )
        constrained(self, "variance", variance, 1.0, Positive())

    @property
    def shares(self) -> dict[str, float]:
        """A third of the variance of the changes."""
        return {"variance": 0.3}

    def block(self) -> Block:
        """``order`` states: the value, and those before it."""
        A = companion(self.coefficients[..., None, None])
        first = torch.eye(self.order, dtype=A.dtype, device=A.device)[0]
        return Block(A, first, self.variance[..., None, None] * torch.outer(first, first), [False] * self.order)


@explained
class Regression(Component):
    """The effect of covariates: ``X_t beta``, with coefficients that are constant or random walks.

    Args:
        X: ``(T, K)``, or ``(T,)`` for one, of every step that is filtered or forecast; it may be longer than
            the series.
        diffuse: how beta is found. True: as constant states from an exactly diffuse start, that is, by generalised
            least squares, with a marginal likelihood. False: as parameters, by maximum likelihood, as statsmodels does.
        beta: the coefficients ``(K,)``, which are then fixed.
        moving: whether the coefficients are random walks, ``beta_t = beta_{t-1} + eta_t``.
        variance: of eta, ``(K,)``, 0 or more, of coefficients that move.

    Raises:
        ArgumentError: for covariates that are not finite or have other axes, a variance of coefficients that do not
            move, and moving ones that are no states.
    """

    name = "regression"
    beta: Tensor
    variance: Tensor

    def __init__(self, X: Any, *, diffuse: bool = True, beta: Any = None, moving: bool = False, variance: Any = None):
        super().__init__()
        given = X.to_numpy(dtype="float64") if hasattr(X, "iloc") else X
        made = as_tensors("Regression", X=given)["X"].to(torch.float64)
        made = made[:, None] if made.dim() == 1 else made
        if made.dim() != 2:
            raise ArgumentError(f"Regression: X has shape {tuple(made.shape)}, expected (T, K) or (T,)")
        check_finite("Regression", {"X": made}, "a covariate cannot be missing")
        self.register_buffer("X", made)
        self.states = diffuse and beta is None
        if not self.states:
            constrained(self, "beta", beta, [0.0] * made.shape[1], None)
        if moving and not self.states:
            raise ArgumentError("Regression: coefficients that move are states, expected no beta and no diffuse=False")
        if variance is not None and not moving:
            raise ArgumentError("Regression: variance is given, but the coefficients do not move", hint="moving=True")
        self.moving = moving
        if moving:
            constrained(self, "variance", variance, [1.0] * made.shape[1], Positive())

    def begin(self, y: Tensor, scale: Tensor) -> None:
        """Set estimated coefficients to those of least squares, of the changes of the series; and their variances."""
        if "beta" in dict(self.named_parameters()):
            X, dy = self.get_buffer("X")[: y.shape[-2]].diff(dim=0), y[..., 0].diff(dim=-1)
            self.beta.copy_(least_squares(X * ~dy.isnan().unsqueeze(-1), dy.nan_to_num(0.0).to(X)))
        if self.moving and self.variance.requires_grad:
            size = self.get_buffer("X").square().mean(0)
            self.variance = 0.01 * scale.unsqueeze(-1) / torch.where(size > 0, size, 1)

    @property
    def length(self) -> int | None:
        """The steps of X."""
        return len(self.get_buffer("X"))

    def block(self) -> Block:
        """A state per covariate, or none."""
        X = self.get_buffer("X")
        k = X.shape[1] if self.states else 0
        eye = torch.eye(k, dtype=X.dtype, device=X.device)
        effect = None if self.states else (X @ self.beta.to(X).unsqueeze(-1)).squeeze(-1)
        Q = torch.diag_embed(self.variance.to(X).expand(*self.variance.shape[:-1], k)) if self.moving else 0 * eye
        return Block(eye, X if self.states else X[0, :0], Q, [True] * k, d=effect)


def _rotation(turn: Tensor, damping: Tensor) -> Tensor:
    cos, sin = damping * turn.cos(), damping * turn.sin()
    return torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)], -2)


def _whole(where: str, name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(f"{where}: {name} is {value!r}, expected a whole number, {least} or more")
    return value


def _fraction(where: str, name: str, value: Any) -> Any:
    if value is not None and not ((torch.as_tensor(value) > 0) & (torch.as_tensor(value) <= 1)).all():
        raise ArgumentError(f"{where}: {name} is {value}, expected above 0 and at most 1")
    return value
