"""Models that say one thing about a whole sequence: a class, or some numbers."""

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Real
from torch import Tensor, nn

from dualform.core.allocation import sized
from dualform.core.calls import explained
from dualform.core.errors import ArgumentError, ConfigError
from dualform.core.packing import Borders, Packing
from dualform.core.recurrence import State
from dualform.core.shapes import check_indices, check_tensors, wide, widest
from dualform.core.tree import state_class
from dualform.models.backbone import ELSEWHERE, Backbone, Steps
from dualform.models.config import ModelConfig
from dualform.models.linear_loss import IGNORED, mean_cross_entropy
from dualform.models.padding import lay_out

POOLINGS = ("mean", "last", "max")


@state_class
class PooledState(NamedTuple):
    """What a pooled model knows of a sequence so far."""

    blocks: State
    pooled: Tensor  # (B, D): the sum in float64, or the last or greatest of the features so far in float32 or wider
    seen: Tensor  # (B,), int64, elements so far


@explained(elsewhere=ELSEWHERE)
class PooledModel(Backbone):
    """``W pool(features) + b``: a sequence of tokens or of features -> one vector ``(B, outputs)``.

    Outputs are those of everything read so far: over a sequence in pieces, the last piece's outputs are those of the
    whole, and ``step`` gives the outputs after one more element, in constant memory. Where a mixer is bidirectional
    there is no state: ``forward`` reads whole sequences and returns ``()`` in its place.

    Args:
        config: the blocks; ``tie_embeddings`` plays no part, and ``vocab_size`` none where features are read.
        outputs: width of the output.
        inputs: width of the features ``(B, T, inputs)``; None reads tokens ``(B, T)``.
        pooling: ``mean``, ``last`` or ``max`` over time.

    Raises:
        ConfigError: for an unknown pooling, listing those that exist, or a size that is out of range.
    """

    least_outputs: ClassVar[int] = 1

    def __init__(self, config: ModelConfig, outputs: int, *, inputs: int | None = None, pooling: str = "mean"):
        if pooling not in POOLINGS:
            raise ConfigError(f"{self._name}: pooling {pooling!r} is unknown", hint=f"one of {', '.join(POOLINGS)}")
        if outputs < self.least_outputs:
            raise ConfigError(f"{self._name}: {outputs} outputs, expected at least {self.least_outputs}")
        super().__init__(config, inputs)
        self.outputs, self.pooling = outputs, pooling
        with sized(self._name):
            self.head = nn.Linear(config.d_model, outputs)

    def init_state(self, batch: int, *, max_len: int = 0) -> PooledState:
        """The state before the first element; ``max_len`` is the capacity of caches that grow with the context.

        Raises:
            ArgumentError: for a bidirectional model, which has none.
        """
        self._check_causal()
        return PooledState(super().init_state(batch, max_len=max_len), *self._nothing(batch))

    def forward(
        self,
        x: Tensor,
        state: PooledState | None = None,
        *,
        cu_seqlens: Borders = None,
        attention_mask: Tensor | None = None,
        intervals: Real[Tensor, "B T"] | None = None,
        rate: float = 1.0,
    ) -> tuple[Float[Tensor, "B outputs"], Any]:
        """One output per sequence, and the state after its last element.

        Args:
            x: tokens ``(B, T)``, int32 or int64, or features ``(B, T, inputs)``.
            state: what came before; None is :meth:`init_state`.
            cu_seqlens: borders of packed sequences; then the batch axis of x is 1, and outputs and state have one row
                per sequence. Of a sequence without elements the pooled features are 0.
            attention_mask: ``(B, T)``, 1 for an element and 0 for padding, left, right or anywhere. Padding changes
                nothing.
            intervals: as in :meth:`features`.
            rate: as in :meth:`features`.

        Raises:
            ArgumentError: names the argument, what came and what was expected.
        """
        given = {"cu_seqlens": cu_seqlens, "attention_mask": attention_mask, "intervals": intervals, "rate": rate}
        y, state, _ = self.forward_and_losses(x, state, **given)
        return y, state

    def forward_and_losses(
        self,
        x: Tensor,
        state: PooledState | None = None,
        *,
        cu_seqlens: Borders = None,
        attention_mask: Tensor | None = None,
        intervals: Real[Tensor, "B T"] | None = None,
        rate: float = 1.0,
    ) -> tuple[Float[Tensor, "B outputs"], Any, list[Tensor]]:
        """What :meth:`forward` returns, and what parts want added to the loss while the model trains.

        Such as what balances the experts of a router; a list of scalars, empty outside of training.
        """
        line = lay_out(self._name, x, state, cu_seqlens, attention_mask, intervals)
        x, packing = line.x, line.packing
        self._check_inputs(x, "B T")
        rows = x.shape[0] if packing is None else packing.rows
        old = self._split(line.state, rows)
        given = {"cu_seqlens": packing, "intervals": line.intervals, "rate": rate}
        h, blocks, losses = self._features(x, old and old.blocks, given, line.counted())
        pooled, seen = old[1:] if old else self._nothing(rows)
        if packing is None:
            lengths, pooled = torch.full_like(seen, h.shape[1]), self._pool(h, pooled)
        else:
            lengths, pooled = packing.cu_seqlens.diff(), self._pool_packed(h[0], packing, pooled)
        seen = seen + lengths
        y = line.rows(self._read(pooled, seen))
        return y, line.rows(PooledState(blocks, pooled, seen)) if self.causal else (), losses

    def step(
        self,
        x: Tensor,
        state: PooledState,
        *,
        interval: Real[Tensor, " B"] | None = None,
        rate: float = 1.0,
    ) -> tuple[Float[Tensor, "B outputs"], PooledState]:
        """The outputs after one more element: tokens ``(B,)`` or features ``(B, inputs)``."""
        return self._step(self._block_steps(rate), x, state, interval=interval)

    def _step(
        self, steps: Steps, x: Tensor, state: PooledState, *, interval: Tensor | None = None
    ) -> tuple[Tensor, PooledState]:
        self._check_inputs(x, "B")
        old = self._split(state, x.shape[0])
        assert old is not None
        h, blocks = self._step_features(steps, x, old.blocks, interval)
        pooled, seen = self._pool(h[:, None], old.pooled), old.seen + 1
        return self._read(pooled, seen), PooledState(blocks, pooled, seen)

    def head_options(self) -> dict[str, Any]:
        """What beside the config it takes to build this model again, as JSON values."""
        return {"kind": self._name, "outputs": self.outputs, "inputs": self.inputs, "pooling": self.pooling}

    def _pool(self, h: Tensor, pooled: Tensor) -> Tensor:
        """``h`` ``(B, T, D)`` and what was pooled before, ``(B, D)``."""
        if h.shape[1] == 0:
            return pooled
        if self.pooling == "mean":
            return pooled + h.sum(1, dtype=pooled.dtype)
        if self.pooling == "last":
            return h[:, -1].to(pooled.dtype, copy=True)
        return torch.maximum(pooled, h.amax(1).to(pooled.dtype))

    def _pool_packed(self, h: Tensor, packing: Packing, pooled: Tensor) -> Tensor:
        """``h`` ``(total, D)``, ``pooled`` ``(n, D)``."""
        if h.shape[0] == 0:
            return pooled
        h = h.to(pooled.dtype)
        if self.pooling == "last":
            borders = packing.cu_seqlens
            some, last = borders.diff() > 0, (borders[1:] - 1).clamp(min=0)
            return torch.where(some[:, None], h[last], pooled)
        ids = packing.sequence_ids(h.shape[0])
        if self.pooling == "mean":
            return pooled.index_add(0, ids, h)
        return pooled.scatter_reduce(0, ids[:, None].expand_as(h), h, "amax")

    def _read(self, pooled: Tensor, seen: Tensor) -> Tensor:
        if self.pooling == "mean":
            pooled = pooled / seen.clamp(min=1)[:, None]
        pooled = torch.where(seen[:, None] > 0, pooled, 0)
        return self.head(pooled.to(self._dtype))

    def _nothing(self, rows: int) -> tuple[Tensor, Tensor]:
        """What is pooled of no elements: a sum in float64, which still moves after 10^9 of them, or a feature."""
        weight, empty = self.norm.weight, -torch.inf if self.pooling == "max" else 0.0
        dtype = torch.promote_types(wide(weight), widest(weight)) if self.pooling == "mean" else wide(weight)
        pooled = torch.full((rows, len(weight)), empty, dtype=dtype, device=weight.device)
        return pooled, torch.zeros(rows, dtype=torch.int64, device=weight.device)

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
        check_tensors(self._name, pooled=(state.pooled, f"R {self.config.d_model}"), seen=(state.seen, "R"))
        return state

    def _check_causal(self) -> None:
        if not self.causal:
            raise ArgumentError(
                f"{self._name}: a bidirectional model has no state and no step: it reads whole sequences",
                hint="call forward on whole sequences, without a state",
            )


