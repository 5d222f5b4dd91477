"""A function of a normal state as an affine one with noise: by derivatives, or by a few points.

For ``x ~ N(m, P)`` the function f(x) becomes ``A x + b + e`` with ``e ~ N(0, V)`` independent of x. Filters and
smoothers of nonlinear models differ in nothing but this; all else is the Kalman filter and its smoother.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap

from dualform.core.errors import ArgumentError
from dualform.core.linalg import matvec
from dualform.core.options import brief, options
from dualform.gaussian.belief import Gaussian
from dualform.gaussian.conditioning import ldl


class Affine(NamedTuple):
    """``A x + b + e`` with ``e ~ N(0, V)``."""

    A: Tensor  # (B, P, N)
    b: Tensor  # (B, P)
    V: Tensor  # (B, P, P)


class At(NamedTuple):
    """Where a function is evaluated, besides the state: its input and its time, one row each."""

    u: Tensor | None  # (B, U)
    t: Tensor  # (B,), int64

    def repeat(self, count: int) -> "At":
        """Every row so many times."""
        return At(None if self.u is None else self.u.repeat_interleave(count, 0), self.t.repeat_interleave(count))

    def tile(self, count: int) -> "At":
        """All rows so many times."""
        return At(None if self.u is None else self.u.repeat(count, 1), self.t.repeat(count))


class Rowwise:
    """A caller's function of one state, ``f(x)``, ``f(x, u)``, ``f(x, t)`` or ``f(x, u, t)``, applied to rows.

    Args:
        where: the first word of an error.
        name: what an error calls it.
        f: ``(N,) -> (size,)``, of operations that :func:`torch.func.vmap` knows.
        size: of its result; a single number may come without an axis.

    Raises:
        ArgumentError: for what cannot be called, or takes other arguments.
    """

    def __init__(self, where: str, name: str, f: Callable[..., Tensor], size: int):
        self.where, self.name, self.f, self.size = where, name, f, size
        self.takes = extras_of(where, name, f)

    def __call__(self, x: Tensor, at: At) -> Tensor:
        """``(B, size)`` of states ``(B, N)``."""
        if not len(x):
            return x.new_zeros(0, self.size)
        return self._rows(self._one)(x, *self._given(at, x))

    def with_jacobian(self, x: Tensor, at: At) -> tuple[Tensor, Tensor]:
        """The same, and its derivatives ``(B, size, N)``."""
        if not len(x):
            return x.new_zeros(0, self.size), x.new_zeros(0, self.size, x.shape[-1])

        given, rows = self._given(at, x), self._rows(self._one)
        value, pull, *_ = vjp(lambda x: rows(x, *given), x)
        basis = torch.eye(self.size, dtype=x.dtype, device=x.device)
        (jacobian,) = vmap(pull)(basis[:, None].expand(-1, len(x), -1))
        return value, jacobian.transpose(0, 1)

    def _given(self, at: At, x: Tensor) -> tuple[Tensor | None, Tensor]:
        return at.u if "u" in self.takes else None, at.t.to(x.dtype)

    def _rows(self, one: Callable[..., Any]) -> Callable[..., Any]:
        return vmap(one, in_dims=(0, 0 if "u" in self.takes else None, 0))

    def _one(self, x: Tensor, u: Tensor | None, t: Tensor) -> Tensor:
        y = self.f(x, **{name: value for name, value in (("u", u), ("t", t)) if name in self.takes})
        if not isinstance(y, Tensor):
            raise ArgumentError(f"{self.where}: {self.name} returns {type(y).__name__}, expected a tensor")
        y = y.unsqueeze(0) if y.dim() == 0 and self.size == 1 else y
        if y.shape != (self.size,):
            raise ArgumentError(
                f"{self.where}: {self.name} returns the shape {tuple(y.shape)} for one state {tuple(x.shape)}, "
                f"expected ({self.size},)",
                hint="it is called with one state at a time, and mapped over the others",
            )
        if y.dtype != x.dtype:
            raise ArgumentError(
                f"{self.where}: {self.name} returns {y.dtype} for a state in {x.dtype}",
                hint="cast its constants, or a module: .to(x.dtype)",
            )
        return y


def extras_of(where: str, name: str, f: Any) -> tuple[str, ...]:
    """Which of u and t a function takes besides the state.

    Raises:
        ArgumentError: for what cannot be called, or takes other arguments.
    """
    if not callable(f):
        raise ArgumentError(f"{where}: {name} is {brief(f)}, expected a function of the state")
    try:
        parameters = [*inspect.signature(f.forward if isinstance(f, nn.Module) else f).parameters.values()]
    except ValueError:  # of a function that is written in C
        return ()
    named = [p for p in parameters[1:] if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    other = [p.name for p in named if p.name not in ("u", "t") and p.default is p.empty]
    if not parameters or other:
        shown = ", ".join(p.name for p in parameters)
        raise ArgumentError(
            f"{where}: {name} takes ({shown}), expected (x), (x, u), (x, t) or (x, u, t)",
            hint="the state comes first; inputs are called u and the time t",
        )
    return tuple(p.name for p in named if p.name in ("u", "t"))


class Method:
    """How a function is made affine: one of the classes below."""

    iterations: int = 1
    tolerance: float = 0.0

    def affine(self, f: Rowwise, state: Gaussian, at: At) -> Affine:
        """The function around a state ``(B, N)``."""
        raise NotImplementedError


class _Derivatives(Method):
    def affine(self, f: Rowwise, state: Gaussian, at: At) -> Affine:
        value, A = f.with_jacobian(state.mean, at)
        return Affine(A, value - matvec(A, state.mean), value.new_zeros(*value.shape, value.shape[-1]))


@options(error=ArgumentError)
class Extended(_Derivatives):
    """The tangent at the mean: ``A = f'(m)``, V = 0; the extended Kalman filter and smoother."""


