"""Falcon-H1: heads of Mamba-2 beside heads of attention in every layer, and a factor of nearly everything."""

from typing import Any, NamedTuple

from dualform.core.errors import ConfigError
from dualform.layers.attention import AttentionConfig
from dualform.layers.block import ParallelConfig, SublayerConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.layers.mlp import MLPConfig
from dualform.models.config import ModelConfig
from dualform.models.tables.family import Family, Found
from dualform.models.tables.layout import Options, scan_width
from dualform.models.tables.mamba2_keys import MAMBA2


class _Sizes(NamedTuple):
    layers: int
    heads: int
    head: int | None
    expand: int
    scan: int | None
    out_bias: bool
    head_dim: int | None
    key: float
    attention_in: float
    attention_out: float
    scan_in: float
    scan_out: float
    mlp: tuple[float, float] | None


def _build(found: Found) -> ModelConfig:
    s, model = found.sizes, found.of[ModelConfig]
    width, scan = model["d_model"], found.of[Mamba2Config]
    channels = s.scan or s.expand * width
    head = s.head or channels // s.heads
    if head * s.heads != channels:
        came = f"mamba_n_heads * mamba_d_head is {s.heads} * {head}"
        raise ConfigError(f"{found.where}{came}, expected the {channels} channels of the scan")
    if s.out_bias != scan["bias"]:
        raise ConfigError(f"{found.where}projectors_bias is {s.out_bias}, and mamba_proj_bias is not")
    given = found.of[AttentionConfig]
    d_head = s.head_dim or width // given["heads"]
    attention = AttentionConfig(**given, d_head=d_head, scale=None if s.key == 1 else s.key * d_head**-0.5)
    mixer = Mamba2Config(**{**scan, "d_head": head, **scan_width(channels, width)})
    gate, down = s.mlp or (1.0, 1.0)
    branches = ParallelConfig(
        (
            SublayerConfig(mixer, norm=None, scale_in=s.scan_in, scale=s.scan_out),
            SublayerConfig(attention, norm=None, scale_in=s.attention_in, scale=s.attention_out),
        )
    )
    mlp = SublayerConfig(MLPConfig(**found.of[MLPConfig], gate_scale=gate), scale=down)
    return ModelConfig(parts={"P": (branches, mlp)}, pattern="P" * s.layers, **model)


def _describe(config: ModelConfig) -> dict[str, Any]:
    block: Any = config.parts[config.pattern[0]]
    branches, mlp = block
    scan, attention = branches.parts
    mixer, head, feed = scan.part, attention.part, mlp.part
    channels = mixer.expand * config.d_model if mixer.d_inner is None else mixer.d_inner
    return {
        "num_hidden_layers": len(config.pattern),
        "mamba_d_ssm": channels,
        "mamba_n_heads": channels // mixer.d_head,
        "mamba_d_head": mixer.d_head,
        "projectors_bias": mixer.bias,
        "head_dim": head.d_head,
        "key_multiplier": 1.0 if head.scale is None else _key(head.scale, head.d_head),
        "attention_in_multiplier": attention.scale_in,
        "attention_out_multiplier": attention.scale,
        "ssm_in_multiplier": scan.scale_in,
        "ssm_out_multiplier": scan.scale,
        "mlp_multipliers": [feed.gate_scale, mlp.scale],
    }


def _key(scale: float, d_head: int) -> float:
    """The factor of keys that makes a scale."""
    exact = scale / d_head**-0.5
    return next((k for k in (exact, round(exact, 12)) if k * d_head**-0.5 == scale), exact)


_NAMES = {
    "norms.0.": "input_layernorm.",
    "parts.0.parts.0.": "mamba.",
    "parts.0.parts.1.": "self_attn.",
    "norms.1.": "pre_ff_layernorm.",
    "parts.1.": "feed_forward.",
}

FALCON_H1 = Family(
    model_type="falcon_h1",
    architecture="FalconH1ForCausalLM",
    options={
        ModelConfig: Options(
            ModelConfig,
            {
                "hidden_size": ("d_model", 4096),
                "vocab_size": ("vocab_size", 128000),
                "rms_norm_eps": ("norm_eps", 1e-5),
                "tie_word_embeddings": ("tie_embeddings", False),
                "embedding_multiplier": ("embed_scale", 1.0),
                "lm_head_multiplier": ("logit_scale", 1.0),
            },
        ),
        Mamba2Config: MAMBA2._replace(
            keys={
                **MAMBA2.keys,
                "mamba_rms_norm": ("norm", False),
                "mamba_norm_before_gate": ("norm_before_gate", True),
                "ssm_multipliers": ("scales", None),
            }
        ),
        AttentionConfig: Options(
            AttentionConfig,
            {
                "num_attention_heads": ("heads", 32),
                "num_key_value_heads": ("kv_heads", 8),
                "rope_theta": ("rope", 10000.0),
                "attention_bias": ("bias", False),
            },
        ),
        MLPConfig: Options(MLPConfig, {"intermediate_size": ("d_hidden", 14336), "mlp_bias": ("bias", False)}),
    },
    sizes=Options(
        _Sizes,
        {
            "num_hidden_layers": ("layers", 32),
            "mamba_n_heads": ("heads", 128),
            "mamba_d_head": ("head", None),
            "mamba_expand": ("expand", 2),
            "mamba_d_ssm": ("scan", 1024),
            "projectors_bias": ("out_bias", False),
            "head_dim": ("head_dim", None),
            "key_multiplier": ("key", 1.0),
            "attention_in_multiplier": ("attention_in", 1.0),
            "attention_out_multiplier": ("attention_out", 1.0),
            "ssm_in_multiplier": ("scan_in", 1.0),
            "ssm_out_multiplier": ("scan_out", 1.0),
            "mlp_multipliers": ("mlp", None),
        },
    ),
    build=_build,
    describe=_describe,
    outside={"embed": "model.embed_tokens.", "norm": "model.final_layernorm.", "head": "lm_head."},
    blocks={"P": _NAMES},
    only={"hidden_act": ("silu", "swish")},
)
