"""Hidden Markov models."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dualform.core.calls import explained
from dualform.core.errors import ArgumentError
from dualform.core.linalg import as_tensors, check_finite
from dualform.core.packing import Borders
from dualform.core.shapes import check_tensors
from dualform.discrete.chain import draw_path, stationary_distribution
from dualform.discrete.decoding import viterbi
from dualform.discrete.emission import Emission, check_distribution, given, widened
from dualform.discrete.filtering import Filtered, run
from dualform.discrete.fit import Fit, Statistics, baum_welch, begin_chain, take_chain
from dualform.discrete.passes import safe_log
from dualform.discrete.recurrent import ChainFilter
from dualform.discrete.series import Part, Series, inputs_of
from dualform.discrete.smoothing import Form, both_passes, log_likelihood, posterior


class Smoothed(NamedTuple):
    """``p(z_t | y_1 .. y_T)``, and ``p(z_t, z_{t+1} | y_1 .. y_T)``."""

    probs: Tensor  # (B, T, K)
    pairs: Tensor  # (B, T - 1, K, K); 0 where the later step is not there


@explained
class HiddenMarkov(ChainFilter):
    """A hidden Markov model, whose filter is a :class:`~dualform.core.recurrence.Recurrence`.

        p(z_1 = i) = initial_i,   p(z_{t+1} = j | z_t = i) = transition_ij,   y_t ~ emission(z_t)

    Observations ``(B, T, M)`` -> :class:`Filtered`; the state is the distribution of the next hidden state, so that
    the initial state is ``initial``, and **no transition comes before the first observation**. **NaN means missing**,
    component by component where the emission allows it.

    :meth:`forward`, :meth:`filter`, :meth:`smooth` and :meth:`log_likelihood` have gradients of any order. That of a
    log-likelihood is made of posterior probabilities, which takes no graph of the recursion.

    Probabilities are multiplied, divided at each step by their sum; where that may lose what matters, in a chain with
    transitions that are almost impossible, everything is computed again with logarithms.

    With ``inputs``, the transition after step t depends on what is known of that step, ``u_t``, as a multinomial logit:

        p(z_{t+1} = j | z_t = i, u_t) = softmax_j(transition_logits_ij + sum_k u_tk input_weights_kij)

    Every method then takes ``u``, with U numbers at each step of X; what acts on the way *into* a step is given one
    step earlier.

    Args:
        emission: what a state emits, such as :class:`~dualform.discrete.poisson.PoissonEmission`.
        initial: distribution of the first state ``(K,)``; None is uniform.
        transition: ``(K, K)``, rows are the states moved from; None is uniform.
        stationary: the first state has the stationary distribution of ``transition``, instead of one of its own.
        inputs: U, how many numbers transitions depend on; their weights begin at 0.
        parallel: the form of passes over time: True is an associative scan of depth ``O(log T)``, False a loop. None
            is a loop on a CPU, and the scan on other devices. Without gradients the loop is compiled; where it cannot
            be, it runs over chunks of the sequence that stand side by side.
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
        inputs: int = 0,
        parallel: bool | None = None,
        scaled: bool | None = None,
    ):
        super().__init__()
        if not isinstance(emission, Emission):
            hint = "such as dualform.discrete.GaussianEmission(states=3, width=2)"
            raise ArgumentError(f"HiddenMarkov: emission is {type(emission).__name__}, expected an Emission", hint=hint)
        if stationary and initial is not None:
            raise ArgumentError("HiddenMarkov: initial is given, but stationary takes it from transition")
        if isinstance(inputs, bool) or not isinstance(inputs, int) or inputs < 0:
            raise ArgumentError(f"HiddenMarkov: inputs is {inputs!r}, expected a whole number from 0")
        if stationary and inputs:
            raise ArgumentError("HiddenMarkov: stationary, but with inputs a chain has no stationary distribution")
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
        self.inputs = inputs
        self.input_weights = nn.Parameter(like.new_zeros(inputs, k, k)) if inputs else None

    @property
    def transition(self) -> Tensor:
        """``(K, K)``; row i is the distribution of the state after state i, where inputs are 0."""
        return widened(self.transition_logits).softmax(-1)

    def transitions(self, u: Any) -> Tensor:
        """The transition after a step with inputs u: ``(..., U)`` -> ``(..., K, K)``.

        Raises:
            ArgumentError: for inputs that do not fit, or of a model without.
        """
        u = as_tensors("HiddenMarkov.transitions", model=self.transition_logits, u=u)["u"]
        u = inputs_of("HiddenMarkov.transitions", self.inputs, self.transition_logits, u, tuple(u.shape[:-1]))
        return self.moves(u)

    def moves(self, u: Tensor | None) -> Tensor:
        """The transition of the chain that a pass runs over ``(K, K)``, or those after each step ``(B, T, K, K)``."""
        if u is None or self.input_weights is None:
            return self.transition
        logits = (u @ widened(self.input_weights).flatten(1)).unflatten(-1, (self.states, self.states))
        return (logits + widened(self.transition_logits)).softmax(-1)

    @property
    def initial(self) -> Tensor:
        """The distribution of the first state ``(K,)``."""
        if self.initial_logits is not None:
            return widened(self.initial_logits).softmax(-1)
        return stationary_distribution(self.transition)

    def extra_repr(self) -> str:
        """What ``print`` shows beside the emission."""
        return f"states={self.states}{', stationary' if self.stationary else ''}"

    def start(self) -> Tensor:
        """The distribution of the first state of the chain that a pass runs over."""
        return self.initial

    def free_parameters(self) -> int:
        """How many numbers describe the model."""
        k = self.states
        return (1 + self.inputs) * k * (k - 1) + (0 if self.stationary else k - 1) + self.emission.free_parameters()

    def filter(self, X: Any, lengths: Any = None, *, u: Any = None, cu_seqlens: Borders = None) -> Filtered:
        """``p(z_t | y_1 .. y_t)`` and ``log p(y_t | y_1 .. y_{t-1})``, in the layout of X.

        Args:
            X: as :meth:`predict_proba`.
            lengths: as there.
            u: as there.
            cu_seqlens: as there.
        """
        where = "HiddenMarkov.filter"
        series = Series.of(where, self, X, lengths, cu_seqlens, u)
        outs = []
        for part in self._some(where, series):
            outs.append(run(where, self, part.x, part.u, self.init_state(len(part.x)), part.keep)[0])
        return Filtered(series.back([out.probs for out in outs]), series.back([out.loglik for out in outs]))

    def log_likelihood(self, X: Any, lengths: Any = None, *, u: Any = None, cu_seqlens: Borders = None) -> Tensor:
        """``log p(y_1 .. y_T)`` of each series ``(B,)``; of one series without axes.

        Args:
            X: as :meth:`predict_proba`.
            lengths: as there.
            u: as there.
            cu_seqlens: as there.
        """
        where = "HiddenMarkov.log_likelihood"
        series = Series.of(where, self, X, lengths, cu_seqlens, u)
        return series.of_series([log_likelihood(where, *self.chain(part), self.form) for part in series.parts])

    def score(self, X: Any, lengths: Any = None, *, u: Any = None, cu_seqlens: Borders = None) -> Tensor:
        """The sum of :meth:`log_likelihood` over the series, without axes."""
        return self.log_likelihood(X, lengths, u=u, cu_seqlens=cu_seqlens).sum()

    @torch.no_grad()
    def predict_proba(self, X: Any, lengths: Any = None, *, u: Any = None, cu_seqlens: Borders = None) -> Tensor:
        """``p(z_t = k | y_1 .. y_T)``, in the layout of X: ``(T, K)``, ``(B, T, K)``; 0 after the end of a row.

        Without gradients; :meth:`smooth` has them.

        Args:
            X: ``(T, M)``, or ``(T,)`` for M = 1: one series, or several end to end with ``lengths``; or ``(B, T, M)``,
                a batch, with ``lengths`` where rows are padded at their ends. A tensor, array or list.
            lengths: of the series end to end, summing to T; or of the rows.
            u: inputs of a model that has them, in the layout of X with U in place of M; or ``(T, U)``, for all rows.
            cu_seqlens: borders of series end to end in ``(1, T, M)``.

        Raises:
            ArgumentError: for shapes and lengths that do not fit, values that no state can emit, or observations of
                probability 0.
        """
        where = "HiddenMarkov.predict_proba"
        series = Series.of(where, self, X, lengths, cu_seqlens, u)
        parts = self._some(where, series)
        return series.back([self.fold(posterior(where, *self.chain(part), self.form)) for part in parts])

    def smooth(self, X: Any, lengths: Any = None, *, u: Any = None) -> Smoothed:
        """The probabilities of states and of pairs of neighbouring states, given everything.

        Args:
            X: one series, or a batch ``(B, T, M)``, as :meth:`predict_proba`.
            lengths: of the rows of a batch.
            u: as there.

        Raises:
            ArgumentError: as :meth:`predict_proba`, and for series end to end.
        """
        where = "HiddenMarkov.smooth"
        series = Series.of(where, self, X, lengths, u=u)
        if series.layout == "line":
            raise ArgumentError(f"{where}: X has series end to end", hint="give them as rows, (B, T, M)")
        probs, pairs = [], []
        for part in self._some(where, series):
            start, A, log_b = self.chain(part)
            both = both_passes(where, start, A, log_b, self.form)
            found = torch.nn.functional.pad(self.fold_pairs(both, A), (0, 0, 0, 0, 0, 1))  # one for each step
            there = None if part.keep is None else torch.nn.functional.pad(part.keep[:, 1:], (0, 1))
            pairs.append(found if there is None else torch.where(there[..., None, None], found, 0))
            probs.append(self.fold(both.probs))
        return Smoothed(series.back(probs), series.back(pairs)[..., :-1, :, :])

    def predict(self, X: Any, lengths: Any = None, *, u: Any = None, cu_seqlens: Borders = None) -> Tensor:
        """The most likely path of states, int64, in the layout of X; -1 after the end of a row."""
        return self.decode(X, lengths, u=u, cu_seqlens=cu_seqlens)[1]

    @torch.no_grad()
    def decode(
        self, X: Any, lengths: Any = None, *, u: Any = None, cu_seqlens: Borders = None
    ) -> tuple[Tensor, Tensor]:
        """The log-probability of the most likely path and the observations, ``(B,)``, and the path, by Viterbi.

        Args and errors are those of :meth:`predict_proba`.
        """
        where, scores, paths = "HiddenMarkov.decode", [], []
        series = Series.of(where, self, X, lengths, cu_seqlens, u)
        for part in self._some(where, series):
            path, score = viterbi(*self.chain(part), part.keep)
            path = self.fold_path(path)
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
        u: Any = None,
        restarts: int = 6,
        max_iterations: int = 1000,
        tolerance: float = 1e-7,
        seed: int = 0,
        from_data: bool = True,
    ) -> Fit:
        """Maximise the likelihood, times the priors, by expectation and maximisation (Baum-Welch), in place.

        Weights of inputs are found by Newton's method. Only their differences matter: those of staying become 0.

        Args:
            X: as :meth:`predict_proba`.
            lengths: as there.
            u: as there.
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
        series = Series.of("HiddenMarkov.fit", self, X, lengths, u=u)
        if restarts < 1 or max_iterations < 0 or not tolerance >= 0:
            raise ArgumentError(
                f"HiddenMarkov.fit: restarts {restarts}, max_iterations {max_iterations}, tolerance {tolerance}, "
                "expected 1, 0 and 0 or more"
            )
        return baum_welch(self, series, restarts if from_data else 0, max_iterations, tolerance, seed)

    @torch.no_grad()
    def sample(
        self, length: int, batch: int = 1, *, u: Any = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw observations and the states behind them; no gradients.

        Args:
            length: T, the number of steps.
            batch: B, the number of independent series.
            u: inputs ``(T, U)`` or ``(B, T, U)``, of a model that has them.
            generator: source of randomness, on the model's device.

        Returns:
            ``y`` ``(B, T, M)`` and ``z`` ``(B, T)``, int64.

        Raises:
            ArgumentError: for a negative length or batch, and inputs that do not fit.
        """
        where = "HiddenMarkov.sample"
        if length < 0 or batch < 0:
            raise ArgumentError(f"{where}: length {length} and batch {batch}, expected 0 or more")
        u = inputs_of(where, self.inputs, self.transition_logits, u, (batch, length))
        check_finite(where, {} if u is None else {"u": u}, "an input cannot be missing")
        states = self.fold_path(draw_path(self.init_state(batch).probs, self.moves(u), length, generator))
        return self.emission.draw(states, generator), states

    def take_chain(self, found: Statistics) -> None:
        """Move the parameters of the chain to where what is expected of it is likeliest; a step of a fit."""
        take_chain(self, found)

    def begin_chain(self, series: Series, weights: Tensor) -> None:
        """Parameters of the chain from a first guess of the states ``(N, K)``."""
        begin_chain(self, series, weights)

    def _some(self, where: str, series: Series) -> tuple[Part, ...]:
        if not series.parts:
            raise ArgumentError(f"{where}: X has no steps")
        return series.parts
