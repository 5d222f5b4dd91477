"""HiPPO: state matrices whose state holds the coefficients of the input's past in a basis of functions.

Every measure is a pair ``A`` ``(N, N)``, ``B`` ``(N,)`` in float64 for ``c' = A c + B u``; :func:`transition` finds
it by name. The papers write ``-A`` for this A. What the state means, and how to read the past back from it, is in
:mod:`dualform.core.memory`; the normal-plus-low-rank and the diagonal forms are in :mod:`dualform.core.nplr`.

The time scales are those of the reference implementation of S4: a window of length 2 for ``legt``, ``fout`` and
``fourier_decay``, of length 1 for ``lmu`` and ``fourier2``, a time constant of 1 for the Laguerre family.

References:
    Gu, Dao, Ermon, Rudra and Re (2020), "HiPPO: recurrent memory with optimal polynomial projections",
    arXiv:2008.07669; Gu, Johnson, Timalsina, Rudra and Re (2022), "How to train your HiPPO: state space models with
    generalized orthogonal basis projections", arXiv:2206.12037.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError

Transition = tuple[Tensor, Tensor]


def transition(measure: str, n: int) -> Transition:
    """``A`` ``(N, N)`` and ``B`` ``(N,)`` of a measure, float64, with its default parameters.

    Args:
        measure: a key of :data:`MEASURES`.
        n: state size; even for the Fourier measures.

    Raises:
        ArgumentError: for an unknown measure, listing those that exist, or a size that does not fit.
    """
    if measure not in MEASURES:
        raise ArgumentError(f"transition: measure {measure!r} is unknown", hint=f"one of {', '.join(MEASURES)}")
    return MEASURES[measure](n)


def legs(n: int) -> Transition:
    """HiPPO-LegS, the scaled Legendre measure: the whole past, every moment of it with the same weight.

        A_nk = -sqrt(2n+1) sqrt(2k+1)  for n > k,   -(n+1)  for n = k,   0  for n < k
        B_n  =  sqrt(2n+1),                          n, k = 0 .. N-1

    The optimal coefficients obey ``c'(t) = (A c(t) + B u(t)) / t``; S4 drops the factor ``1 / t`` and learns a step
    size instead.

    Raises:
        ArgumentError: for a size below 1.

    References:
        arXiv:2008.07669, Theorem 2, equation (3); derivation in appendix D.3.
    """
    root = _roots("legs", n)
    return -torch.outer(root, root).tril(-1) - torch.diag(_order(n) + 1), root


def legs_diagonal(n: int) -> Tensor:
    """S4D-LegS: the poles of the normal part of :func:`legs`, ``(N // 2,)`` complex128.

    ``A + B B^T / 2`` is ``-I / 2`` plus a skew-symmetric matrix, so all its eigenvalues have the real part -1/2;
    they come in conjugate pairs, of which this is the half with positive imaginary part, smallest first.

    Raises:
        ArgumentError: for a size that is odd or below 2.

    References:
        Gu, Goel, Gupta and Re (2022), "On the parameterization and initialization of diagonal state space
        models", arXiv:2206.11893, section 4.
    """
    if n < 2 or n % 2:
        raise ArgumentError(f"legs_diagonal: the state size is {n}, expected an even number: poles come in pairs")
    A, B = legs(n)
    skew = A + torch.outer(B, B) / 2 + torch.eye(n, dtype=A.dtype) / 2
    imaginary = torch.linalg.eigvalsh(-1j * skew.to(torch.complex128))[n // 2 :]
    return torch.complex(torch.full_like(imaginary, -0.5), imaginary)


def legsd(n: int) -> Transition:
    """The normal part of :func:`legs`, ``A + B B^T / 2`` and ``B / 2``: what S4D-LegS diagonalises.

    Raises:
        ArgumentError: for a size below 1.

    References:
        arXiv:2206.11893, section 4, Theorem 3: its impulse responses tend to those of LegS as N grows.
    """
    A, B = legs(n)
    return A + torch.outer(B, B) / 2, B / 2


def legt(n: int) -> Transition:
    """HiPPO-LegT, the translated Legendre measure: a sliding window of length 2 with uniform weight.

        A_nk = -sqrt(2n+1) sqrt(2k+1) / 2  times  1 for n >= k,  (-1)^(n-k) for n < k
        B_n  =  sqrt(2n+1) / 2

    For a window of length theta multiply both by ``2 / theta``.

    Raises:
        ArgumentError: for a size below 1.

    References:
        arXiv:2008.07669, Theorem 1, equation (1), with orthonormal scaling; derivation in appendix D.1.
    """
    root = _roots("legt", n)
    signs = torch.where(_upper(n), _alternating(n), torch.ones(n, n, dtype=torch.float64))
    return -torch.outer(root, root) * signs / 2, root / 2


def lmu(n: int) -> Transition:
    """The Legendre memory unit: :func:`legt` for a window of length 1, in polynomials with ``P_n(1) = 1``.

        A_nk = (2n+1)  times  -1 for n < k,  (-1)^(n-k+1) for n >= k
        B_n  = (2n+1) (-1)^n

    Raises:
        ArgumentError: for a size below 1.

    References:
        Voelker, Kajic and Eliasmith (2019), "Legendre memory units", equations (1) and (2); arXiv:2008.07669,
        Theorem 1, equation (1), with ``lambda_n = sqrt(2n+1) (-1)^n``.
    """
    square = _roots("lmu", n).square()
    signs = torch.where(_upper(n), -torch.ones(n, n, dtype=torch.float64), -_alternating(n))
    return signs * square[:, None], square * (-1.0) ** _order(n)


def lagt(n: int, beta: float = 1.0) -> Transition:
    """HiPPO-LagT in Laguerre functions: the whole past, ``L_n(s) exp(-s/2)`` of the age s.

        A_nk = 1/2 [n = k] - [n >= k],   B_n = beta

    Raises:
        ArgumentError: for a size below 1.

    References:
        arXiv:2008.07669, Theorem 1, equation (2), tilted to functions orthonormal on the half line; appendix D.2.
    """
    A, B = tlagt(n, 0.0)
    return A, torch.full_like(B, beta)


def tlagt(n: int, beta: float = 1.0) -> Transition:
    """HiPPO-LagT, the translated Laguerre measure with tilt: a past that fades as ``exp(-beta s)``.

        A_nk = (1 - beta)/2 [n = k] - [n >= k],   B_n = beta

    The impulse responses are ``beta L_n(s) exp(-(1 + beta) s / 2)``; ``beta = 1`` is the measure ``exp(-s)``
    without tilt, equation (2) of the paper.

    Raises:
        ArgumentError: for a size below 1.

    References:
        arXiv:2008.07669, Theorem 1, equation (2); the tilt is in appendix D.2.
    """
    _roots("tlagt", n)
    ones = torch.ones(n, n, dtype=torch.float64)
    return (1 - beta) / 2 * torch.eye(n, dtype=torch.float64) - ones.tril(), beta * ones[0]


def glagt(n: int, alpha: float = 0.0, beta: float = 0.01) -> Transition:
    """HiPPO for the generalised Laguerre polynomials ``L_n^(alpha)``, with tilt ``beta``, orthonormal.

        A_nk = (l_k / l_n) (-(1 + beta)/2 [n = k] - [n > k])
        B_n  = binom(n + alpha, n) / l_n  beta^((1 - alpha)/2) / sqrt(Gamma(1 - alpha))
        l_n  = sqrt(Gamma(n + alpha + 1) / Gamma(n + 1))

    Raises:
        ArgumentError: for a size below 1, an ``alpha`` outside of (-1, 1), or a ``beta`` that is not positive.

    References:
        arXiv:2008.07669, appendix D.2.
    """
    _roots("glagt", n)
    if not (-1 < alpha < 1 and beta > 0):
        raise ArgumentError(f"glagt: alpha is {alpha} and beta is {beta}, expected -1 < alpha < 1 and beta > 0")
    order = _order(n)
    log_norm = (torch.lgamma(order + alpha + 1) - torch.lgamma(order + 1)) / 2
    A = -(1 + beta) / 2 * torch.eye(n, dtype=torch.float64) - torch.ones(n, n, dtype=torch.float64).tril(-1)
    height = log_norm - math.lgamma(alpha + 1) - math.lgamma(1 - alpha) / 2 + (1 - alpha) / 2 * math.log(beta)
    return A * (log_norm - log_norm[:, None]).exp(), height.exp()


def fout(n: int) -> Transition:
    """HiPPO-FouT, the truncated Fourier basis on a sliding window of length 2.

    With states in pairs, cosine and sine of the frequencies ``j = 0 .. N/2 - 1``:

        S[2j+1, 2j] = pi j = -S[2j, 2j+1],   B_0 = 1,  B_2j = sqrt(2),  B_odd = 0,   A = S - B B^T

    The equation needs the value that leaves the window, and takes it from the reconstruction. At either end of
    the window a Fourier series takes the mean of the values at both ends; hence the rank-one term. :func:`fourier2` is
    the same for a window of length 1.

    Raises:
        ArgumentError: for a size that is odd or below 2.

    References:
        arXiv:2206.12037, the theorem on S4-FouT (whose matrix is that of :func:`fourier2`); arXiv:2008.07669,
        appendix D.4.
    """
    S, B = _fourier("fout", n)
    return S - torch.outer(B, B), B


def fourier2(n: int) -> Transition:
    """:func:`fout` for a window of length 1: both its A and its B doubled.

    Raises:
        ArgumentError: for a size that is odd or below 2.

    References:
        arXiv:2206.12037, the theorem on S4-FouT.
    """
    S, B = _fourier("fourier2", n)
    return 2 * (S - torch.outer(B, B)), 2 * B


def fourier_decay(n: int) -> Transition:
    """:func:`fout` with half of its rank-one term, ``S - B B^T / 2`` and ``B / 2``: a past that decays.

    Raises:
        ArgumentError: for a size that is odd or below 2.

    References:
        The measure ``fourier_decay`` of the reference implementation of S4.
    """
    S, B = _fourier("fourier_decay", n)
    return S - torch.outer(B, B) / 2, B / 2


def foud(n: int) -> Transition:
    """The diagonal Fourier system: undamped Fourier modes of period 1 under an envelope ``exp(-t / 2)``.

        A = 2 S - I / 2,   S and B as in :func:`fout`

    Raises:
        ArgumentError: for a size that is odd or below 2.

    References:
        arXiv:2206.11893, section 4: the poles of S4D-Lin, up to the scale of their frequencies.
    """
    S, B = _fourier("foud", n)
    return 2 * S - torch.eye(n, dtype=torch.float64) / 2, B


MEASURES: dict[str, Callable[[int], Transition]] = {
    "legs": legs,
    "legsd": legsd,
    "legt": legt,
    "lmu": lmu,
    "lagt": lagt,
    "tlagt": tlagt,
    "glagt": glagt,
    "fout": fout,
    "fourier2": fourier2,
    "fourier_decay": fourier_decay,
    "foud": foud,
}


def _order(n: int) -> Tensor:
    return torch.arange(n, dtype=torch.float64)


def _roots(where: str, n: int) -> Tensor:
    """``sqrt(2n+1)``, after a check of the size."""
    if n < 1:
        raise ArgumentError(f"{where}: the state size is {n}, expected at least 1")
    return (2 * _order(n) + 1).sqrt()


def _upper(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).triu(1)


def _alternating(n: int) -> Tensor:
    """``(-1)^(n-k)``."""
    sign = (-1.0) ** _order(n)
    return torch.outer(sign, sign)


def _fourier(where: str, n: int) -> Transition:
    """The rotation S and the values B of the basis at age zero."""
    if n < 2 or n % 2:
        raise ArgumentError(f"{where}: the state size is {n}, expected an even number: cosine and sine come in pairs")
    below = torch.zeros(n - 1, dtype=torch.float64)
    below[0::2] = math.pi * _order(n // 2)
    B = torch.zeros(n, dtype=torch.float64)
    B[0::2] = math.sqrt(2)
    B[0] = 1
    return torch.diag(below, -1) - torch.diag(below, 1), B
