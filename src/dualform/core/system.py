"""Linear time-invariant systems: the four matrices that everything in this library generalises."""

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualform.core.calls import explained
from dualform.core.discretize import control_form, discretize_dense, generalized_bilinear, known_method
from dualform.core.errors import ArgumentError
from dualform.core.gramian import balance, gramian
from dualform.core.linalg import as_tensors, balancing, check_finite, orbit
from dualform.core.shapes import check_tensors, wide


@explained
@dataclass(frozen=True, init=False, repr=False, eq=False)
class StateSpace:
    """A linear time-invariant system with dense matrices, in continuous or in discrete time.

        continuous (dt is None):  h'(t) = A h(t) + B u(t),      y(t) = C h(t) + D u(t)
        discrete (dt > 0):        h_t = A h_{t-1} + B u_t,      y_t = C h_t + D u_t

    The discrete form is that of the deep state space models: the input acts at once, and ``x0`` is the state
    before the first input. ``scipy.signal`` and the control literature write ``h_{t+1} = A h_t + B u_t`` and
    ``y_t = C h_t + D u_t``; a system ``(A, B, C, D)`` of this class is ``(A, B, C A, C B + D)`` there, see
    :meth:`to_control_form` and :meth:`from_control_form`. Continuous systems are the same everywhere.

    Everything but the model reduction is differentiable in the matrices, the step size, the input and the initial
    state.

    Args:
        A: state matrix ``(N, N)``.
        B: input matrix ``(N, inputs)``; ``(N,)`` means one input.
        C: output matrix ``(outputs, N)``; ``(N,)`` means one output.
        D: feed-through ``(outputs, inputs)``; a number for one input and one output; None means zero.
        dt: step size of a discrete system, in the unit of time of the user's choice; None means continuous.

    Tensors, NumPy arrays and nested lists are taken; see :func:`dualform.core.linalg.as_tensors` for their dtype.

    Raises:
        ArgumentError: for shapes that do not fit, values that are not finite, or a step size that is not positive.

    Example:
        >>> import dualform as df
        >>> lag = df.StateSpace([[-1.0]], [1.0], [1.0]).discretize(0.1)
        >>> y, x = lag.simulate([1.0, 1.0, 1.0])
    """

    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    dt: float | Tensor | None

    def __init__(self, A: Any, B: Any, C: Any, D: Any = None, dt: float | Tensor | None = None):
        given = {"A": A, "B": B, "C": C} | ({} if D is None else {"D": D})
        m = as_tensors("StateSpace", **given)
        m["B"] = m["B"][:, None] if m["B"].dim() == 1 else m["B"]
        m["C"] = m["C"][None, :] if m["C"].dim() == 1 else m["C"]
        if D is None:
            m["D"] = m["A"].new_zeros(m["C"].shape[0], m["B"].shape[-1])
        elif m["D"].dim() == 0:
            m["D"] = m["D"][None, None]
        check_tensors(
            "StateSpace",
            A=(m["A"], "N N"),
            B=(m["B"], "N inputs"),
            C=(m["C"], "outputs N"),
            D=(m["D"], "outputs inputs"),
        )
        check_finite("StateSpace", m)
        for name, value in (m | {"dt": None if dt is None else _step("StateSpace", dt)}).items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        (outputs, n), inputs = self.C.shape, self.B.shape[1]
        time = "continuous" if self.dt is None else f"dt={_number(self.dt):g}"
        return f"StateSpace(N={n}, inputs={inputs}, outputs={outputs}, {time})"

    def discretize(self, dt: float | Tensor, method: str = "zoh", alpha: float | None = None) -> "StateSpace":
        """The discrete system with step ``dt``, with the input and output of ``scipy.signal.cont2discrete``.

        Output k belongs to the time ``k dt``, and the input at k acts from then on. The methods give SciPy's matrices
        ``(A, B, C, D)``, with a C and a D of their own, and :meth:`from_control_form` makes the system of this class
        from them, which may take ``outputs`` more states. So with ``zoh`` the output at k does not contain the input
        at k, but for D; and ``bilinear`` is Tustin's map, whose response at the frequency w is the continuous one at
        ``2/dt tan(w dt / 2)``. :meth:`discretize_recurrence` keeps C and D instead.

        To start a simulation at the state h of the continuous system, with the first input u, take ``x0 = h`` for
        ``zoh``, ``h - lead u`` for ``foh`` (:func:`dualform.core.discretize.first_order_hold`), and
        ``h - w dt (A h + B u)`` for the others, with w = 0 (``euler``), 1/2 (``bilinear``), 1 (``backward_euler``)
        or alpha (``gbt``); append ``outputs`` zeros where there are more states.

        Args:
            dt: step size; a tensor with no axes may require a gradient.
            method: ``zoh`` (exact for inputs constant during a step), ``foh`` (exact for inputs linear between their
                samples), ``bilinear`` or ``tustin``, ``euler`` or ``forward_diff``, ``backward_euler`` or
                ``backward_diff``, or ``gbt`` (generalised bilinear).
            alpha: weight of the new state, for ``gbt`` only, from 0 (``euler``) to 1 (``backward_euler``).

        Raises:
            ArgumentError: for a system that is discrete already, an unknown method, a step that is not positive, or
                a weight that is missing, not asked for, or outside of 0 .. 1.
        """
        self._need_continuous("discretize")
        method, dt = known_method("discretize", method, alpha, foh=True), _step("discretize", dt)
        if method == "backward_euler" or alpha == 1:  # the only methods for which both forms have the same response
            return self.discretize_recurrence(dt, method, alpha)
        return StateSpace.from_control_form(*control_form(self.A, self.B, self.C, self.D, dt, method, alpha), dt)

    def discretize_recurrence(
        self, dt: float | Tensor, method: str = "zoh", alpha: float | None = None
    ) -> "StateSpace":
        """The recurrence of deep state space models, ``h_t = Abar h_{t-1} + Bbar u_t`` with C and D as they are.

        Output t belongs to the end of the step in which input t acts: with ``zoh`` the state h_t is that of the
        continuous system at the time ``t dt``, counted from 1, when input t was held over the step before it. The
        other methods give the update alone, which the papers read out with the same C; their responses differ from
        those of :meth:`discretize`, but for ``backward_euler``.

        Args and errors are those of :meth:`discretize`, without ``foh``, which needs another C and D.
        """
        self._need_continuous("discretize_recurrence")
        method = known_method("discretize_recurrence", method, alpha, foh=False)
        dt = _step("discretize_recurrence", dt)
        if alpha is not None:
            A, B = generalized_bilinear(self.A, self.B, dt, alpha)
        else:
            A, B = discretize_dense(self.A, self.B, dt, method)
        return replace(self, A=A, B=B, dt=dt)

    def simulate(self, u: Any, x0: Any = None) -> tuple[Tensor, Tensor]:
        """The output and the states for an input, by the recurrence.

        Args:
            u: input ``(T, inputs)`` or ``(B, T, inputs)``; ``(T,)`` for a system of one input. An input that is NaN or
                masked is unknown, and so is everything from then on: NaN.
            x0: state before the first input, ``(N,)`` or, for a batch, ``(B, N)``; None means zero.

        Returns:
            ``y`` ``(T, outputs)`` and ``x`` ``(T, N)``, the state after each input; batched as ``u`` is.

        Raises:
            ArgumentError: for a continuous system, or shapes that do not fit.
        """
        self._need_discrete("simulate")
        n, inputs = self.B.shape
        given = as_tensors("simulate", A=self.A, u=u) | ({} if x0 is None else as_tensors("simulate", A=self.A, x0=x0))
        u, x0 = given["u"], given.get("x0")
        u = u[:, None] if u.dim() == 1 else u
        batched = u.dim() == 3
        check_tensors("simulate", u=(u, f"{'B ' * batched}T {inputs}"))
        u = u if batched else u[None]
        if x0 is None:
            x0 = u.new_zeros(n)
        check_tensors("simulate", x0=(x0, f"{len(u)} {n}" if batched and x0.dim() == 2 else f"{n}"))
        dtype = wide(u, x0, self.A)
        A, B, C, D = (matrix.to(dtype).mT for matrix in (self.A, self.B, self.C, self.D))
        u = u.to(dtype)
        h, states = x0.to(dtype).expand(len(u), n), []
        for drive in (u @ B).unbind(1):
            h = h @ A + drive
            states.append(h)
        x = torch.stack(states, 1) if states else u.new_zeros(len(u), 0, n)
        y = x @ C + u @ D
        return (y, x) if batched else (y[0], x[0])

    def kernel(self, length: int) -> Tensor:
        """The impulse response ``K_k = C A^k B``, ``(length, outputs, inputs)``; D is not part of it.

        From a zero state, ``y_t = sum_k K_k u_{t-k} + D u_t``. With ``k = j s + i`` and ``s`` about
        ``sqrt(length)``, the products ``C A^(j s)`` and ``A^i B`` are made by doubling and then multiplied: time
        ``O(sqrt(length) N^2 + length N)`` for one input and one output.

        Raises:
            ArgumentError: for a continuous system, or a negative length.
        """
        self._need_discrete("kernel")
        if length < 0:
            raise ArgumentError(f"kernel: the length is {length}, expected 0 or more")
        inner = max(1, math.isqrt(length))
        outer = -(-length // inner)
        right = orbit(self.A, self.B, inner)
        left = orbit(torch.linalg.matrix_power(self.A, inner).mT, self.C.mT, outer)
        return torch.einsum("jnp,inm->jipm", left, right).flatten(0, 1)[:length]

    def frequency_response(self, omega: Any) -> Tensor:
        """The transfer function on the imaginary axis or the unit circle, complex ``(frequencies, outputs, inputs)``.

            continuous   H(i w) = C (i w - A)^-1 B + D
            discrete     H(z) = C (1 - A / z)^-1 B + D,   z = exp(i w dt)

        Args:
            omega: angular frequencies ``(frequencies,)``, radians per unit of time; the response of a discrete system
                repeats itself with the period 2 pi / dt.

        Raises:
            ArgumentError: for frequencies that are not finite, and one at a pole, where the response is infinite.
        """
        omega = as_tensors("frequency_response", A=self.A.real, omega=omega)["omega"]
        check_tensors("frequency_response", omega=(omega, "frequencies"))
        check_finite("frequency_response", {"omega": omega})
        z = (1j * omega if self.dt is None else (-1j * omega * self.dt).exp())[:, None, None]
        eye = torch.eye(len(self.A), dtype=z.dtype, device=z.device)
        A, B, C, D = (matrix.to(z.dtype) for matrix in (self.A, self.B, self.C, self.D))
        left = z * eye - A if self.dt is None else eye - z * A
        states, info = torch.linalg.solve_ex(left, B.expand(len(z), *B.shape))
        if bool(info.any()):
            at = float(omega[info.nonzero()[0, 0]])
            raise ArgumentError(f"frequency_response: the response at {at:g} is infinite: the system has a pole there")
        return C @ states + D

    def poles(self) -> Tensor:
        """The eigenvalues of A, complex ``(N,)``."""
        return torch.linalg.eigvals(self.A)

    def is_stable(self) -> bool:
        """Whether every free response dies out: poles in the open left half plane, or in the open unit disc.

        An integrator, with a pole on the border, is not stable in this sense.
        """
        poles = self.poles()
        return bool((poles.real < 0).all() if self.dt is None else (poles.abs() < 1).all())

    def controllability_gramian(self) -> Tensor:
        """``P`` ``(N, N)``: inputs of energy up to 1 reach the states ``{h : h^* P^-1 h <= 1}`` from rest.

        ``A P + P A^* + B B^* = 0`` in continuous, ``P = A P A^* + B B^*`` in discrete time.

        Raises:
            ArgumentError: for an unstable system.
        """
        return gramian("controllability_gramian", self.A, self.B, continuous=self.dt is None)

    def observability_gramian(self) -> Tensor:
        """``Q`` ``(N, N)``: from the state h, without input, the output has the energy ``h^* Q h``.

        ``A^* Q + Q A + C^* C = 0`` in continuous, ``Q = A^* Q A + C^* C`` in discrete time, where h is a state after
        an input and the output of the same time counts.

        Raises:
            ArgumentError: for an unstable system.
        """
        return gramian("observability_gramian", self.A.mH, self.C.mH, continuous=self.dt is None)

    def hankel_singular_values(self) -> Tensor:
        """The square roots of the eigenvalues of ``P Q``, ``(N,)``, greatest first: the same in all coordinates.

        Raises:
            ArgumentError: for an unstable system.
        """
        return balance("hankel_singular_values", self.A, self.B, self.C, continuous=self.dt is None).hankel

    def reduce(self, order: int) -> "Reduction":
        """A system of fewer states by balanced truncation, and how far from this one it can be.

        In coordinates in which both Gramians are the same diagonal matrix, the states with the smallest Hankel
        singular values are dropped. The reduced system is stable, and at every frequency the largest gain of the
        difference is at most ``bound``, twice the sum of the values dropped. The bound is usually stated for the
        control form. In the discrete form of this class the responses of both systems, but for D, come one step
        earlier, which multiplies the difference by ``exp(i w dt)``, of modulus 1.

        Args:
            order: number of states to keep, 1 to N.

        Raises:
            ArgumentError: for an unstable system, or an order above the number of states that matter.

        References:
            Moore (1981), "Principal component analysis in linear systems"; Glover (1984), "All optimal Hankel-norm
            approximations of linear multivariable systems and their L-infinity error bounds", section 9; in discrete
            time Al-Saggaf and Franklin (1987), "An error bound for a discrete reduced order model".
        """
        n = len(self.A)
        if not 1 <= order <= n:
            raise ArgumentError(f"reduce: the order is {order}, expected 1 to {n}, the states of the system")
        left, right, hankel = balance("reduce", self.A, self.B, self.C, continuous=self.dt is None)
        if order > len(left):
            raise ArgumentError(
                f"reduce: the order is {order}, but only {len(left)} states are both controllable and observable",
                hint=f"reduce({len(left)}) loses nothing"
                if len(left)
                else "the output does not depend on the input's past",
            )
        left, right = left[:order], right[:, :order]
        system = replace(self, A=left @ self.A @ right, B=left @ self.B, C=self.C @ right)
        return Reduction(system, 2 * hankel[order:].sum())

    def to_control_form(self) -> tuple[Any, ...]:
        """NumPy arrays in the convention of SciPy and python-control: ``(A, B, C, D)``, and ``dt`` if discrete.

            x_{k+1} = A x_k + B u_k,   y_k = C x_k + D u_k

        The state ``x_k`` there is ``h_{k-1}`` here: the same initial state gives the same output.

        Example:
            >>> import scipy.signal
            >>> lag = StateSpace([[-1.0]], [1.0], [1.0]).discretize(0.1)
            >>> _, y, x = scipy.signal.dlsim(lag.to_control_form(), [1.0, 1.0, 1.0])

        and ``scipy.signal.StateSpace(*form[:4], dt=form[4])``, or ``control.ss(*form)``, which takes both kinds.
        """
        A, B, C, D = self.A, self.B, self.C, self.D
        if self.dt is not None:
            C, D = C @ A, C @ B + D
        arrays = tuple(matrix.detach().cpu().numpy() for matrix in (A, B, C, D))
        return arrays if self.dt is None else (*arrays, _number(self.dt))

    @classmethod
    def from_control_form(cls, A: Any, B: Any, C: Any, D: Any = None, dt: float | Tensor | None = None) -> "StateSpace":
        """The system that SciPy and python-control write ``x_{k+1} = A x_k + B u_k``, ``y_k = C x_k + D u_k``.

        Where A can be inverted at the cost of at most three digits (``|A^-1| max(1, |A|) < 1000`` in balanced
        coordinates), that is ``(A, B, C A^-1, D - C A^-1 B)``. Otherwise, as for a pure delay, the delayed output
        joins the state, which then has ``N + outputs`` components; ``(x_0, 0)`` is the initial state that
        corresponds to ``x_0``.

        Args:
            A: state matrix; B, C, D as for the class.
            B: input matrix.
            C: output matrix.
            D: feed-through.
            dt: step size; None, or python-control's 0, means continuous, and True, an unspecified step, means 1.

        Raises:
            ArgumentError: as the class does.

        Example:
            >>> system = StateSpace.from_control_form(s.A, s.B, s.C, s.D, s.dt)  # doctest: +SKIP
        """
        continuous = dt is None or (not isinstance(dt, Tensor) and dt == 0)
        given = cls(A, B, C, D, None if continuous else dt)
        if continuous:
            return given
        A, B, C, D = given.A, given.B, given.C, given.D
        units = balancing(A)
        balanced = A * units / units[:, None]
        gains = torch.linalg.svdvals(balanced.detach())
        if float(gains.min()) > 1e-3 * max(1.0, float(gains.max())):
            ahead = torch.linalg.solve(balanced, C * units, left=False) / units
            return replace(given, C=ahead, D=D - ahead @ B)
        n, outputs = len(A), len(C)
        return replace(
            given,
            A=torch.nn.functional.pad(torch.cat([A, C]), (0, outputs)),
            B=torch.nn.functional.pad(B, (0, 0, 0, outputs)),
            C=torch.nn.functional.pad(torch.eye(outputs, dtype=A.dtype, device=A.device), (n, 0)),
        )

    def _need_continuous(self, where: str) -> None:
        if self.dt is not None:
            raise ArgumentError(f"{where}: the system is discrete already, with dt={_number(self.dt):g}")

    def _need_discrete(self, where: str) -> None:
        if self.dt is None:
            raise ArgumentError(
                f"{where}: the system is continuous", hint="discretise it first, as in system.discretize(dt=0.01)"
            )


class Reduction(NamedTuple):
    """What :meth:`StateSpace.reduce` returns."""

    system: StateSpace
    bound: Tensor  # of the gain of the difference, at every frequency


def _number(dt: float | Tensor) -> float:
    return float(dt.detach()) if isinstance(dt, Tensor) else dt


def _step(where: str, dt: Any) -> float | Tensor:
    """A step size, checked: a Python number, or a tensor with no axes."""
    if isinstance(dt, Tensor) and dt.dim():
        raise ArgumentError(f"{where}: dt has shape {tuple(dt.shape)}, expected a number")
    dt = dt if isinstance(dt, Tensor) else float(dt)
    value = _number(dt)
    if not 0 < value < math.inf:
        raise ArgumentError(f"{where}: dt is {value:g}, expected a positive step size")
    return dt