@explained(elsewhere=ELSEWHERE)
class SequenceClassifier(PooledModel):
    """A sequence of tokens or of features -> logits of its classes, ``(B, classes)``; see :class:`PooledModel`.

    Args:
        config: the blocks.
        classes: number of classes, at least 2.
        inputs: width of the features ``(B, T, inputs)``; None reads tokens ``(B, T)``.
        pooling: ``mean``, ``last`` or ``max`` over time.

    Raises:
        ConfigError: for an unknown pooling, listing those that exist, or a size that is out of range.

    Example:
        >>> import torch, dualform as df
        >>> config = df.ModelConfig(0, 32, {"S": (df.layers.S4DConfig(bidirectional=True),)}, "SS")
        >>> logits, _ = df.SequenceClassifier(config, 10, inputs=1)(torch.randn(4, 64, 1))
    """

    least_outputs: ClassVar[int] = 2

    def __init__(self, config: ModelConfig, classes: int, *, inputs: int | None = None, pooling: str = "mean"):
        super().__init__(config, classes, inputs=inputs, pooling=pooling)

    def loss(self, x: Tensor, labels: Int[Tensor, " B"], **options: Any) -> Float[Tensor, ""]:
        """Mean cross-entropy in nats of ``labels`` ``(B,)``, 0 to classes - 1.

        Args:
            x: what :meth:`forward` takes.
            labels: int32 or int64; -100 does not count. The loss is 0 where none counts.
            options: the keywords of :meth:`forward`.

        Raises:
            ArgumentError: names the argument, what came and what was expected.
        """
        logits, _, losses = self.forward_and_losses(x, **options)
        check_tensors(self._name, logits=(logits, "B classes"), labels=(labels, "B"))
        check_indices(self._name, "labels", labels, self.outputs, IGNORED, "classes are numbered from 0")
        return sum(losses, mean_cross_entropy(logits, labels.long()))


