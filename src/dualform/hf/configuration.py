"""The config of a model of this library, as transformers keeps configs."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from dualform.core.errors import ConfigError
from dualform.models.config import ModelConfig


class DualformConfig(PreTrainedConfig):
    """``config.json`` of a model of this library in the format of transformers: ``model`` holds all that it is.

    Args:
        model: a :class:`~dualform.models.config.ModelConfig`, or its table.
        options: those of every config of transformers, such as ``eos_token_id``.

    Raises:
        ConfigError: for a table that describes no model, or an option that contradicts it; names the key.
    """

    model_type = "dualform"
    keys_to_ignore_at_inference = ("cache", "past_key_values")

    def __init__(self, model: ModelConfig | Mapping[str, Any] | None = None, **options: Any):
        if model and not isinstance(model, ModelConfig):
            model = ModelConfig.from_dict(model)
        self.model = model.to_dict() if isinstance(model, ModelConfig) else {}  # where transformers only asks defaults
        for name in ("vocab_size", "hidden_size", "num_hidden_layers"):  # follow from the model
            came, own = options.pop(name, None), getattr(self, name)
            if self.model and came not in (None, own):
                raise ConfigError(f"DualformConfig: {name} is {came}, but the model's is {own}", hint="leave it out")
        super().__init__(**{"tie_word_embeddings": False, **options})  # embedding and head are one tensor, or two

    @property
    def model_config(self) -> ModelConfig:
        """The config as this library has it."""
        return ModelConfig.from_dict(self.model)

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.model.get("vocab_size", 0)

    @vocab_size.setter
    def vocab_size(self, size: int) -> None:
        self.model = {**self.model, "vocab_size": size}

    @property
    def hidden_size(self) -> int:
        """The width of the residual stream."""
        return self.model.get("d_model", 0)

    @property
    def num_hidden_layers(self) -> int:
        """The number of blocks."""
        return len(self.model.get("pattern", ""))
