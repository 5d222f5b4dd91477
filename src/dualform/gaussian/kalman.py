"""The Kalman filter, one step at a time and in parallel over time: the same function."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualform.core.elements import GaussianElement, combine_gaussian
from dualform.core.errors import ArgumentError
from dualform.core.linalg import as_tensors, matvec, symmetric_part
from dualform.core.packing import check_cu_seqlens, keep_mask, unpack
from dualform.core.scan import associative_scan
from dualform.core.shapes import check_floating, check_tensors, wide
from dualform.core.tree import concat, state_class, tree_map
from dualform.gaussian.model import Gaussian, LinearGaussian


@state_class
class Filtered(NamedTuple):
    """Moments of ``p(h_t | y_1 .. y_t)``, and ``log p(y_t | y_1 .. y_{t-1})``."""

    mean: Tensor  # (B, T, N)
    cov: Tensor  # (B, T, N, N)
    loglik: Tensor  # (B, T)


class _Steps(NamedTuple):
    """The model as each step sees it: missing components carry no information, padding does nothing at all."""

    A: Tensor  # (B, T, N, N)
    Q: Tensor  # (B, T, N, N)
    C: Tensor  # (B, T, M, N), zero rows where missing
    R: Tensor  # (B, T, M, M), rows and columns of the identity where missing
    y: Tensor  # (B, T, M), zero where missing
    seen: Tensor  # (B, T, M), bool


class KalmanFilter:
    """The filter of a linear-Gaussian model, a :class:`~dualform.core.recurrence.Recurrence`.

    Observations ``(B, T, M)`` -> :class:`Filtered`; the state is the :class:`~dualform.gaussian.model.Gaussian` of
    the last filtered step, and the initial state is ``N(m0, P0)``, **before** the first transition. A step is

        predict   m = A m,               P = A P A^T + Q
        update    S = C P C^T + R,       K = P C^T S^-1
                  m = m + K (y - C m),   P = (I - K C) P (I - K C)^T + K R K^T     (Joseph)

    **NaN means missing**, component by component: what is left is the exact marginal over the missing ones. A step
    with nothing observed is a prediction, of log-likelihood 0. Gradients reach the model's tensors, the
    observations and the initial state, and stay finite where data are missing.

    The parallel form finds the state before every step by an associative scan of depth ``O(log T)``, then makes
    all steps at once with the arithmetic of the sequential form, so that its error does not grow with T. It takes
    a singular Q, and needs ``C Q C^T + R`` to be positive definite. It meets the prior in information form: where
    P0 exceeds the scale of the noise by more than the dtype's digits, as vague priors do in float32, take float64
    or the sequential form. On a CPU it pays for few and long series of small models.

    Args:
        model: the parameters; results have the widest dtype among theirs, the data's and the state's.
        parallel: run :meth:`forward` in parallel over time; None means on every device but the CPU.

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
        self, x: Tensor, state: Gaussian | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Filtered, Gaussian]:
        """Filter observations ``x`` ``(B, T, M)``.

        Args:
            x: observations; NaN is missing.
            state: the distribution before the first transition, B rows, or n with ``cu_seqlens``; None means the prior.
            cu_seqlens: borders ``(n + 1,)`` of series laid end to end on the time axis, with B = 1.

        Returns:
            The moments of every step, and the state after the last, one row per series.

        Raises:
            ArgumentError: for shapes, dtypes or devices that do not fit, or an innovation covariance that is not
                positive definite.
        """
        where = "KalmanFilter.forward"
        check_tensors(where, x=(x, f"B T {len(self.model.C)}"), model=(self.model.A, "* *"))
        check_floating(where, x=x)
        rows = len(x) if cu_seqlens is None else check_cu_seqlens(where, cu_seqlens, *x.shape[:2])
        state = self._check_state(where, rows, x, state)
        if cu_seqlens is None:
            return self._run(x, state, None)
        cu_seqlens = cu_seqlens.to(x.device)
        keep = keep_mask(cu_seqlens)
        out, _ = self._run(unpack(x, keep), state, keep)
        history = concat([tree_map(lambda z: z[:, None], state), Gaussian(out.mean, out.cov)], dim=1)
        last = torch.arange(rows, device=x.device), cu_seqlens.diff().long()
        return tree_map(lambda z: z[keep][None], out), tree_map(lambda z: z[last], history)

    def step(self, x: Tensor, state: Gaussian) -> tuple[Filtered, Gaussian]:
        """One observation ``x`` ``(B, M)``: :meth:`predict`, then :meth:`update`; outputs have no time axis.

        Raises:
            ArgumentError: as :meth:`forward`.
        """
        state, steps = self._one("KalmanFilter.step", x, state)
        return _finish(*_update(_predict(state, steps), steps))

    def predict(self, state: Gaussian) -> Gaussian:
        """One transition of a state, B rows: ``p(h_t | y_1 .. y_{t-1})``, which forecasts when repeated.

        Raises:
            ArgumentError: for a state that does not fit.
        """
        rows = len(state.mean)
        state, steps = self._one("KalmanFilter.predict", self.model.A.new_zeros(rows, len(self.model.C)), state)
        return _predict(state, steps)

    def update(self, x: Tensor, predicted: Gaussian) -> tuple[Filtered, Gaussian]:
        """Condition a predicted state on one observation ``x`` ``(B, M)``, without a transition.

        Raises:
            ArgumentError: as :meth:`forward`.
        """
        predicted, steps = self._one("KalmanFilter.update", x, predicted)
        return _finish(*_update(predicted, steps))

    def filter(self, y: Any, state: Gaussian | None = None) -> Filtered:
        """Filter one series or a batch: :meth:`forward` for arrays, without the final state.

        Args:
            y: ``(B, T, M)``, or one series ``(T, M)``, or ``(T,)`` for M = 1; a tensor, NumPy array or list.
            state: as in :meth:`forward`, with one row for one series.

        Returns:
            With the axes of ``y``: for ``(T, M)`` and ``(T,)``, the moments have no batch axis.

        Raises:
            ArgumentError: as :meth:`forward`.
        """
        y = as_tensors("KalmanFilter.filter", model=self.model.A, y=y)["y"]
        single = y.dim() < 3
        if y.dim() == 1 and len(self.model.C) == 1:
            y = y[:, None]
        if y.dim() == 2:
            y = y[None]
        if y.dim() != 3:
            raise ArgumentError(
                f"KalmanFilter.filter: y has shape {tuple(y.shape)}, "
                f"expected (B, T, {len(self.model.C)}) or (T, {len(self.model.C)})"
            )
        out, _ = self.forward(y, state)
        return tree_map(lambda z: z[0], out) if single else out

    def log_likelihood(self, y: Any, state: Gaussian | None = None) -> Tensor:
        """``log p(y_1 .. y_T)`` of the observed components, every constant included, ``(B,)``.

        Args and errors are those of :meth:`filter`; for one series the result has no axes.
        """
        return self.filter(y, state).loglik.sum(-1)

    def _one(self, where: str, x: Tensor, state: Gaussian) -> tuple[Gaussian, _Steps]:
        """The arguments of a single step, checked, without a time axis."""
        check_tensors(where, x=(x, f"B {len(self.model.C)}"), model=(self.model.A, "* *"))
        check_floating(where, x=x)
        state = self._check_state(where, len(x), x, state)
        return state, tree_map(lambda z: z[:, 0], self._steps(x[:, None], state.mean.dtype, None))

    def _check_state(self, where: str, rows: int, x: Tensor, state: Gaussian | None) -> Gaussian:
        """The state in the dtype of the results, with a symmetric covariance."""
        state = self.init_state(rows) if state is None else state
        n = len(self.model.A)
        check_tensors(
            where, model=(self.model.A, "* *"), mean=(state.mean, f"{rows} {n}"), cov=(state.cov, f"{rows} {n} {n}")
        )
        dtype = wide(x, self.model.A, state.mean, state.cov)
        if dtype.is_complex:
            raise ArgumentError(f"{where}: complex values in the observations or the state, expected real ones")
        return Gaussian(state.mean.to(dtype), symmetric_part(state.cov.to(dtype)))

    def _steps(self, x: Tensor, dtype: torch.dtype, keep: Tensor | None) -> _Steps:
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
        return _Steps(A, Q, C * seen.unsqueeze(-1), R, y, seen)

    def _run(self, x: Tensor, state: Gaussian, keep: Tensor | None) -> tuple[Filtered, Gaussian]:
        mean, cov = state
        if x.shape[1] == 0:
            empty = mean.new_zeros(len(x), 0)
            return Filtered(empty[..., None] * mean[:, None], empty[..., None, None] * cov[:, None], empty), state
        steps = self._steps(x, mean.dtype, keep)
        parallel = x.device.type != "cpu" if self.parallel is None else self.parallel
        return (_parallel if parallel else _sequential)(steps, state)


