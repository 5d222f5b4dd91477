"""Bamba: Mamba-2 with attention in some layers, each before a feed-forward."""

from typing import Any, NamedTuple

from dualform.layers.attention import AttentionConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.layers.mlp import MLPConfig
from dualform.models.config import ModelConfig
from dualform.models.tables.family import Family, Found
from dualform.models.tables.layout import Options
from dualform.models.tables.mamba2_keys import MAMBA2, SCAN, heads_of, written_heads
from dualform.models.tables.rope import rotated, share


class _Sizes(NamedTuple):
    layers: int
    attends: tuple[int, ...] | None
    turned: float
    expand: float
    heads: int
    head: int | None


def _build(found: Found) -> ModelConfig:
    s, model = found.sizes, found.of[ModelConfig]
    scan = Mamba2Config(**found.of[Mamba2Config], **heads_of(s, model["d_model"], found.where))
    attention = found.of[AttentionConfig]
    d_rope = rotated(s.turned, model["d_model"] // attention["heads"], found.where)
    mlp = MLPConfig(**found.of[MLPConfig])
    parts = {"M": (scan, mlp), "A": (AttentionConfig(**attention, d_rope=d_rope), mlp)}
    pattern = "".join("A" if i in (s.attends or ()) else "M" for i in range(s.layers))
    return ModelConfig(parts={letter: parts[letter] for letter in parts if letter in pattern}, pattern=pattern, **model)


def _describe(config: ModelConfig) -> dict[str, Any]:
    kinds = [config.parts[letter][0] for letter in config.pattern]
    scans = [part for part in kinds if isinstance(part, Mamba2Config)]
    attention = next((part for part in kinds if isinstance(part, AttentionConfig)), AttentionConfig())
    head = config.d_model // attention.heads
    return {
        "num_hidden_layers": len(kinds),
        "attn_layer_indices": [i for i, part in enumerate(kinds) if isinstance(part, AttentionConfig)],
        "partial_rotary_factor": share(attention.d_rope, head),
        **written_heads(scans[0], config.d_model),
    }


BAMBA = Family(
    model_type="bamba",
    architecture="BambaForCausalLM",
    options={
        ModelConfig: Options(
            ModelConfig,
            {
                "hidden_size": ("d_model", 4096),
                "vocab_size": ("vocab_size", 128000),
                "rms_norm_eps": ("norm_eps", 1e-5),
                "tie_word_embeddings": ("tie_embeddings", False),
            },
        ),
        Mamba2Config: MAMBA2,
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
            "attn_layer_indices": ("attends", None),
            "partial_rotary_factor": ("turned", 0.5),
            **SCAN,
        },
    ),
    build=_build,
    describe=_describe,
    outside={"embed": "model.embed_tokens.", "norm": "model.final_layernorm.", "head": "lm_head."},
    blocks={
        "M": {
            "norms.0.": "input_layernorm.",
            "parts.0.": "mamba.",
            "norms.1.": "pre_ff_layernorm.",
            "parts.1.": "feed_forward.",
        },
        "A": {
            "norms.0.": "input_layernorm.",
            "parts.0.": "self_attn.",
            "norms.1.": "pre_ff_layernorm.",
            "parts.1.": "feed_forward.",
        },
    },
    only={"hidden_act": ("silu", "swish")},
)
