"""Nemotron-H: layers of one kind each, Mamba-2, attention without positions, a feed-forward or experts."""

import math
from typing import Any, NamedTuple

from dualform.core.errors import ConfigError
from dualform.core.options import brief
from dualform.layers.attention import AttentionConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.layers.mlp import MLPConfig
from dualform.layers.moe import MoEConfig
from dualform.models.config import ModelConfig
from dualform.models.tables.family import Family, Found
from dualform.models.tables.layout import Options, Piece, scan_width
from dualform.models.tables.names import moe

_KINDS = {"linear_attention": "M", "mamba": "M", "full_attention": "A", "attention": "A", "mlp": "F", "moe": "E"}
_SIGNS = {"M": "M", "*": "A", "-": "F", "E": "E"}  # of older files
_WRITTEN = {Mamba2Config: "linear_attention", AttentionConfig: "full_attention", MLPConfig: "mlp", MoEConfig: "moe"}


_EXPERTS: dict[str, Any] = {"activation": "relu2", "gated": False, "scores": "sigmoid", "corrected": True}
_EXPERTS |= {"balance": 0.0, "z": 0.0}  # transformers adds no loss of theirs


class _Sizes(NamedTuple):
    layers: int
    types: tuple[str, ...] | None
    signs: str | None
    heads: int
    head: int
    least: float


def _build(found: Found) -> ModelConfig:
    s, model = found.sizes, found.of[ModelConfig]
    width = model["d_model"]
    kinds, known = (s.types, _KINDS) if s.types or not s.signs else (s.signs, _SIGNS)
    kinds = kinds or ("linear_attention", "moe", "full_attention", "mlp")
    if unknown := [kind for kind in kinds if kind not in known]:
        raise ConfigError(f"{found.where}layers_block_type has {brief(unknown[0])}, expected one of {', '.join(known)}")
    limits = (s.least, math.inf)
    scan = {**found.of[Mamba2Config], **scan_width(s.heads * s.head, width), "d_head": s.head, "dt_limit": limits}
    parts = {
        "M": (Mamba2Config(**scan),),
        "A": (AttentionConfig(**found.of[AttentionConfig], rope=None),),
        "F": (MLPConfig(**found.of[MLPConfig], activation="relu2", gated=False),),
        "E": (MoEConfig(**found.of[MoEConfig], **_EXPERTS),),
    }
    pattern = "".join(known[kind] for kind in kinds)
    return ModelConfig(parts={letter: parts[letter] for letter in parts if letter in pattern}, pattern=pattern, **model)


def _describe(config: ModelConfig) -> dict[str, Any]:
    kinds = [config.parts[letter][0] for letter in config.pattern]
    scan = next((part for part in kinds if isinstance(part, Mamba2Config)), None)
    about: dict[str, Any] = {
        "num_hidden_layers": len(kinds),
        "layers_block_type": [_WRITTEN[type(part)] for part in kinds],
    }
    if scan is not None:
        channels = scan.expand * config.d_model if scan.d_inner is None else scan.d_inner
        heads = {"mamba_num_heads": channels // scan.d_head, "mamba_head_dim": scan.d_head}
        about |= {**heads, "expand": max(1, channels // config.d_model), "time_step_min": scan.dt_limit[0]}
    return about


def _moe(part: MoEConfig, width: int) -> dict[str, tuple[Piece, ...]]:
    found = {"router.weight": "gate.weight", "router.correction": "gate.e_score_correction_bias"}
    found |= {f"shared.{name}.weight": f"shared_experts.{name}.weight" for name in ("up_proj", "down_proj")}
    return {**moe(part, width), **{here: (Piece(there),) for here, there in found.items()}}


_NAMES = {"norms.0.": "norm.", "parts.0.": "mixer."}

NEMOTRON_H = Family(
    model_type="nemotron_h",
    architecture="NemotronHForCausalLM",
    options={
        ModelConfig: Options(
            ModelConfig,
            {
                "hidden_size": ("d_model", 4096),
                "vocab_size": ("vocab_size", 131072),
                "layer_norm_epsilon": ("norm_eps", 1e-5),
                "tie_word_embeddings": ("tie_embeddings", False),
            },
        ),
        Mamba2Config: Options(
            Mamba2Config,
            {
                "ssm_state_size": ("d_state", 128),
                "conv_kernel": ("d_conv", 4),
                "n_groups": ("groups", 8),
                "use_conv_bias": ("conv_bias", True),
                "use_bias": ("bias", False),
                "layer_norm_epsilon": ("norm_eps", 1e-5),
            },
        ),
        AttentionConfig: Options(
            AttentionConfig,
            {
                "num_attention_heads": ("heads", 32),
                "num_key_value_heads": ("kv_heads", 8),
                "head_dim": ("d_head", 128),
            },
        ),
        MLPConfig: Options(MLPConfig, {"intermediate_size": ("d_hidden", 21504), "mlp_bias": ("bias", False)}),
        MoEConfig: Options(
            MoEConfig,
            {
                "moe_intermediate_size": ("d_hidden", 7688),
                "moe_shared_expert_intermediate_size": ("d_shared", 7688),
                "n_routed_experts": ("experts", 8),
                "num_experts_per_tok": ("top_k", 2),
                "routed_scaling_factor": ("scale", 1.0),
                "norm_topk_prob": ("normalise", True),
                "n_group": ("groups", 1),
                "topk_group": ("top_groups", 1),
            },
        ),
    },
    sizes=Options(
        _Sizes,
        {
            "num_hidden_layers": ("layers", 4),
            "layers_block_type": ("types", None),
            "hybrid_override_pattern": ("signs", None),
            "mamba_num_heads": ("heads", 128),
            "mamba_head_dim": ("head", 64),
            "time_step_min": ("least", 1e-3),
        },
    ),
    build=_build,
    describe=_describe,
    outside={"embed": "backbone.embeddings.", "norm": "backbone.norm_f.", "head": "lm_head."},
    layer="backbone.layers.{}.",
    blocks=dict.fromkeys("MAFE", _NAMES),
    names={MoEConfig: _moe, MLPConfig: lambda part, width: {}},
    only={
        "mlp_hidden_act": ("relu2",),
        "mamba_hidden_act": ("silu", "swish"),
        "sliding_window": (None,),
        "moe_latent_size": (None,),
        "num_nextn_predict_layers": (0,),
    },
)