def _sequential(steps: _Steps, state: Gaussian) -> tuple[Filtered, Gaussian]:
    outs, failures = [], []
    for now in zip(*(z.unbind(1) for z in steps), strict=True):
        now = _Steps(*now)
        out, failed = _update(_predict(state, now), now)
        state = Gaussian(out.mean, out.cov)
        outs.append(out)
        failures.append(failed)
    out, _ = _finish(tree_map(lambda *z: torch.stack(z, 1), *outs), torch.stack(failures, 1))
    return out, state


def _parallel(steps: _Steps, state: Gaussian) -> tuple[Filtered, Gaussian]:
    """The states before every step by the scan, then every step at once."""
    elements = _elements(tree_map(lambda z: z[:, :-1], steps))
    first = tree_map(lambda z: z[:, None], state)
    zero = torch.zeros_like(first.cov)
    known = GaussianElement(zero, first.mean, first.cov, zero[..., 0], zero)
    reached = combine_gaussian(known, associative_scan(combine_gaussian, elements))
    before = concat([first, Gaussian(reached.b, reached.C)], dim=1)
    out, after = _finish(*_update(_predict(before, steps), steps))
    return out, tree_map(lambda z: z[:, -1], after)


def _predict(state: Gaussian, steps: _Steps) -> Gaussian:
    return Gaussian(matvec(steps.A, state.mean), symmetric_part(steps.A @ state.cov @ steps.A.mT) + steps.Q)


