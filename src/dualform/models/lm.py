"""The language model: a Recurrence from tokens to logits, made of Recurrences."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Real
from torch import Tensor, nn

from dualform.core.calls import explained
from dualform.core.errors import ConfigError
from dualform.core.packing import Borders
from dualform.core.recurrence import State
from dualform.core.shapes import check_tensors
from dualform.layers.projection import project, project_by
from dualform.layers.quantized import QuantizedEmbedding
from dualform.models.backbone import ELSEWHERE, Backbone, Steps
from dualform.models.block_steps import head_behind
from dualform.models.config import ModelConfig
from dualform.models.linear_loss import IGNORED, counted, linear_cross_entropy, mean_cross_entropy
from dualform.models.padding import Line, lay_out
from dualform.ops.head_step import HeadStep


@explained(elsewhere=ELSEWHERE)
class LanguageModel(Backbone):
    """Tokens ``(B, T)`` -> logits ``(B, T, V)``: embedding, one block per letter of the pattern, norm, head.

    For the state, the residual stream and the initialisation see :class:`~dualform.models.backbone.Backbone`. Built
    under ``torch.device("meta")`` it costs no memory and can count its parameters.

    Raises:
        ConfigError: for a bidirectional part: it would see the token that it is to predict.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        if not self.causal:
            raise ConfigError(
                "LanguageModel: a part is bidirectional, and would see the token that it is to predict",
                hint="bidirectional parts are for SequenceClassifier and SequenceRegressor",
            )
        self.head = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, config.head_bias)

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        state: State | None = None,
        *,
        cu_seqlens: Borders = None,
        attention_mask: Tensor | None = None,
        intervals: Real[Tensor, "B T"] | None = None,
        rate: float = 1.0,
    ) -> tuple[Float[Tensor, "B T V"], State]:
        """Logits of the next token at every position, and the state after the last one.

        Args:
            tokens: int32 or int64, 0 to V - 1. Values are checked where reading them costs nothing, on the CPU.
            state: what came before; None is ``init_state``.
            cu_seqlens: borders of packed sequences, or their ``Packing``; then B is 1 and the state has one row per
                sequence.
            attention_mask: ``(B, T)``, 1 for a token and 0 for padding, left, right or anywhere. Padding changes
                nothing: logits there are 0, and each row's state is that of its tokens alone.
            intervals: as in :meth:`features`.
            rate: as in :meth:`features`.

        Raises:
            ArgumentError: names the argument, what came and what was expected.
        """
        line = lay_out(self._name, tokens, state, cu_seqlens, attention_mask, intervals)
        h, state, _ = self.line_features(line, rate)
        return line.unpack(self.logits(h)), line.rows(state)

    def logits(self, h: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """The head: :meth:`features` to logits."""
        return self._bounded(self._tied(h, F.linear) if self.head is None else self.head(h))

    def _tied(self, h: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The products with the rows of the embedding, of which there may be several ways."""
        embed: Any = self.embed
        return embed.products(h) if isinstance(embed, QuantizedEmbedding) else product(h, embed.weight)

    def _bounded(self, logits: Tensor) -> Tensor:
        """The factor of the logits, and their bound."""
        scale, cap = self.config.logit_scale, self.config.logit_cap
        logits = logits if scale == 1 else scale * logits
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def step(
        self,
        tokens: Int[Tensor, " B"],
        state: State,
        *,
        interval: Real[Tensor, " B"] | None = None,
        rate: float = 1.0,
    ) -> tuple[Float[Tensor, "B V"], State]:
        """One token per row."""
        return self._step(self._block_steps(rate), tokens, state, interval=interval)

    def _step(self, steps: Steps, x: Tensor, state: State, *, interval: Tensor | None = None) -> tuple[Tensor, State]:
        return self._step_features(steps, x, state, interval, self._step_logits)

    def _step_logits(self, h: Tensor) -> Tensor:
        return self._bounded(self._tied(h, project_by) if self.head is None else project(self.head, h))

    def _head_step(self) -> Callable[[Tensor], HeadStep] | None:
        config, head = self.config, self.embed if self.head is None else self.head
        return head_behind(self.norm, head, config.logit_scale, config.logit_cap or 0.0)

    def loss(
        self,
        tokens: Int[Tensor, "B T"],
        targets: Int[Tensor, "B T"] | None = None,
        state: State | None = None,
        **options: Any,
    ) -> Float[Tensor, ""]:
        """Mean cross-entropy of the next token: the first of what :meth:`loss_and_state` returns."""
        return self.loss_and_state(tokens, targets, state, **options)[0]

    def loss_and_state(
        self,
        tokens: Int[Tensor, "B T"],
        targets: Int[Tensor, "B T"] | None = None,
        state: State | None = None,
        *,
        cu_seqlens: Borders = None,
        attention_mask: Tensor | None = None,
        intervals: Real[Tensor, "B T"] | None = None,
        rate: float = 1.0,
    ) -> tuple[Float[Tensor, ""], State]:
        """Mean cross-entropy of the next token, in nats, without holding all logits of a large vocabulary.

        While the model trains (``model.train()``, gradients recorded), losses that parts have beside it are added,
        such as those that balance the experts of a router.

        The state goes on to the next piece of the same sequences; for truncated backpropagation, detached::

            loss, state = model.loss_and_state(tokens, targets, state)
            loss.backward()
            state = dualform.core.tree.detach(state)

        Args:
            tokens: ``(B, T)``.
            targets: the token after each position; -100 does not count. None shifts ``tokens`` by one.
            state: what came before; None is ``init_state``.
            cu_seqlens: borders of packed sequences. Nothing is predicted across a border: the target at the last
                position of each sequence does not count.
            attention_mask: ``(B, T)``, 1 for a token and 0 for padding. The loss is that of the rows without it: no
                target at padding counts, and without ``targets`` the next token is the next that is no padding.
            intervals: as in :meth:`features`.
            rate: as in :meth:`features`.

        Returns:
            A scalar, 0 where no target counts, and the state after the last token.

        Raises:
            ArgumentError: names the argument, what came and what was expected.
        """
        line = lay_out(self._name, tokens, state, cu_seqlens, attention_mask, intervals)
        h, state, losses = self.line_features(line, rate)
        packing = line.packing
        if targets is None:
            targets = F.pad(line.x[:, 1:], (0, 1), value=IGNORED) if line.x.shape[1] else line.x
        else:
            check_tensors(self._name, tokens=(tokens, "B T"), targets=(targets, "B T"))
            self._check_tokens("targets", targets, "B T", ignored=IGNORED)
            if line.keep is not None:
                targets = line.pack(targets.masked_fill(~line.keep, IGNORED))
                packing = None  # the target at the end of a row is the caller's
        if packing is not None:
            ids = packing.sequence_ids(line.x.shape[1])
            targets = targets.masked_fill(F.pad(ids.diff() != 0, (0, 1), value=True), IGNORED)
        if (counted := line.counted()) is not None:
            targets = targets.masked_fill(~counted, IGNORED)
        loss = self.head_loss(h, targets)
        return sum(losses, loss), line.rows(state)

    def head_loss(self, h: Float[Tensor, "B T D"], targets: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
        """Mean cross-entropy of :meth:`logits` of ``h``, in nats; 0 where no target counts.

        Args:
            h: of :meth:`features`. What it holds where no target counts reaches neither the loss nor the gradients.
            targets: the token after each position; -100 does not count.
        """
        h, targets = h.flatten(0, 1), targets.long().flatten()
        head: Any = self.embed if self.head is None else self.head
        plain = type(head) is nn.Linear if self.head is not None else not isinstance(head, QuantizedEmbedding)
        if plain and self.config.logit_cap is None and getattr(head, "bias", None) is None:
            scale, count = self.config.logit_scale, (targets != IGNORED).sum().clamp(min=1)
            return linear_cross_entropy(h if scale == 1 else scale * h, head.weight, targets) / count
        logits = self.logits(counted(h, targets))  # bounded, or of a wrapper around a linear map: quantised, adapted
        return mean_cross_entropy(logits, targets)

    def line_features(self, line: Line, rate: float = 1.0) -> tuple[Tensor, State, list[Tensor]]:
        """:meth:`features` of a line that :func:`~dualform.models.padding.lay_out` has made.

        And the losses that parts have beside them while the model trains, such as those of routers.
        """
        given = {"cu_seqlens": line.packing, "intervals": line.intervals, "rate": rate}
        return self._features(line.x, line.state, given, line.counted())
