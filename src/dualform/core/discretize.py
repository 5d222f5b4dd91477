"""From continuous time to steps: ``h' = A h + B u`` becomes ``h_t = Abar h_{t-1} + Bbar u_t``.

For diagonal A a rule is a plain function ``(A, dt) -> (Abar, factor)``, elementwise, with ``Bbar = factor * B``;
configs name it by its key in :data:`RULES`. For dense A there is :func:`discretize_dense`, with the same names.
With ``z = dt A``:

    ==================  ===========================  ========================
    method              Abar                         factor of B
    ==================  ===========================  ========================
    ``zoh``             ``exp(z)``                   ``dt (exp(z) - 1) / z``
    ``bilinear``        ``(1 + z/2) / (1 - z/2)``    ``dt / (1 - z/2)``
    ``euler``           ``1 + z``                    ``dt``
    ``backward_euler``  ``1 / (1 - z)``              ``dt / (1 - z)``
    ==================  ===========================  ========================

``zoh`` (zero-order hold) is exact for an input that is constant during each step; ``bilinear`` (Tustin) maps the
stable half plane onto the unit disc; ``euler`` may turn a stable system into an unstable one.

Dense systems have two more methods: ``gbt``, the generalised bilinear transform, whose weight the caller gives, and
``foh``, the first-order hold, see :func:`first_order_hold`.

Deep layers keep C and D and read the output from the new state, ``y_t = C h_t + D u_t``. The control literature reads
it from the state before the input acts, and its methods come with a C and a D of their own:
:func:`control_form` gives them.

Where samples come at irregular times, a layer with the step dt holds an input over an ``interval`` of s steps:
:func:`hold` makes one update of s of them, from ``log Abar``, which :data:`EXPONENTS` gives for the rules that keep
a stable system stable. For ``zoh`` that is the rule at the step ``s dt``.

References:
    Gu, Goel, Gupta and Re (2022), "On the parameterization and initialization of diagonal state space models",
    arXiv:2206.11893, section 3.1; Franklin, Powell and Workman, "Digital control of dynamic systems", chapter 4.
"""

from collections.abc import Callable
from math import factorial

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.linalg import matrix_exp, small_expm1, symmetric_part
from dualform.core.shapes import widest

Rule = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

_SERIES = [1 / factorial(n + 1) for n in range(14)]  # truncation below float64's rounding for |z| < 1/2


