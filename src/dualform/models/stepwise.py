"""Models that say something about every element of a sequence, and of a stream as it comes."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float, Real
from torch import Tensor

from dualform.core.calls import explained
from dualform.core.packing import Borders
from dualform.core.recurrence import State
from dualform.core.shapes import check_tensors
from dualform.models.backbone import ELSEWHERE, Steps
from dualform.models.block_steps import head_behind
from dualform.models.padding import Line, lay_out
from dualform.models.readout import Readout
from dualform.ops.head_step import HeadStep


@explained(elsewhere=ELSEWHERE)
class StepwiseModel(Readout):
    """``W features + b``: a sequence of tokens or of features -> one vector for each element, ``(B, T, outputs)``.

    It is a recurrence, with the state of its blocks: whole, in pieces, packed, padded and by ``step`` the outputs are
    the same. Where a mixer is bidirectional there is no state: ``forward`` reads whole sequences and returns ``()`` in
    its place.

    Args:
        config: the blocks; ``tie_embeddings`` plays no part, and ``vocab_size`` none where features are read.
        outputs: width of the output.
        inputs: width of the features ``(B, T, inputs)``; None reads tokens ``(B, T)``.
        standardise: whether features are scaled inside the model, see :meth:`fit_inputs`; with ``"differences"`` it
            reads those in time beside them, scaled, too.
        missing: what NaN means in features; see :class:`~dualform.models.entrance.Entrance`.

    Raises:
        ConfigError: for a size that is out of range.
    """

    def init_state(self, batch: int, *, max_len: int = 0) -> State:
        """The state before the first element; ``max_len`` is the capacity of caches that grow with the context.

        Raises:
            ArgumentError: for a bidirectional model, which has none.
        """
        self._check_causal()
        return super().init_state(batch, max_len=max_len)

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        cu_seqlens: Borders = None,
        attention_mask: Tensor | None = None,
        lengths: Tensor | None = None,
        intervals: Real[Tensor, "B T"] | None = None,
        rate: float = 1.0,
    ) -> tuple[Float[Tensor, "B T outputs ..."], Any]:
        """One output per element, 0 at padding, and the state after the last.

        Args:
            x: tokens ``(B, T)``, int32 or int64, or features ``(B, T, inputs)``.
            state: what came before; None is :meth:`init_state`.
            cu_seqlens: borders of packed sequences; then the batch axis of x is 1, and the state has one row per
                sequence.
            attention_mask: ``(B, T)``, 1 for an element and 0 for padding, left, right or anywhere. Padding changes
                nothing.
            lengths: as in :meth:`features`.
            intervals: as in :meth:`features`.
            rate: as in :meth:`features`.

        Raises:
            ArgumentError: names the argument, what came and what was expected.
        """
        given = {"cu_seqlens": cu_seqlens, "attention_mask": attention_mask, "lengths": lengths}
        y, state, _ = self.forward_and_losses(x, state, **given, intervals=intervals, rate=rate)
        return y, state

    def forward_and_losses(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        cu_seqlens: Borders = None,
        attention_mask: Tensor | None = None,
        lengths: Tensor | None = None,
        intervals: Real[Tensor, "B T"] | None = None,
        rate: float = 1.0,
    ) -> tuple[Float[Tensor, "B T outputs ..."], Any, list[Tensor]]:
        """What :meth:`forward` returns, and what parts want added to the loss while the model trains.

        Such as what balances the experts of a router; a list of scalars, empty outside of training.
        """
        line = lay_out(self._name, x, state, cu_seqlens, attention_mask, intervals, lengths)
        y, state, losses = self._on_line(line, rate)
        return line.unpack(y), state, losses

    def step(
        self, x: Tensor, state: State, *, interval: Real[Tensor, " B"] | None = None, rate: float = 1.0
    ) -> tuple[Float[Tensor, "B outputs ..."], State]:
        """The output of one more element: tokens ``(B,)`` or features ``(B, inputs)``."""
        return self._step(self._block_steps(rate), x, state, interval=interval)

    def _step(self, steps: Steps, x: Tensor, state: State, *, interval: Tensor | None = None) -> tuple[Tensor, State]:
        if state is not steps.made:
            self._check_causal()
        y, steps.made = self._step_features(steps, x, state, interval, self.head)
        return self._shaped(y), steps.made

    def _head_step(self) -> Callable[[Tensor], HeadStep] | None:
        return head_behind(self.norm, self.head)

    def _on_line(self, line: Line, rate: float) -> tuple[Tensor, Any, list[Tensor]]:
        """Outputs laid out like the line, the state of its rows, and the losses of parts."""
        if line.state is not None:
            self._check_causal()
        given = {"cu_seqlens": line.packing, "intervals": line.intervals, "rate": rate}
        h, state, losses = self._features(line.x, line.state, given, line.counted())
        return self._shaped(self.head(h)), line.rows(state) if self.causal else (), losses

    def _learned(
        self, x: Tensor, targets: Tensor, axes: str, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:
        given = dict(options)
        rate, state = given.pop("rate", 1.0), given.pop("state", None)
        check_tensors(self._name, **{"x": (x, "B T ..."), self.learned: (targets, f"B T {axes}")})
        names = ("cu_seqlens", "attention_mask", "intervals", "lengths")
        line = lay_out(self._name, x, state, *(given.pop(name, None) for name in names))
        if given:  # which forward explains
            self.forward(x, **given)
        y, _, losses = self._on_line(line, rate)
        keep = line.counted()
        return y.flatten(0, 1), line.pack(targets).flatten(0, 1), None if keep is None else keep.flatten(), losses
