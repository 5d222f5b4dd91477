"""Granite 4: Mamba-2 and attention, experts beside a shared one, and factors of embedding, stream and logits."""

from typing import Any, NamedTuple

from dualform.layers.attention import AttentionConfig
from dualform.layers.block import SublayerConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.layers.mixer import PartConfig
from dualform.layers.mlp import MLPConfig
from dualform.layers.moe import MoEConfig
from dualform.models.config import ModelConfig
from dualform.models.tables.family import Family, Found
from dualform.models.tables.layout import Options, Piece
from dualform.models.tables.mamba2_keys import MAMBA2, SCAN, heads_of, written_heads
from dualform.models.tables.names import is_attention, type_names


class _Sizes(NamedTuple):
    layers: int
    types: tuple[str, ...] | None
    expand: float
    heads: int
    head: int | None
    positions: str | None
    base: float
    kv_heads: int | None
    experts: int
    shared: int
    added: float
    logits: float


def _build(found: Found) -> ModelConfig:
    s, model = found.sizes, found.of[ModelConfig]
    rope = s.base if s.positions == "rope" else None
    given = found.of[AttentionConfig]
    attention = AttentionConfig(**given, kv_heads=s.kv_heads or given["heads"], rope=rope)
    beside: PartConfig = MLPConfig(d_hidden=s.shared)
    if s.experts:
        beside = MoEConfig(**found.of[MoEConfig], experts=s.experts, d_shared=s.shared, z=0.0)
    types = s.types or ("mamba",) * s.layers
    pattern = "".join("A" if is_attention(kind) else "M" for kind in types)
    mixers: dict[str, PartConfig] = {"A": attention} if "A" in pattern else {}
    if "M" in pattern:
        mixers["M"] = Mamba2Config(**found.of[Mamba2Config], **heads_of(s, model["d_model"], found.where))
    parts = {
        letter: tuple(part if s.added == 1 else SublayerConfig(part, scale=s.added) for part in (mixer, beside))
        for letter, mixer in mixers.items()
    }
    return ModelConfig(parts=parts, pattern=pattern, logit_scale=1 / s.logits, **model)


def _describe(config: ModelConfig) -> dict[str, Any]:
    blocks: list[Any] = [config.parts[letter] for letter in config.pattern]
    inner: list[Any] = [tuple(s.part if isinstance(s, SublayerConfig) else s for s in block) for block in blocks]
    scan = next((part for part, _ in inner if isinstance(part, Mamba2Config)), None)
    attention = next((part for part, _ in inner if isinstance(part, AttentionConfig)), AttentionConfig(rope=None))
    beside, first = inner[0][1], blocks[0][0]
    moe = isinstance(beside, MoEConfig)
    return {
        "num_hidden_layers": len(inner),
        "layer_types": type_names(isinstance(part, AttentionConfig) for part, _ in inner),
        "position_embedding_type": None if attention.rope is None else "rope",
        "rope_theta": attention.rope or 10000.0,
        "num_key_value_heads": attention.kv_heads,
        "num_local_experts": beside.experts if moe else 0,
        "shared_intermediate_size": beside.d_shared if moe else beside.d_hidden,
        "residual_multiplier": first.scale if isinstance(first, SublayerConfig) else 1.0,
        "logits_scaling": 1 / config.logit_scale,
        **({"mamba_n_heads": 1} if scan is None else written_heads(scan, config.d_model)),
    }


def _moe(part: MoEConfig, width: int) -> dict[str, tuple[Piece, ...]]:
    return {
        "gate_up_proj": (Piece("block_sparse_moe.input_linear.weight"),),
        "down_proj": (Piece("block_sparse_moe.output_linear.weight"),),
        "router.weight": (Piece("block_sparse_moe.router.layer.weight"),),
        "shared.gate_up_proj.weight": (Piece("shared_mlp.input_linear.weight"),),
        "shared.down_proj.weight": (Piece("shared_mlp.output_linear.weight"),),
    }


def _mlp(part: MLPConfig, width: int) -> dict[str, tuple[Piece, ...]]:
    return {
        "gate_up_proj.weight": (Piece("shared_mlp.input_linear.weight"),),
        "down_proj.weight": (Piece("shared_mlp.output_linear.weight"),),
    }


_NAMES = {"norms.0.": "input_layernorm.", "norms.1.": "post_attention_layernorm.", "parts.1.": ""}

GRANITE = Family(
    model_type="granitemoehybrid",
    architecture="GraniteMoeHybridForCausalLM",
    options={
        ModelConfig: Options(
            ModelConfig,
            {
                "hidden_size": ("d_model", 4096),
                "vocab_size": ("vocab_size", 32000),
                "rms_norm_eps": ("norm_eps", 1e-6),
                "tie_word_embeddings": ("tie_embeddings", False),
                "embedding_multiplier": ("embed_scale", 1.0),
            },
        ),
        Mamba2Config: MAMBA2.but(rms_norm_eps=1e-6),
        AttentionConfig: Options(
            AttentionConfig,
            {
                "num_attention_heads": ("heads", 32),
                "attention_bias": ("bias", False),
                "attention_multiplier": ("scale", 1.0),
            },
        ),
        MoEConfig: Options(
            MoEConfig,
            {
                "intermediate_size": ("d_hidden", 11008),
                "num_experts_per_tok": ("top_k", 2),
                "router_aux_loss_coef": ("balance", 0.001),
            },
        ),
    },
    sizes=Options(
        _Sizes,
        {
            "num_hidden_layers": ("layers", 32),
            "layer_types": ("types", None),
            "position_embedding_type": ("positions", None),
            "rope_theta": ("base", 10000.0),
            "num_key_value_heads": ("kv_heads", None),
            "num_local_experts": ("experts", 8),
            "shared_intermediate_size": ("shared", 1024),
            "residual_multiplier": ("added", 1.0),
            "logits_scaling": ("logits", 1.0),
            **SCAN,
        },
        least=0,
    ),
    build=_build,
    describe=_describe,
    outside={"embed": "model.embed_tokens.", "norm": "model.norm.", "head": "lm_head."},
    blocks={"M": {**_NAMES, "parts.0.": "mamba."}, "A": {**_NAMES, "parts.0.": "self_attn."}},
    names={MoEConfig: _moe, MLPConfig: _mlp},
    only={"hidden_act": ("silu", "swish")},
)
