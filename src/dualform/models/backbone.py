"""What every model shares: an entrance for tokens or features, blocks from a pattern, a final norm."""

import os
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dualform.core.allocation import sized
from dualform.core.calls import explained
from dualform.core.door import check_line, other_rows
from dualform.core.errors import ArgumentError, ConfigError
from dualform.core.options import brief
from dualform.core.packing import Borders, Packing
from dualform.core.recurrence import State
from dualform.core.shapes import check_indices, check_tensors, wide
from dualform.layers.block import Block
from dualform.layers.context import EMBEDDING, Context, Told
from dualform.layers.drop import Drop, depth_rates, dropout
from dualform.layers.low_rank import another_use
from dualform.layers.mixer import Prepared
from dualform.layers.norms import counting, make_norm
from dualform.layers.part import Part
from dualform.layers.quantized import TRAINS, quantized_within
from dualform.models.adapters import Adaptation
from dualform.models.block_steps import Steps, stream_runs
from dualform.models.config import ModelConfig
from dualform.models.entrance import Entrance, check_features
from dualform.models.padding import lay_out
from dualform.ops.head_step import HeadStep
from dualform.ops.op import backend, forced

EMBEDDING_STD = 0.02  # of the embedding of a new model
_STATE = "a state is given and returned: y, state = model(x, state)"
ELSEWHERE = {
    "input_ids": "tokens come first: model(tokens)",
    "inference_params": _STATE,
    "labels": "model.loss(x, targets) is the loss",
    "mask": "attention_mask is 1 for an element and 0 for padding",
    "past_key_values": _STATE,
    "targets": "model.loss(x, targets) is the loss",
}
"""Hints for keywords that models do not have, or not everywhere."""


class Quantization(NamedTuple):
    """How the matrices of a model are quantised: to 8 bits, with a scale for ``group`` neighbours in a row.

    Attributes:
        group: neighbours.
        kept: names of the linear maps and embeddings that are not.
    """

    group: int
    kept: tuple[str, ...] = ()