@options(error=ArgumentError)
class Iterated(_Derivatives):
    """The tangent at the most probable state given the data, found by Gauss-Newton steps from the mean.

    The filter repeats the update of each observation from the tangent at the state that the last repetition found
    (Bell and Cathey 1993). The smoother repeats filter and smoother with all tangents at the states that the last one
    found (Bell 1994); it begins with those of the filter. Of each step so much is taken as brings the density to its
    greatest, where it has one: Q (of the smoother) and R are positive definite; elsewhere all of it.

    Args:
        iterations: at most so many; 1 is the extended filter or smoother.
        tolerance: ends the repetitions of a row, where no state moves by more than so many standard deviations.

    References:
        Bell and Cathey (1993), "The iterated Kalman filter update as a Gauss-Newton method"; Bell (1994), "The iterated
        Kalman smoother as a Gauss-Newton method".
    """

    iterations: int = 10
    tolerance: float = 1e-6

    def __post_init__(self):
        if self.iterations < 1 or not self.tolerance >= 0:
            raise ArgumentError(
                f"Iterated: iterations is {self.iterations} and tolerance {self.tolerance:g}, expected 1 or more, and "
                "0 or more"
            )


class _Points(Method):
    """A mean and covariances of f at ``m + L xi``, where ``P = L L^T`` and the points xi have weights.

    With D, the covariance of f and xi, it is ``A L = D``, and V is what is left, ``sum of w e e^T`` of the residuals
    ``e = f - mean - D xi``: a linear function has none.
    """

    def points(self, like: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """The points ``(K, N)``, and their weights for the mean and for covariances ``(K,)``."""
        raise NotImplementedError

    def affine(self, f: Rowwise, state: Gaussian, at: At) -> Affine:
        mean, cov = state
        xi, of_mean, of_cov = self.points(mean, mean.shape[-1])
        unit, scale = root_of(cov)
        x = mean.unsqueeze(-2) + xi @ (unit * scale.unsqueeze(-2)).mT
        y = f(x.flatten(0, 1), at.repeat(len(xi))).unflatten(0, (-1, len(xi)))
        center = of_mean @ y
        change = y - center.unsqueeze(-2)
        D = change.mT @ (of_cov.unsqueeze(-1) * xi)
        left = change - xi @ D.mT
        V = left.mT @ (of_cov.unsqueeze(-1) * left)
        moves = scale > 0
        D = torch.where(moves.unsqueeze(-2), D / torch.where(moves, scale, 1).unsqueeze(-2), 0)
        A = torch.linalg.solve_triangular(unit, D, upper=False, left=False, unitriangular=True)
        return Affine(A, center - matvec(A, mean), V)


@options(error=ArgumentError)
class Unscented(_Points):
    """2 N + 1 points: the mean, and ``sqrt(N + lambda)`` away from it along each column of the root of P, both ways.

    ``lambda = alpha^2 (N + kappa) - N``. The weights are ``lambda / (N + lambda)`` of the mean, with ``1 - alpha^2 +
    beta`` more in covariances, and ``1 / (2 (N + lambda))`` of the others. The points are drawn anew for the
    observation. With the default values, no weight is negative in any dimension, so that covariances stay positive
    semi-definite; the mean of a polynomial of degree 3 is exact with any.

    Args:
        alpha: spread of the points, above 0.
        beta: weight of the mean in covariances; 2 is best for a normal distribution.
        kappa: more spread, above -N.

    References:
        Julier and Uhlmann (2004), "Unscented filtering and nonlinear estimation"; Wan and van der Merwe (2000), "The
        unscented Kalman filter for nonlinear estimation".
    """

    alpha: float = 1.0
    beta: float = 2.0
    kappa: float = 0.0

    def __post_init__(self):
        if not self.alpha > 0:
            raise ArgumentError(f"Unscented: alpha is {self.alpha:g}, expected more than 0")

    def points(self, like: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """The points ``(2 N + 1, N)`` and their weights.

        Raises:
            ArgumentError: for a kappa of -N or less.
        """
        if not n + self.kappa > 0:
            raise ArgumentError(f"Unscented: kappa is {self.kappa:g} for {n} states, expected more than {-n}")
        size = self.alpha**2 * (n + self.kappa)
        eye = torch.eye(n, dtype=like.dtype, device=like.device) * size**0.5
        weights = like.new_full((2 * n + 1,), 1 / (2 * size))
        weights[0] = 1 - n / size
        of_cov = weights.clone()
        of_cov[0] += 1 - self.alpha**2 + self.beta
        return torch.cat([torch.zeros_like(eye[:1]), eye, -eye]), weights, of_cov


@options(error=ArgumentError)
class Cubature(_Points):
    """2 N points of one weight, ``sqrt(N)`` away from the mean; the spherical-radial rule of degree 3.

    References:
        Arasaratnam and Haykin (2009), "Cubature Kalman filters".
    """

    def points(self, like: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """The points ``(2 N, N)`` and their weights."""
        eye = torch.eye(n, dtype=like.dtype, device=like.device) * n**0.5
        weights = like.new_full((2 * n,), 1 / (2 * n))
        return torch.cat([eye, -eye]), weights, weights


def root_of(cov: Tensor) -> tuple[Tensor, Tensor]:
    """Unit lower triangular L, and scales, of ``P = (L s) (L s)^T``; a scale of 0 where P is singular."""
    if not torch.compiler.is_compiling():
        root, failed = torch.linalg.cholesky_ex(cov)
        if not failed.any():
            scale = root.diagonal(dim1=-2, dim2=-1)
            return root / scale.unsqueeze(-2), scale
    unit, variances = ldl(cov)
    varies = variances > 0
    return unit, torch.where(varies, torch.where(varies, variances, 1).sqrt(), 0)


METHODS = {"ekf": Extended, "iterated": Iterated, "ukf": Unscented, "cubature": Cubature}
"""The methods by the names that a model takes."""
