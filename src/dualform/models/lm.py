"""The language model: a Recurrence from tokens to logits, made of Recurrences."""

import os

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dualform.core.errors import ConfigError
from dualform.core.packing import pack, sequence_ids, unpack
from dualform.core.recurrence import State
from dualform.core.shapes import check_tensors
from dualform.layers.mixer import Step
from dualform.models.backbone import Backbone
from dualform.models.checkpoint import write_model
from dualform.models.config import ModelConfig
from dualform.models.linear_loss import IGNORED, linear_cross_entropy
from dualform.models.tokenizer import Tokenizer


class LanguageModel(Backbone):
    """Tokens ``(B, T)`` -> logits ``(B, T, V)``: embedding, one block per letter of the pattern, RMS norm, head.

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
        self.head = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        state: State | None = None,
        *,
        cu_seqlens: Int[Tensor, " n"] | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Float[Tensor, "B T V"], State]:
        """Logits of the next token at every position, and the state after the last one.

        Args:
            tokens: int32 or int64, 0 to V - 1. Values are checked where reading them costs nothing, on the CPU.
            state: what came before; None is ``init_state``.
            cu_seqlens: borders of packed sequences; then B is 1 and the state has one row per sequence.
            attention_mask: ``(B, T)``, 1 for a token and 0 for padding, left, right or anywhere. Padding changes
                nothing: logits there are 0, and each row's state is that of its tokens alone.

        Raises:
            ArgumentError: names the argument, what came and what was expected.
        """
        if attention_mask is not None:
            return self._masked(tokens, state, cu_seqlens, attention_mask)
        h, state = self.features(tokens, state, cu_seqlens=cu_seqlens)
        return self.logits(h), state

    def logits(self, h: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """The head: :meth:`features` to logits."""
        return F.linear(h, self._head())

    def step(self, tokens: Int[Tensor, " B"], state: State) -> tuple[Float[Tensor, "B V"], State]:
        """One token per row."""
        return self._step(self._block_steps(), tokens, state)

    def _step(self, steps: list[Step], x: Int[Tensor, " B"], state: State) -> tuple[Float[Tensor, "B V"], State]:
        h, state = self._step_features(steps, x, state)
        return self.logits(h), state

    def loss(
        self,
        tokens: Int[Tensor, "B T"],
        targets: Int[Tensor, "B T"] | None = None,
        *,
        cu_seqlens: Int[Tensor, " n"] | None = None,
    ) -> Float[Tensor, ""]:
        """Mean cross-entropy of the next token, in nats, without holding all logits of a large vocabulary.

        Args:
            tokens: ``(B, T)``.
            targets: the token after each position; -100 does not count. None shifts ``tokens`` by one.
            cu_seqlens: borders of packed sequences. Nothing is predicted across a border: the target at the last
                position of each sequence does not count.

        Returns:
            A scalar; 0 where no target counts.

        Raises:
            ArgumentError: names the argument, what came and what was expected.
        """
        h, _ = self.features(tokens, cu_seqlens=cu_seqlens)
        if targets is None:
            targets = torch.full_like(tokens, IGNORED)
            targets[:, :-1] = tokens[:, 1:]
        else:
            check_tensors("LanguageModel", tokens=(tokens, "B T"), targets=(targets, "B T"))
            self._check_tokens("targets", targets, "B T", ignored=IGNORED)
        if cu_seqlens is not None:
            ids = sequence_ids(cu_seqlens.to(tokens.device), tokens.shape[1])
            last = ids.diff(append=ids.new_tensor([-1])) != 0
            targets = targets.masked_fill(last, IGNORED)
        total = linear_cross_entropy(h.flatten(0, 1), self._head(), targets.long().flatten())
        return total / (targets != IGNORED).sum().clamp(min=1)

    def save(self, folder: str | os.PathLike[str], tokenizer: Tokenizer | None = None) -> None:
        """Write ``config.json``, ``model.safetensors`` and, if given, ``tokenizer.json``; see :func:`dualform.load`.

        Raises:
            CheckpointError: when the disk refuses; what was saved there before still loads.
        """
        write_model(folder, self.config, self, tokenizer)

    def _head(self) -> Tensor:
        return self.embed.weight if self.head is None else self.head.weight

    def _masked(
        self, tokens: Tensor, state: State | None, cu_seqlens: Tensor | None, mask: Tensor
    ) -> tuple[Tensor, State]:
        """Padding becomes packing."""
        keep = self._keep(tokens, cu_seqlens, mask)
        if keep.all():
            return self.forward(tokens, state)
        packed, borders = pack(tokens, keep)
        logits, state = self.forward(packed, state, cu_seqlens=borders)
        return unpack(logits, keep), state
