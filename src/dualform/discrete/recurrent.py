"""What a hidden Markov model is as a recurrence: its filter, whole, in pieces and step by step."""

from typing import Any

import torch
from torch import Tensor, nn

from dualform.core.calls import explained
from dualform.core.errors import ArgumentError
from dualform.core.linalg import check_finite
from dualform.core.packing import Borders, Packing
from dualform.core.shapes import check_tensors, wide
from dualform.core.tree import take, tree_map
from dualform.discrete.emission import Emission
from dualform.discrete.filtering import Filtered, HiddenState, between, log_prob, run
from dualform.discrete.series import Part, inputs_of
from dualform.discrete.smoothing import Both, Form, pair_probs


@explained
class ChainFilter(nn.Module):
    """A chain behind emissions, as a :class:`~dualform.core.recurrence.Recurrence`.

    A pass runs over a chain that may have more states than the K of the emission: :meth:`spread` and the ``fold``
    methods lead there and back.
    """

    emission: Emission
    form: Form
    inputs: int
    transition_logits: nn.Parameter

    @property
    def states(self) -> int:
        """K."""
        return self.emission.states

    def moves(self, u: Tensor | None) -> Tensor:
        """The transition of the chain ``(K, K)``, or those after each step ``(B, T, K, K)``."""
        raise NotImplementedError

    def spread(self, values: Tensor) -> Tensor:
        """What each of the K states has, as what each state of the chain has."""
        return values

    def fold(self, probs: Tensor) -> Tensor:
        """Probabilities of the states of the chain, as those of the K states."""
        return probs

    def fold_pairs(self, both: Both, A: Tensor) -> Tensor:
        """The probabilities of pairs of neighbouring states."""
        return pair_probs(both, A)

    def fold_path(self, path: Tensor) -> Tensor:
        """A path of the chain, as one of the K states; -1 stays."""
        return path

    def start(self) -> Tensor:
        """The distribution of the first state of the chain ``(K,)``."""
        raise NotImplementedError

    def init_state(self, batch: int, *, max_len: int = 0) -> HiddenState:
        """The same start for each row; ``max_len`` is ignored, the state has a constant size."""
        initial, e = self.start(), self.emission
        lags, seen = initial.new_zeros(batch, e.lags, e.width), initial.new_zeros(batch, dtype=torch.int64)
        return HiddenState(initial.repeat(batch, 1), lags, seen)

    def forward(
        self, x: Tensor, state: HiddenState | None = None, *, u: Tensor | None = None, cu_seqlens: Borders = None
    ) -> tuple[Filtered, HiddenState]:
        """Filter observations ``x`` ``(B, T, M)``.

        Args:
            x: observations; NaN is missing.
            state: the distribution of the next hidden state, B rows, or n with ``cu_seqlens``; None means ``initial``.
            u: ``(B, T, U)``, of a model with inputs.
            cu_seqlens: borders ``(n + 1,)`` of series laid end to end on the time axis, with B = 1.

        Returns:
            The probabilities of every step, and the state after the last, one row per series.

        Raises:
            ArgumentError: for shapes, dtypes or devices that do not fit, values that no state can emit, or
                observations of probability 0.
        """
        where = "HiddenMarkov.forward"
        x, packing = self._check(where, x, "B T"), Packing.of(where, cu_seqlens, x)
        u = self._check_inputs(where, u, x)
        last = self._check_state(where, len(x) if packing is None else packing.rows, state)
        if packing is None:
            return run(where, self, x, u, last)
        (groups, order), outs = packing.groups(), []
        for rows, steps, keep in groups:
            laid = torch.where(keep[..., None], x[0][steps], 0)
            of_u = None if u is None else torch.where(keep[..., None], u[0][steps], 0)
            out, new = run(where, self, laid, of_u, take(last, rows), keep)
            last = tree_map(lambda old, new, rows=rows: old.index_put((rows,), new), last, new)
            outs.append(out)
        if not outs:
            return run(where, self, x, u, self.init_state(1))[0], last
        each = [torch.cat([m.flatten(0, 1) for m in of_all])[order][None] for of_all in zip(*outs, strict=True)]
        return Filtered(*each), last

    def step(self, x: Tensor, state: HiddenState, *, u: Tensor | None = None) -> tuple[Filtered, HiddenState]:
        """One observation ``x`` ``(B, M)``, and its inputs ``(B, U)``; outputs have no time axis.

        Raises:
            ArgumentError: as :meth:`forward`.
        """
        where = "HiddenMarkov.step"
        x = self._check(where, x, "B")
        state, u = self._check_state(where, len(x), state), self._check_inputs(where, u, x)
        out, state = run(where, self, x[:, None], None if u is None else u[:, None], state)
        return Filtered(out.probs[:, 0], out.loglik[:, 0]), state

    def chain(self, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        """The distribution of the first state ``(B, K)``, the transition, and ``log p(y_t | z_t)`` ``(B, T, K)``."""
        state = self.init_state(len(part.x))
        log_b = part.masked(log_prob(self.emission, part.x, state.lags, state.seen))
        return state.probs, between(self.moves(part.u)), self.spread(log_b)

    def _check(self, where: str, x: Tensor, axes: str) -> Tensor:
        """Observations in the dtype of the parameters; integers stay."""
        like = self.transition_logits
        check_tensors(where, x=(x, f"{axes} {self.emission.width}"), model=(like, "* *"))
        if x.is_complex():
            raise ArgumentError(f"{where}: complex values in x, expected real ones")
        self.emission.check(where, "x", x)
        return x.to(wide(like)) if x.is_floating_point() else x

    def _check_inputs(self, where: str, u: Any, x: Tensor) -> Tensor | None:
        u = inputs_of(where, self.inputs, self.transition_logits, u, tuple(x.shape[:-1]))
        check_finite(where, {} if u is None else {"u": u}, "an input cannot be missing")
        return u

    def _check_state(self, where: str, rows: int, state: HiddenState | None) -> HiddenState:
        if state is None:
            return self.init_state(rows)
        e, like = self.emission, self.transition_logits
        sizes = {
            "probs": (state.probs, f"{rows} {self.start().shape[-1]}"),
            "lags": (state.lags, f"{rows} {e.lags} {e.width}"),
        }
        check_tensors(f"{where}: state", model=(like, "* *"), seen=(state.seen, f"{rows}"), **sizes)
        check_finite(where, {"state.probs": state.probs, "state.lags": state.lags})
        return HiddenState(state.probs.to(wide(like)), state.lags.to(wide(like)), state.seen)
