"""A language model of this library under the interface of transformers."""

import os
from inspect import signature
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from dualform.core.errors import ArgumentError
from dualform.core.recurrence import State
from dualform.core.shapes import check_tensors, wide
from dualform.hf.cache import StateCache
from dualform.hf.configuration import DualformConfig
from dualform.models.linear_loss import IGNORED
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
            attention_mask: ``(B, T)``, 1 for a token and 0 for padding. After earlier calls it may be longer, and its
                last T columns count.
            labels: ``(B, T)``, the token at each position itself, as transformers has them; -100 does not count.
            use_cache: whether the state is returned; by default outside of training.
            output_hidden_states: whether what the head reads is returned.
            logits_to_keep: the number of last positions whose logits are needed, or their indices; 0 is all of them.
            return_dict: False returns a tuple.
            options: ``cache`` or ``past_key_values`` of an earlier call, and ``num_items_in_batch`` of the Trainer, the
                number by which the sum of the losses is divided. ``inputs_embeds`` is refused; others change nothing.

        Raises:
            ArgumentError: for no tokens, or embeddings in their place; labels of another shape.
        """
        if options.get("inputs_embeds") is not None or input_ids is None:
            raise ArgumentError("forward: a model of this library reads tokens", hint="give input_ids alone")
        check_tensors("forward", input_ids=(input_ids, "B T"), labels=(labels, "? B T"))
        cache: StateCache | None = options.get("cache") or options.get("past_key_values")
        length, state = input_ids.shape[1], None if cache is None else cache.state
        mask = None if attention_mask is None else attention_mask[:, -length:]
        loss = logits = h = None
        if labels is not None and self.training and not self.training_logits:
            targets = _targets(labels, mask)
            loss, state = self.model.loss_and_state(input_ids, targets, state, attention_mask=mask)
            loss = loss * (targets != IGNORED).sum() / _divisor(targets, options)
        else:
            h, state = self._features(input_ids, mask, state)
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.model.logits(h[:, kept])
            if labels is not None:
                targets, each = _targets(labels, mask), logits if logits.shape[1] == length else self.model.logits(h)
                each = each.to(wide(each)).flatten(0, 1)
                loss = F.cross_entropy(each, targets.flatten(), ignore_index=IGNORED, reduction="sum")
                loss = loss / _divisor(targets, options)
        left: Any = None
        if use_cache or (use_cache is None and not self.training):
            left = StateCache(state) if cache is None else cache
            left.state, left.seen = state, left.seen + length
        read = (h,) if output_hidden_states and h is not None else None
        output = CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=read, **{CACHE: left})
        return output if return_dict is not False else output.to_tuple()

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: Tensor, **kwargs: Any
    ) -> dict[str, Any]:
        """What ``forward`` gets of ``generate``: the tokens that the state has not seen, and where there is padding."""
        cache: StateCache | None = kwargs.get(CACHE)
        count = kwargs.get("next_sequence_length") or input_ids.shape[1] - (0 if cache is None else cache.seen)
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

    def _features(self, tokens: Tensor, mask: Tensor | None, state: State | None) -> tuple[Tensor, State]:
        line = lay_out("forward", tokens, state, None, mask)
        h, state = self.model.features(line.x, line.state, cu_seqlens=line.packing)
        return line.unpack(h), line.rows(state)

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
