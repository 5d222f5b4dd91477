"""Linear-Gaussian models that switch between regimes, with the filter and the smoother of Kim."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dualform.core.calls import explained
from dualform.core.errors import ArgumentError
from dualform.core.linalg import as_tensors, check_finite, matvec, refuse, symmetric_part
from dualform.core.packing import Borders, Packing, unpack
from dualform.core.shapes import check_floating, check_tensors, wide
from dualform.core.tree import tree_map
from dualform.gaussian.arrays import Door, lengths_of, refuse_infinite
from dualform.gaussian.belief import Belief, Gaussian
from dualform.gaussian.initial import initial as start_of
from dualform.gaussian.kim import SwitchingBelief, advance, collapsed, earlier
from dualform.gaussian.model import LinearGaussian
from dualform.gaussian.smoothing import normal
from dualform.gaussian.steps import Matrices, Steps, ended, masked, standing, steps_of


class SwitchingEstimate(NamedTuple):
    """Moments of ``p(h_t | y_1 .. y_t)``, ``p(s_t | y_1 .. y_t)``, and ``log p(y_t | y_1 .. y_{t-1})``."""

    mean: Tensor  # (B, T, N)
    cov: Tensor  # (B, T, N, N)
    probs: Tensor  # (B, T, K)
    loglik: Tensor  # (B, T)


class SwitchingFiltered(NamedTuple):
    """Given the observations so far: moments of the state, the probability of each regime, and the moments in each."""

    mean: Any  # (..., T, N)
    cov: Any  # (..., T, N, N)
    probs: Any  # (..., T, K)
    regime_mean: Any  # (..., T, K, N)
    regime_cov: Any  # (..., T, K, N, N)
    log_likelihood: Any  # (...)
    loglik: Any  # (..., T), the terms of it


class SwitchingSmoothed(NamedTuple):
    """The same given all observations."""

    mean: Any  # (..., T, N)
    cov: Any  # (..., T, N, N)
    probs: Any  # (..., T, K)
    regime_mean: Any  # (..., T, K, N)
    regime_cov: Any  # (..., T, K, N, N)
    log_likelihood: Any  # (...)


class _Pass(NamedTuple):
    states: SwitchingBelief  # with time on axis 1
    loglik: Tensor  # (B, T)
    steps: Steps  # (B, T, K, ...)
    moves: Tensor  # (B, T, K, K)


@explained
class SwitchingLinearGaussian(nn.Module):
    """A linear-Gaussian model whose matrices follow a hidden Markov chain of K regimes.

        p(s_1 = k) = initial_k,   p(s_t = j | s_{t-1} = i) = transition_ij
        h_t = A_k h_{t-1} + c_k + B_k u_t + S_k eta_t,   y_t = C_k h_t + d_k + D_k u_t + eps_t,   k = s_t

    The exact distribution of a state is a mixture of one normal distribution for each path of regimes, ``K^t``. **The
    filter of Kim keeps K of them**: each of the ``K^2`` pairs of a regime and the one before it makes an exact step,
    and the K that end in one regime are then replaced by one of the same mean and covariance. The first two
    observations are filtered exactly, moments and likelihood; from the third on both are approximations. The smoother
    goes back over pairs likewise, and takes ``p(s_t | s_{t+1}, y_1 .. y_T)`` for ``p(s_t | s_{t+1}, y_1 .. y_t)``.
    One regime, equal regimes, or a chain that leaves no choice make both exact.

    The filter is a :class:`~dualform.core.recurrence.Recurrence`, with NaN for what is missing and the conventions of
    :class:`~dualform.gaussian.model.LinearGaussian`. Everything has gradients, to the probabilities too.

    Args:
        model: the regimes, a :class:`~dualform.gaussian.model.LinearGaussian` with one batch axis ``(K,)``: parameters
            without it are shared. Not with an exactly diffuse start.
        transition: ``(K, K)``, rows are the regimes moved from.
        initial: distribution of the regime of the first observation ``(K,)``; None is uniform.

    An ``nn.Parameter`` stays one, everything else is a buffer. Values are checked here, once: probabilities are trained
    as a softmax, with a model that is made of them.

    Raises:
        ArgumentError: for a model of another kind or without its batch axis, shapes that do not fit, or rows that are
            no distribution.

    Example:
        >>> import dualform as df
        >>> calm_or_wild = df.LinearGaussian([[1.0]], [[1.0]], [[[0.01]], [[4.0]]], [[1.0]], P0=10.0)
        >>> switching = df.gaussian.SwitchingLinearGaussian(calm_or_wild, [[0.95, 0.05], [0.2, 0.8]])
        >>> switching.smooth([0.1, 0.3, None, 6.0]).probs.shape
        torch.Size([4, 2])

    References:
        Kim (1994), "Dynamic linear models with Markov-switching"; Kim and Nelson (1999), "State-space models with
        regime switching", chapter 5.
    """

    transition: Tensor
    initial: Tensor

    def __init__(self, model: LinearGaussian, transition: Any, initial: Any = None):
        super().__init__()
        where = "SwitchingLinearGaussian"
        if not isinstance(model, LinearGaussian):
            raise ArgumentError(f"{where}: model is {type(model).__name__}, expected a LinearGaussian")
        if len(model.batch) != 1:
            raise ArgumentError(
                f"{where}: model has the batch axes {tuple(model.batch)}, expected one, of the regimes",
                hint="stack the matrices in which the regimes differ: A of shape (K, N, N)",
            )
        if model.diffuse is not None:
            hint = "give P0 a covariance, or a large number"
            raise ArgumentError(f"{where}: the model has an exactly diffuse start", hint=hint)
        (k,) = model.batch
        values = {"transition": transition, "initial": [1 / k] * k if initial is None else initial}
        made = as_tensors(where, model=model.Q, **values)
        check_tensors(where, transition=(made["transition"], f"{k} {k}"), initial=(made["initial"], f"{k}"))
        for name, value in values.items():
            _check_distribution(where, name, made[name].detach())
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, made[name])
        self.model = model

    @property
    def regimes(self) -> int:
        """K."""
        return len(self.initial)

    def init_state(self, batch: int, *, max_len: int = 0) -> SwitchingBelief:
        """The prior, for each row; ``max_len`` is ignored, the state has a constant size."""
        start = start_of(f"{type(self).__name__}.init_state", self.model, (batch, self.regimes))
        mean, cov = (z.unflatten(0, (batch, self.regimes)) for z in (start.mean, start.cov))
        probs = self.initial.to(mean.dtype).expand(batch, -1).clone()
        return SwitchingBelief(mean, cov, probs, start.steps.unflatten(0, (batch, self.regimes))[:, 0].clone())

    def forward(
        self, x: Tensor, state: SwitchingBelief | None = None, *, u: Tensor | None = None, cu_seqlens: Borders = None
    ) -> tuple[SwitchingEstimate, SwitchingBelief]:
        """Filter observations ``x`` ``(B, T, M)``.

        Args:
            x: observations; NaN is missing.
            state: before the first of them, B rows, or n with ``cu_seqlens``; None means the prior.
            u: inputs ``(B, T, U)``, of a model with B or D.
            cu_seqlens: borders ``(n + 1,)`` of series laid end to end on the time axis, with B = 1.

        Returns:
            What is known at every step, and the state after the last, one row per series.

        Raises:
            ArgumentError: for shapes, dtypes or devices that do not fit, an observation that is infinite, a state that
                is not finite, or an innovation covariance that is not positive definite.
        """
        where = f"{type(self).__name__}.forward"
        check_tensors(where, x=(x, f"B T {self.model.d_obs}"), model=(self.model.Q, "..."))
        check_floating(where, x=x)
        refuse_infinite(where, "x", x)
        packing = Packing.of(where, cu_seqlens, x)
        state = self._checked(where, x, len(x) if packing is None else packing.rows, state)
        u = self.model._check_inputs(where, u, x.shape[:2], _first(state))
        if packing is None:
            found = self._pass(where, x, state, u, None)
            return _estimate(found), _at(state, found.states, torch.full_like(state.steps, x.shape[1]))
        keep = packing.keep_mask()
        u = None if u is None else unpack(u, keep)
        found = self._pass(where, unpack(x, keep), state, u, keep)
        last = _at(state, found.states, packing.cu_seqlens.diff())
        return tree_map(lambda z: z[keep][None], _estimate(found)), last

    def step(
        self, x: Tensor, state: SwitchingBelief, *, u: Tensor | None = None
    ) -> tuple[SwitchingEstimate, SwitchingBelief]:
        """One observation ``x`` ``(B, M)``: a transition, then the update; outputs have no time axis."""
        out, last = self.forward(x.unsqueeze(1), state, u=None if u is None else u.unsqueeze(1))
        return tree_map(lambda z: z[:, 0], out), last

    def filter(
        self, y: Any, state: SwitchingBelief | None = None, *, u: Any = None, lengths: Any = None
    ) -> SwitchingFiltered:
        """Filter one series or a batch; the batch is that of the series, and the regimes are summed over.

        Args:
            y: as in :meth:`~dualform.gaussian.series.Series.filter`.
            state: before the first observation, one row per series; None is the prior.
            u: inputs ``(*batch, T, U)`` of a model with B or D.
            lengths: how many steps each series of a batch has ``(*batch,)``; results after them are NaN.

        Returns:
            With the axes of ``y``, and of its kind.

        Raises:
            ArgumentError: as :meth:`forward`, and for lengths that do not fit.
        """
        door, full, found, lengths = self._series(f"{type(self).__name__}.filter", y, state, u, lengths)
        s, out = found.states, _estimate(found)
        parts = [out.mean, out.cov, out.probs, s.mean, s.cov, found.loglik.sum(-1), found.loglik]
        return SwitchingFiltered(*_out(door, full, parts, lengths))

    def log_likelihood(
        self, y: Any, state: SwitchingBelief | None = None, *, u: Any = None, lengths: Any = None
    ) -> Tensor:
        """``log p(y_1 .. y_T)`` ``(*batch,)`` by the filter; arguments and errors are those of :meth:`filter`."""
        _, full, found, _ = self._series(f"{type(self).__name__}.log_likelihood", y, state, u, lengths)
        return found.loglik.sum(-1).reshape(full)

    def smooth(
        self, y: Any, state: SwitchingBelief | None = None, *, u: Any = None, lengths: Any = None
    ) -> SwitchingSmoothed:
        """The states and regimes given all observations; arguments and errors are those of :meth:`filter`."""
        door, full, found, lengths = self._series(f"{type(self).__name__}.smooth", y, state, u, lengths)
        later, back = None, []
        for t in reversed(range(found.loglik.shape[1])):
            now = tree_map(lambda z, t=t: z[:, t], found.states)
            if later is not None:
                step = tree_map(lambda z, t=t: z[:, t + 1], found.steps)
                now = earlier(now, later, step, found.moves[:, t + 1])
            back.append(now)
            later = now
        s = tree_map(lambda *z: torch.stack(z[::-1], 1), *back) if back else found.states
        mean, cov = collapsed(s.probs, s.mean, s.cov)
        parts = [mean, cov, s.probs, s.mean, s.cov, found.loglik.sum(-1)]
        return SwitchingSmoothed(*_out(door, full, parts, lengths))

    @torch.no_grad()
    def sample(
        self, length: int, batch: int = 1, *, u: Any = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw observations, and the states and regimes behind them; no gradients.

        Args:
            length: T, the number of steps.
            batch: B, the number of independent series.
            u: inputs ``(T, U)`` or ``(B, T, U)``, of a model with B or D.
            generator: source of randomness, on the model's device.

        Returns:
            ``y`` ``(B, T, M)``, ``h`` ``(B, T, N)`` and ``s`` ``(B, T)``, int64.

        Raises:
            ArgumentError: for a negative length or batch, and inputs that do not fit.
        """
        where, rows = f"{type(self).__name__}.sample", torch.arange(batch)
        if length < 0 or batch < 0:
            raise ArgumentError(f"sample: length {length} and batch {batch}, expected 0 or more")
        start = self.init_state(batch)
        u = self.model._inputs(where, u, (batch,), length, _first(start))
        y = start.mean.new_zeros(batch, length, self.model.d_obs)
        steps, moves = self._steps(where, y, start, None if u is None else u[:, :length], None)
        s, draws = start.probs, []
        for t in range(length):
            chances = s if not t else moves[rows, t, s]
            s = torch.multinomial(chances, 1, generator=generator)[:, 0]
            draws.append(s)
        if not draws:
            return y, y.new_zeros(batch, 0, self.model.d_state), rows.new_zeros(batch, 0)
        s = torch.stack(draws, 1)
        taken = tree_map(lambda z: z[rows[:, None], torch.arange(length), s], steps)
        first = tree_map(lambda z: z[rows, s[:, 0]], Gaussian(start.mean, start.cov))
        h, path = first.mean + normal(first.cov, first.mean.shape, generator), []
        noise = normal(taken.Q, taken.c.shape, generator)
        for t in range(length):
            h = matvec(taken.A[:, t], h) + taken.c[:, t] + noise[:, t]
            path.append(h)
        h = torch.stack(path, 1)
        return matvec(taken.C, h) - taken.y + normal(taken.R, taken.y.shape, generator), h, s

    # What the methods share.

    def _series(
        self, where: str, y: Any, state: SwitchingBelief | None, u: Any, lengths: Any
    ) -> tuple[Door, tuple[int, ...], _Pass, Tensor | None]:
        door = Door(where, y, self.model.Q, self.model.d_obs)
        full = tuple(door.y.shape[:-2])
        x = door.rows
        rows, length = x.shape[:2]
        state = self._checked(where, x, rows, state)
        u = self.model._inputs(where, u, full, length, _first(state))
        keep = None
        if lengths is not None:
            lengths = lengths_of(where, lengths, full, length, x.device)
            keep = torch.arange(length, device=x.device) < lengths[:, None]
        return door, full, self._pass(where, x, state, None if u is None else u[:, :length], keep), lengths

    def _checked(self, where: str, x: Tensor, rows: int, state: SwitchingBelief | None) -> SwitchingBelief:
        state = self.init_state(rows) if state is None else state
        k, n = self.regimes, self.model.d_state
        check_tensors(
            where,
            model=(self.model.Q, "..."),
            **{
                "state.mean": (state.mean, f"{rows} {k} {n}"),
                "state.cov": (state.cov, f"{rows} {k} {n} {n}"),
                "state.probs": (state.probs, f"{rows} {k}"),
                "state.steps": (state.steps, f"{rows}"),
            },
        )
        check_finite(where, {"state.mean": state.mean, "state.cov": state.cov, "state.probs": state.probs})
        dtype = wide(x, self.model.Q, state.mean, state.cov)
        mean, cov, probs = (z.to(dtype) for z in state[:3])
        return SwitchingBelief(mean, symmetric_part(cov), probs, state.steps)

    def _steps(
        self, where: str, x: Tensor, state: SwitchingBelief, u: Tensor | None, keep: Tensor | None
    ) -> tuple[Steps, Tensor]:
        """Of every regime ``(B, T, K, ...)``, and the probabilities of moves ``(B, T, K, K)``."""
        (rows, length, _), k = x.shape, self.regimes
        seen = ~x.isnan() if keep is None else ~x.isnan() & keep[..., None]
        mean = state.mean.flatten(0, 1)

        def repeated(z: Tensor | None) -> Any:
            return None if z is None else z.repeat_interleave(k, 0)

        belief = Belief(mean, state.cov.flatten(0, 1), repeated(state.steps), mean.new_zeros(*mean.shape, 0))
        needed = None if keep is None else repeated(keep.sum(1))
        matrices = Matrices(where, self.model, (rows, k), belief.steps, length, mean.dtype, needed)
        still = standing(self.model, belief, length, repeated(keep))
        steps = masked(steps_of(matrices, repeated(x), repeated(u), repeated(seen), still))
        steps = tree_map(lambda z: z.unflatten(0, (rows, k)).transpose(1, 2), steps)
        held = torch.zeros(rows, length, dtype=torch.bool, device=x.device) if keep is None else ~keep
        held = held | ((state.steps == 0)[:, None] & (torch.arange(length, device=x.device) == 0))
        moves = self.transition.to(mean.dtype)
        stay = torch.eye(k, dtype=moves.dtype, device=moves.device)
        return steps, torch.where(held[..., None, None], stay, moves)

    def _pass(self, where: str, x: Tensor, state: SwitchingBelief, u: Tensor | None, keep: Tensor | None) -> _Pass:
        steps, moves = self._steps(where, x, state, u, keep)
        found, terms = [], []
        for t in range(x.shape[1]):
            state, loglik = advance(state, tree_map(lambda z, t=t: z[:, t], steps), moves[:, t])
            found.append(state)
            terms.append(loglik)
        if not found:
            empty = tree_map(lambda z: z[:, None][:, :0], state)
            return _Pass(empty, empty.probs.sum(-1), steps, moves)
        return _Pass(tree_map(lambda *z: torch.stack(z, 1), *found), torch.stack(terms, 1), steps, moves)


