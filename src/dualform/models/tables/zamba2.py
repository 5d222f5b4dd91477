"""Zamba2: Mamba-2, and shared blocks of attention, taken in turn; every use adds low-rank matrices of its own."""

import math
from typing import Any, NamedTuple

from dualform.core.errors import ConfigError
from dualform.layers.attention import AttentionConfig
from dualform.layers.block import SublayerConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.layers.mlp import MLPConfig
from dualform.models.config import ModelConfig
from dualform.models.tables.family import Family, Found
from dualform.models.tables.layout import Options, Piece, scan_width
from dualform.models.tables.names import ACTIVATIONS, activation_of, attention
from dualform.models.tables.zamba import found_in, hybrid, in_blocks, layer_types, names_of_hybrids, saves

_SHARED = "STUVWXYZ"  # letters of the shared blocks
_TYPES = (
    "mamba",
    *(("mamba",) * 5 + ("hybrid",)) * 7,
    *("mamba",) * 4,
    "hybrid",
    *("mamba",) * 3,
    "hybrid",
    *("mamba",) * 2,
)


class _Sizes(NamedTuple):
    layers: int
    types: tuple[str, ...] | None
    expand: int
    heads: int
    least: float
    hidden: int | None
    kv_heads: int | None
    shared: int
    adapted: bool
    rank: int
    turned: bool
    base: float
    act: str


def _build(found: Found) -> ModelConfig:
    s, model = found.sizes, found.of[ModelConfig]
    width = model["d_model"]
    channels = s.expand * width
    if channels % s.heads:
        raise ConfigError(f"{found.where}n_mamba_heads is {s.heads}, expected a divisor of {channels}")
    if not 0 < s.shared <= len(_SHARED):
        raise ConfigError(f"{found.where}num_mem_blocks is {s.shared}, expected 1 to {len(_SHARED)}")
    scan = {**found.of[Mamba2Config], **scan_width(channels, width), "d_head": channels // s.heads}
    given = found.of[AttentionConfig]
    head = 2 * width // given["heads"]
    turned = {"rope": s.base if s.turned else None, "scale": (head / 2) ** -0.5, "d_head": head, "d_out": width}
    attention = AttentionConfig(**given, **turned, kv_heads=s.kv_heads or given["heads"])
    mlp = MLPConfig(**found.of[MLPConfig], d_hidden=s.hidden or 4 * width, activation=activation_of(s.act, found.where))
    low_rank = s.rank if s.adapted else 0
    blocks = hybrid(
        Mamba2Config(**scan, dt_limit=(s.least, math.inf)),
        SublayerConfig(attention, joined="embedding", stream=0.0, low_rank=low_rank),
        SublayerConfig(mlp, stream=0.0, low_rank=s.rank),
    )
    letters = _SHARED[: s.shared]
    pattern = in_blocks(s.types or _TYPES, letters)
    parts = {**blocks, **dict.fromkeys(letters, blocks["S"])}
    shared = "".join(letter for letter in letters if letter in pattern)
    return ModelConfig(
        parts={letter: parts[letter] for letter in parts if letter in pattern}, pattern=pattern, shared=shared, **model
    )


def _describe(config: ModelConfig) -> dict[str, Any]:
    scan, attention, mlp = found_in(config)
    types = layer_types(config)
    channels = scan.expand * config.d_model if scan.d_inner is None else scan.d_inner
    return {
        "num_hidden_layers": len(types),
        "layers_block_type": types,
        "hybrid_layer_ids": [i for i, kind in enumerate(types) if kind == "hybrid"],
        "mamba_expand": channels // config.d_model,
        "n_mamba_heads": channels // scan.d_head,
        "time_step_min": scan.dt_limit[0],
        "intermediate_size": mlp.part.d_hidden,
        "num_key_value_heads": attention.part.kv_heads,
        "num_mem_blocks": len({letter for letter in config.pattern if saves(config, letter)}),
        "use_shared_attention_adapter": attention.low_rank > 0,
        "adapter_rank": mlp.low_rank,
        "use_mem_rope": attention.part.rope is not None,
        "rope_theta": attention.part.rope or 10000.0,
        "hidden_act": next(there for there, here in ACTIVATIONS.items() if here == mlp.part.activation),
    }


def _adapters(inner: str, lists: list[str]) -> dict[str, tuple[Piece, ...]]:
    """The low-rank matrices of each piece of a map."""
    return {
        f"{inner}.{half}.{i}.weight": (Piece(f"{name}.{{use}}.{at}.weight"),)
        for at, half in enumerate(("down", "up"))
        for i, name in enumerate(lists)
    }


def _attention(part: AttentionConfig, width: int) -> dict[str, tuple[Piece, ...]]:
    return {**attention(part, 2 * width), **_adapters("qkv_proj", [f"linear_{m}_adapter_list" for m in "qkv"])}


def _mlp(part: MLPConfig, width: int) -> dict[str, tuple[Piece, ...]]:
    kinds = {f"gate_up_proj.base.{kind}": (Piece(f"gate_up_proj.{kind}"),) for kind in ("weight", "bias")}
    return {**kinds, **_adapters("gate_up_proj", ["gate_up_proj_adapter_list"])}


ZAMBA2 = Family(
    model_type="zamba2",
    architecture="Zamba2ForCausalLM",
    options={
        ModelConfig: Options(
            ModelConfig,
            {
                "hidden_size": ("d_model", 2560),
                "vocab_size": ("vocab_size", 32000),
                "rms_norm_eps": ("norm_eps", 1e-5),
            },
        ),
        Mamba2Config: Options(
            Mamba2Config,
            {
                "mamba_d_state": ("d_state", 64),
                "mamba_d_conv": ("d_conv", 4),
                "mamba_ngroups": ("groups", 1),
                "add_bias_linear": ("bias", False),
            },
        ),
        AttentionConfig: Options(AttentionConfig, {"num_attention_heads": ("heads", 32)}),
        MLPConfig: Options(MLPConfig, {"add_bias_linear": ("bias", False)}),
    },
    sizes=Options(
        _Sizes,
        {
            "num_hidden_layers": ("layers", 54),
            "layers_block_type": ("types", None),
            "mamba_expand": ("expand", 2),
            "n_mamba_heads": ("heads", 8),
            "time_step_min": ("least", 1e-3),
            "intermediate_size": ("hidden", None),
            "num_key_value_heads": ("kv_heads", None),
            "num_mem_blocks": ("shared", 1),
            "use_shared_attention_adapter": ("adapted", False),
            "adapter_rank": ("rank", 128),
            "use_mem_rope": ("turned", False),
            "rope_theta": ("base", 10000.0),
            "hidden_act": ("act", "gelu"),
        },
    ),
    build=_build,
    describe=_describe,
    outside={"embed": "model.embed_tokens.", "norm": "model.final_layernorm.", "head": "lm_head."},
    blocks=(_blocks := names_of_hybrids("shared_transformer", "feed_forward")) | dict.fromkeys(_SHARED, _blocks["S"]),
    beside=_SHARED,
    names={AttentionConfig: _attention, MLPConfig: _mlp},
    only={"tie_word_embeddings": (True,), "use_conv_bias": (True,), "use_long_context": (False,)},
)
