"""LFM2 with experts: gated short convolutions, attention in some layers, and experts behind the first few layers."""

from typing import Any, NamedTuple

from dualform.core.errors import ConfigError
from dualform.core.options import brief
from dualform.layers.attention import AttentionConfig
from dualform.layers.mlp import MLPConfig
from dualform.layers.moe import MoEConfig
from dualform.layers.short_conv import GatedShortConvConfig
from dualform.models.config import ModelConfig
from dualform.models.tables.family import Family, Found
from dualform.models.tables.layout import Options, Piece
from dualform.models.tables.lfm2 import ATTENTION, CONV, IN_ATTENTION, IN_CONV, attention, mlp, short_conv
from dualform.models.tables.names import NUMBERED, is_attention, moe, renamed


class _Sizes(NamedTuple):
    layers: int
    types: tuple[str, ...] | None
    dense: int


def _build(found: Found) -> ModelConfig:
    s, model = found.sizes, found.of[ModelConfig]
    if s.types is None or len(s.types) != s.layers:
        came = brief(None if s.types is None else list(s.types))
        raise ConfigError(f"{found.where}layer_types is {came}, expected the types of {s.layers} layers")
    conv = GatedShortConvConfig(**found.of[GatedShortConvConfig])
    attends = AttentionConfig(**found.of[AttentionConfig], qk_norm="rms")
    dense = MLPConfig(**found.of[MLPConfig])
    experts = MoEConfig(**found.of[MoEConfig], scores="sigmoid", eps=1e-6, balance=0.0, z=0.0)
    parts = {"C": (conv, dense), "A": (attends, dense), "E": (conv, experts), "X": (attends, experts)}
    pattern = ""
    for i, kind in enumerate(s.types):
        first = i < s.dense
        pattern += ("A" if first else "X") if is_attention(kind) else ("C" if first else "E")
    return ModelConfig(parts={letter: parts[letter] for letter in parts if letter in pattern}, pattern=pattern, **model)


def _describe(config: ModelConfig) -> dict[str, Any]:
    blocks = [config.parts[letter] for letter in config.pattern]
    return {
        "num_hidden_layers": len(blocks),
        "layer_types": ["full_attention" if isinstance(part, AttentionConfig) else "conv" for part, _ in blocks],
        "num_dense_layers": sum(isinstance(part, MLPConfig) for _, part in blocks),
    }


def _moe(part: MoEConfig, width: int) -> dict[str, tuple[Piece, ...]]:
    own = {"router.weight": (Piece("gate.weight"),), "router.correction": (Piece("expert_bias"),)}
    return {**renamed(moe(part, width), NUMBERED), **own}


LFM2_MOE = Family(
    model_type="lfm2_moe",
    architecture="Lfm2MoeForCausalLM",
    options={
        ModelConfig: Options(
            ModelConfig,
            {
                "hidden_size": ("d_model", 2048),
                "vocab_size": ("vocab_size", 65536),
                "norm_eps": ("norm_eps", 1e-5),
                "tie_word_embeddings": ("tie_embeddings", True),
            },
        ),
        GatedShortConvConfig: CONV,
        AttentionConfig: ATTENTION,
        MLPConfig: Options(MLPConfig, {"intermediate_size": ("d_hidden", 7168)}),
        MoEConfig: Options(
            MoEConfig,
            {
                "moe_intermediate_size": ("d_hidden", 1792),
                "num_experts": ("experts", 32),
                "num_experts_per_tok": ("top_k", 4),
                "routed_scaling_factor": ("scale", 1.0),
                "norm_topk_prob": ("normalise", True),
                "use_expert_bias": ("corrected", True),
            },
        ),
    },
    sizes=Options(
        _Sizes,
        {"num_hidden_layers": ("layers", 32), "layer_types": ("types", None), "num_dense_layers": ("dense", 2)},
        least=0,
    ),
    build=_build,
    describe=_describe,
    outside={"embed": "model.embed_tokens.", "norm": "model.embedding_norm.", "head": "lm_head."},
    blocks={"C": IN_CONV, "E": IN_CONV, "A": IN_ATTENTION, "X": IN_ATTENTION},
    names={MoEConfig: _moe, MLPConfig: mlp, AttentionConfig: attention, GatedShortConvConfig: short_conv},
)
