"""Models that say one thing about a whole sequence, or about what a stream has shown so far."""

from typing import Any, NamedTuple

from jaxtyping import Float, Real
from torch import Tensor, full_like, int64, where, zeros
from torch import bool as boolean

from dualform.core.allocation import sized
from dualform.core.calls import explained
from dualform.core.errors import ArgumentError
from dualform.core.packing import Borders
from dualform.core.recurrence import State
from dualform.core.shapes import check_tensors
from dualform.core.tree import Tree, state_class, tree_map
from dualform.models.backbone import ELSEWHERE, Steps
from dualform.models.config import ModelConfig
from dualform.models.padding import lay_out
from dualform.models.pooling import check_pooled, make_pooling
from dualform.models.readout import Readout


@state_class
class PooledState(NamedTuple):
    """What a pooled model knows of a sequence so far."""

    blocks: State
    pooled: Tree  # of the features so far, see dualform.models.pooling; for mean, last and max one tensor (B, D)
    seen: Tensor  # (B,), int64, elements so far


@explained(elsewhere=ELSEWHERE)
class PooledModel(Readout):
    """``W pool(features) + b``: a sequence of tokens or of features -> one vector ``(B, outputs)``.

    Outputs are those of everything read so far: over a sequence in pieces, the last piece's outputs are those of the
    whole, and ``step`` gives the outputs after one more element, in constant memory. Where a mixer is bidirectional
    there is no state: ``forward`` reads whole sequences and returns ``()`` in its place.

    Args:
        config: the blocks; ``tie_embeddings`` plays no part, and ``vocab_size`` none where features are read.
        outputs: width of the output.
        inputs: width of the features ``(B, T, inputs)``; None reads tokens ``(B, T)``.
        pooling: ``mean``, ``last``, ``max`` or ``attention`` over time; for streams also ``window``, the mean of the
            last elements, or ``forgetting``, the mean with weights that fall exponentially. :meth:`reset` starts anew.
        window: of these two, in elements; the weight of an element falls by ``1 / window`` with each later one.
        standardise: whether features are scaled inside the model, see :meth:`fit_inputs`; with ``"differences"`` it
            reads those in time beside them, scaled, too.
        missing: what NaN means in features; see :class:`~dualform.models.entrance.Entrance`.

    Raises:
        ConfigError: for an unknown pooling, listing those that exist, or a size that is out of range.
    """

    def __init__(
        self,
        config: ModelConfig,
        outputs: int,
        *,
        inputs: int | None = None,
        pooling: str = "mean",
        window: int | None = None,
        standardise: bool | str = False,
        missing: str = "refused",
    ):
        width = config.d_model if isinstance(config, ModelConfig) else 1  # which is refused behind this
        with sized(self._name):
            pool = make_pooling(self._name, pooling, width, window)
        super().__init__(config, outputs, inputs=inputs, standardise=standardise, missing=missing)
        self.pooling, self.window, self.pool = pooling, window, pool

    def init_state(self, batch: int, *, max_len: int = 0) -> PooledState:
        """The state before the first element; ``max_len`` is the capacity of caches that grow with the context.

        Raises:
            ArgumentError: for a bidirectional model, which has none.
        """
        self._check_causal()
        return PooledState(super().init_state(batch, max_len=max_len), *self._nothing(batch))

    def reset(self, state: PooledState, rows: Tensor | None = None) -> PooledState:
        """The state of a stream whose pooling starts anew, while the blocks remember.

        Args:
            state: of this model.
            rows: ``(B,)``, bool, those that start anew; None for all.

        Raises:
            ArgumentError: for rows of another shape or dtype, or what is no state of this model.
        """
        old = self._split(state, state.seen.shape[0] if isinstance(state, PooledState) else 0)
        assert old is not None
        count = old.seen.shape[0]
        if rows is None:
            return PooledState(old.blocks, *self._nothing(count))
        check_tensors(self._name, seen=(old.seen, "R"), rows=(rows, "R"))
        if rows.dtype != boolean:
            raise ArgumentError(f"{self._name}: rows is {rows.dtype}, expected bool, one for each row")

        def chosen(new: Tensor, old: Tensor) -> Tensor:
            return where(rows.view(-1, *[1] * (old.dim() - 1)), new, old)

        new = self._nothing(count)
        return PooledState(old.blocks, tree_map(chosen, new[0], old.pooled), chosen(new[1], old.seen))

    def forward(
        self,
        x: Tensor,
        state: PooledState | None = None,
        *,
        cu_seqlens: Borders = None,
        attention_mask: Tensor | None = None,
        lengths: Tensor | None = None,
        intervals: Real[Tensor, "B T"] | None = None,
        rate: float = 1.0,
    ) -> tuple[Float[Tensor, "B outputs ..."], Any]:
        """One output per sequence, and the state after its last element.

        Args:
            x: tokens ``(B, T)``, int32 or int64, or features ``(B, T, inputs)``.
            state: what came before; None is :meth:`init_state`.
            cu_seqlens: borders of packed sequences; then the batch axis of x is 1, and outputs and state have one row
                per sequence. Of a sequence without elements the pooled features are 0.
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
        state: PooledState | None = None,
        *,
        cu_seqlens: Borders = None,
        attention_mask: Tensor | None = None,
        lengths: Tensor | None = None,
        intervals: Real[Tensor, "B T"] | None = None,
        rate: float = 1.0,
    ) -> tuple[Float[Tensor, "B outputs ..."], Any, list[Tensor]]:
        """What :meth:`forward` returns, and what parts want added to the loss while the model trains.

        Such as what balances the experts of a router; a list of scalars, empty outside of training.
        """
        line = lay_out(self._name, x, state, cu_seqlens, attention_mask, intervals, lengths)
        x, packing = line.x, line.packing
        self._check_inputs(x, "B T")
        rows = x.shape[0] if packing is None else packing.rows
        old = self._split(line.state, rows)
        given = {"cu_seqlens": packing, "intervals": line.intervals, "rate": rate}
        h, blocks, losses = self._features(x, old and old.blocks, given, line.counted())
        pooled, seen = old[1:] if old else self._nothing(rows)
        if h.shape[1]:
            pooled = self.pool(h, pooled, packing)
        seen = seen + (full_like(seen, h.shape[1]) if packing is None else packing.cu_seqlens.diff())
        y = line.rows(self._read(pooled, seen))
        return y, line.rows(PooledState(blocks, pooled, seen)) if self.causal else (), losses

    def step(
        self,
        x: Tensor,
        state: PooledState,
        *,
        interval: Real[Tensor, " B"] | None = None,
        rate: float = 1.0,
    ) -> tuple[Float[Tensor, "B outputs ..."], PooledState]:
        """The outputs after one more element: tokens ``(B,)`` or features ``(B, inputs)``."""
        return self._step(self._block_steps(rate), x, state, interval=interval)

    def _step(
        self, steps: Steps, x: Tensor, state: PooledState, *, interval: Tensor | None = None
    ) -> tuple[Tensor, PooledState]:
        self._check_inputs(x, "B")
        known = state is steps.made and state.seen.shape[0] == x.shape[0]
        old = state if known else self._split(state, x.shape[0])
        assert old is not None
        h, blocks = self._step_features(steps, x, old.blocks, interval)
        pooled, seen = self.pool(h[:, None], old.pooled, None), old.seen + 1
        steps.made = made = PooledState(blocks, pooled, seen)
        return self._shaped(self.head(self.pool.read(pooled, seen).to(self.norm.weight.dtype))), made

    def head_options(self) -> dict[str, Any]:
        """What beside the config it takes to build this model again, as JSON values."""
        options = {**super().head_options(), "pooling": self.pooling}
        return options if self.window is None else {**options, "window": self.window}

    def _learned(
        self, x: Tensor, targets: Tensor, axes: str, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:
        y, _, losses = self.forward_and_losses(x, **options)
        check_tensors(self._name, **{"outputs": (y, "B ..."), self.learned: (targets, f"B {axes}")})
        return y, targets, None, losses

    def _read(self, pooled: Tree, seen: Tensor) -> Tensor:
        h = where(seen[:, None] > 0, self.pool.read(pooled, seen), 0)
        return self._shaped(self.head(h.to(self.norm.weight.dtype)))

    def _nothing(self, rows: int) -> tuple[Tree, Tensor]:
        """What is pooled of no elements, and their number."""
        weight = self.norm.weight
        return self.pool.nothing(rows, weight.detach()), zeros(rows, dtype=int64, device=weight.device)

    def _split(self, state: PooledState | None, rows: int) -> PooledState | None:
        if state is None:
            return None
        self._check_causal()
        if not isinstance(state, PooledState):
            raise ArgumentError(
                f"{self._name}: state is {type(state).__name__}, expected a PooledState",
                hint="a state comes from init_state, forward or step of the same model",
            )
        self._check_rows(state, rows)
        check_pooled(self._name, self.pool, state.pooled, state.seen, self.config.d_model)
        return state