@explained(elsewhere=ELSEWHERE)
class SequenceRegressor(PooledModel):
    """A sequence of tokens or of features -> some numbers, ``(B, targets)``; see :class:`PooledModel`.

    Args:
        config: the blocks.
        targets: how many numbers.
        inputs: width of the features ``(B, T, inputs)``; None reads tokens ``(B, T)``.
        pooling: ``mean``, ``last`` or ``max`` over time.

    Raises:
        ConfigError: for an unknown pooling, listing those that exist, or a size that is out of range.
    """

    def __init__(self, config: ModelConfig, targets: int, *, inputs: int | None = None, pooling: str = "mean"):
        super().__init__(config, targets, inputs=inputs, pooling=pooling)

    def loss(self, x: Tensor, targets: Float[Tensor, "B outputs"], **options: Any) -> Float[Tensor, ""]:
        """Mean squared error against ``targets`` ``(B, targets)``.

        Args:
            x: what :meth:`forward` takes.
            targets: floating, one row per output.
            options: the keywords of :meth:`forward`.

        Raises:
            ArgumentError: names the argument, what came and what was expected.
        """
        y, _, losses = self.forward_and_losses(x, **options)
        check_tensors(self._name, outputs=(y, "B outputs"), targets=(targets, "B outputs"))
        return sum(losses, F.mse_loss(y.to(wide(y)), targets.to(wide(y))))