def zoh(A: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Zero-order hold, ``exp(z)`` and ``dt (exp(z) - 1) / z``; the limit ``dt`` and its gradient at ``z = 0``."""
    z = dt * A
    Abar = z.exp()
    small = z.abs() < 0.5
    near = torch.where(small, z, torch.zeros_like(z))
    far = torch.where(small, torch.ones_like(z), z)
    series = torch.full_like(near, _SERIES[-1])
    for coefficient in reversed(_SERIES[:-1]):
        series = series * near + coefficient
    return Abar, dt * torch.where(small, series, (far.exp() - 1) / far)


def bilinear(A: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Tustin's rule, ``(1 + z/2) / (1 - z/2)`` and ``dt / (1 - z/2)``."""
    half = dt * A / 2
    return (1 + half) / (1 - half), dt / (1 - half)


def euler(A: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Forward Euler, ``1 + z`` and ``dt``."""
    z = dt * A
    return 1 + z, dt.to(z.dtype).expand_as(z)


def backward_euler(A: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Backward Euler, ``1 / (1 - z)`` and ``dt / (1 - z)``."""
    Abar = 1 / (1 - dt * A)
    return Abar, dt * Abar


RULES: dict[str, Rule] = {"zoh": zoh, "bilinear": bilinear, "euler": euler, "backward_euler": backward_euler}


def _bilinear_exponent(A: Tensor, dt: Tensor) -> Tensor:
    """``2 atanh(z / 2)`` without the cancellation that ``log((1 + z/2) / (1 - z/2))`` has for small z."""
    half = dt * A / 2
    x, y = half.real, half.imag
    return torch.complex(
        torch.log1p(4 * x / ((1 - x).square() + y.square())) / 2, torch.atan2(2 * y, (1 - x) * (1 + x) - y.square())
    )


EXPONENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"zoh": lambda A, dt: dt * A, "bilinear": _bilinear_exponent}
"""``log Abar`` of a rule for complex diagonal A with Re A < 0, on the branch that tends to ``dt A`` for small dt."""

_IMPLICIT = {"euler": 0.0, "bilinear": 0.5, "backward_euler": 1.0}  # the weight of the new state in A h
ALIASES = {"tustin": "bilinear", "forward_diff": "euler", "backward_diff": "backward_euler"}
"""Other names that the control literature and SciPy have for the methods of dense systems."""


def rule(method: str) -> Rule:
    """The rule for diagonal A with a name.

    Raises:
        ArgumentError: for an unknown name; lists those that exist.
    """
    if method not in RULES:
        raise _unknown(method)
    return RULES[method]


def hold(log_a: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Several steps of ``h <- a h + b`` under one b in a single update, ``h <- a^s h + w b``: ``a^s`` and w.

    ``w = 1 + a + ... + a^(s-1) = (a^s - 1) / (a - 1)``. The closed form is used for every positive s, whole or not.
    With it intervals add up: an update of s steps and one of r steps, under the same b, are an update of s + r.

    Args:
        log_a: logarithm of the decay, real or complex, with a real part of at most 0.
        steps: s, positive; broadcasts against ``log_a``.
    """
    least = torch.finfo(log_a.dtype).eps ** 2  # below it w equals s to the last digit
    log_a = torch.where(log_a.abs() < least, -least, log_a)
    total = steps * log_a
    return total.exp(), torch.expm1(total) / torch.expm1(log_a)


def discretize_dense(A: Tensor, B: Tensor, dt: float | Tensor, method: str = "zoh") -> tuple[Tensor, Tensor]:
    """Discretise a dense system, ``A`` ``(..., N, N)`` and ``B`` ``(..., N, inputs)`` -> ``(Abar, Bbar)``.

    ``zoh`` is the exponential of the block matrix ``dt [[A, B], [0, 0]]`` (Van Loan 1978, "Computing integrals
    involving the matrix exponential"), right for singular A too. The other methods are the generalised bilinear
    transform ``(I - w z)^-1 [I + (1 - w) z, dt B]`` with w = 0 (euler), 1/2 (bilinear), 1 (backward_euler).

    Args:
        A: state matrix, in 1 / (the unit of ``dt``).
        B: input matrix.
        dt: step size, a number or a tensor that broadcasts against the leading axes of A.
        method: ``zoh``, ``bilinear``, ``euler`` or ``backward_euler``.

    Raises:
        ArgumentError: for an unknown method; lists those that exist.
    """
    if method not in RULES:
        raise _unknown(method)
    if method != "zoh":
        return generalized_bilinear(A, B, dt, _IMPLICIT[method])
    n = A.shape[-1]
    both = _scaled(A, B, dt)
    inputs = B.shape[-1]
    exponential = matrix_exp(torch.nn.functional.pad(both, (0, 0, 0, inputs)), driven=inputs)[..., :n, :]
    return exponential[..., :n], exponential[..., n:]


def discretize_noise(A: Tensor, Q: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """The exact step of ``dh = A h dt + dw`` with white noise w of the spectral density Q: ``(Abar, Qbar)``.

        Abar = exp(A dt),   Qbar = int_0^dt exp(A s) Q exp(A s)^T ds

    Van Loan's block exponential at ``dt / 2^k``, where it is small, and then ``Qbar(2 s) = Qbar(s) + Abar(s) Qbar(s)
    Abar(s)^T``. So nothing overflows for long steps of a stable system, and Qbar stays positive semi-definite. Steps
    that are chains of integrators, such as of motion, keep all digits.

    Args:
        A: ``(..., N, N)``, in 1 / (the unit of ``dt``).
        Q: ``(..., N, N)``, symmetric, maybe singular.
        dt: ``(...)``, 0 or more; its axes broadcast with the leading ones of A and Q.

    References:
        Van Loan (1978), "Computing integrals involving the matrix exponential".
    """
    dtype, work = A.dtype, widest(A)
    A, Q, dt = A.to(work), Q.to(work), dt.to(A.device, work)[..., None, None]
    n = A.shape[-1]
    size = (A.detach() * dt.detach()).abs().sum(-1).amax(-1) if n else dt.detach()[..., 0, 0]
    halvings = torch.where(size > 0.5, size.log2().ceil() + 1, 0)[..., None, None]
    small = dt * torch.exp2(-halvings)
    z, noise = small * A, small * Q
    top, bottom = torch.cat(torch.broadcast_tensors(-z, noise), -1), torch.cat([torch.zeros_like(z), z.mT], -1)
    change = small_expm1(torch.cat(torch.broadcast_tensors(top, bottom), -2))
    E, eye = change[..., n:, n:].mT, torch.eye(n, dtype=change.dtype, device=change.device)
    Qbar = symmetric_part((eye + E) @ change[..., :n, n:])
    for k in range(int(halvings.max()) if halvings.numel() else 0):
        double, Abar = k < halvings, eye + E
        Qbar = torch.where(double, Qbar + symmetric_part(Abar @ Qbar @ Abar.mT), Qbar)
        E = torch.where(double, 2 * E + E @ E, E)
    return (eye + E).to(dtype), Qbar.to(dtype)


def generalized_bilinear(A: Tensor, B: Tensor, dt: float | Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """``(I - alpha z)^-1 [I + (1 - alpha) z, dt B]`` with ``z = dt A``: ``alpha`` weighs the new state in ``A h``.

    Stable systems stay stable for ``alpha >= 1/2``.

    Raises:
        ArgumentError: for a weight outside of 0 .. 1.

    References:
        Zhang, Chen and Chen (2009), "Digital redesign via the generalised bilinear transformation"; arXiv:2008.07669,
        appendix B.3.
    """
    if not 0 <= alpha <= 1:
        raise ArgumentError(f"discretize: alpha is {alpha}, expected a weight from 0 (explicit) to 1 (implicit)")
    n = A.shape[-1]
    both = _scaled(A, B, dt)
    z, eye = both[..., :n], torch.eye(n, dtype=both.dtype, device=both.device)
    new = torch.linalg.solve(eye - alpha * z, torch.cat([eye + (1 - alpha) * z, both[..., n:]], -1))
    return new[..., :n], new[..., n:]


def control_form(
    A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt: float | Tensor, method: str = "zoh", alpha: float | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Discretise a dense system as ``scipy.signal.cont2discrete`` does, to ``(Abar, Bbar, Cbar, Dbar)``.

        x_{k+1} = Abar x_k + Bbar u_k,   y_k = Cbar x_k + Dbar u_k

    ``zoh`` keeps C and D. The generalised bilinear transform of weight w has ``x = (I - w z) h - w dt B u`` for its
    state, and so ``Cbar = C (I - w z)^-1`` and ``Dbar = D + w C Bbar``; ``bilinear`` is then Tustin's map, whose
    response at the frequency w is that of the continuous system at ``2/dt tan(w dt / 2)``. ``foh`` is
    :func:`first_order_hold`.

    Args:
        A: state matrix ``(..., N, N)``, in 1 / (the unit of ``dt``).
        B: input matrix ``(..., N, inputs)``.
        C: output matrix ``(..., outputs, N)``.
        D: feed-through ``(..., outputs, inputs)``.
        dt: step size, a number or a tensor that broadcasts against the leading axes of A.
        method: ``zoh``, ``bilinear``, ``euler``, ``backward_euler``, ``gbt`` or ``foh``.
        alpha: the weight w of ``gbt``, from 0 to 1.

    Raises:
        ArgumentError: for a weight outside of 0 .. 1.
    """
    if method == "zoh":
        return *discretize_dense(A, B, dt), C, D
    if method == "foh":
        Abar, Bbar, lead = first_order_hold(A, B, dt)
        return Abar, Bbar, C, D + C @ lead
    weight = _IMPLICIT[method] if alpha is None else alpha
    Abar, Bbar = generalized_bilinear(A, B, dt, weight)
    n = A.shape[-1]
    left = torch.eye(n, dtype=A.dtype, device=A.device) - weight * _scaled(A, B, dt)[..., :n]
    return Abar, Bbar, torch.linalg.solve(left, C, left=False), D + weight * C @ Bbar


def known_method(where: str, method: str, alpha: float | None, *, foh: bool) -> str:
    """The name of a method of dense systems, without its aliases.

    Raises:
        ArgumentError: for an unknown name, listing those that exist, or a weight that is missing or not asked for.
    """
    method = ALIASES.get(method, method)
    known = (*RULES, "gbt", "foh") if foh else (*RULES, "gbt")
    if method not in known:
        other = "; foh changes C and D: use discretize" if method == "foh" else ""
        raise ArgumentError(f"{where}: method {method!r} is unknown", hint=f"one of {', '.join(known)}{other}")
    if (alpha is not None) != (method == "gbt"):
        raise ArgumentError(
            f"{where}: alpha is {alpha} with method {method!r}, expected a weight with 'gbt' and none with the others"
        )
    return method


def first_order_hold(A: Tensor, B: Tensor, dt: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(Abar, Bbar, lead)`` for an input that is linear between its samples: exact, for singular A too.

        h(t_k) = x_k + lead u_k,   x_{k+1} = Abar x_k + Bbar u_k,   y_k = C x_k + (D + C lead) u_k

    ``Abar = M1``, ``lead = M3`` and ``Bbar = M2 - M3 + M1 M3`` with ``[M1 M2 M3]`` the first rows of
    ``exp [[z, dt B, 0], [0, 0, I], [0, 0, 0]]``. The state at the end of a step depends on the input at both ends of
    it; this form, of SciPy and of the control literature, moves the part of the new input into the output. No system
    ``h_t = Abar h_{t-1} + Bbar u_t`` with an unchanged C does the same, so ``foh`` is no rule of :data:`RULES`.

    References:
        Franklin, Powell and Workman, "Digital control of dynamic systems", 3rd edition, pages 204-206, the
        triangle hold.
    """
    n, inputs = B.shape[-2:]
    padded = torch.nn.functional.pad(_scaled(A, B, dt), (0, inputs, 0, 2 * inputs))
    block = padded + torch.nn.functional.pad(
        torch.eye(inputs, dtype=padded.dtype, device=padded.device), (n + inputs, 0, n, inputs)
    )
    Abar, constant, lead = matrix_exp(block, driven=2 * inputs)[..., :n, :].split([n, inputs, inputs], -1)
    return Abar, constant - lead + Abar @ lead, lead


def _scaled(A: Tensor, B: Tensor, dt: float | Tensor) -> Tensor:
    """``dt [A, B]``."""
    step = dt.to(A.real)[..., None, None] if isinstance(dt, Tensor) else dt
    return step * torch.cat([A, B], -1)


def _unknown(method: str) -> ArgumentError:
    return ArgumentError(f"discretisation method {method!r} is unknown", hint=f"one of {', '.join(RULES)}")
