"""LFM2: gated short convolutions, and attention in some layers, each before a feed-forward."""

from typing import Any, NamedTuple

from dualform.core.errors import ConfigError
from dualform.core.options import brief
from dualform.layers.attention import AttentionConfig
from dualform.layers.mlp import MLPConfig
from dualform.layers.short_conv import GatedShortConvConfig
from dualform.models.config import ModelConfig
from dualform.models.tables.family import Family, Found
from dualform.models.tables.layout import DEPTHWISE, Options, Piece
from dualform.models.tables.names import NUMBERED, renamed
from dualform.models.tables.names import attention as usual_attention
from dualform.models.tables.names import mlp as usual_mlp

KINDS = {"conv": "C", "full_attention": "A"}
"""Layers as the config there calls them, and the letters of their blocks."""


class _Sizes(NamedTuple):
    layers: int
    types: tuple[str, ...] | None
    attends: tuple[int, ...] | None
    tied: bool | None
    hidden: int
    old_hidden: int | None
    adjusted: bool
    factor: float | None
    multiple: int


def pattern(sizes: Any, where: str) -> str:
    """The letters of the layers, which ``layer_types`` or ``full_attn_idxs`` say; attention where neither does.

    Raises:
        ConfigError: for another kind of layer, or not one for each.
    """
    types = sizes.types
    if types is None:
        attends = range(sizes.layers) if sizes.attends is None else sizes.attends
        return "".join("A" if i in attends else "C" for i in range(sizes.layers))
    if len(types) != sizes.layers or not set(types) <= KINDS.keys():
        raise ConfigError(f"{where}layer_types is {brief(types)}, expected {sizes.layers} of {', '.join(KINDS)}")
    return "".join(KINDS[kind] for kind in types)


def _hidden(s: _Sizes, where: str) -> int:
    """The inner width, which the library there may adjust."""
    hidden = s.hidden if s.old_hidden is None else s.old_hidden
    if not s.adjusted:
        return hidden
    hidden = int(2 * hidden / 3)
    if s.factor is not None:
        if not 0 <= s.factor * hidden < 2**62:
            raise ConfigError(f"{where}block_ffn_dim_multiplier is {brief(s.factor)}, expected a positive number")
        hidden = -(-int(s.factor * hidden) // s.multiple) * s.multiple
    return hidden


def _build(found: Found) -> ModelConfig:
    s, model = found.sizes, dict(found.of[ModelConfig])
    if s.tied is not None:
        model["tie_embeddings"] = s.tied
    mlp = MLPConfig(d_hidden=_hidden(s, found.where))
    parts = {
        "C": (GatedShortConvConfig(**found.of[GatedShortConvConfig]), mlp),
        "A": (AttentionConfig(**found.of[AttentionConfig], qk_norm="rms"), mlp),
    }
    letters = pattern(s, found.where)
    return ModelConfig(parts={letter: parts[letter] for letter in parts if letter in letters}, pattern=letters, **model)


def _describe(config: ModelConfig) -> dict[str, Any]:
    blocks = [config.parts[letter] for letter in config.pattern]
    types = ["full_attention" if isinstance(part, AttentionConfig) else "conv" for part, _ in blocks]
    mlp: Any = blocks[0][1]
    return {
        "num_hidden_layers": len(types),
        "layer_types": types,
        "intermediate_size": mlp.d_hidden,
        "block_auto_adjust_ff_dim": False,
    }


def attention(part: AttentionConfig, width: int) -> dict[str, tuple[Piece, ...]]:
    """As usual, but for the last map, which is called as here, and the norms of queries and keys."""
    norms = {f"{which}_norm.weight": (Piece(f"{which}_layernorm.weight"),) for which in "qk"}
    return {**renamed(usual_attention(part, width), {"o_proj": "out_proj"}), **norms}


def short_conv(part: GatedShortConvConfig, width: int) -> dict[str, tuple[Piece, ...]]:
    """The convolution is a module of its own there."""
    return {"conv_weight": (Piece("conv.weight", DEPTHWISE),), "conv_bias": (Piece("conv.bias"),)}


def mlp(part: MLPConfig, width: int) -> dict[str, tuple[Piece, ...]]:
    """The gate is ``w1`` there, what it multiplies ``w3``, and the last map ``w2``."""
    return {**renamed(usual_mlp(part, width), NUMBERED), "down_proj.weight": (Piece("w2.weight"),)}


_NAMES = {"norms.0.": "operator_norm.", "norms.1.": "ffn_norm.", "parts.1.": "feed_forward."}
IN_CONV, IN_ATTENTION = {**_NAMES, "parts.0.": "conv."}, {**_NAMES, "parts.0.": "self_attn."}
"""What begins the names in the two kinds of blocks."""
CONV = Options(GatedShortConvConfig, {"conv_L_cache": ("d_conv", 3), "conv_bias": ("bias", False)})
ATTENTION = Options(
    AttentionConfig,
    {
        "num_attention_heads": ("heads", 32),
        "num_key_value_heads": ("kv_heads", 8),
        "rope_theta": ("rope", 1000000.0),
        "norm_eps": ("norm_eps", 1e-5),
    },
)

LFM2 = Family(
    model_type="lfm2",
    architecture="Lfm2ForCausalLM",
    options={
        ModelConfig: Options(
            ModelConfig,
            {
                "hidden_size": ("d_model", 2560),
                "vocab_size": ("vocab_size", 65536),
                "norm_eps": ("norm_eps", 1e-5),
                "tie_word_embeddings": ("tie_embeddings", True),
            },
        ),
        GatedShortConvConfig: CONV,
        AttentionConfig: ATTENTION,
        MLPConfig: Options(MLPConfig, {}),
    },
    sizes=Options(
        _Sizes,
        {
            "num_hidden_layers": ("layers", 32),
            "layer_types": ("types", None),
            "full_attn_idxs": ("attends", None),
            "tie_embedding": ("tied", None),
            "intermediate_size": ("hidden", 12288),
            "block_ff_dim": ("old_hidden", None),
            "block_auto_adjust_ff_dim": ("adjusted", True),
            "block_ffn_dim_multiplier": ("factor", 1.0),
            "block_multiple_of": ("multiple", 256),
        },
    ),
    build=_build,
    describe=_describe,
    outside={"embed": "model.embed_tokens.", "norm": "model.embedding_norm.", "head": "lm_head."},
    blocks={"C": IN_CONV, "A": IN_ATTENTION},
    names={AttentionConfig: attention, GatedShortConvConfig: short_conv, MLPConfig: mlp},
)
