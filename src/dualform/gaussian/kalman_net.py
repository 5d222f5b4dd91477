"""KalmanNet: a filter whose gain a small recurrent network corrects, where the model is not right."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dualform.core.calls import explained
from dualform.core.errors import ArgumentError, DualformError
from dualform.core.linalg import as_tensors, matvec
from dualform.core.packing import Borders, Packing
from dualform.core.shapes import check_tensors
from dualform.core.tree import concat, state_class, tree_map
from dualform.gaussian.belief import Belief
from dualform.gaussian.model import LinearGaussian
from dualform.gaussian.nonlinear import NonlinearGaussian

_KEPT = 0.9  # of the running mean of squared innovations, in each step


@state_class
class KalmanNetState(NamedTuple):
    """What a :class:`KalmanNet` carries."""

    belief: Belief  # its own mean; the covariance that the model has for it
    moved: Tensor  # (B, N), the last correction, in deviations of the prediction
    hidden: Tensor  # (B, H)
    surprise: Tensor  # (B,), the running mean of squared normalised innovations; 1 where the model is right


@explained
class KalmanNet(nn.Module):
    """The filter of a model with a gain that a GRU corrects, step by step; it learns from states that are known.

        w_t = L_t^{-1} (y_t - yhat_t),   L_t L_t^T = the innovation's covariance
        g_t = GRU(asinh(w_t, last correction, last transition), g_{t-1})
        m_t = mhat_t + K_t (y_t - yhat_t) + D_t bound tanh(W g_t) w_t,   D_t = deviations of the prediction

    ``mhat``, ``yhat``, K and the covariances are those of the model's own filter, from the mean that this one has. W is
    0 at the start: then it is that filter, and where the model is right it has nothing to learn. It is of use where the
    noise, the transition or the observation is not what the model says.

    Learned gains are known to fail in four ways; this is what is done about each. Inputs of another scale than in
    training: they are normalised by the model's own covariances, and compressed by asinh. Gains that make the filter
    unstable: what is added is bounded, by ``bound`` deviations of the prediction for each deviation of the innovation.
    Gradients that explode along a series: :meth:`fit` cuts them every ``truncate`` steps and clips them. Series unlike
    those of training: where the running mean of squared innovations of a row exceeds ``patience`` times the largest
    one in training, the row takes the model's own gain until it falls again.

    The covariance in its state is the model's, and says nothing of the error of a mean that was corrected.

    It is a :class:`~dualform.core.recurrence.Recurrence`: ``mean, state = net(y, state)``, ``(B, T, M) -> (B, T, N)``,
    ``step`` and ``cu_seqlens``.

    Args:
        model: a :class:`~dualform.gaussian.model.LinearGaussian` or
            :class:`~dualform.gaussian.nonlinear.NonlinearGaussian`, without inputs and without a batch. Its own
            parameters are not trained here.
        hidden: H, the width of the GRU.
        bound: of the correction.
        patience: of the fall-back.

    Raises:
        ArgumentError: for another model, a diffuse one, and numbers out of range.

    Example:
        >>> import torch
        >>> import dualform as df
        >>> model = df.LinearGaussian([[1.0]], [[1.0]], [[0.01]], [[1.0]], P0=1.0)
        >>> x = torch.randn(8, 20, 1).cumsum(1)
        >>> net = df.gaussian.KalmanNet(model, hidden=8).fit(x + torch.randn(8, 20, 1), x, passes=2)
        >>> net(torch.randn(3, 20, 1, dtype=torch.float64))[0].shape
        torch.Size([3, 20, 1])

    References:
        Revach, Shlezinger, Ni, Lopez Escoriza, van Sloun and Eldar (2022), "KalmanNet: neural network aided Kalman
        filtering for partially known dynamics", IEEE Transactions on Signal Processing 70: section III. There the gain
        is the network's alone, its inputs are differences in their own units, and gradients run through whole series.
    """

    usual: Tensor  # the largest surprise in training; infinite before

    def __init__(
        self,
        model: LinearGaussian | NonlinearGaussian,
        *,
        hidden: int = 32,
        bound: float = 4.0,
        patience: float = 4.0,
    ):
        super().__init__()
        if not isinstance(model, LinearGaussian | NonlinearGaussian):
            raise ArgumentError(
                f"KalmanNet: model is {type(model).__name__}, expected a LinearGaussian or a NonlinearGaussian"
            )
        if model.diffuse is not None or model.batch or model.d_input is not None:
            what = "is diffuse" if model.diffuse is not None else "has a batch" if model.batch else "takes inputs"
            raise ArgumentError(f"KalmanNet: the model {what}", hint="one model with a known prior and without inputs")
        if hidden < 1 or not 0 < bound < float("inf") or not patience > 1:
            raise ArgumentError(
                f"KalmanNet: hidden {hidden}, bound {bound}, patience {patience}, expected 1 or more, a positive "
                "number, and more than 1"
            )
        self.model, self.bound, self.patience = model, bound, patience
        n, m = model.d_state, model.d_obs
        dtype = model.Q.dtype
        self.cell = nn.GRUCell(m + 2 * n, hidden, dtype=dtype)
        self.head = nn.Linear(hidden, n * m, dtype=dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("usual", torch.tensor(torch.inf, dtype=dtype))

    def init_state(self, batch: int, *, max_len: int = 0) -> KalmanNetState:
        """The prior of the model, for each row; ``max_len`` is ignored."""
        belief = self.model.init_state(batch)
        zeros = belief.mean.new_zeros
        hidden = zeros(batch, self.cell.hidden_size)
        return KalmanNetState(belief, zeros(batch, self.model.d_state), hidden, torch.ones_like(hidden[:, 0]))

    def forward(
        self, x: Tensor, state: KalmanNetState | None = None, *, cu_seqlens: Borders = None
    ) -> tuple[Tensor, KalmanNetState]:
        """Means of the states ``(B, T, N)`` given the observations until each ``(B, T, M)``; NaN is missing.

        Raises:
            ArgumentError: for shapes that do not fit, and observations that are infinite.
        """
        where = "KalmanNet.forward"
        check_tensors(where, x=(x, f"B T {self.model.d_obs}"))
        packing = Packing.of(where, cu_seqlens, x)
        state = self.init_state(len(x) if packing is None else packing.rows) if state is None else state
        if packing is None:
            return self._through(x, state)
        found = []
        for row, (first, end) in enumerate(pairwise(packing.as_tensor().tolist())):
            found.append(self._through(x[:, first:end], tree_map(lambda z, row=row: z[row : row + 1], state)))
        means, states = zip(*found, strict=True)
        return torch.cat(means, 1), concat([*states], 0)

    def step(self, x: Tensor, state: KalmanNetState) -> tuple[Tensor, KalmanNetState]:
        """The mean ``(B, N)`` given one more observation ``(B, M)``.

        Raises:
            ArgumentError: as :meth:`forward`.
        """
        before = self.model.predict(state.belief)
        found = self.model.update(before, x)
        seen = ~x.isnan()
        white = _white(found.innovation, found.innovation_cov, seen)
        spread = before.cov.diagonal(dim1=-2, dim2=-1).clamp_min(1e-30).sqrt()
        evolved = (before.mean - state.belief.mean) / spread
        any_seen = seen.any(-1)
        hidden = self.cell(torch.cat([white, state.moved, evolved], -1).asinh(), state.hidden)
        hidden = torch.where(any_seen[:, None], hidden, state.hidden)
        gain = self.bound * torch.tanh(self.head(hidden)).unflatten(-1, (spread.shape[-1], -1))
        squares = white.square().sum(-1) / seen.sum(-1).clamp_min(1)
        surprise = torch.where(any_seen, _KEPT * state.surprise + (1 - _KEPT) * squares, state.surprise)
        trusted = (surprise <= self.patience * self.usual) & any_seen
        correction = torch.where(trusted[:, None], spread * matvec(gain, white), 0.0)
        mean = found.belief.mean + correction
        moved = (mean - before.mean) / spread
        return mean, KalmanNetState(found.belief._replace(mean=mean), moved, hidden, surprise)

    def fit(
        self,
        y: Any,
        states: Any,
        *,
        passes: int = 30,
        truncate: int = 20,
        batch: int = 32,
        lr: float = 5e-3,
        seed: int = 0,
        tell: Callable[[int, float], None] = lambda done, loss: None,
    ) -> "KalmanNet":
        """Minimise the squared error of the means, each component in its own deviation; returns the filter.

        Args:
            y: observations ``(B, T, M)``; NaN where missing.
            states: the true states ``(B, T, N)``; NaN where one is not known, which does not count.
            passes: over all series.
            truncate: after how many steps gradients are cut; the weights change as often.
            batch: series at a time.
            lr: of Adam.
            seed: of the order of the series.
            tell: called with how many passes are done, and the mean loss of the last.

        Raises:
            ArgumentError: for shapes that do not fit, or numbers below 1.
            DualformError: where the loss is not finite.
        """
        given = as_tensors("KalmanNet.fit", y=y, states=states)
        y, states = (given[name].to(self.usual.dtype) for name in ("y", "states"))
        check_tensors("KalmanNet.fit", y=(y, f"B T {self.model.d_obs}"), states=(states, f"B T {self.model.d_state}"))
        if min(passes, truncate, batch) < 1:
            raise ArgumentError(
                f"KalmanNet.fit: passes {passes}, truncate {truncate}, batch {batch}, expected 1 or more"
            )
        scale = (states - states.nanmean((0, 1))).square().nanmean((0, 1)).sqrt().clamp_min(1e-12)
        weights = [*self.cell.parameters(), *self.head.parameters()]
        optimizer, source = torch.optim.Adam(weights, lr=lr), torch.Generator().manual_seed(seed)
        self.usual.fill_(torch.inf)
        for done in range(passes):
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - done / passes)
            total, count = 0.0, 0
            for rows in torch.randperm(len(y), generator=source).split(batch):
                state = self.init_state(len(rows))
                for first in range(0, y.shape[1], truncate):
                    part = slice(first, first + truncate)
                    mean, state = self(y[rows, part], state)
                    away = (mean - states[rows, part]) / scale
                    loss = away.square().nanmean()
                    if not loss.isfinite():
                        raise DualformError(f"KalmanNet.fit: the loss is {loss.item()} in pass {done}", hint="lower lr")
                    optimizer.zero_grad()
                    loss.backward(inputs=weights)
                    torch.nn.utils.clip_grad_norm_(weights, 1.0)
                    optimizer.step()
                    state = tree_map(lambda z: z.detach(), state)
                    total, count = total + loss.item(), count + 1
            tell(done + 1, total / max(count, 1))
        self.usual.copy_(self._largest_surprise(y))
        return self

    @torch.no_grad()
    def _largest_surprise(self, y: Tensor) -> Tensor:
        state, largest = self.init_state(len(y)), self.usual.new_ones(())
        for x in y.unbind(1):
            _, state = self.step(x, state)
            largest = torch.maximum(largest, state.surprise.max())
        return largest

    def _through(self, x: Tensor, state: KalmanNetState) -> tuple[Tensor, KalmanNetState]:
        means = []
        for at in x.unbind(1):
            mean, state = self.step(at, state)
            means.append(mean)
        return (torch.stack(means, 1) if means else x.new_zeros(len(x), 0, self.model.d_state)), state


def _white(innovation: Tensor, cov: Tensor, seen: Tensor) -> Tensor:
    """Innovations ``(B, M)`` with the covariance of the identity, of the components that are seen; 0 elsewhere."""
    both = seen.unsqueeze(-1) & seen.unsqueeze(-2)
    eye = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
    root = torch.linalg.cholesky(torch.where(both, cov, eye))
    there = torch.where(seen, innovation, 0.0).unsqueeze(-1)
    return torch.linalg.solve_triangular(root, there, upper=False).squeeze(-1)
