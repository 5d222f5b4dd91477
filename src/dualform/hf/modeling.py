"""A language model of this library under the interface of transformers."""

import os
from dataclasses import replace
from inspect import signature
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from dualform.core.errors import ArgumentError
from dualform.core.recurrence import State
from dualform.core.shapes import check_indices, check_tensors
from dualform.hf.cache import StateCache
from dualform.hf.configuration import DualformConfig
from dualform.hf.inputs import cache_of, check_mask, check_options, check_positions, places_to_keep
from dualform.models.backbone import EMBEDDING_STD
from dualform.models.linear_loss import IGNORED, mean_cross_entropy
from dualform.models.lm import LanguageModel
from dualform.models.padding import lay_out
from dualform.models.saving.folder import model_folder
from dualform.models.saving.model import load as load_model
from dualform.models.usage import read_ends

_PREPARES = signature(vars(GenerationMixin)["prepare_inputs_for_generation"])
CACHE = "cache" if "cache" in _PREPARES.parameters else "past_key_values"
"""What this release of transformers calls a cache."""


class DualformForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model for ``generate`` and ``Trainer`` of transformers, for PEFT, and for what takes its models.

    ``model`` is the :class:`~dualform.models.lm.LanguageModel`, of the same tensors. Padding changes nothing, on either
    side: the logits of a row are those of its tokens alone.

    In training a call with labels gives the loss without logits, which a large vocabulary repays in memory; set
    ``training_logits = True`` for a trainer that reads them.

    Args:
        config: what the model is.
        model: a language model to wrap; None builds a new one.

    Raises:
        ConfigError: for a config that describes no language model.
    """

    config_class = DualformConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    training_logits: bool = False
    _no_split_modules: ClassVar[Any] = ["Block"]

    def __init__(self, config: DualformConfig, model: LanguageModel | None = None):
        super().__init__(config)
        self.model = LanguageModel(config.model_config) if model is None else model
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits, the loss of ``labels``, and the state.

        Args:
            input_ids: ``(B, T)``.
            attention_mask: ``(B, T)``, 1 for a token and 0 for padding. After earlier calls it may have their columns
                before its own.
            labels: ``(B, T)``, the token at each position itself, as transformers has them; -100 does not count. All
                that count go into the loss, whichever logits are kept.
            use_cache: whether the state is returned; by default outside of training.
            output_hidden_states: whether what the head reads is returned.
            logits_to_keep: the number of last positions whose logits are needed, or their indices; 0 is all of them.
            return_dict: False returns a tuple.
            options: ``cache`` or ``past_key_values`` of an earlier call, and ``num_items_in_batch`` of the Trainer, the
                number by which the sum of the losses is divided. ``position_ids`` must be those that follow from the
                order of the tokens. ``token_type_ids`` and ``cache_position`` change nothing.

        Raises:
            ArgumentError: for no tokens, or embeddings in their place; labels, a mask or positions that do not fit
                them; a cache of another kind, and a keyword that would change nothing.
        """
        if options.get("inputs_embeds") is not None or input_ids is None:
            raise ArgumentError("forward: a model of this library reads tokens", hint="give input_ids alone")
        check_options(options)
        check_tensors("forward", input_ids=(input_ids, "B T"), labels=(labels, "? B T"))
        cache, length = cache_of(options), input_ids.shape[1]
        state, seen = (None, 0) if cache is None else (cache.state, cache.seen)
        mask = check_mask(attention_mask, input_ids, seen)
        check_positions(options.get("position_ids"), input_ids, attention_mask, seen)
        places = places_to_keep(logits_to_keep, length, input_ids.device)
        targets = None if labels is None else _targets(labels, mask)
        if targets is not None:
            check_indices("forward", "labels", targets, self.config.vocab_size, IGNORED, "-100 does not count")
        loss = logits = h = None
        if targets is not None and self.training and not self.training_logits and not output_hidden_states:
            loss, state = self.model.loss_and_state(input_ids, targets, state, attention_mask=mask)
        else:
            h, state, losses = self._features(input_ids, mask, state)
            logits = self.model.logits(h[:, places])
            whole = isinstance(places, slice) and logits.shape[1] == length
            if targets is not None and whole and not torch.is_grad_enabled():
                loss = mean_cross_entropy(logits.flatten(0, 1), targets.long().flatten())
            elif targets is not None:
                loss = sum(losses, self.model.head_loss(h, targets))
        if loss is not None and targets is not None:
            loss = loss * (targets != IGNORED).sum() / _divisor(targets, options)
        left: Any = None
        if use_cache or (use_cache is None and not self.training):
            left = StateCache(state) if cache is None else cache
            left.state, left.seen = state, seen + length
        read = (h,) if output_hidden_states and h is not None else None
        output = CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=read, **{CACHE: left})
        return output if return_dict is not False else output.to_tuple()

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: Tensor, **kwargs: Any
    ) -> dict[str, Any]:
        """What ``forward`` gets of ``generate``: the tokens that the state has not seen, and where there is padding."""
        cache: StateCache | None = kwargs.get(CACHE)
        count = kwargs.get("next_sequence_length") or input_ids.shape[1] - (0 if cache is None else cache.seen)
        if count < 1:
            what = f"input_ids has {input_ids.shape[1]} tokens, and the cache has seen {input_ids.shape[1] - count}"
            raise ArgumentError(f"generate: {what}: none is left to read", hint="give more tokens, or no cache")
        mask = kwargs.get("attention_mask") if cache is None or count > 1 else None  # a new token is no padding
        given = {"input_ids": input_ids[:, -count:], "attention_mask": mask, CACHE: cache}
        return {**given, "use_cache": kwargs.get("use_cache"), "logits_to_keep": kwargs.get("logits_to_keep") or 0}

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.model.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another embedding in the place of the model's."""
        self.model.add_module("embed", value)

    def get_output_embeddings(self) -> nn.Module | None:
        """The head; None where it is the embedding."""
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Put another head in the place of the model's."""
        self.model.add_module("head", new_embeddings)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Another number of tokens: embedding, head and configs, as transformers documents it.

        Args:
            new_num_tokens: V, or None for the same number.
            pad_to_multiple_of: V is raised to a multiple of it.
            mean_resizing: whether new tokens begin near the mean of the others; otherwise as in a new model.
        """
        before = self.config.vocab_size
        embedding: nn.Embedding = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.model.config = replace(self.model.config, vocab_size=len(embedding.weight))
        if not mean_resizing:
            with torch.no_grad():
                nn.init.normal_(embedding.weight[before:], std=EMBEDDING_STD)
        return embedding

    def _features(self, tokens: Tensor, mask: Tensor | None, state: State | None) -> tuple[Tensor, State, list[Tensor]]:
        """What the head reads, the state, and the losses that parts have beside the model's while it trains."""
        line = lay_out("forward", tokens, state, None, mask)
        h, state, losses = self.model.line_features(line)
        return line.unpack(h), line.rows(state), losses

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: a language model begins as it was built."""

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **options: Any) -> None:
        self.model.recompute = self.gradient_checkpointing = enable

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False


def load(
    folder: str | os.PathLike[str], *, device: str | torch.device = "cpu", dtype: str | torch.dtype | None = None
) -> DualformForCausalLM:
    """Whatever :func:`dualform.load` reads as a language model, as a model of transformers.

    Args:
        folder: of a model or a run, in the layout of this library or of another one, or a name of the Hub.
        device: where to put it.
        dtype: of its weights; None keeps what was saved.

    Raises:
        CheckpointError: for what cannot be loaded, as :func:`dualform.load`.
    """
    model = load_model(folder, device=device, dtype=dtype, kind=LanguageModel)
    wrapped = DualformForCausalLM(DualformConfig(model.config, dtype=model.norm.weight.dtype), model)
    ends = read_ends(model_folder(folder), model.config.vocab_size)
    wrapped.generation_config = GenerationConfig(eos_token_id=ends or None)
    return wrapped.eval()


def _targets(labels: Tensor, mask: Tensor | None) -> Tensor:
    """The token after each position, where neither it nor the position is padding."""
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    if mask is None:
        return targets
    shown = mask != 0
    return targets.masked_fill(~(shown & F.pad(shown[:, 1:], (0, 1))), IGNORED)


def _divisor(targets: Tensor, options: dict[str, Any]) -> Tensor | int:
    items = options.get("num_items_in_batch")
    return (targets != IGNORED).sum().clamp(min=1) if items is None else items
