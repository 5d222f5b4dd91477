"""This library's own models as transformers saves them: a config inside of a config, tensors one name further in."""

from collections.abc import Mapping
from typing import Any

from dualform.core.errors import ConfigError
from dualform.models.config import ModelConfig
from dualform.models.tables.layout import Piece

MODEL_TYPE = "dualform"


class Wrapped:
    """What ``save_pretrained`` of :class:`dualform.hf.DualformForCausalLM` writes; it is only read here."""

    name = "dualform of transformers"

    def read(self, table: Mapping[str, Any], where: str) -> ModelConfig:
        """The config inside.

        Raises:
            ConfigError: where there is none, or it describes no model.
        """
        if not isinstance(table.get("model"), Mapping):
            raise ConfigError(f"{where}model is missing, expected the table of a ModelConfig")
        return ModelConfig.from_dict(table["model"])

    def pieces(self, config: ModelConfig, name: str) -> tuple[Piece, ...]:
        """The tensor itself."""
        return (Piece(f"model.{name}"),)

    def spare(self, config: ModelConfig) -> set[str]:
        """None."""
        return set()

    def variants(self) -> "list[Wrapped]":
        """This one."""
        return [self]


WRAPPED = Wrapped()
