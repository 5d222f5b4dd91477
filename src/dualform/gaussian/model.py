"""Linear-Gaussian state space models: their parameters, and samples from them."""

from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from dualform.core.calls import explained
from dualform.core.errors import ArgumentError
from dualform.core.linalg import as_tensors, matvec
from dualform.gaussian.fitting import fit
from dualform.gaussian.initial import initial
from dualform.gaussian.linear import Linear
from dualform.gaussian.parameters import Parameters, Terms
from dualform.gaussian.smoothing import normal
from dualform.gaussian.steps import Matrices, standing, transition


@explained
class LinearGaussian(Linear, Parameters):
    """A linear-Gaussian state space model, an ``nn.Module``.

        h_t = A h_{t-1} + c + B u_t + S eta_t,   eta_t ~ N(0, Q),   t = 1 .. T
        y_t = C h_t + d + D u_t + eps_t,         eps_t ~ N(0, R)
        h_0 ~ N(m0, P0)

    **m0 and P0 describe the state before the first transition**, one step before the first observation, so that a
    prior and a state left by an earlier run are the same thing: ``h_1 ~ N(A m0 + c, A P0 A^T + Q)``. Many libraries
    (statsmodels, KFAS, pykalman, dynamax) give the moments of h_1 in their place: ``prior="first"`` takes them so, and
    makes no transition before the first observation.

    The matrices and the input of step t lead **into** its observation. Where another library's transition leads out of
    an observation, as in statsmodels, its matrix of step t is ours of step t + 1; under ``prior="first"`` the first is
    not used.

    Matrices are ``(*batch, N, N)``: the axes of a batch, of models that differ, broadcast with each other and with
    those of the data. Those that vary in time are ``(*batch, T, N, N)``, with T steps or more.

    Q and P0 may be singular. R may be, as long as every observation has some uncertainty before it is made:
    ``C P C^T + R`` is positive definite for the predicted covariance P.

    The methods are those of :class:`~dualform.gaussian.kalman.KalmanFilter`, in the form that is expected to be faster.

    Args:
        A: transition ``(N, N)``.
        C: emission ``(M, N)``.
        Q: covariance of the process noise ``(N, N)``, or ``(K, K)`` with S.
        R: covariance of the observation noise ``(M, M)``.
        m0: prior mean ``(N,)``; zeros by default.
        P0: prior covariance ``(N, N)``; a number times the identity, such as 1e6 for an approximately diffuse prior; or
            the name of one. ``"stationary"``: the distribution that a transition leaves as it is, mean and covariance,
            computed where it is needed, with gradients. ``"diffuse"``: exactly diffuse, an infinite variance in every
            direction.
        prior: ``"before"`` or ``"first"``.
        terms: what most models do without, by name. c and d, intercepts of the state ``(N,)`` and of the observation
            ``(M,)``. B and D, of inputs on the state ``(N, U)`` and on the observation ``(M, U)``. S, which states the
            noise reaches ``(N, K)``; the identity by default. ``time_varying``, the letters of those that have an axis
            of time, such as ``("C", "d")``. ``diffuse``, True for each state that is exactly diffuse, or directions
            ``(N, K)`` that are; besides P0, which is then of what is known; with ``P0="stationary"`` the other states
            are stationary. ``convention``, how an observation that determines a diffuse direction counts in the
            log-likelihood: ``"statsmodels"`` (Durbin and Koopman 2012, equation 7.4), the limit of the proper one plus
            ``log(kappa) / 2``, or ``"kfas"``, which leaves out ``-log(2 pi) / 2`` besides.

    Tensors, NumPy arrays and nested lists are taken (see :func:`dualform.core.linalg.as_tensors` for their dtype);
    plain numbers are float64. An ``nn.Parameter`` is a parameter of the module, everything else a buffer; both may have
    gradients. Values are checked here, once. Constraints are kept by ``torch.nn.utils.parametrize``, or by making a
    model of unconstrained tensors.

    Raises:
        ArgumentError: for shapes that do not fit, values that are not finite, covariances that are not symmetric or
            have a negative eigenvalue, both beyond rounding, and names that are unknown.

    Example:
        >>> import dualform as df
        >>> level = df.LinearGaussian([[1.0]], [[1.0]], [[1469.1]], [[15099.0]], P0="diffuse")
        >>> level.smooth([1120.0, 1160.0, None, 1210.0]).mean.shape
        torch.Size([4, 1])
    """

    def __init__(
        self,
        A: Any,
        C: Any,
        Q: Any,
        R: Any,
        m0: Any = None,
        P0: Any = None,
        *,
        prior: Literal["before", "first"] = "before",
        **terms: Unpack[Terms],
    ):
        super().__init__({"A": A, "C": C, "Q": Q, "R": R, "m0": m0, "P0": P0}, prior, terms)

    @property
    def system(self) -> Parameters:
        """The model itself."""
        return self

    def fit(self, y: Any, method: Literal["lbfgs", "em", "adam"] = "lbfgs", **options: Any) -> Any:
        """Maximise the likelihood of a series over the matrices that are ``nn.Parameter``, with standard errors.

        The arguments are those of :func:`~dualform.gaussian.fitting.fit`.
        """
        return fit(self, y, method, **options)

    @torch.no_grad()
    def sample(
        self, length: int, batch: int = 1, *, u: Any = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw observations and the states behind them; no gradients.

        Args:
            length: T, the number of steps.
            batch: B, the number of independent series.
            u: inputs ``(T, U)`` or ``(B, *batch, T, U)``, of a model with B or D.
            generator: source of randomness, on the model's device.

        Returns:
            ``y`` ``(B, T, M)`` and ``h`` ``(B, T, N)``, with the model's batch axes after B. A diffuse direction is
            drawn as if it were known to be 0.

        Raises:
            ArgumentError: for a negative length or batch, and inputs that do not fit.
        """
        where = f"{type(self).__name__}.sample"
        if length < 0 or batch < 0:
            raise ArgumentError(f"sample: length {length} and batch {batch}, expected 0 or more")
        full = (batch, *self.batch)
        start = initial(where, self, full)
        u = None if u is None else as_tensors(where, model=self.A, u=u)["u"]
        u = self._inputs(where, u, full, length, start)
        u = None if u is None else u[:, :length]
        at = Matrices(where, self, full, start.steps, length, start.mean.dtype)

        def noise(cov: Tensor) -> Tensor:
            return normal(cov, cov.shape[:-1], generator)

        h, states = start.mean + noise(start.cov), []
        moves = transition(at, u, standing(self, start, length, None))
        for A, c, q in zip(*(z.unbind(1) for z in (moves.A, moves.c, noise(moves.Q))), strict=True):
            h = matvec(A, h) + c + q
            states.append(h)
        path = torch.stack(states, 1) if states else h.new_zeros(len(h), 0, self.d_state)
        y, level = matvec(at.there("C"), path) + noise(at.there("R")), at.driven("d", "D", u)
        y = y if level is None else y + level
        return y.reshape(*full, length, self.d_obs), path.reshape(*full, length, self.d_state)
