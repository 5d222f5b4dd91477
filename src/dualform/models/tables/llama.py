"""Llama: attention and a gated feed-forward in every layer; the baseline of the field."""

from typing import Any, NamedTuple

from dualform.layers.attention import AttentionConfig
from dualform.layers.mlp import MLPConfig
from dualform.models.config import ModelConfig
from dualform.models.tables.family import Family, Found
from dualform.models.tables.layout import Options


class _Sizes(NamedTuple):
    layers: int
    kv_heads: int | None


def _build(found: Found) -> ModelConfig:
    s, model, given = found.sizes, found.of[ModelConfig], found.of[AttentionConfig]
    attention = AttentionConfig(**given, kv_heads=s.kv_heads or given["heads"])
    return ModelConfig(parts={"A": (attention, MLPConfig(**found.of[MLPConfig]))}, pattern="A" * s.layers, **model)


def _describe(config: ModelConfig) -> dict[str, Any]:
    attention: Any = config.parts[config.pattern[0]][0]
    return {"num_hidden_layers": len(config.pattern), "num_key_value_heads": attention.kv_heads}


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    options={
        ModelConfig: Options(
            ModelConfig,
            {
                "hidden_size": ("d_model", 4096),
                "vocab_size": ("vocab_size", 32000),
                "rms_norm_eps": ("norm_eps", 1e-6),
                "tie_word_embeddings": ("tie_embeddings", False),
            },
        ),
        AttentionConfig: Options(
            AttentionConfig,
            {
                "num_attention_heads": ("heads", 32),
                "head_dim": ("d_head", None),
                "rope_theta": ("rope", 10000.0),
                "attention_bias": ("bias", False),
            },
        ),
        MLPConfig: Options(MLPConfig, {"intermediate_size": ("d_hidden", 11008), "mlp_bias": ("bias", False)}),
    },
    sizes=Options(_Sizes, {"num_hidden_layers": ("layers", 32), "num_key_value_heads": ("kv_heads", None)}),
    build=_build,
    describe=_describe,
    outside={"embed": "model.embed_tokens.", "norm": "model.norm.", "head": "lm_head."},
    blocks={
        "A": {
            "norms.0.": "input_layernorm.",
            "parts.0.": "self_attn.",
            "norms.1.": "post_attention_layernorm.",
            "parts.1.": "mlp.",
        }
    },
    only={"hidden_act": ("silu", "swish")},
    buffers=("self_attn.rotary_emb.inv_freq",),
)