@explained(elsewhere=ELSEWHERE)
class Backbone(nn.Module):
    """Tokens ``(B, T)`` or features ``(B, T, inputs)`` -> ``(B, T, D)``: entrance, blocks, norm.

    The state is a tuple with the state of each block. The blocks of a shared letter are one module, with a state per
    use; only low-rank matrices, where its config has them, are each use's own. The residual stream is float32 or wider
    whatever the dtype of the weights, as Mamba's ``residual_in_fp32``.

    Initialised as Mamba: the embedding normal with deviation 0.02, biases of linear maps zero, what each sub-layer
    adds to the stream divided by the root of their number; everything else is the layers' own. The map of features
    keeps PyTorch's initialisation with its bias: without one the first norm would leave of a single input its sign.

    While the model trains (``model.train()``, gradients recorded), its config's ``dropout``, ``drop_path`` and
    ``embed_dropout`` leave out random parts; ``step`` never does.

    With ``model.recompute = True`` training keeps only what enters each block, and the backward runs a block once more
    before it differentiates it: the same gradients for a third more work, in the memory of one block instead of all.

    Args:
        config: the blocks, and the vocabulary if tokens are read.
        inputs: width of the features; None reads tokens.
        entrance: options of their :class:`~dualform.models.entrance.Entrance`, which scales them, and knows what is
            missing.

    Raises:
        ConfigError: for what is no ModelConfig, a config without a vocabulary where tokens are read, a width below 1,
            or sizes that memory cannot hold.
    """

    recompute: bool = False
    adaptation: Adaptation | None = None  # where it has adapters: what they lie on
    quantization: Quantization | None = None  # where its matrices have 8 bits

    def __init__(self, config: ModelConfig, inputs: int | None = None, entrance: dict[str, Any] | None = None):
        super().__init__()
        if not isinstance(config, ModelConfig):
            hint = "dualform.preset gives one by its name, ModelConfig.from_dict one from a table"
            raise ConfigError(f"{self._name}: config is {brief(config)}, expected a ModelConfig", hint=hint)
        self.config, self.inputs = config, inputs
        if inputs is None and config.vocab_size < 1:
            raise ConfigError(f"{self._name}: vocab_size is 0, expected at least 1 for a model that reads tokens")
        if inputs is not None and inputs < 1:
            raise ConfigError(f"{self._name}: inputs is {inputs}, expected at least 1")
        self.entrance: Entrance | None = None
        with sized(self._name):
            if inputs is not None:
                self.entrance = self._entrance(inputs, entrance or {})
            self._build(config, inputs)

    def _build(self, config: ModelConfig, inputs: int | None) -> None:
        """Make and initialise every module."""
        shared = {letter: self._block(letter) for letter in config.shared}
        first = list(shared.values())
        if inputs is None:
            self.embed = nn.Embedding(config.vocab_size, config.d_model)
        else:
            self.embed = nn.Linear(inputs if self.entrance is None else self.entrance.width, config.d_model)
        if config.embed_norm is not None:
            self.embed_norm = make_norm(config.embed_norm, config.d_model, config.norm_eps)
        used: set[str] = set()
        blocks: list[nn.Module] = []
        for letter in config.pattern:
            if letter not in shared:
                first.append(self._block(letter))
                blocks.append(first[-1])
            else:
                blocks.append(another_use(shared[letter]) if letter in used else shared[letter])
                used.add(letter)
        self.blocks = nn.ModuleList(blocks)
        self.norm: Any = make_norm(config.norm, config.d_model, config.norm_eps)
        if inputs is None:
            nn.init.normal_(self.embed.weight, std=EMBEDDING_STD)
        residual_parts = sum(len(config.parts[letter]) for letter in config.pattern)
        for block in first:
            block.initialise(residual_parts)

    def _entrance(self, inputs: int, given: dict[str, Any]) -> "Entrance":
        try:
            return Entrance(inputs, **given)
        except ConfigError as error:
            raise ConfigError(f"{self._name}: {error}") from error

    def _block(self, letter: str) -> Block:
        return Block(self.config.parts[letter], self.config.d_model, self.config.norm_eps)

    def init_state(self, batch: int, *, max_len: int = 0) -> State:
        """The state before the first element; ``max_len`` is the capacity of caches that grow with the context."""
        blocks = tuple(block.init_state(batch, max_len=max_len) for block in self._stack())
        if self.entrance is None or not self.entrance.carries:
            return blocks
        weight = self.norm.weight
        return *blocks, weight.new_zeros(batch, self.entrance.held, dtype=wide(weight))

    @property
    def causal(self) -> bool:
        """Whether no output depends on a later input: true unless a mixer is bidirectional."""
        return all(block.causal for block in self._stack())

    def features(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        cu_seqlens: Borders = None,
        attention_mask: Tensor | None = None,
        lengths: Int[Tensor, " B"] | None = None,
        intervals: Real[Tensor, "B T"] | None = None,
        rate: float = 1.0,
    ) -> tuple[Float[Tensor, "B T D"], State]:
        """What a head reads: the stream after the final norm, in the dtype of the weights.

        Args:
            x: tokens ``(B, T)``, or features ``(B, T, inputs)``.
            state: what came before; None is the state before the first element.
            cu_seqlens: borders of packed sequences, or their ``Packing``; then B is 1 and the state has one row per
                sequence.
            attention_mask: ``(B, T)``, 1 for an element and 0 for padding, left, right or anywhere. Padding changes
                nothing: features there are 0, and each row's state is that of its elements alone.
            lengths: ``(B,)``, int64, how many elements each row has, where it is padded on the right: the mask in
                another form.
            intervals: for inputs at irregular times, the number of steps over which each is held; None is 1 throughout.
            rate: the step of every mixer is multiplied by it: 2 for inputs sampled half as often as in training.

        Raises:
            ArgumentError: names the argument, what came and what was expected; also for intervals or a rate that a
                mixer does not take.
        """
        line = lay_out(self._name, x, state, cu_seqlens, attention_mask, intervals, lengths)
        given = {"cu_seqlens": line.packing, "intervals": line.intervals, "rate": rate}
        h, state, _ = self._features(line.x, line.state, given, line.counted())
        return line.unpack(h), line.rows(state)

    def _features(
        self, x: Tensor, state: State | None, given: dict[str, Any], counted: Tensor | None = None
    ) -> tuple[Tensor, State, list[Tensor]]:
        """:meth:`features`, and the losses that parts have beside them while the model trains.

        Args:
            x: as there.
            state: as there.
            given: the other arguments there.
            counted: ``(B, T)``, the elements that are no padding; None where all are.
        """
        cu_seqlens, intervals, rate = given["cu_seqlens"], given["intervals"], given["rate"]
        self._check_inputs(x, "B T")
        self._check_timing(intervals=intervals, rate=rate)
        if intervals is not None:
            check_tensors(self._name, x=(x, "B T ..."), intervals=(intervals, "B T"))
        packing = Packing.of(self._name, cu_seqlens, x)
        rows = x.shape[0] if packing is None else packing.rows
        options = {"cu_seqlens": packing, "intervals": intervals, "rate": rate}
        x, state, held = self._enter(x, state, packing, rate if intervals is None else rate * intervals)
        h, new, trains = self._embed(x, counted), [], self.training and torch.is_grad_enabled()
        if trains:
            h = dropout(h, self.config.embed_dropout)
        context = Context({EMBEDDING: h}, collects=trains, counted=counted)
        drops = self._drops(h) if trains else (None,) * len(self.blocks)
        for block, old, drop in zip(self._stack(), self._states(state, rows), drops, strict=True):
            h, left = self._run(block, h, old, options | {"drop": drop}, context)
            new.append(left)
        return counting(self.norm, counted)(h), (*new, *held), context.losses

    def save(self, folder: str | os.PathLike[str], tokenizer: Any = None) -> None:
        """:func:`dualform.save`, for :func:`dualform.load` to read."""
        from dualform import save  # the room for saving knows all models, and so none of them knows it

        save(self, folder, tokenizer)

    def parameter_count(self) -> int:
        """Number of parameters, quantised ones without their scales; tied and shared ones count once."""
        quantized = sum(m.weight.numel() for m in quantized_within(self).values())
        return quantized + sum(p.numel() for p in self.parameters())

    def train(self, mode: bool = True) -> Any:
        """Switch to training, or with False to evaluation.

        Raises:
            ArgumentError: for a quantised model, which cannot be trained.
        """
        if mode and self.quantization is not None:
            raise ArgumentError(f"{self._name}: a quantised model is not trained", hint=TRAINS)
        return super().train(mode)

    def active_parameter_count(self) -> int:
        """Number of parameters that one element uses: all but those of experts that it does not go to."""
        return self.parameter_count() - sum(part.idle for part in self.modules() if isinstance(part, Part))

    def prepare(self, *, rate: float = 1.0) -> Prepared:
        """Steps with prepared blocks, at one rate; see :class:`~dualform.layers.mixer.Prepared`."""
        self._check_timing(rate=rate)
        stack = self._stack()
        residuals = {block: block.residuals() if rate == 1 else {} for block in set(stack)}  # a shared block once
        steps = {block: block.prepare(rate=rate, known=residuals[block]).step for block in set(stack)}
        runs = stream_runs(stack, residuals, self._head_step()) if rate == 1 else {}
        found = Steps([steps[block] for block in stack], runs, rate)
        return Prepared(partial(self._step, found))

    def _head_step(self) -> Callable[[Tensor], HeadStep] | None:
        """What follows the last block in a step, given the stream; None where there is no kernel for it."""
        return None

    @abstractmethod
    def _step(self, steps: Steps, x: Tensor, state: State, *, interval: Tensor | None = None) -> tuple[Tensor, State]:
        """One element, given the steps of the blocks in order."""

    def _block_steps(self, rate: float) -> Steps:
        self._check_timing(rate=rate)
        return Steps([partial(block.step, rate=rate) for block in self._stack()], {}, rate)

    def _step_features(
        self,
        steps: Steps,
        x: Tensor,
        state: State,
        interval: Tensor | None,
        read: Callable[[Tensor], Tensor] = lambda h: h,
    ) -> tuple[Tensor, State]:
        """One element: the features, or what ``read``, the head of :meth:`_head_step`, makes of them; and the state."""
        self._check_inputs(x, "B")
        if interval is not None:
            self._check_timing(interval=interval)
            check_tensors(self._name, x=(x, "B ..."), interval=(interval, "B"))
        elapsed = steps.rate if interval is None else steps.rate * interval[:, None]
        x, state, held = self._enter(x, state, None, elapsed)
        h, new = self._embed(x), []
        whole = steps.whole if interval is None else None
        if whole is not None and (y := whole.continued(h, state)) is not None:
            assert isinstance(state, tuple)
            return y if whole.head is not None else read(self.norm(y)), (*state, *held) if held else state
        old = self._states(state, x.shape[0])
        context = Context({EMBEDDING: h[:, None]})
        while len(new) < len(old):
            at = len(new)
            run = steps.runs.get(at) if interval is None else None
            if run is not None and (made := run(h, old[at : at + len(run.blocks)])) is not None:
                h, left = made
                new.extend(left)
                if run.head is not None:
                    return h, (*new, *held)
            else:
                h, left = steps.alone[at](h, old[at], interval=interval, context=context)
                new.append(left)
        return read(self.norm(h)), (*new, *held)

    def _enter(
        self, x: Tensor, state: State | None, packing: Packing | None, elapsed: Tensor | float
    ) -> tuple[Tensor, State | None, tuple[Tensor, ...]]:
        """What the embedding reads of inputs ``(B, T, ...)`` or ``(B, ...)``, and the states of blocks and entrance."""
        entrance, held = self.entrance, None
        if entrance is None:
            return x, state, ()
        if entrance.carries and state is not None:
            if not isinstance(state, tuple) or len(state) != len(self.blocks) + 1:
                raise self._no_state(len(self.blocks) + 1, "one per block, and the last values of the inputs")
            *blocks, held = state
            state = tuple(blocks)
        if x.dim() == 2 and entrance.carries:
            y, left = entrance(self._name, x[:, None], held, None, elapsed)
            y = y[:, 0]
        else:
            y, left = entrance(self._name, x, held, packing, elapsed)
        return y, state, () if left is None else (left,)

    def _no_state(self, parts: int, which: str) -> ArgumentError:
        return ArgumentError(
            f"{self._name}: state is not a tuple of {parts}, {which}",
            hint="a state comes from init_state, forward or step of the same model",
        )

    def _check_timing(self, *, rate: float = 1.0, **times: Tensor | None) -> None:
        for letter, block in dict(zip(self.config.pattern, self._stack(), strict=True)).items():
            block.timing(f"{self._name}: part {letter!r}", rate=rate, **times)

    def _run(
        self, block: Block, h: Tensor, state: State | None, options: dict[str, Any], context: Context
    ) -> tuple[Tensor, State]:
        if not (self.recompute and torch.is_grad_enabled()):
            return block(h, state, **options, context=context)
        name = forced()  # the second run must choose the backends of the first

        def run(h: Tensor, state: State | None, values: dict[str, Tensor]) -> tuple[Tensor, State, Told]:
            inner = context.within(values)  # which a second run may tell once more
            with backend(name):
                h, state = block(h, state, **options, context=inner)
            return h, state, inner.told()

        # random numbers are drawn alike, too
        h, state, told = checkpoint(run, h, state, context.values if block.in_context else {}, use_reentrant=False)
        if block.in_context:
            context.hear(told)
        return h, state

    def _drops(self, h: Tensor) -> Sequence[Drop | None]:
        """What training drops in each block, where the model's config has a rate."""
        config, depth = self.config, len(self.blocks)
        paths = depth_rates(config.drop_path, depth, h) if config.drop_path else (None,) * depth
        return [Drop(config.dropout, path) if config.dropout or config.drop_path else None for path in paths]

    def _stack(self) -> list[Block]:
        return cast("list[Block]", list(self.blocks))

    def _embed(self, x: Tensor, counted: Tensor | None = None) -> Tensor:
        h = self.embed(x if self.inputs is None else x.to(self.norm.weight.dtype))
        h = h.to(wide(h))
        h = h if self.config.embed_scale == 1 else self.config.embed_scale * h
        return h if self.config.embed_norm is None else counting(self.embed_norm, counted)(h).to(h.dtype)

    def _states(self, state: State | None, rows: int) -> tuple[State | None, ...]:
        if state is None:
            return (None,) * len(self.blocks)
        if not isinstance(state, tuple) or len(state) != len(self.blocks):
            raise self._no_state(len(self.blocks), "one per block")
        self._check_rows(state, rows)
        return state

    def _check_rows(self, state: State, rows: int) -> None:
        if wrong := other_rows(self._name, state, rows):
            raise wrong

    def _check_inputs(self, x: Tensor, axes: str) -> None:
        if self.inputs is None:
            self._check_tokens("tokens", x, axes)
        else:
            check_features(self._name, axes, self.inputs, x, self.norm.weight)

    def _check_tokens(self, name: str, tokens: Tensor, letters: str, ignored: int = 0) -> None:
        check_line(self._name, name, letters, tokens, self.norm.weight)
        hint = "is this the tokenizer of this model?"
        if isinstance(tokens, Tensor) and tokens.is_floating_point():
            hint = "text becomes tokens with a tokenizer's encode"
        check_indices(self._name, name, tokens, self.config.vocab_size, ignored, hint)

    @property
    def _name(self) -> str:
        return type(self).__name__
