"""Jamba: Mamba with norms inside, attention without positions in some layers, and experts in some feed-forwards."""

from typing import Any, NamedTuple

from dualform.layers.attention import AttentionConfig
from dualform.layers.mamba import MambaConfig
from dualform.layers.mlp import MLPConfig
from dualform.layers.moe import MoEConfig
from dualform.models.config import ModelConfig
from dualform.models.tables.family import Family, Found
from dualform.models.tables.layout import Options, Piece, rank, scan_width
from dualform.models.tables.names import CONVOLUTION, periodic


class _Sizes(NamedTuple):
    layers: int
    attention_period: int
    attention_offset: int
    experts_period: int
    experts_offset: int
    expand: int
    rank: int | None


_NAMES = {"norms.0.": "input_layernorm.", "norms.1.": "pre_ff_layernorm.", "parts.1.": "feed_forward."}
_NORMS = {"dt_norm": "dt_layernorm", "B_norm": "b_layernorm", "C_norm": "c_layernorm"}


def _build(found: Found) -> ModelConfig:
    s, model = found.sizes, found.of[ModelConfig]
    width = model["d_model"]
    scan = {**found.of[MambaConfig], **scan_width(s.expand * width, width), "norm_weights": True}
    mamba = MambaConfig(**scan, dt_rank=None if s.rank in (None, rank(width)) else s.rank)
    attention = AttentionConfig(**found.of[AttentionConfig], rope=None)
    mlp, moe = MLPConfig(**found.of[MLPConfig]), MoEConfig(**found.of[MoEConfig], normalise=False, z=0.0)
    parts = {"M": (mamba, mlp), "E": (mamba, moe), "A": (attention, mlp), "X": (attention, moe)}
    pattern = ""
    for i in range(s.layers):
        attends = i % s.attention_period == s.attention_offset
        routes = moe.experts > 1 and i % s.experts_period == s.experts_offset
        pattern += ("X" if routes else "A") if attends else ("E" if routes else "M")
    return ModelConfig(parts={letter: parts[letter] for letter in parts if letter in pattern}, pattern=pattern, **model)


def _describe(config: ModelConfig) -> dict[str, Any]:
    blocks = [config.parts[letter] for letter in config.pattern]
    count = len(blocks)
    scan = next(part for part, _ in blocks if isinstance(part, MambaConfig))
    channels = scan.expand * config.d_model if scan.d_inner is None else scan.d_inner
    attends = periodic([i for i, (part, _) in enumerate(blocks) if isinstance(part, AttentionConfig)], count)
    routes = periodic([i for i, (_, part) in enumerate(blocks) if isinstance(part, MoEConfig)], count)
    return {
        "num_hidden_layers": count,
        "attn_layer_period": attends[0],
        "attn_layer_offset": attends[1],
        "expert_layer_period": routes[0],
        "expert_layer_offset": routes[1],
        "mamba_expand": channels // config.d_model,
        "mamba_dt_rank": scan.dt_rank or rank(config.d_model),
    }


def _mamba(part: MambaConfig, width: int) -> dict[str, tuple[Piece, ...]]:
    norms = {f"{here}.weight": (Piece(f"{there}.weight"),) for here, there in _NORMS.items()}
    return {**CONVOLUTION, "dt_bias": (Piece("dt_proj.bias"),), **norms}


JAMBA = Family(
    model_type="jamba",
    architecture="JambaForCausalLM",
    options={
        ModelConfig: Options(
            ModelConfig,
            {
                "hidden_size": ("d_model", 4096),
                "vocab_size": ("vocab_size", 65536),
                "rms_norm_eps": ("norm_eps", 1e-6),
                "tie_word_embeddings": ("tie_embeddings", False),
            },
        ),
        MambaConfig: Options(
            MambaConfig,
            {
                "mamba_d_state": ("d_state", 16),
                "mamba_d_conv": ("d_conv", 4),
                "mamba_conv_bias": ("conv_bias", True),
                "mamba_proj_bias": ("bias", False),
                "rms_norm_eps": ("norm_maps", 1e-6),
            },
        ),
        AttentionConfig: Options(
            AttentionConfig, {"num_attention_heads": ("heads", 32), "num_key_value_heads": ("kv_heads", 8)}
        ),
        MLPConfig: Options(MLPConfig, {"intermediate_size": ("d_hidden", 14336)}),
        MoEConfig: Options(
            MoEConfig,
            {
                "intermediate_size": ("d_hidden", 14336),
                "num_experts": ("experts", 16),
                "num_experts_per_tok": ("top_k", 2),
                "router_aux_loss_coef": ("balance", 0.001),
            },
        ),
    },
    sizes=Options(
        _Sizes,
        {
            "num_hidden_layers": ("layers", 32),
            "attn_layer_period": ("attention_period", 8),
            "attn_layer_offset": ("attention_offset", 4),
            "expert_layer_period": ("experts_period", 2),
            "expert_layer_offset": ("experts_offset", 1),
            "mamba_expand": ("expand", 2),
            "mamba_dt_rank": ("rank", None),
        },
        least=0,
    ),
    build=_build,
    describe=_describe,
    outside={"embed": "model.embed_tokens.", "norm": "model.final_layernorm.", "head": "lm_head."},
    blocks={
        "M": {**_NAMES, "parts.0.": "mamba."},
        "E": {**_NAMES, "parts.0.": "mamba."},
        "A": {**_NAMES, "parts.0.": "self_attn."},
        "X": {**_NAMES, "parts.0.": "self_attn."},
    },
    names={MambaConfig: _mamba},
    only={"hidden_act": ("silu", "swish")},
)
