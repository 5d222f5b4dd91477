"""A linear-Gaussian model as a recurrence: whole sequences, one step, and the two halves of a step."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualform.core.calls import explained
from dualform.core.errors import ArgumentError
from dualform.core.linalg import as_tensors, check_finite, matvec, symmetric_part
from dualform.core.packing import Borders, Packing, unpack
from dualform.core.shapes import check_floating, check_tensors, wide
from dualform.core.tree import tree_map
from dualform.gaussian.arrays import refuse_infinite
from dualform.gaussian.belief import Belief, Gaussian, is_belief
from dualform.gaussian.conditioning import condition
from dualform.gaussian.filtering import Form, update
from dualform.gaussian.initial import initial
from dualform.gaussian.parameters import System
from dualform.gaussian.passes import Blame, Pass, predict
from dualform.gaussian.steps import Steps, Transition


class Estimate(NamedTuple):
    """Moments of ``p(h_t | y_1 .. y_t)``, and ``log p(y_t | y_1 .. y_{t-1})``; the finite part while h is diffuse."""

    mean: Tensor  # (B, T, N)
    cov: Tensor  # (B, T, N, N)
    loglik: Tensor  # (B, T)


class Innovation(NamedTuple):
    """What an observation is away from its prediction, and how unlikely that is.

    ``distance`` is ``v^T S^-1 v`` over the observed components, the squared Mahalanobis distance. If the model is right
    it has the chi-squared distribution with as many degrees of freedom as there are components.
    """

    innovation: Any  # (..., M), NaN where missing
    cov: Any  # (..., M, M), S = C P C^T + R
    distance: Any  # (...)
    loglik: Any  # (...)


class Updated(NamedTuple):
    """A belief after an observation, and how far that was from its prediction; see :class:`Innovation`."""

    belief: Belief
    innovation: Tensor  # (B, M)
    innovation_cov: Tensor  # (B, M, M)
    distance: Tensor  # (B,)
    loglik: Tensor  # (B,)


@explained
class Recurrent:
    """The recurrence of a model; see :class:`~dualform.gaussian.kalman.KalmanFilter`."""

    parallel: bool | None = None

    @property
    def system(self) -> System:
        """The model."""
        raise NotImplementedError

    # What a kind of model has to say about its steps.

    def _through(
        self,
        where: str,
        x: Tensor,
        belief: Belief,
        u: Tensor | None,
        full: tuple[int, ...],
        keep: tuple[Tensor, Tensor] | None,
        blame: Blame,
        moments: bool = True,
    ) -> tuple[Pass, Steps, Belief, Form]:
        """The filter over rows; ``keep`` is where a row has observations, and where it makes transitions."""
        raise NotImplementedError

    def _one(
        self, where: str, x: Tensor, belief: Belief, u: Tensor | None, full: tuple[int, ...]
    ) -> tuple[Belief, Steps]:
        """The belief after one transition, and the step with its observation, with a time axis of length 1."""
        raise NotImplementedError

    def _transition(self, where: str, belief: Belief, u: Tensor | None, given: dict[str, Tensor]) -> Transition:
        """The next transition of a belief, without a time axis; with what a caller gives for it."""
        raise NotImplementedError

    def _sees(
        self, where: str, belief: Belief, u: Tensor | None, y: Tensor | None, R: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``C, R, d`` of the observation of a belief, one row each; y is what it is conditioned on, if anything."""
        raise NotImplementedError

    def _noise(self, where: str, belief: Belief) -> Tensor:
        """R of the observation of a belief, one row each."""
        raise NotImplementedError

    def init_state(self, batch: int, *, max_len: int = 0) -> Belief:
        """The prior, for each row; ``max_len`` is ignored, the state has a constant size.

        Raises:
            ArgumentError: for a stationary start of a model that is not stationary.
        """
        where = f"{type(self).__name__}.init_state"
        return initial(where, self.system, self._full(where, batch))

    def forward(
        self, x: Tensor, state: Any = None, *, u: Tensor | None = None, cu_seqlens: Borders = None
    ) -> tuple[Estimate, Belief]:
        """Filter observations ``x`` ``(B, T, M)``.

        Args:
            x: observations; NaN is missing.
            state: the belief before the first of them, B rows, or n with ``cu_seqlens``; None means the prior. A
                :class:`Gaussian` is one to which a transition comes first.
            u: inputs ``(B, T, U)``, of a model with B or D.
            cu_seqlens: borders ``(n + 1,)`` of series laid end to end on the time axis, with B = 1.

        Returns:
            The moments of every step, and the state after the last, one row per series.

        Raises:
            ArgumentError: for shapes, dtypes or devices that do not fit, an observation that is infinite, a state that
                is not finite, or an innovation covariance that is not positive definite.
        """
        where = f"{type(self).__name__}.forward"
        self._check_observations(where, "x", x, "B T")
        packing = Packing.of(where, cu_seqlens, x)
        rows = len(x) if packing is None else packing.rows
        state = self._check_state(where, rows, x, state)
        u = self._check_inputs(where, u, x.shape[:2], state)
        blame = _blame(where, "x", x, state)
        blame()
        full, length = self._full(where, rows), x.shape[1]
        if packing is None:
            out, _, last, _ = self._through(where, x, state, u, full, None, blame)
            return Estimate(out.mean, out.cov, out.loglik), last._replace(steps=state.steps + length)
        keep = packing.keep_mask()
        u = None if u is None else unpack(u, keep)
        out, *_ = self._through(where, unpack(x, keep), state, u, full, (keep, keep), blame)
        last = after(state, out, packing.cu_seqlens.diff())
        return tree_map(lambda z: z[keep][None], Estimate(out.mean, out.cov, out.loglik)), last

    def step(self, x: Tensor, state: Any, *, u: Tensor | None = None) -> tuple[Estimate, Belief]:
        """One observation ``x`` ``(B, M)``: a transition, then the update; outputs have no time axis.

        Where gradients are recorded, every state keeps the graph of all steps before it. A stream is filtered in
        constant memory without them:

            with torch.inference_mode():
                for x in stream:
                    now, state = kalman.step(x, state)

        Raises:
            ArgumentError: as :meth:`forward`.
        """
        where = f"{type(self).__name__}.step"
        self._check_observations(where, "x", x, "B")
        state = self._check_state(where, len(x), x, state)
        u = self._check_inputs(where, u, x.shape[:1], state)
        before, steps = self._one(where, x, state, u, self._full(where, len(x)))
        out, last = update(before, steps, self._counted, _blame(where, "x", x, state))
        one = Estimate(out.mean[:, 0], out.cov[:, 0], out.loglik[:, 0])
        return one, last._replace(steps=state.steps + 1)

    def predict(self, belief: Any, *, u: Tensor | None = None, **matrices: Tensor) -> Belief:
        """One transition of a belief, B rows, which forecasts when repeated.

        Under ``prior="first"`` a belief of 0 steps is that of the first observation already, and stays as it is.

        Args:
            belief: B rows.
            u: inputs ``(B, U)``.
            matrices: A, Q or c of this transition alone, in place of the model's: ``(N, N)`` or ``(B, N, N)``, and
                ``(N,)`` or ``(B, N)``. Q is the covariance of the whole noise.

        Raises:
            ArgumentError: for a belief or a matrix that does not fit.
        """
        where = f"{type(self).__name__}.predict"
        rows = len(belief[0])
        belief = self._check_state(where, rows, self.system.Q, belief)
        check_finite(where, {"state.mean": belief.mean, "state.cov": belief.cov})
        u = self._check_inputs(where, u, (rows,), belief)
        out = predict(belief, self._transition(where, belief, u, matrices))
        return out._replace(steps=belief.steps + 1)

    def update(
        self, belief: Any, y: Any, *, C: Any = None, R: Any = None, d: Any = None, u: Tensor | None = None
    ) -> Updated:
        """Condition a belief on one observation ``y`` ``(B, M)``, without a transition.

        Args:
            belief: B rows.
            y: NaN is missing.
            C: what this observation sees, in place of the model's: ``(M, N)`` or ``(B, M, N)``; any number of
                components, then with an R of as many.
            R: its noise, ``(M, M)`` or ``(B, M, M)``.
            d: its level, ``(M,)`` or ``(B, M)``; 0 where C is given.
            u: inputs ``(B, U)``, of a model with D, where C is not given.

        Raises:
            ArgumentError: as :meth:`forward`.
        """
        where = f"{type(self).__name__}.update"
        belief, y, parts = self._observation(where, belief, y, (C, R, d), u, True)
        seen = ~y.isnan()
        C, R, level = parts
        found = innovation_of(belief, y, C, R, level)
        clean = torch.where(seen, y - level, 0)
        parts = (z[:, None] for z in (C, R, clean, seen))
        steps = Steps(*self._no_transition(belief), *parts)
        out, last = update(belief, steps, self._counted, _blame(where, "y", y, belief))
        last = last._replace(steps=belief.steps.clamp_min(1))
        return Updated(last, found.innovation, found.cov, found.distance, out.loglik[:, 0])

    def innovation(
        self, belief: Any, y: Any, *, C: Any = None, R: Any = None, d: Any = None, u: Tensor | None = None
    ) -> Innovation:
        """How far observations are from the prediction of a belief, which stays as it is: for gates and association.

        Args:
            belief: B rows, such as of tracks.
            y: ``(B, M)``, or ``(K, B, M)`` for K observations of every row; ``y[:, None].expand(-1, B, -1)`` makes
                each of K a candidate for each row.
            C: as in :meth:`update`.
            R: as in :meth:`update`.
            d: as in :meth:`update`.
            u: as in :meth:`update`.

        Raises:
            ArgumentError: as :meth:`forward`.
        """
        where = f"{type(self).__name__}.innovation"
        belief, y, parts = self._observation(where, belief, y, (C, R, d), u, False)
        return innovation_of(belief, y, *parts)

    # What the methods share.

    @property
    def _counted(self) -> bool:
        return self.system.convention == "statsmodels"

    def _full(self, where: str, rows: int) -> tuple[int, ...]:
        """The batch axes of rows that a caller has laid out: one."""
        batch = self.system.batch
        if batch not in ((), (1,), (rows,)):
            raise ArgumentError(
                f"{where}: {rows} rows of a model with the batch axes {tuple(batch)}, expected {(rows,)} or none",
                hint="filter, smooth and forecast take a batch of any axes",
            )
        return (rows,)

    def _no_transition(self, belief: Belief) -> tuple[Tensor, Tensor, Tensor]:
        eye = torch.eye(belief.mean.shape[-1], dtype=belief.mean.dtype, device=belief.mean.device)
        eye = eye.expand(len(belief.mean), 1, -1, -1)
        return eye, torch.zeros_like(eye[..., 0]), torch.zeros_like(eye)

    def _check_observations(self, where: str, name: str, x: Tensor, axes: str) -> None:
        model = self.system
        check_tensors(where, **{name: (x, f"{axes} {model.d_obs}"), "model": (model.Q, "...")})
        check_floating(where, **{name: x})
        if x.is_complex():
            raise ArgumentError(f"{where}: complex values in {name}, expected real ones")

    def _check_state(self, where: str, rows: int, x: Tensor, state: Any) -> Belief:
        """The state in the dtype of the results, with a symmetric covariance."""
        model = self.system
        if state is None:
            state = initial(where, model, self._full(where, rows))
        n = model.d_state
        wanted = {"state.mean": (state[0], f"{rows} {n}"), "state.cov": (state[1], f"{rows} {n} {n}")}
        if is_belief(state):
            wanted |= {"state.steps": (state[2], f"{rows}"), "state.diffuse": (state[3], f"{rows} {n} *")}
        check_tensors(where, model=(model.Q, "..."), **wanted)
        if not is_belief(state):
            steps = torch.full((rows,), int(model.prior == "first"), dtype=torch.int64, device=state[0].device)
            kinds = 0 if model.diffuse is None else model.diffuse.shape[-1]
            state = Belief(state[0], state[1], steps, state[0].new_zeros(rows, n, kinds))
        dtype = wide(x, model.Q, state.mean, state.cov)
        if dtype.is_complex:
            raise ArgumentError(f"{where}: complex values in the state, expected real ones")
        cov = symmetric_part(state.cov.to(dtype))
        return Belief(state.mean.to(dtype), cov, state.steps, state.diffuse.to(dtype))

    def _check_inputs(self, where: str, u: Any, axes: Any, belief: Belief) -> Tensor | None:
        model = self.system
        width = model.d_input
        if u is None and width is None:
            return None
        if u is None or width is None:
            what = f"no inputs u, but the model has {model.driven[0]}"
            what = what if u is None else f"inputs u, but the model has {model.driven[1]}"
            raise ArgumentError(f"{where}: {what}", hint="they travel together")
        check_tensors(where, u=(u, " ".join(str(size) for size in (*axes, width))), model=(model.Q, "..."))
        check_finite(where, {"u": u}, "an input cannot be missing")
        return u.to(belief.mean.dtype)

    def _observation(
        self, where: str, belief: Any, y: Any, own: tuple[Any, Any, Any], u: Tensor | None, conditioned: bool
    ) -> tuple[Belief, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """A belief, an observation of it, and ``C, R, d`` with a row each."""
        if isinstance(belief, Tensor) or not isinstance(belief, tuple):
            kind = type(belief).__name__
            raise ArgumentError(f"{where}: belief is {kind}, expected a Belief or a Gaussian", hint="(belief, y)")
        y = as_tensors(where, model=self.system.Q, y=y)["y"]
        rows, model = len(belief[0]), self.system
        belief = self._check_state(where, rows, y, belief)
        if own[0] is None:
            check_tensors(where, y=(y[(0,) * (y.dim() - 2)] if y.dim() > 2 else y, f"{rows} {model.d_obs}"))
        refuse_infinite(where, "y", y)
        check_finite(where, {"state.mean": belief.mean, "state.cov": belief.cov})
        given = as_tensors(where, **{name: m for name, m in zip("CRd", own, strict=True) if m is not None})
        R = given.get("R", self._noise(where, belief)).to(belief.mean)
        if own[0] is None:
            check_tensors(where, R=(R.expand(rows, *R.shape[-2:]), f"{rows} {model.d_obs} {model.d_obs}"))
            C, R, level = self._sees(where, belief, u, y if conditioned else None, R.expand(rows, *R.shape[-2:]))
        else:
            C = given["C"].to(belief.mean).expand(rows, -1, -1)
            level = C.new_zeros(C.shape[1])
        m = C.shape[1]
        check_tensors(where, C=(C, f"{rows} * {model.d_state}"), R=(R.expand(rows, *R.shape[-2:]), f"{rows} {m} {m}"))
        level = given.get("d", level).to(C).expand(rows, m)
        if y.shape[-2:] != (rows, m):
            raise ArgumentError(f"{where}: y has shape {tuple(y.shape)}, expected ({rows}, {m})")
        return belief, y.to(C), (C, R.expand(rows, m, m), level)


def after(before: Belief, found: Pass, lengths: Tensor) -> Belief:
    """The belief of each row after so many of its steps."""
    rows = torch.arange(len(lengths), device=lengths.device)
    mean, cov, diffuse = (
        torch.cat([first[:, None], rest], 1)[rows, lengths]
        for first, rest in ((before.mean, found.mean), (before.cov, found.cov), (before.diffuse, found.diffuse))
    )
    return Belief(mean, cov, before.steps + lengths, diffuse)


def innovation_of(belief: Belief, y: Tensor, C: Tensor, R: Tensor, level: Tensor) -> Innovation:
    """The innovation of observations that may be missing; y may have axes before those of the belief."""
    seen = ~y.isnan()
    v, S = y - level - matvec(C, belief.mean), symmetric_part(C @ belief.cov @ C.mT) + R
    both = seen.unsqueeze(-1) & seen.unsqueeze(-2)
    eye = torch.eye(C.shape[-2], dtype=C.dtype, device=C.device)
    if belief.diffuse.shape[-1] and (torch.compiler.is_compiling() or belief.diffuse.any()):
        axes = y.shape[:-1]
        at = [z.expand(*axes, *z.shape[1:]) for z in (belief.mean.unsqueeze(-1), belief.cov, belief.diffuse)]
        clean = torch.where(seen, y - level, 0).unsqueeze(-1)
        found = condition(at[0], at[1], at[2], C * seen.unsqueeze(-1), torch.where(both, R, eye), clean)
        distance, log_det = found.distance, found.log_det
    else:
        root, _ = torch.linalg.cholesky_ex(torch.where(both, S, eye))
        white = torch.linalg.solve_triangular(root, torch.where(seen, v, 0).unsqueeze(-1), upper=False)
        distance, log_det = white.square().sum((-2, -1)), 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    loglik = -(distance + log_det + seen.to(v.dtype).sum(-1) * math.log(2 * math.pi)) / 2
    return Innovation(v, S.expand(*y.shape, S.shape[-1]), distance, loglik)


def own(where: str, given: dict[str, Any], known: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices in place of the model's, with a row each."""
    for name in given:
        if name not in known:
            raise ArgumentError(f"{where}: unknown keyword {name!r}", hint=f"known: u, {', '.join(known)}")
    if not given:
        return {}
    made = as_tensors(where, **given)
    for name, value in made.items():
        core = known[name].shape[1:]
        if value.shape not in (core, known[name].shape):
            raise ArgumentError(
                f"{where}: {name} has shape {tuple(value.shape)}, expected {tuple(core)} or {tuple(known[name].shape)}"
            )
    return {name: value.to(known[name]).expand(known[name].shape) for name, value in made.items()}


def _blame(where: str, name: str, x: Tensor, state: Belief) -> Blame:
    """A check of the values that a caller gave."""

    def blame() -> None:
        refuse_infinite(where, name, x)
        check_finite(where, {"state.mean": state.mean, "state.cov": state.cov})

    return blame


__all__ = ["Estimate", "Gaussian", "Innovation", "Recurrent", "Updated", "after", "own"]
