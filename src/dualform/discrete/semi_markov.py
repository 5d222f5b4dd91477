"""Hidden semi-Markov models: states with durations of any distribution."""

from typing import Any

import torch
from torch import Tensor, nn

from dualform.core.calls import explained
from dualform.core.errors import ArgumentError
from dualform.core.shapes import check_tensors
from dualform.discrete.durations import Durations
from dualform.discrete.emission import Emission, check_distribution, given, widened
from dualform.discrete.fit import Statistics, likeliest
from dualform.discrete.model import HiddenMarkov
from dualform.discrete.passes import safe_log
from dualform.discrete.series import Series
from dualform.discrete.smoothing import Both


@explained
class HiddenSemiMarkov(HiddenMarkov):
    """A hidden Markov model whose states last as long as :class:`~dualform.discrete.durations.Durations` say.

        z changes to j after state i with probability transition_ij, never to itself,
        and then stays for d steps with probability p(d | z = j), d from 1 to D

    It is a chain over pairs of a state and the number of steps that remain in it: another one with the probability of
    its transition and duration where one step remains, else the same state with one step less. So everything that a
    :class:`~dualform.discrete.model.HiddenMarkov` does, this one does, and results are those of the K states; what a
    filter keeps has one probability for each of the K D pairs. The first state begins with the first observation, and
    the last one may go on after the end.

    The most likely path is that of the most likely states *and* durations, that of the last state included. A step of
    the compiled loop takes ``O(K^2 D)`` operations.

    Args:
        emission: what a state emits.
        durations: how long states last, such as :class:`~dualform.discrete.durations.NegativeBinomialDurations`.
        initial: distribution of the first state ``(K,)``; None is uniform.
        transition: ``(K, K)`` with zeros on the diagonal; None is uniform beside these.
        parallel: see :class:`~dualform.discrete.model.HiddenMarkov`.
        scaled: see there.

    Raises:
        ArgumentError: for shapes that do not fit, a single state, or rows that are no distribution.

    References:
        Yu (2010), "Hidden semi-Markov models"; Guedon (2003), "Estimating hidden semi-Markov chains from discrete
        sequences"; Langrock and Zucchini (2011), "Hidden Markov models with arbitrary state dwell-time distributions",
        for the larger chain.

    Example:
        >>> from dualform.discrete import HiddenSemiMarkov, PoissonDurations, PoissonEmission
        >>> model = HiddenSemiMarkov(PoissonEmission.of([2.0, 20.0]), PoissonDurations.of([2.0, 2.0], longest=9))
        >>> model.predict([1, 3, 2, 20, 18, 22, 2, 2, 1])
        tensor([0, 0, 0, 1, 1, 1, 0, 0, 0])
    """

    def __init__(
        self,
        emission: Emission,
        durations: Durations,
        *,
        initial: Any = None,
        transition: Any = None,
        parallel: bool | None = None,
        scaled: bool | None = None,
    ):
        super().__init__(emission, initial=initial, parallel=parallel, scaled=scaled)
        if not isinstance(durations, Durations):
            hint = "such as dualform.discrete.PoissonDurations(states=3, longest=20)"
            raise ArgumentError(f"HiddenSemiMarkov: durations is {type(durations).__name__}", hint=hint)
        k, like = emission.states, self.transition_logits
        if k < 2 or durations.states != k:
            raise ArgumentError(
                f"HiddenSemiMarkov: {k} states and durations of {durations.states}, expected as many, 2 or more"
            )
        self.durations = durations
        others = 1 - torch.eye(k, dtype=like.dtype)
        moves = others / (k - 1) if transition is None else given("HiddenSemiMarkov", t=transition)["t"]
        check_tensors("HiddenSemiMarkov", transition=(moves, f"{k} {k}"))
        check_distribution("HiddenSemiMarkov", "transition", moves)
        if bool(moves.diagonal().any()):
            hint = "how long a state lasts, durations say"
            raise ArgumentError("HiddenSemiMarkov: transition leads from a state to itself", hint=hint)
        self.transition_logits = nn.Parameter(safe_log(moves).to(like))

    @property
    def transition(self) -> Tensor:
        """``(K, K)``; row i is the distribution of the state that follows state i; 0 for itself."""
        itself = torch.eye(self.states, dtype=torch.bool, device=self.transition_logits.device)
        return widened(self.transition_logits).masked_fill(itself, -torch.inf).softmax(-1)

    def moves(self, u: Tensor | None) -> Tensor:
        """The transition of the chain of pairs ``(K D, K D)``; number k D + r has r steps to come after this one."""
        k, longest = self.states, self.durations.longest
        begun = torch.einsum("ij,jd->ijd", self.transition, self.durations.probs).flatten(1)  # (K, K D)
        going_on = torch.eye(longest, dtype=begun.dtype, device=begun.device)[:-1]  # from r + 1 to r
        going_on = torch.block_diag(*[torch.nn.functional.pad(going_on, (0, 0, 1, 0))] * k)
        last = torch.zeros_like(going_on[:, :k])
        last[torch.arange(k) * longest, torch.arange(k)] = 1
        return going_on + last @ begun

    def start(self) -> Tensor:
        """The distribution of the first pair ``(K D,)``."""
        return (self.initial[:, None] * self.durations.probs).flatten()

    def spread(self, values: Tensor) -> Tensor:
        return values.repeat_interleave(self.durations.longest, -1)

    def fold(self, probs: Tensor) -> Tensor:
        return probs.unflatten(-1, (self.states, self.durations.longest)).sum(-1)

    def fold_pairs(self, both: Both, A: Tensor) -> Tensor:
        """Of pairs of states that follow each other, the same one included, without those of the larger chain."""
        if both.log:
            return self._fold_pairs((both.alpha[:, :-1] - both.weight[:, :-1, None]).exp(), both.after[:, 1:].exp(), A)
        return self._fold_pairs(both.alpha[:, :-1] / both.weight[:, :-1, None], both.after[:, 1:], A)

    def _fold_pairs(self, before: Tensor, after: Tensor, A: Tensor) -> Tensor:
        sizes = (self.states, self.durations.longest)
        moves = A.unflatten(0, sizes).unflatten(-1, sizes)
        return torch.stack(
            [
                (before.unflatten(-1, sizes)[..., k, :] @ moves[k].flatten(1) * after).unflatten(-1, sizes).sum(-1)
                for k in range(sizes[0])
            ],
            -2,
        )

    def fold_path(self, path: Tensor) -> Tensor:
        return path.div(self.durations.longest, rounding_mode="floor")  # -1 stays -1

    def free_parameters(self) -> int:
        k = self.states
        return k * (k - 2) + k - 1 + self.emission.free_parameters() + self.durations.free_parameters()

    def take_chain(self, found: Statistics) -> None:
        sizes = (self.states, self.durations.longest)
        begun = found.counts[:: self.durations.longest].unflatten(-1, sizes)  # (K, K, D)
        first = found.first.unflatten(-1, sizes)
        self.durations.maximise(begun.sum(0) + first)
        assert self.initial_logits is not None
        self.transition_logits.copy_(likeliest(begun.sum(-1), self.transition_logits))
        self.initial_logits.copy_(likeliest(first.sum(-1), self.initial_logits))

    def begin_chain(self, series: Series, weights: Tensor) -> None:
        """From runs of the state that is likeliest at each step."""
        state, k, longest = weights.argmax(-1), self.states, self.durations.longest
        ends = torch.ones_like(state, dtype=torch.bool)
        ends[:-1] = (state[1:] != state[:-1]) | (series.place[1:] == 0)
        last = ends.nonzero()[:, 0]
        runs, which = torch.diff(last, prepend=last.new_tensor([-1])).clamp(max=longest), state[last]
        counts = weights.new_full((k, longest), 1 / longest)
        self.durations.maximise(counts.index_put_((which, runs - 1), weights.new_ones(()), accumulate=True))
        moved = 1 - torch.eye(k, dtype=weights.dtype, device=weights.device)
        follows = series.place[(last[:-1] + 1)] > 0
        moved.index_put_((which[:-1][follows], which[1:][follows]), weights.new_ones(()), accumulate=True)
        self.transition_logits.copy_(likeliest(moved, self.transition_logits))
        assert self.initial_logits is not None
        self.initial_logits.copy_(likeliest(weights[series.place == 0].sum(0) + 1, self.initial_logits))