def _estimate(found: _Pass) -> SwitchingEstimate:
    s = found.states
    return SwitchingEstimate(*collapsed(s.probs, s.mean, s.cov), s.probs, found.loglik)


def _at(start: SwitchingBelief, states: SwitchingBelief, lengths: Tensor) -> SwitchingBelief:
    """The state of each row after so many of its steps."""
    rows = torch.arange(len(lengths), device=lengths.device)
    mean, cov, probs = (
        torch.cat([first[:, None], rest], 1)[rows, lengths] for first, rest in zip(start[:3], states[:3], strict=True)
    )
    return SwitchingBelief(mean, cov, probs, start.steps + lengths)


def _first(state: SwitchingBelief) -> Belief:
    """The belief in one regime, for what is asked of a belief."""
    mean = state.mean[:, 0]
    return Belief(mean, state.cov[:, 0], state.steps, mean.new_zeros(*mean.shape, 0))


def _out(door: Door, full: tuple[int, ...], parts: list[Tensor], lengths: Tensor | None) -> tuple[Any, ...]:
    """Results with the axes of the call, NaN where a series has ended."""
    if lengths is not None:
        parts = [ended([z], lengths)[0] if z.dim() > 1 else z for z in parts]
    return door.out(*(z.reshape((*full, *z.shape[1:])) for z in parts), timed=True)


def _check_distribution(where: str, name: str, value: Tensor) -> None:
    """The last axis holds the probabilities of a distribution."""
    check_finite(where, {name: value})
    hint = "rows of probabilities with the sum 1, such as a softmax"
    refuse(where, name, value, value < 0, "has a negative probability", hint)
    total = value.sum(-1)
    refuse(where, f"the sum of {name}", total, (total - 1).abs() > 1e-6, "is not 1", hint)
