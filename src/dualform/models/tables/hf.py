"""The Mamba models of Hugging Face's transformers: names of tensors, and options by the keys of ``config.json``."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from dualform.core.errors import ConfigError
from dualform.core.options import brief
from dualform.layers.mamba import MambaConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.models.config import DEEPEST, ModelConfig
from dualform.models.tables.layout import (
    MAMBA,
    MAMBA2,
    Layout,
    Options,
    PartNames,
    encoded,
    one_block,
    rank,
    scan_width,
)


class _Sizes(NamedTuple):
    """What a config here says in another way."""

    layers: int
    expand: float
    heads: int | None


_MODEL = {
    "hidden_size": ("d_model", 768),
    "vocab_size": ("vocab_size", 50280),
    "layer_norm_epsilon": ("norm_eps", 1e-5),
    "tie_word_embeddings": ("tie_embeddings", True),
}
_MIXER = {
    "state_size": ("d_state", 16),
    "conv_kernel": ("d_conv", 4),
    "use_bias": ("bias", False),
    "use_conv_bias": ("conv_bias", True),
    "time_step_min": ("dt_min", 1e-3),
    "time_step_max": ("dt_max", 1e-1),
}
_MAMBA = {**_MIXER, "time_step_rank": ("dt_rank", "auto"), "intermediate_size": ("d_inner", None)}
_FALCON = {**_MAMBA, "mixer_rms_eps": ("norm_maps", 1e-6)}
_MODEL2 = {
    **_MODEL,
    "hidden_size": ("d_model", 4096),
    "vocab_size": ("vocab_size", 32768),
    "tie_word_embeddings": ("tie_embeddings", False),
}
_MAMBA2 = {
    **_MIXER,
    "state_size": ("d_state", 128),
    "head_dim": ("d_head", 64),
    "n_groups": ("groups", 8),
    "time_step_limit": ("dt_limit", (0.0, math.inf)),
    "layer_norm_epsilon": ("norm_eps", 1e-5),
}
_ONLY: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu", "swish"), "quantization_config": (None,)}
"""Keys that change what is computed, and the values, of one meaning, that the layers here compute."""
_SILENT = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
"""Keys whose defaults there would be taken for this model's; the tokens are the tokenizer's here."""


@dataclass(frozen=True)
class _Family:
    """A ``model_type``: its class there, the config of its mixer here, and the tables of both configs."""

    model_type: str
    architecture: str
    part: type[Any]
    names: PartNames
    model: Options
    mixer: Options
    sizes: Options

    def layout(self) -> Layout:
        return Layout(
            name=f"{self.model_type} of transformers",
            outside={"embed": "backbone.embeddings.", "norm": "backbone.norm_f.", "head": "lm_head."},
            block="backbone.layers.{}.",
            norms=("norm.",),
            parts={self.part: self.names},
            read=self.read,
            write=self.write,
        )

    def read(self, table: Mapping[str, Any], where: str) -> ModelConfig:
        for key, values in _ONLY.items():
            if table.get(key, values[0]) not in values:
                raise ConfigError(f"{where}{key} is {brief(table[key])}, which the layers here do not have")
        model, mixer, sizes = (o.read(table, where) for o in (self.model, self.mixer, self.sizes))
        if sizes["layers"] > DEEPEST:
            raise ConfigError(f"{where}num_hidden_layers is {sizes['layers']:,}, expected at most {DEEPEST:,}")
        width, expand = model["d_model"], sizes["expand"]
        if not 1 <= expand * width < 2**63:
            raise ConfigError(f"{where}expand is {brief(expand)}, expected a positive number")
        channels = mixer.pop("d_inner", None) or int(expand * width)
        mixer |= scan_width(channels, width)
        if mixer.get("dt_rank") == rank(width):
            mixer["dt_rank"] = None
        if (heads := sizes.get("heads")) and heads * mixer["d_head"] != channels:
            came = f"{heads} * {mixer['d_head']}"
            raise ConfigError(f"{where}num_heads * head_dim is {came}, expected expand * hidden_size = {channels}")
        return ModelConfig(parts={"M": (self.part(**mixer),)}, pattern="M" * sizes["layers"], **model)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        parts = one_block(config, "transformers")
        if [type(part) for part in parts] != [self.part]:
            raise self._lacks("blocks of " + ", ".join(type(part).__name__.removesuffix("Config") for part in parts))
        part: Any = parts[0]
        width = config.d_model
        if (getattr(part, "norm_maps", None) is not None) != ("mixer_rms_eps" in self.mixer.keys):
            raise self._lacks(f"norm_maps = {part.norm_maps}")
        channels = part.expand * width if part.d_inner is None else part.d_inner
        model, mixer = self.model.write(config), self.mixer.write(part)
        if any(model[key] != mixer[key] for key in model.keys() & mixer.keys()):
            raise self._lacks(f"a norm_eps of {part.norm_eps} beside one of {config.norm_eps}")
        if self.part is Mamba2Config:
            if channels % width:
                raise self._lacks(f"d_inner = {channels}, no multiple of d_model = {width}")
            mixer |= {"num_heads": channels // part.d_head, "time_step_limit": encoded(part.dt_limit)}
        else:
            mixer |= {"intermediate_size": channels, "time_step_rank": part.dt_rank or rank(width)}
        sizes = {"num_hidden_layers": len(config.pattern), "expand": max(1, channels // width)}
        about = {"architectures": [self.architecture], "model_type": self.model_type, "hidden_act": "silu"}
        return {**about, **model, **mixer, **sizes, **_SILENT}

    def _lacks(self, what: str) -> ConfigError:
        return ConfigError(f"model: {what}, which {self.architecture} of transformers does not have")


_SIZES: dict[str, tuple[str, Any]] = {"num_hidden_layers": ("layers", 32), "expand": ("expand", 2)}
_SIZES2 = {**_SIZES, "num_hidden_layers": ("layers", 64), "num_heads": ("heads", 128)}

HF: dict[str, Layout] = {
    family.model_type: family.layout()
    for family in (
        _Family(
            "mamba",
            "MambaForCausalLM",
            MambaConfig,
            MAMBA,
            Options(ModelConfig, _MODEL),
            Options(MambaConfig, _MAMBA),
            Options(_Sizes, _SIZES),
        ),
        _Family(
            "falcon_mamba",
            "FalconMambaForCausalLM",
            MambaConfig,
            MAMBA,
            Options(ModelConfig, _MODEL),
            Options(MambaConfig, _FALCON),
            Options(_Sizes, _SIZES),
        ),
        _Family(
            "mamba2",
            "Mamba2ForCausalLM",
            Mamba2Config,
            MAMBA2,
            Options(ModelConfig, _MODEL2),
            Options(Mamba2Config, _MAMBA2),
            Options(_Sizes, _SIZES2),
        ),
    )
}
"""The layouts of transformers by their ``model_type``."""