def _update(predicted: Gaussian, steps: _Steps) -> tuple[Filtered, Tensor]:
    """The update, and where its Cholesky factorisation failed (not 0)."""
    mean, cov = predicted
    C, R = steps.C, steps.R
    CP = C @ cov
    root, failed = torch.linalg.cholesky_ex(symmetric_part(CP @ C.mT) + R)
    innovation = steps.y - matvec(C, mean)
    K = torch.cholesky_solve(CP, root).mT
    left = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device) - K @ C
    white = torch.linalg.solve_triangular(root, innovation.unsqueeze(-1), upper=False).squeeze(-1)
    scale = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    loglik = -white.square().sum(-1) / 2 - scale - steps.seen.to(mean.dtype).sum(-1) * (math.log(2 * math.pi) / 2)
    joseph = symmetric_part(left @ cov @ left.mT) + symmetric_part(K @ R @ K.mT)
    return Filtered(mean + matvec(K, innovation), joseph, loglik), failed


def _finish(out: Filtered, failed: Tensor) -> tuple[Filtered, Gaussian]:
    _check_positive(
        (failed != 0) | out.loglik.isnan(),
        "C P C^T + R, of the predicted covariance P,",
        "add observation noise to R, or compute in float64",
    )
    return out, Gaussian(out.mean, out.cov)


def _elements(steps: _Steps) -> GaussianElement:
    """Each step on its own: the filter from a known state, and what its observation says about that state."""
    CQ = steps.C @ steps.Q
    root, failed = torch.linalg.cholesky_ex(symmetric_part(CQ @ steps.C.mT) + steps.R)
    _check_positive(failed, "C Q C^T + R", "use KalmanFilter(model, parallel=False), or add noise to R or Q")
    K = torch.cholesky_solve(CQ, root).mT
    left = torch.eye(CQ.shape[-1], dtype=CQ.dtype, device=CQ.device) - K @ steps.C
    CA = steps.C @ steps.A
    information = torch.cholesky_solve(CA, root).mT
    return GaussianElement(
        left @ steps.A,
        matvec(K, steps.y),
        symmetric_part(left @ steps.Q),
        matvec(information, steps.y),
        symmetric_part(information @ CA),
    )


def _check_positive(failed: Tensor, what: str, remedy: str) -> None:
    """Raise for the first place, by row and time if it has both, where a factorisation failed."""
    if torch.compiler.is_compiling() or not failed.any():
        return
    place = ", ".join(f"{axis} {at}" for axis, at in zip(("row", "time"), failed.nonzero()[0].tolist(), strict=False))
    raise ArgumentError(f"KalmanFilter: {what} is not positive definite (or not finite) at {place}", hint=remedy)
