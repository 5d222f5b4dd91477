"""OLMo hybrid: gated delta nets with norms before, and attention with norms behind, each with a feed-forward."""

from typing import Any, NamedTuple

from dualform.layers.attention import AttentionConfig
from dualform.layers.block import SublayerConfig
from dualform.layers.gated_delta_net import GatedDeltaNetConfig
from dualform.layers.mixer import PartConfig
from dualform.layers.mlp import MLPConfig
from dualform.models.config import ModelConfig
from dualform.models.tables.family import Family, Found
from dualform.models.tables.layout import DEPTHWISE, Options, Piece
from dualform.models.tables.names import is_attention, stacked, type_names

_EPS = 1e-5  # of the norm inside of a gated delta net, whatever the config says


class _Sizes(NamedTuple):
    layers: int
    types: tuple[str, ...] | None
    kv_heads: int | None
    heads: int | None
    key_heads: int | None
    key: int | None
    value: int | None


def _build(found: Found) -> ModelConfig:
    s, model, given = found.sizes, found.of[ModelConfig], found.of[AttentionConfig]
    key_heads = s.key_heads or given["heads"]
    key = s.key or int(0.75 * model["d_model"] / key_heads)
    widths = {"heads": s.heads or given["heads"], "key_heads": key_heads, "d_key": key, "d_value": s.value or 2 * key}
    delta = GatedDeltaNetConfig(**{**found.of[GatedDeltaNetConfig], **widths, "norm_eps": _EPS})
    normed = {"qk_norm": "rms", "qk_norm_over": "all", "norm_eps": model["norm_eps"]}
    attention = AttentionConfig(**{**given, **normed, "kv_heads": s.kv_heads or given["heads"]})
    mlp = MLPConfig(**found.of[MLPConfig])
    parts: dict[str, tuple[PartConfig, ...]] = {
        "D": (delta, mlp),
        "A": tuple(SublayerConfig(part, norm=None, after="rms") for part in (attention, mlp)),
    }
    types = s.types or tuple("full_attention" if i % 4 == 3 else "linear" for i in range(s.layers))
    types = types if any(map(is_attention, types)) else (*types[:-1], "full_attention")
    pattern = "".join("A" if is_attention(kind) else "D" for kind in types)
    return ModelConfig(parts={letter: parts[letter] for letter in parts if letter in pattern}, pattern=pattern, **model)


def _describe(config: ModelConfig) -> dict[str, Any]:
    blocks: list[Any] = [config.parts[letter] for letter in config.pattern]
    delta = next(mixer for mixer, _ in blocks if isinstance(mixer, GatedDeltaNetConfig))
    attention = next(mixer.part for mixer, _ in blocks if isinstance(mixer, SublayerConfig))
    key = delta.d_key or config.d_model // delta.heads
    return {
        "num_hidden_layers": len(blocks),
        "layer_types": type_names(isinstance(mixer, SublayerConfig) for mixer, _ in blocks),
        "num_key_value_heads": attention.kv_heads,  # pyright: ignore[reportAttributeAccessIssue]
        "linear_num_value_heads": delta.heads,
        "linear_num_key_heads": delta.key_heads or delta.heads,
        "linear_key_head_dim": key,
        "linear_value_head_dim": delta.d_value or 2 * key,
    }


def _delta(part: GatedDeltaNetConfig, width: int) -> dict[str, tuple[Piece, ...]]:
    """The rows of the convolution are three tensors, as transformers cuts them: alike, whatever the widths."""
    keys, values = _widths(part, width)
    third = -(-(2 * keys + values) // 3)
    return _named(part, width, {"q_conv1d": third, "k_conv1d": third, "v_conv1d": 2 * keys + values - 2 * third})


def _original(part: GatedDeltaNetConfig, width: int) -> dict[str, tuple[Piece, ...]]:
    """The convolution of queries, that of keys and that of values are tensors of their own."""
    keys, values = _widths(part, width)
    return _named(part, width, {"q_conv1d": keys, "k_conv1d": keys, "v_conv1d": values})


def _widths(part: GatedDeltaNetConfig, width: int) -> tuple[int, int]:
    """Of all keys and of all values."""
    key = part.d_key or width // part.heads
    return (part.key_heads or part.heads) * key, part.heads * (part.d_value or 2 * key)


def _named(part: GatedDeltaNetConfig, width: int, convolved: dict[str, int]) -> dict[str, tuple[Piece, ...]]:
    keys, values = _widths(part, width)
    sizes = {"q_proj": keys, "k_proj": keys, "v_proj": values, "b_proj": part.heads, "g_proj": values}
    return {
        "in_proj.weight": stacked({**sizes, "a_proj": part.heads}),
        "conv_weight": tuple(piece._replace(change=DEPTHWISE) for piece in stacked(convolved)),
        "norm.weight": (Piece("o_norm.weight"),),
        "out_proj.weight": (Piece("o_proj.weight"),),
    }


OLMO_HYBRID = Family(
    model_type="olmo_hybrid",
    architecture="OlmoHybridForCausalLM",
    options={
        ModelConfig: Options(
            ModelConfig,
            {
                "hidden_size": ("d_model", 3840),
                "vocab_size": ("vocab_size", 100352),
                "rms_norm_eps": ("norm_eps", 1e-6),
                "tie_word_embeddings": ("tie_embeddings", False),
            },
        ),
        GatedDeltaNetConfig: Options(
            GatedDeltaNetConfig,
            {
                "linear_conv_kernel_dim": ("d_conv", 4),
                "linear_allow_neg_eigval": ("negative", True),
                "linear_dt_min": ("dt_min", 1e-3),
                "linear_dt_max": ("dt_max", 1e-1),
            },
        ),
        AttentionConfig: Options(
            AttentionConfig,
            {"num_attention_heads": ("heads", 30), "rope_theta": ("rope", 10000.0), "attention_bias": ("bias", False)},
        ),
        MLPConfig: Options(MLPConfig, {"intermediate_size": ("d_hidden", 11008)}),
    },
    sizes=Options(
        _Sizes,
        {
            "num_hidden_layers": ("layers", 32),
            "layer_types": ("types", None),
            "num_key_value_heads": ("kv_heads", None),
            "linear_num_value_heads": ("heads", None),
            "linear_num_key_heads": ("key_heads", None),
            "linear_key_head_dim": ("key", None),
            "linear_value_head_dim": ("value", None),
        },
    ),
    build=_build,
    describe=_describe,
    outside={"embed": "model.embed_tokens.", "norm": "model.norm.", "head": "lm_head."},
    blocks={
        "D": {
            "norms.0.": "attention_layer_norm.",
            "parts.0.": "linear_attn.",
            "norms.1.": "feedforward_layer_norm.",
            "parts.1.": "mlp.",
        },
        "A": {
            "parts.0.": "self_attn.",
            "after.0.": "feedforward_layer_norm.",
            "parts.1.": "mlp.",
            "after.1.": "post_feedforward_layernorm.",
        },
    },
    names={GatedDeltaNetConfig: _delta},
    original={GatedDeltaNetConfig: _original},
    only={"hidden_act": ("silu", "swish")},
)
