"""Mamba, Falcon-Mamba and Mamba-2 of transformers."""

import math
from typing import Any, NamedTuple

from dualform.core.errors import ConfigError
from dualform.core.options import brief
from dualform.layers.mamba import MambaConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.models.config import ModelConfig
from dualform.models.tables.family import Family, Found
from dualform.models.tables.layout import Options, rank, scan_width


class _Sizes(NamedTuple):
    layers: int
    expand: float
    heads: int | None = None


def _build(found: Found) -> ModelConfig:
    s, model, where = found.sizes, found.of[ModelConfig], found.where
    kind = Mamba2Config if Mamba2Config in found.of else MambaConfig
    width, mixer = model["d_model"], dict(found.of[kind])
    if not 1 <= s.expand * width < 2**63:
        raise ConfigError(f"{where}expand is {brief(s.expand)}, expected a positive number")
    channels = mixer.pop("d_inner", None) or int(s.expand * width)
    if mixer.get("dt_rank") == rank(width):
        mixer["dt_rank"] = None
    if s.heads and s.heads * mixer["d_head"] != channels:
        came = f"{s.heads} * {mixer['d_head']}"
        raise ConfigError(f"{where}num_heads * head_dim is {came}, expected expand * hidden_size = {channels}")
    mixer |= scan_width(channels, width)
    return ModelConfig(parts={"M": (kind(**mixer),)}, pattern="M" * s.layers, **model)


def _describe(config: ModelConfig) -> dict[str, Any]:
    part: Any = config.parts[config.pattern[0]][0]
    channels = part.expand * config.d_model if part.d_inner is None else part.d_inner
    about = {"num_hidden_layers": len(config.pattern), "expand": max(1, channels // config.d_model)}
    if isinstance(part, MambaConfig):
        return {**about, "intermediate_size": channels, "time_step_rank": part.dt_rank or rank(config.d_model)}
    if channels % config.d_model:
        raise ConfigError(f"d_inner = {channels}, no multiple of d_model = {config.d_model}")
    return {**about, "num_heads": channels // part.d_head}


_MODEL = Options(
    ModelConfig,
    {
        "hidden_size": ("d_model", 768),
        "vocab_size": ("vocab_size", 50280),
        "layer_norm_epsilon": ("norm_eps", 1e-5),
        "tie_word_embeddings": ("tie_embeddings", True),
    },
)
_MIXER = {
    "state_size": ("d_state", 16),
    "conv_kernel": ("d_conv", 4),
    "use_bias": ("bias", False),
    "use_conv_bias": ("conv_bias", True),
    "time_step_min": ("dt_min", 1e-3),
    "time_step_max": ("dt_max", 1e-1),
}
_SCAN = Options(MambaConfig, {**_MIXER, "time_step_rank": ("dt_rank", "auto"), "intermediate_size": ("d_inner", None)})
_SIZES: dict[str, tuple[str, Any]] = {"num_hidden_layers": ("layers", 32), "expand": ("expand", 2)}
_SAME: dict[str, Any] = {
    "build": _build,
    "describe": _describe,
    "outside": {"embed": "backbone.embeddings.", "norm": "backbone.norm_f.", "head": "lm_head."},
    "layer": "backbone.layers.{}.",
    "blocks": {"M": {"norms.0.": "norm.", "parts.0.": "mixer."}},
    "only": {"hidden_act": ("silu", "swish")},
}

MAMBA = Family(
    model_type="mamba",
    architecture="MambaForCausalLM",
    options={ModelConfig: _MODEL, MambaConfig: _SCAN},
    sizes=Options(_Sizes, _SIZES),
    **_SAME,
)
FALCON_MAMBA = Family(
    model_type="falcon_mamba",
    architecture="FalconMambaForCausalLM",
    options={
        ModelConfig: _MODEL,
        MambaConfig: Options(MambaConfig, {**_SCAN.keys, "mixer_rms_eps": ("norm_maps", 1e-6)}),
    },
    sizes=Options(_Sizes, _SIZES),
    **_SAME,
)
MAMBA2 = Family(
    model_type="mamba2",
    architecture="Mamba2ForCausalLM",
    options={
        ModelConfig: _MODEL.but(hidden_size=4096, vocab_size=32768, tie_word_embeddings=False),
        Mamba2Config: Options(
            Mamba2Config,
            {
                **_MIXER,
                "state_size": ("d_state", 128),
                "head_dim": ("d_head", 64),
                "n_groups": ("groups", 8),
                "time_step_limit": ("dt_limit", (0.0, math.inf)),
                "layer_norm_epsilon": ("norm_eps", 1e-5),
            },
        ),
    },
    sizes=Options(_Sizes, {**_SIZES, "num_hidden_layers": ("layers", 64), "num_heads": ("heads", 128)}),
    **_SAME,
)
