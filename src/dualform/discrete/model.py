"""Hidden Markov models."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dualform.core.calls import explained
from dualform.core.errors import ArgumentError
from dualform.core.linalg import check_finite
from dualform.core.packing import Borders, Packing
from dualform.core.shapes import check_tensors, wide
from dualform.core.tree import take, tree_map
from dualform.discrete.chain import stationary_distribution
from dualform.discrete.decoding import viterbi
from dualform.discrete.emission import Emission, check_distribution, given, widened
from dualform.discrete.filtering import Filtered, HiddenState, log_prob, run
from dualform.discrete.fit import Fit, baum_welch
from dualform.discrete.passes import safe_log
from dualform.discrete.series import Part, Series
from dualform.discrete.smoothing import Form, both_passes, log_likelihood, pair_probs, posterior


class Smoothed(NamedTuple):
    """``p(z_t | y_1 .. y_T)``, and ``p(z_t, z_{t+1} | y_1 .. y_T)``."""

    probs: Tensor  # (B, T, K)
    pairs: Tensor  # (B, T - 1, K, K); 0 where the later step is not there


@explained
class HiddenMarkov(nn.Module):
    """A hidden Markov model, whose filter is a :class:`~dualform.core.recurrence.Recurrence`.

        p(z_1 = i) = initial_i,   p(z_{t+1} = j | z_t = i) = transition_ij,   y_t ~ emission(z_t)

    Observations ``(B, T, M)`` -> :class:`Filtered`; the state is the distribution of the next hidden state, so that
    the initial state is ``initial``, and **no transition comes before the first observation**. **NaN means missing**,
    component by component where the emission allows it.

    :meth:`forward`, :meth:`filter`, :meth:`smooth` and :meth:`log_likelihood` have gradients of any order. That of a
    log-likelihood is made of posterior probabilities, which takes no graph of the recursion.

    Probabilities are multiplied, divided at each step by their sum; where that may lose what matters, in a chain with
    transitions that are almost impossible, everything is computed again with logarithms.

    Args:
        emission: what a state emits, such as :class:`~dualform.discrete.poisson.PoissonEmission`.
        initial: distribution of the first state ``(K,)``; None is uniform.
        transition: ``(K, K)``, rows are the states moved from; None is uniform.
        stationary: the first state has the stationary distribution of ``transition``, instead of one of its own.
        parallel: the form of passes over time: True is an associative scan of depth ``O(log T)``, False a loop. None
            is a loop where gradients are recorded on a CPU, the scan on other devices, and without gradients a loop
            over chunks of the sequence that stand side by side.
        scaled: True multiplies probabilities, False adds logarithms; None as described above.

    Raises:
        ArgumentError: for shapes that do not fit, or rows that are no distribution.

    References:
        Rabiner (1989), "A tutorial on hidden Markov models and selected applications in speech recognition";
        Sarkka and Garcia-Fernandez (2021), "Temporal parallelization of Bayesian smoothers", arXiv:1905.13002, and
        Hassan, Sarkka and Garcia-Fernandez (2021), "Temporal parallelization of inference in hidden Markov models",
        arXiv:2102.05743, for the scan.

    Example:
        >>> import dualform as df
        >>> model = df.HiddenMarkov(df.discrete.PoissonEmission.of([15.0, 26.0]), transition=[[0.9, 0.1], [0.2, 0.8]])
        >>> model.predict([13, 14, 8, 27, 32, 36])
        tensor([0, 0, 0, 1, 1, 1])
    """

    def __init__(
        self,
        emission: Emission,
        *,
        initial: Any = None,
        transition: Any = None,
        stationary: bool = False,
        parallel: bool | None = None,
        scaled: bool | None = None,
    ):
        super().__init__()
        if not isinstance(emission, Emission):
            hint = "such as dualform.discrete.GaussianEmission(states=3, width=2)"
            raise ArgumentError(f"HiddenMarkov: emission is {type(emission).__name__}, expected an Emission", hint=hint)
        if stationary and initial is not None:
            raise ArgumentError("HiddenMarkov: initial is given, but stationary takes it from transition")
        self.emission, self.stationary, self.form = emission, stationary, Form(parallel, scaled)
        k, like = emission.states, next(emission.parameters())
        start = torch.full((k,), 1 / k) if initial is None else given("HiddenMarkov", initial=initial)["initial"]
        moves = torch.full((k, k), 1 / k) if transition is None else given("HiddenMarkov", t=transition)["t"]
        sizes = {"initial": (start, f"{k}"), "transition": (moves, f"{k} {k}")}
        check_tensors("HiddenMarkov", **sizes)
        check_distribution("HiddenMarkov", "initial", start)
        check_distribution("HiddenMarkov", "transition", moves)
        self.transition_logits = nn.Parameter(safe_log(moves).to(like))
        self.initial_logits = None if stationary else nn.Parameter(safe_log(start).to(like))

    @property
    def states(self) -> int:
        """K."""
        return self.emission.states

    @property
    def transition(self) -> Tensor:
        """``(K, K)``; row i is the distribution of the state after state i."""
        return widened(self.transition_logits).softmax(-1)

    @property
    def initial(self) -> Tensor:
        """The distribution of the first state ``(K,)``."""
        if self.initial_logits is not None:
            return widened(self.initial_logits).softmax(-1)
        return stationary_distribution(self.transition)

    def extra_repr(self) -> str:
        """What ``print`` shows beside the emission."""
        return f"states={self.states}{', stationary' if self.stationary else ''}"

    def free_parameters(self) -> int:
        """How many numbers describe the model."""
        k = self.states
        return k * (k - 1) + (0 if self.stationary else k - 1) + self.emission.free_parameters()

    def init_state(self, batch: int, *, max_len: int = 0) -> HiddenState:
        """``initial`` for each row; ``max_len`` is ignored, the state has a constant size."""
        initial, e = self.initial, self.emission
        lags, seen = initial.new_zeros(batch, e.lags, e.width), initial.new_zeros(batch, dtype=torch.int64)
        return HiddenState(initial.repeat(batch, 1), lags, seen)

    def forward(
        self, x: Tensor, state: HiddenState | None = None, *, cu_seqlens: Borders = None
    ) -> tuple[Filtered, HiddenState]:
        """Filter observations ``x`` ``(B, T, M)``.

        Args:
            x: observations; NaN is missing.
            state: the distribution of the next hidden state, B rows, or n with ``cu_seqlens``; None means ``initial``.
            cu_seqlens: borders ``(n + 1,)`` of series laid end to end on the time axis, with B = 1.

        Returns:
            The probabilities of every step, and the state after the last, one row per series.

        Raises:
            ArgumentError: for shapes, dtypes or devices that do not fit, values that no state can emit, or
                observations of probability 0.
        """
        where = "HiddenMarkov.forward"
        x, packing = self._check(where, x, "B T"), Packing.of(where, cu_seqlens, x)
        last = self._check_state(where, len(x) if packing is None else packing.rows, state)
        if packing is None:
            return run(where, self.emission, self.transition, x, last, self.form)
        (groups, order), A, outs = packing.groups(), self.transition, []
        for rows, steps, keep in groups:
            laid = torch.where(keep[..., None], x[0][steps], 0)
            out, new = run(where, self.emission, A, laid, take(last, rows), self.form, keep)
            last = tree_map(lambda old, new, rows=rows: old.index_put((rows,), new), last, new)
            outs.append(out)
        if not outs:
            return run(where, self.emission, A, x, self.init_state(1), self.form)[0], last
        each = [torch.cat([m.flatten(0, 1) for m in of_all])[order][None] for of_all in zip(*outs, strict=True)]
        return Filtered(*each), last

    def step(self, x: Tensor, state: HiddenState) -> tuple[Filtered, HiddenState]:
        """One observation ``x`` ``(B, M)``; outputs have no time axis.

        Raises:
            ArgumentError: as :meth:`forward`.
        """
        where = "HiddenMarkov.step"
        x = self._check(where, x, "B")
        state = self._check_state(where, len(x), state)
        out, state = run(where, self.emission, self.transition, x[:, None], state, self.form)
        return Filtered(out.probs[:, 0], out.loglik[:, 0]), state

    def filter(self, X: Any, lengths: Any = None, *, cu_seqlens: Borders = None) -> Filtered:
        """``p(z_t | y_1 .. y_t)`` and ``log p(y_t | y_1 .. y_{t-1})``, in the layout of X.

        Args:
            X: as :meth:`predict_proba`.
            lengths: as there.
            cu_seqlens: as there.
        """
        where = "HiddenMarkov.filter"
        series = Series.of(where, self.emission, X, lengths, cu_seqlens)
        A, outs = self.transition, []
        for part in self._some(where, series):
            state = self.init_state(len(part.x))
            outs.append(run(where, self.emission, A, part.x, state, self.form, part.keep)[0])
        return Filtered(series.back([out.probs for out in outs]), series.back([out.loglik for out in outs]))

    def log_likelihood(self, X: Any, lengths: Any = None, *, cu_seqlens: Borders = None) -> Tensor:
        """``log p(y_1 .. y_T)`` of each series ``(B,)``; of one series without axes.

        Args:
            X: as :meth:`predict_proba`.
            lengths: as there.
            cu_seqlens: as there.
        """
        where = "HiddenMarkov.log_likelihood"
        series = Series.of(where, self.emission, X, lengths, cu_seqlens)
        return series.of_series([log_likelihood(where, *self.chain(part), self.form) for part in series.parts])

    def score(self, X: Any, lengths: Any = None, *, cu_seqlens: Borders = None) -> Tensor:
        """The sum of :meth:`log_likelihood` over the series, without axes."""
        return self.log_likelihood(X, lengths, cu_seqlens=cu_seqlens).sum()

    @torch.no_grad()
    def predict_proba(self, X: Any, lengths: Any = None, *, cu_seqlens: Borders = None) -> Tensor:
        """``p(z_t = k | y_1 .. y_T)``, in the layout of X: ``(T, K)``, ``(B, T, K)``; 0 after the end of a row.

        Without gradients; :meth:`smooth` has them.

        Args:
            X: ``(T, M)``, or ``(T,)`` for M = 1: one series, or several end to end with ``lengths``; or ``(B, T, M)``,
                a batch, with ``lengths`` where rows are padded at their ends. A tensor, array or list.
            lengths: of the series end to end, summing to T; or of the rows.
            cu_seqlens: borders of series end to end in ``(1, T, M)``.

        Raises:
            ArgumentError: for shapes and lengths that do not fit, values that no state can emit, or observations of
                probability 0.
        """
        where = "HiddenMarkov.predict_proba"
        series = Series.of(where, self.emission, X, lengths, cu_seqlens)
        return series.back([posterior(where, *self.chain(part), self.form) for part in self._some(where, series)])

    def smooth(self, X: Any, lengths: Any = None) -> Smoothed:
        """The probabilities of states and of pairs of neighbouring states, given everything.

        Args:
            X: one series, or a batch ``(B, T, M)``, as :meth:`predict_proba`.
            lengths: of the rows of a batch.

        Raises:
            ArgumentError: as :meth:`predict_proba`, and for series end to end.
        """
        where = "HiddenMarkov.smooth"
        series = Series.of(where, self.emission, X, lengths)
        if series.layout == "line":
            raise ArgumentError(f"{where}: X has series end to end", hint="give them as rows, (B, T, M)")
        probs, pairs = [], []
        for part in self._some(where, series):
            start, A, log_b = self.chain(part)
            both = both_passes(where, start, A, log_b, self.form)
            found = torch.nn.functional.pad(pair_probs(both, A), (0, 0, 0, 0, 0, 1))  # one for each step
            there = None if part.keep is None else torch.nn.functional.pad(part.keep[:, 1:], (0, 1))
            pairs.append(found if there is None else torch.where(there[..., None, None], found, 0))
            probs.append(both.probs)
        return Smoothed(series.back(probs), series.back(pairs)[..., :-1, :, :])

    def predict(self, X: Any, lengths: Any = None, *, cu_seqlens: Borders = None) -> Tensor:
        """The most likely path of states, int64, in the layout of X; -1 after the end of a row."""
        return self.decode(X, lengths, cu_seqlens=cu_seqlens)[1]

    @torch.no_grad()
    def decode(self, X: Any, lengths: Any = None, *, cu_seqlens: Borders = None) -> tuple[Tensor, Tensor]:
        """The log-probability of the most likely path and the observations, ``(B,)``, and the path, by Viterbi.

        Args and errors are those of :meth:`predict_proba`.
        """
        where, scores, paths = "HiddenMarkov.decode", [], []
        series = Series.of(where, self.emission, X, lengths, cu_seqlens)
        for part in self._some(where, series):
            path, score = viterbi(*self.chain(part), part.keep)
            if bool((score == -torch.inf).any()):
                row = int(part.rows[score == -torch.inf][0])
                raise ArgumentError(f"{where}: every path of series {row} has probability 0")
            scores.append(score)
            paths.append(path)
        return series.of_series(scores), series.back(paths, fill=-1)

    def fit(
        self,
        X: Any,
        lengths: Any = None,
        *,
        restarts: int = 6,
        max_iterations: int = 1000,
        tolerance: float = 1e-7,
        seed: int = 0,
        from_data: bool = True,
    ) -> Fit:
        """Maximise the likelihood, times the priors, by expectation and maximisation (Baum-Welch), in place.

        Args:
            X: as :meth:`predict_proba`.
            lengths: as there.
            restarts: how many starting points are tried, each for a few iterations; the best goes on. The first is from
                k-means, the second from k-means of moving averages, the others from random centres of either.
            max_iterations: of the one that goes on.
            tolerance: it has converged when an iteration gains less, per observed step.
            seed: of the starting points.
            from_data: False starts from the parameters that the model has, once.

        Returns:
            The log-likelihood, whether it has converged, and the history.

        Raises:
            ArgumentError: for X as :meth:`predict_proba`; for fewer observations than states; for a component that is
                missing everywhere.

        References:
            Baum, Petrie, Soules and Weiss (1970), "A maximization technique occurring in the statistical analysis of
            probabilistic functions of Markov chains".
        """
        series = Series.of("HiddenMarkov.fit", self.emission, X, lengths)
        if restarts < 1 or max_iterations < 0 or not tolerance >= 0:
            raise ArgumentError(
                f"HiddenMarkov.fit: restarts {restarts}, max_iterations {max_iterations}, tolerance {tolerance}, "
                "expected 1, 0 and 0 or more"
            )
        return baum_welch(self, series, restarts if from_data else 0, max_iterations, tolerance, seed)

    @torch.no_grad()
    def sample(self, length: int, batch: int = 1, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw observations and the states behind them; no gradients.

        Args:
            length: T, the number of steps.
            batch: B, the number of independent series.
            generator: source of randomness, on the model's device.

        Returns:
            ``y`` ``(B, T, M)`` and ``z`` ``(B, T)``, int64.

        Raises:
            ArgumentError: for a negative length or batch.
        """
        if length < 0 or batch < 0:
            raise ArgumentError(f"HiddenMarkov.sample: length {length} and batch {batch}, expected 0 or more")
        until, moves = self.initial.cumsum(-1), self.transition.cumsum(-1)
        drawn = torch.rand(length, batch, 1, generator=generator, dtype=until.dtype, device=until.device)
        path, last = [], self.states - 1
        for u in drawn:
            now = torch.searchsorted(until.expand(batch, -1).contiguous(), u * until[..., -1:]).squeeze(-1)
            now = now.clamp(max=last)
            path.append(now)
            until = moves[now]
        states = torch.stack(path, 1) if path else drawn.new_zeros(batch, 0, dtype=torch.int64)
        return self.emission.draw(states, generator), states

    def chain(self, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        """The distribution of the first state ``(B, K)``, the transition, and ``log p(y_t | z_t)`` ``(B, T, K)``."""
        state = self.init_state(len(part.x))
        return state.probs, self.transition, part.masked(log_prob(self.emission, part.x, state.lags, state.seen))

    def _some(self, where: str, series: Series) -> tuple[Part, ...]:
        if not series.parts:
            raise ArgumentError(f"{where}: X has no steps")
        return series.parts

    def _check(self, where: str, x: Tensor, axes: str) -> Tensor:
        """Observations in the dtype of the parameters; integers stay."""
        like = self.transition_logits
        check_tensors(where, x=(x, f"{axes} {self.emission.width}"), model=(like, "* *"))
        if x.is_complex():
            raise ArgumentError(f"{where}: complex values in x, expected real ones")
        self.emission.check(where, "x", x)
        return x.to(wide(like)) if x.is_floating_point() else x

    def _check_state(self, where: str, rows: int, state: HiddenState | None) -> HiddenState:
        if state is None:
            return self.init_state(rows)
        e, like = self.emission, self.transition_logits
        sizes = {"probs": (state.probs, f"{rows} {e.states}"), "lags": (state.lags, f"{rows} {e.lags} {e.width}")}
        check_tensors(f"{where}: state", model=(like, "* *"), seen=(state.seen, f"{rows}"), **sizes)
        check_finite(where, {"state.probs": state.probs, "state.lags": state.lags})
        return HiddenState(state.probs.to(wide(like)), state.lags.to(wide(like)), state.seen)
