"""The steps of a linear-Gaussian model: its matrices at the times of the observations."""

from typing import Any

import torch
from torch import Tensor

from dualform.core.linalg import matvec, symmetric_part
from dualform.core.tree import tree_map
from dualform.gaussian.belief import Belief, Gaussian
from dualform.gaussian.filtering import Form
from dualform.gaussian.parameters import Parameters
from dualform.gaussian.passes import Blame, Pass, predict
from dualform.gaussian.recurrent import own
from dualform.gaussian.results import Laid, Rows
from dualform.gaussian.series import Series
from dualform.gaussian.steps import Matrices, Steps, Transition, present, standing, steps_of, transition


class Linear(Series):
    """The methods of a linear-Gaussian model; see :class:`~dualform.gaussian.kalman.KalmanFilter`."""

    @property
    def system(self) -> Parameters:
        """The model."""
        raise NotImplementedError

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
        steps = self._steps(where, x, belief, u, full, keep)
        out, last, form = self._run(steps, belief, moments, blame)
        return out, steps, last, form

    def _steps(
        self,
        where: str,
        x: Tensor,
        belief: Belief,
        u: Tensor | None,
        full: tuple[int, ...],
        keep: tuple[Tensor, Tensor] | None,
    ) -> Steps:
        observed, moved = (None, None) if keep is None else keep
        seen = present(x) if observed is None else present(x) & observed[..., None]
        needed = None if moved is None else moved.sum(1)
        matrices = Matrices(where, self.system, full, belief.steps, x.shape[1], belief.mean.dtype, needed)
        return steps_of(matrices, x, u, seen, standing(self.system, belief, x.shape[1], moved))

    def _smooth(
        self, where: str, y: Any, state: Any, u: Any, lengths: Any
    ) -> tuple[Laid | Rows, Gaussian, Tensor, Tensor, Form]:
        """Steps of matrices are known before the filter runs: a kernel may filter and smooth at once."""
        laid = self._laid(where, y, state, u, lengths)
        steps = self._steps(where, laid.x, laid.start, laid.here, laid.full, laid.keep)
        return laid, *self._smoothed(where, laid.start, steps)

    def _one(
        self, where: str, x: Tensor, belief: Belief, u: Tensor | None, full: tuple[int, ...]
    ) -> tuple[Belief, Steps]:
        matrices, y = Matrices(where, self.system, full, belief.steps, 1, belief.mean.dtype), x[:, None]
        u = None if u is None else u[:, None]
        steps = steps_of(matrices, y, u, present(y), standing(self.system, belief, 1, None))
        return predict(belief, tree_map(lambda z: z[:, 0], steps)), steps

    def _transition(self, where: str, belief: Belief, u: Tensor | None, given: dict[str, Tensor]) -> Transition:
        full = self._full(where, len(belief.mean))
        at = Matrices(where, self.system, full, belief.steps, 1, belief.mean.dtype)
        moves = transition(at, None if u is None else u[:, None], standing(self.system, belief, 1, None))
        step = tree_map(lambda z: z[:, 0], moves)
        return step._replace(**own(where, given, step._asdict()))

    def _sees(
        self, where: str, belief: Belief, u: Tensor | None, y: Tensor | None, R: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        at = self._reached(where, belief)
        C = at.there("C")[:, 0]
        u = self._check_inputs(where, u, C.shape[:1], belief) if self.system.D is not None else None
        level = at.driven("d", "D", None if u is None else u[:, None])
        return C, R, C.new_zeros(C.shape[:2]) if level is None else level[:, 0]

    def _noise(self, where: str, belief: Belief) -> Tensor:
        return self._reached(where, belief).noise_of_y()[:, 0]

    def _reached(self, where: str, belief: Belief) -> Matrices:
        """The matrices of the time that a belief is of."""
        full = self._full(where, len(belief.mean))
        return Matrices(where, self.system, full, (belief.steps - 1).clamp_min(0), 1, belief.mean.dtype)

    def _ahead(self, where: str, series: Rows, horizon: int, u: Tensor | None) -> tuple[Tensor, Tensor]:
        last, model = series.last, self.system
        matrices = Matrices(where, model, series.full, last.steps, horizon, last.mean.dtype)
        nothing = last.mean.new_full((len(last.mean), horizon, model.d_obs), torch.nan)
        unseen = torch.zeros_like(nothing, dtype=torch.bool)
        steps = steps_of(matrices, nothing, u, unseen, standing(model, last, horizon, None))
        ahead, _, _ = self._run(steps, last)
        C, level = matrices.there("C"), matrices.driven("d", "D", u)
        mean = matvec(C, ahead.predicted_mean)
        mean = mean if level is None else mean + level
        return mean, symmetric_part(C @ ahead.predicted_cov @ C.mT) + matrices.noise_of_y()

    def _next(self, where: str, series: Rows, last: Belief, u: Tensor | None) -> Transition | None:
        model = self.system
        matrices = Matrices(where, model, series.full, last.steps, 1, last.mean.dtype)
        known = all(matrices.reach(name) for name in "AQSc") and (model.B is None or matrices.reach("B"))
        if not known or (u is not None and model.B is not None and not u.shape[1]):
            return None
        moves = transition(matrices, None if model.B is None else u, standing(model, last, 1, None))
        return tree_map(lambda z: z[:, 0], moves)
