"""The Kalman filter, one step at a time and in parallel over time: the same function."""

from typing import Any

import torch
from torch import Tensor

from dualform.core.calls import explained
from dualform.core.errors import ArgumentError
from dualform.core.linalg import as_tensors, check_finite, refuse, symmetric_part
from dualform.core.packing import Borders, Packing, unpack
from dualform.core.shapes import check_floating, check_tensors, wide
from dualform.core.tree import concat, tree_map
from dualform.gaussian.filtering import Blame, Filtered, Steps, predict, run, update
from dualform.gaussian.model import Gaussian, LinearGaussian

__all__ = ["Filtered", "KalmanFilter"]


@explained
class KalmanFilter:
    """The filter of a linear-Gaussian model, a :class:`~dualform.core.recurrence.Recurrence`.

    Observations ``(B, T, M)`` -> :class:`Filtered`; the state is the :class:`~dualform.gaussian.model.Gaussian` of
    the last filtered step, and the initial state is ``N(m0, P0)``, **before** the first transition. A step is

        predict   m = A m,               P = A P A^T + Q
        update    S = C P C^T + R,       K = P C^T S^-1
                  m = m + K (y - C m),   P = (I - K C) P (I - K C)^T + K R K^T     (Joseph)

    **NaN means missing**, and so do the masked values of ``numpy.ma``, component by component: the observed components
    are filtered with their exact joint distribution. A step with nothing observed is a prediction, of log-likelihood
    0. Gradients reach the model's tensors, the observations and the initial state, and stay finite where data are
    missing.

    The parallel form finds the state before every step by an associative scan of depth ``O(log T)``, then makes
    all steps at once with the arithmetic of the sequential form, so that its error does not grow with T. It takes
    a singular Q, and needs ``C Q C^T + R`` to be positive definite. It combines the prior with the data in
    information form, and loses digits where P0 is much greater than the covariance of the noise: with a vague prior,
    all that float32 has.

    Args:
        model: the parameters; results have the widest dtype among theirs, the data's and the state's.
        parallel: the form that :meth:`forward` takes. None takes the parallel form where
            :func:`dualform.gaussian.filtering.is_parallel_faster` says so and the prior costs it few digits,
            if necessary after N sequential steps; otherwise the sequential form.

    References:
        Kalman (1960), "A new approach to linear filtering and prediction problems"; Bucy and Joseph (1968),
        "Filtering for stochastic processes", for the update; Durbin and Koopman (2012), "Time series analysis by
        state space methods", section 4.10, for missing components; Sarkka and Garcia-Fernandez (2021), "Temporal
        parallelization of Bayesian smoothers", arXiv:1905.13002, section IV.

    Example:
        >>> import dualform as df
        >>> level = df.LinearGaussian([[1.0]], [[1.0]], [[1469.1]], [[15099.0]], [0.0], [[1e7]])
        >>> df.KalmanFilter(level).filter([1120.0, 1160.0, float("nan"), 1210.0]).mean.shape
        torch.Size([4, 1])
    """

    def __init__(self, model: LinearGaussian, *, parallel: bool | None = None):
        self.model, self.parallel = model, parallel

    def init_state(self, batch: int, *, max_len: int = 0) -> Gaussian:
        """``N(m0, P0)`` for each row; ``max_len`` is ignored, the state has a constant size."""
        return Gaussian(self.model.m0.repeat(batch, 1), self.model.P0.repeat(batch, 1, 1))

    def forward(
        self, x: Tensor, state: Gaussian | None = None, *, cu_seqlens: Borders = None
    ) -> tuple[Filtered, Gaussian]:
        """Filter observations ``x`` ``(B, T, M)``.

        Args:
            x: observations; NaN is missing.
            state: the distribution before the first transition, B rows, or n with ``cu_seqlens``; None means the prior.
            cu_seqlens: borders ``(n + 1,)`` of series laid end to end on the time axis, with B = 1.

        Returns:
            The moments of every step, and the state after the last, one row per series.

        Raises:
            ArgumentError: for shapes, dtypes or devices that do not fit, an observation that is infinite, a state that
                is not finite, or an innovation covariance that is not positive definite.
        """
        return self._forward("KalmanFilter.forward", "x", x, state, cu_seqlens)

    def _forward(
        self, where: str, name: str, x: Tensor, state: Gaussian | None, cu_seqlens: Borders = None
    ) -> tuple[Filtered, Gaussian]:
        self._check_observations(where, name, x, "B T")
        packing = Packing.of(where, cu_seqlens, x)
        rows = len(x) if packing is None else packing.rows
        state = self._check_state(where, rows, x, state)
        blame = _blame(where, name, x, state)
        blame()
        if packing is None:
            return self._run(x, state, None, blame)
        keep = packing.keep_mask()
        out, _ = self._run(unpack(x, keep), state, keep, blame)
        history = concat([tree_map(lambda z: z[:, None], state), Gaussian(out.mean, out.cov)], dim=1)
        last = torch.arange(rows, device=x.device), packing.cu_seqlens.diff()
        return tree_map(lambda z: z[keep][None], out), tree_map(lambda z: z[last], history)

    def step(self, x: Tensor, state: Gaussian) -> tuple[Filtered, Gaussian]:
        """One observation ``x`` ``(B, M)``: :meth:`predict`, then :meth:`update`; outputs have no time axis.

        Where gradients are recorded, every state keeps the graph of all steps before it. A stream is filtered in
        constant memory without them:

            with torch.inference_mode():
                for x in stream:
                    now, state = kalman.step(x, state)

        Raises:
            ArgumentError: as :meth:`forward`.
        """
        state, steps, blame = self._one("KalmanFilter.step", x, state)
        return update(predict(state, steps), steps, blame)

    def predict(self, state: Gaussian) -> Gaussian:
        """One transition of a state, B rows: ``p(h_t | y_1 .. y_{t-1})``, which forecasts when repeated.

        Raises:
            ArgumentError: for a state that does not fit.
        """
        rows = len(state.mean)
        nothing = self.model.A.new_full((rows, len(self.model.C)), torch.nan)
        state, steps, blame = self._one("KalmanFilter.predict", nothing, state)
        blame()
        return predict(state, steps)

    def update(self, x: Tensor, predicted: Gaussian) -> tuple[Filtered, Gaussian]:
        """Condition a predicted state on one observation ``x`` ``(B, M)``, without a transition.

        Raises:
            ArgumentError: as :meth:`forward`.
        """
        predicted, steps, blame = self._one("KalmanFilter.update", x, predicted)
        return update(predicted, steps, blame)

    def filter(self, y: Any, state: Gaussian | None = None) -> Filtered:
        """Filter one series or a batch: :meth:`forward` for arrays, without the final state.

        Args:
            y: ``(B, T, M)``, or one series ``(T, M)``, or ``(T,)`` for M = 1; a tensor, NumPy array or list, in which
                None is missing, as NaN is.
            state: as in :meth:`forward`, with one row for one series.

        Returns:
            With the axes of ``y``: for ``(T, M)`` and ``(T,)``, the moments have no batch axis.

        Raises:
            ArgumentError: as :meth:`forward`.
        """
        return self._filter("KalmanFilter.filter", y, state)

    def log_likelihood(self, y: Any, state: Gaussian | None = None) -> Tensor:
        """``log p(y_1 .. y_T)`` of the observed components, every constant included, ``(B,)``.

        Args and errors are those of :meth:`filter`; for one series the result has no axes.
        """
        return self._filter("KalmanFilter.log_likelihood", y, state).loglik.sum(-1)

    def _filter(self, where: str, y: Any, state: Gaussian | None) -> Filtered:
        y = as_tensors(where, model=self.model.A, y=y)["y"]
        m, batched = len(self.model.C), y.dim() == 3
        if not batched and (y.dim() not in (1, 2) or (y.dim() == 1 and m > 1)):
            raise ArgumentError(
                f"{where}: y has shape {tuple(y.shape)}, expected (B, T, {m}) or (T, {m}){' or (T,)' * (m == 1)}"
            )
        _refuse_infinite(where, "y", y)
        x = y if batched else (y[:, None] if y.dim() == 1 else y)[None]
        out, _ = self._forward(where, "y", x, state)
        return out if batched else tree_map(lambda z: z[0], out)

    def _one(self, where: str, x: Tensor, state: Gaussian) -> tuple[Gaussian, Steps, Blame]:
        """The arguments of a single step, without a time axis: their shapes are checked, their values on failure."""
        self._check_observations(where, "x", x, "B")
        state = self._check_state(where, len(x), x, state)
        steps = tree_map(lambda z: z[:, 0], self._steps(x[:, None], state.mean.dtype, None))
        return state, steps, _blame(where, "x", x, state)

    def _check_observations(self, where: str, name: str, x: Tensor, axes: str) -> None:
        check_tensors(where, **{name: (x, f"{axes} {len(self.model.C)}"), "model": (self.model.A, "* *")})
        check_floating(where, **{name: x})
        if x.is_complex():
            raise ArgumentError(f"{where}: complex values in {name}, expected real ones")

    def _check_state(self, where: str, rows: int, x: Tensor, state: Gaussian | None) -> Gaussian:
        """The state in the dtype of the results, with a symmetric covariance."""
        state = self.init_state(rows) if state is None else state
        n = len(self.model.A)
        wanted = {"state.mean": (state.mean, f"{rows} {n}"), "state.cov": (state.cov, f"{rows} {n} {n}")}
        check_tensors(where, model=(self.model.A, "* *"), **wanted)
        dtype = wide(x, self.model.A, state.mean, state.cov)
        if dtype.is_complex:
            raise ArgumentError(f"{where}: complex values in the state, expected real ones")
        return Gaussian(state.mean.to(dtype), symmetric_part(state.cov.to(dtype)))

    def _steps(self, x: Tensor, dtype: torch.dtype, keep: Tensor | None) -> Steps:
        model, (b, t, m) = self.model, x.shape
        A, C = model.A.to(dtype), model.C.to(dtype)
        Q, R = symmetric_part(model.Q.to(dtype)), symmetric_part(model.R.to(dtype))
        A, Q, seen = A.expand(b, t, *A.shape), Q.expand(b, t, *Q.shape), ~x.isnan()
        if keep is not None:
            here = keep[:, :, None, None]
            seen = seen & keep[:, :, None]
            A = torch.where(here, A, torch.eye(A.shape[-1], dtype=dtype, device=x.device))
            Q = torch.where(here, Q, torch.zeros_like(Q))
        R = torch.where(seen.unsqueeze(-1) & seen.unsqueeze(-2), R, torch.eye(m, dtype=dtype, device=x.device))
        y = torch.where(seen, x.to(dtype), torch.zeros_like(x, dtype=dtype))
        return Steps(A, Q, C * seen.unsqueeze(-1), R, y, seen)

    def _run(self, x: Tensor, state: Gaussian, keep: Tensor | None, blame: Blame) -> tuple[Filtered, Gaussian]:
        mean, cov = state
        if x.shape[1] == 0:
            empty = mean.new_zeros(len(x), 0)
            return Filtered(empty[..., None] * mean[:, None], empty[..., None, None] * cov[:, None], empty), state
        return run(self._steps(x, mean.dtype, keep), state, self.parallel, blame)


def _blame(where: str, name: str, x: Tensor, state: Gaussian) -> Blame:
    """A check of the values that a caller gave."""

    def blame() -> None:
        _refuse_infinite(where, name, x)
        check_finite(where, {"state.mean": state.mean, "state.cov": state.cov})

    return blame


def _refuse_infinite(where: str, name: str, x: Tensor) -> None:
    refuse(where, name, x, x.detach().isinf(), "has infinite values", "NaN stands for a missing observation")
