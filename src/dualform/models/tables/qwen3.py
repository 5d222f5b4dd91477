"""Qwen3: Llama with norms of queries and keys; some layers may have a window."""

from typing import Any, NamedTuple

from dualform.core.errors import ConfigError
from dualform.core.options import brief
from dualform.layers.attention import AttentionConfig
from dualform.layers.mlp import MLPConfig
from dualform.models.config import ModelConfig
from dualform.models.tables.family import Family, Found
from dualform.models.tables.layout import Options

_TYPES = {"full_attention": "A", "sliding_attention": "W"}


class _Sizes(NamedTuple):
    layers: int
    kv_heads: int | None
    slides: bool
    window: int | None
    first: int
    types: tuple[str, ...] | None


def _build(found: Found) -> ModelConfig:
    s, model, given = found.sizes, found.of[ModelConfig], found.of[AttentionConfig]
    window = s.window if s.slides else None
    types = s.types
    if types is None:
        sliding = "full_attention" if window is None else "sliding_attention"
        types = tuple(sliding if i >= s.first else "full_attention" for i in range(s.layers))
    if len(types) != s.layers or not {*types} <= _TYPES.keys():
        raise ConfigError(
            f"{found.where}layer_types is {brief(list(types))}, expected {s.layers} of {', '.join(_TYPES)}"
        )
    full = {**given, "kv_heads": s.kv_heads or given["heads"], "qk_norm": "rms"}
    mlp = MLPConfig(**found.of[MLPConfig])
    parts = {"A": (AttentionConfig(**full), mlp), "W": (AttentionConfig(**full, window=window), mlp)}
    pattern = "".join("A" if window is None else _TYPES[kind] for kind in types)
    return ModelConfig(parts={letter: parts[letter] for letter in parts if letter in pattern}, pattern=pattern, **model)


def _describe(config: ModelConfig) -> dict[str, Any]:
    attention: list[Any] = [config.parts[letter][0] for letter in config.pattern]
    window = next((part.window for part in attention if part.window), None)
    return {
        "num_hidden_layers": len(attention),
        "num_key_value_heads": attention[0].kv_heads,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": next((i for i, part in enumerate(attention) if part.window), len(attention)),
        "layer_types": ["sliding_attention" if part.window else "full_attention" for part in attention],
    }


_NAMES = {
    "norms.0.": "input_layernorm.",
    "parts.0.": "self_attn.",
    "norms.1.": "post_attention_layernorm.",
    "parts.1.": "mlp.",
}

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    options={
        ModelConfig: Options(
            ModelConfig,
            {
                "hidden_size": ("d_model", 4096),
                "vocab_size": ("vocab_size", 151936),
                "rms_norm_eps": ("norm_eps", 1e-6),
                "tie_word_embeddings": ("tie_embeddings", False),
            },
        ),
        AttentionConfig: Options(
            AttentionConfig,
            {
                "num_attention_heads": ("heads", 32),
                "head_dim": ("d_head", 128),
                "rope_theta": ("rope", 10000.0),
                "attention_bias": ("bias", False),
                "rms_norm_eps": ("norm_eps", 1e-6),
            },
        ),
        MLPConfig: Options(MLPConfig, {"intermediate_size": ("d_hidden", 22016)}),
    },
    sizes=Options(
        _Sizes,
        {
            "num_hidden_layers": ("layers", 32),
            "num_key_value_heads": ("kv_heads", 32),
            "use_sliding_window": ("slides", False),
            "sliding_window": ("window", 4096),
            "max_window_layers": ("first", 28),
            "layer_types": ("types", None),
        },
        least=0,
    ),
    build=_build,
    describe=_describe,
    outside={"embed": "model.embed_tokens.", "norm": "model.norm.", "head": "lm_head."},
    blocks={"A": _NAMES, "W": _NAMES},
    only={"hidden_act": ("silu", "swish")},
    buffers=("self_attn.rotary_emb.inv_freq",),
)
