"""The log-likelihood of stationary autoregressive moving averages."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.shapes import check_real, check_tensors, once_per_shape, wide
from dualform.ops.op import Op
from dualform.ops.state import check_dtype

_WHERE = "arma_likelihood"


def arma_likelihood(ar: Tensor, ma: Tensor, variance: Tensor, y: Tensor) -> Tensor:
    """The exact log-likelihood ``log p(y_1 .. y_T)`` of each row of stationary series of mean zero.

        y_t = phi_1 y_{t-1} + .. + phi_p y_{t-p} + e_t + theta_1 e_{t-1} + .. + theta_q e_{t-q},   e_t ~ N(0, variance)

    Seasonal factors are multiplied out beforehand. The moving average need not be invertible. The kernel takes
    ``O(max(p, q + 1))`` operations per step, has first derivatives by all arguments, and second derivatives besides.
    Everything is computed in float32, or in float64 where an argument is.

    Args:
        ar: phi, ``(B, p)``; p may be 0.
        ma: theta, ``(B, q)``; q may be 0.
        variance: of the shocks, ``(B,)``.
        y: ``(B, T)``, none missing.

    Returns:
        ``(B,)``; NaN where the autoregression has no stationary distribution, or the variance is not positive.

    Raises:
        ArgumentError: for shapes, dtypes or devices that do not fit together.

    References:
        Durbin (1960), "The fitting of time-series models", for the definition; Brockwell and Davis (1991), "Time
        series: theory and methods", sections 3.3 and 5.2; Pearlman (1980), "An algorithm for the exact likelihood of a
        high-order autoregressive-moving average process", and Kailath and Sayed (1995), "Displacement structure: theory
        and applications", for that of the kernel.
    """
    _check_inputs(ar, ma, variance, y)
    dtype = wide(ar, ma, variance, y)
    return arma_likelihood_op(ArmaLikelihood._make(x.to(dtype) for x in (ar, ma, variance, y)))[0]


class ArmaLikelihood(NamedTuple):
    """The arguments of the operator, as in :func:`arma_likelihood`; all in one dtype."""

    ar: Tensor  # (B, p)
    ma: Tensor  # (B, q)
    variance: Tensor  # (B,)
    y: Tensor  # (B, T)


@once_per_shape
def _check_inputs(ar: Tensor, ma: Tensor, variance: Tensor, y: Tensor) -> None:
    check_tensors(_WHERE, ar=(ar, "B P"), ma=(ma, "B Q"), variance=(variance, "B"), y=(y, "B T"))
    check_real(_WHERE, ar=ar, ma=ma, variance=variance, y=y)


def _check(a: ArmaLikelihood) -> None:
    _check_inputs(*a)
    check_dtype(_WHERE, a.y.dtype)
    for name, m in zip(a._fields, a, strict=True):
        if m.dtype != a.y.dtype:
            raise ArgumentError(f"{_WHERE}: {name} is {m.dtype}, but y is {a.y.dtype}", hint=f"{name}.to({a.y.dtype})")


def autocovariances(ar: Tensor, ma: Tensor, count: int) -> Tensor:
    """gamma_0 .. gamma_count of series with shocks of unit variance, ``(B, count + 1)``.

    The first p + 1 solve ``gamma_k - sum_i phi_i gamma_|k-i| = sum_j theta_j psi_{j-k}``, and give those that follow.

    Args:
        ar: phi, ``(B, p)``.
        ma: theta, ``(B, q)``.
        count: how many besides gamma_0.

    References:
        Brockwell and Davis (1991), equations 3.3.8 and 3.3.9.
    """
    (rows, p), q = ar.shape, ma.shape[1]
    theta = torch.cat([torch.ones_like(ar[:, :1]) if p else ma.new_ones(rows, 1), ma], 1)
    psi: list[Tensor] = []
    for j in range(q + 1):
        psi.append(theta[:, j] + sum(ar[:, i - 1] * psi[j - i] for i in range(1, min(j, p) + 1)))
    nothing = torch.zeros_like(theta[:, 0])
    right = [sum((theta[:, j] * psi[j - k] for j in range(k, q + 1)), nothing) for k in range(max(p, count) + 1)]
    lags = torch.arange(p + 1)
    left = torch.eye(p + 1, dtype=ar.dtype, device=ar.device).expand(rows, -1, -1)
    for i in range(1, p + 1):
        left = left - ar[:, i - 1, None, None] * torch.nn.functional.one_hot((lags - i).abs(), p + 1).to(ar)
    gamma = [*torch.linalg.solve_ex(left, torch.stack(right[: p + 1], 1))[0].unbind(1)]
    for k in range(p + 1, count + 1):
        gamma.append(right[k] + sum(ar[:, i - 1] * gamma[k - i] for i in range(1, p + 1)))
    return torch.stack(gamma[: count + 1], 1)


def _reference(a: ArmaLikelihood) -> tuple[Tensor]:
    """The best linear predictions of each value by all those before it, by the recursion of Durbin and Levinson.

    phi_nn = (gamma_n - sum_j phi_{n-1,j} gamma_{n-j}) / v_{n-1},   v_n = v_{n-1} (1 - phi_nn^2),
    phi_nj = phi_{n-1,j} - phi_nn phi_{n-1,n-j}
    """
    gamma = autocovariances(a.ar, a.ma, a.y.shape[1])
    v, phi = gamma[:, 0], a.y[:, :0]
    total = torch.zeros_like(v)
    for n in range(1, a.y.shape[1] + 1):
        error = a.y[:, n - 1] - (phi * a.y[:, : n - 1].flip(1)).sum(1)
        size = a.variance * v
        total = total - (error.square() / size + size.log() + math.log(2 * math.pi)) / 2
        last = (gamma[:, n] - (phi * gamma[:, 1:n].flip(1)).sum(1)) / v
        phi, v = torch.cat([phi - last[:, None] * phi.flip(1), last[:, None]], 1), v * (1 - last.square())
    return (total,)


def _fake(a: ArmaLikelihood) -> list[Tensor]:
    return [a.y.new_empty(a.y.shape[0])]


arma_likelihood_op = Op(_WHERE, ArmaLikelihood, _reference, fake=_fake, check=_check, outputs=1, stepwise=True)


def has_kernel(a: ArmaLikelihood) -> bool:
    """Whether a kernel would run an eager call, and give its gradient where one is wanted."""
    wanted = torch.is_grad_enabled() and any(m.requires_grad for m in a)
    return arma_likelihood_op.has_kernel(a, wanted)
