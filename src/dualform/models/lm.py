"""The language model: a Recurrence from tokens to logits, made of Recurrences."""

import os
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dualform.core.errors import ArgumentError
from dualform.core.packing import check_cu_seqlens, pack, sequence_ids, unpack
from dualform.core.recurrence import State
from dualform.core.shapes import check_tensors, wide
from dualform.core.tree import leaves
from dualform.models.block import Block
from dualform.models.checkpoint import write_model
from dualform.models.config import ModelConfig
from dualform.models.tokenizer import Tokenizer

IGNORED = -100  # a target that does not count, as in torch.nn.functional.cross_entropy
_LOGITS_AT_ONCE = 2**24  # the loss holds at most this many logits: 64 MiB in float32


class LanguageModel(nn.Module):
    """Tokens ``(B, T)`` -> logits ``(B, T, V)``: embedding, one block per letter of the pattern, RMS norm, head.

    The state is a tuple with the state of each block. The blocks of a shared letter are one module, with a state per
    use. The residual stream is float32 or wider whatever the dtype of the weights, as Mamba's ``residual_in_fp32``.

    Initialised as Mamba: the embedding normal with deviation 0.02, biases of linear maps zero, what each sub-layer
    adds to the stream divided by the root of their number; everything else is the layers' own. Built under
    ``torch.device("meta")`` it costs no memory and can count its parameters.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        shared = {letter: self._block(letter) for letter in config.shared}
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(
            shared[letter] if letter in shared else self._block(letter) for letter in config.pattern
        )
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)
        residual_parts = sum(len(config.parts[letter]) for letter in config.pattern)
        for block in dict.fromkeys(self._stack()):  # a shared block once
            block.initialise(residual_parts)

    def _block(self, letter: str) -> Block:
        return Block(self.config.parts[letter], self.config.d_model, self.config.norm_eps)

    def init_state(self, batch: int, *, max_len: int = 0) -> State:
        """The state before the first token; ``max_len`` is the capacity of caches that grow with the context."""
        return tuple(block.init_state(batch, max_len=max_len) for block in self._stack())

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
            state: what came before; None is :meth:`init_state`.
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

    def features(
        self, tokens: Int[Tensor, "B T"], state: State | None = None, *, cu_seqlens: Int[Tensor, " n"] | None = None
    ) -> tuple[Float[Tensor, "B T D"], State]:
        """What the head reads: the stream after the final norm, in the dtype of the weights."""
        self._check_tokens("tokens", tokens, "B T")
        rows = len(tokens) if cu_seqlens is None else check_cu_seqlens("LanguageModel", cu_seqlens, *tokens.shape)
        h, new = self._embed(tokens), []
        for block, old in zip(self._stack(), self._states(state, rows), strict=True):
            h, left = block(h, old, cu_seqlens=cu_seqlens)
            new.append(left)
        return self._final(h), tuple(new)

    def logits(self, h: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """The head: :meth:`features` to logits."""
        return F.linear(h, self.embed.weight if self.head is None else self.head.weight)

    def step(self, tokens: Int[Tensor, " B"], state: State) -> tuple[Float[Tensor, "B V"], State]:
        """One token per row."""
        self._check_tokens("tokens", tokens, "B")
        h, new = self._embed(tokens), []
        for block, old in zip(self._stack(), self._states(state, len(tokens)), strict=True):
            h, left = block.step(h, old)
            new.append(left)
        return self.logits(self._final(h)), tuple(new)

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
        rows = max(1, _LOGITS_AT_ONCE // self.config.vocab_size)
        pieces = list(zip(h.flatten(0, 1).split(rows), targets.long().flatten().split(rows), strict=True))
        if len(pieces) == 1:
            total = self._nats(*pieces[0])
        else:
            parts = [checkpoint(self._nats, *p, use_reentrant=False, preserve_rng_state=False) for p in pieces]
            total = torch.stack(parts).sum()
        return total / (targets != IGNORED).sum().clamp(min=1)

    def parameter_count(self) -> int:
        """Number of parameters; tied and shared ones count once."""
        return sum(p.numel() for p in self.parameters())

    def save(self, folder: str | os.PathLike[str], tokenizer: Tokenizer | None = None) -> None:
        """Write ``config.json``, ``model.safetensors`` and, if given, ``tokenizer.json``; see :func:`dualform.load`.

        Raises:
            CheckpointError: when the disk refuses; what was saved there before still loads.
        """
        write_model(folder, self.config, self, tokenizer)

    def _stack(self) -> list[Block]:
        return cast("list[Block]", list(self.blocks))

    def _embed(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        return h.to(wide(h))

    def _final(self, h: Tensor) -> Tensor:
        return self.norm(h.to(self.norm.weight.dtype))

    def _nats(self, h: Tensor, targets: Tensor) -> Tensor:
        logits = self.logits(h)
        return F.cross_entropy(logits.to(wide(logits)), targets, ignore_index=IGNORED, reduction="sum")

    def _masked(
        self, tokens: Tensor, state: State | None, cu_seqlens: Tensor | None, mask: Tensor
    ) -> tuple[Tensor, State]:
        """Padding becomes packing."""
        if cu_seqlens is not None:
            raise ArgumentError("LanguageModel: give cu_seqlens or attention_mask, not both")
        self._check_tokens("tokens", tokens, "B T")
        check_tensors("LanguageModel", tokens=(tokens, "B T"), attention_mask=(mask, "B T"))
        keep = mask != 0
        if not torch.equal(keep.to(mask.dtype), mask):
            raise ArgumentError("LanguageModel: attention_mask has values other than 0 and 1")
        if keep.all():
            return self.forward(tokens, state)
        packed, borders = pack(tokens, keep)
        logits, state = self.forward(packed, state, cu_seqlens=borders)
        return unpack(logits, keep), state

    def _states(self, state: State | None, rows: int) -> tuple[State | None, ...]:
        if state is None:
            return (None,) * len(self.blocks)
        if not isinstance(state, tuple) or len(state) != len(self.blocks):
            raise ArgumentError(
                f"LanguageModel: state is not a tuple of {len(self.blocks)}, one per block",
                hint="a state comes from init_state, forward or step of the same model",
            )
        for leaf in leaves(state):
            if len(leaf) != rows:
                raise ArgumentError(f"LanguageModel: state has {len(leaf)} rows, expected {rows}")
        return state

    def _check_tokens(self, name: str, tokens: Tensor, letters: str, ignored: int = 0) -> None:
        check_tensors("LanguageModel", embedding=(self.embed.weight, "V D"), **{name: (tokens, letters)})
        if tokens.dtype not in (torch.int32, torch.int64):
            hint = "text becomes tokens with a tokenizer's encode" if tokens.is_floating_point() else f"{name}.long()"
            raise ArgumentError(f"LanguageModel: {name} is {tokens.dtype}, expected int32 or int64", hint=hint)
        if torch.compiler.is_compiling() or tokens.device.type != "cpu" or not tokens.numel():
            return
        outside = (tokens < 0) | (tokens >= self.config.vocab_size)
        if ignored:
            outside &= tokens != ignored
        if outside.any():
            raise ArgumentError(
                f"LanguageModel: {name} holds {int(tokens[outside][0])}, expected 0 to {self.config.vocab_size - 1}",
                hint="is this the tokenizer of this model?",
            )
