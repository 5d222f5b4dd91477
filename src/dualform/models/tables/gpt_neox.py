"""GPT-NeoX, and so Pythia: attention beside a feed-forward, layer norms, biases, a rotation of a part of each head."""

from typing import Any, NamedTuple

from dualform.layers.attention import AttentionConfig
from dualform.layers.block import ParallelConfig, SublayerConfig
from dualform.layers.mlp import MLPConfig
from dualform.models.config import ModelConfig
from dualform.models.tables.family import Family, Found
from dualform.models.tables.layout import Change, Options, Piece
from dualform.models.tables.names import ACTIVATIONS, activation_of
from dualform.models.tables.rope import rotated, share


class _Sizes(NamedTuple):
    layers: int
    turned: float
    act: str
    parallel: bool


def _build(found: Found) -> ModelConfig:
    s, model = found.sizes, found.of[ModelConfig]
    given = found.of[AttentionConfig]
    attention = AttentionConfig(**given, d_rope=rotated(s.turned, model["d_model"] // given["heads"], found.where))
    mlp = MLPConfig(**found.of[MLPConfig], bias=True, gated=False, activation=activation_of(s.act, found.where))
    parts = tuple(SublayerConfig(part, norm="layer") for part in (attention, mlp))
    block = (SublayerConfig(ParallelConfig(parts), norm=None),) if s.parallel else parts
    return ModelConfig(parts={"P": block}, pattern="P" * s.layers, norm="layer", **model)


def _describe(config: ModelConfig) -> dict[str, Any]:
    block: Any = config.parts[config.pattern[0]]
    parallel = len(block) == 1
    attention, mlp = (s.part for s in (block[0].part.parts if parallel else block))
    head = attention.d_head or config.d_model // attention.heads
    return {
        "num_hidden_layers": len(config.pattern),
        "partial_rotary_factor": share(attention.d_rope, head),
        "hidden_act": next(there for there, here in ACTIVATIONS.items() if here == mlp.activation),
        "use_parallel_residual": parallel,
    }


def _attention(part: AttentionConfig, width: int) -> dict[str, tuple[Piece, ...]]:
    """The rows of queries, keys and values alternate head by head."""
    sizes = (part.heads, 3, width // part.heads)
    turns = Change(
        lambda t: t.unflatten(0, sizes).transpose(0, 1).flatten(0, 2),
        lambda t: t.unflatten(0, (3, part.heads, sizes[2])).transpose(0, 1).flatten(0, 2),
    )
    found = {f"qkv_proj.{kind}": (Piece(f"query_key_value.{kind}", turns),) for kind in ("weight", "bias")}
    return found | {f"out_proj.{kind}": (Piece(f"dense.{kind}"),) for kind in ("weight", "bias")}


def _mlp(part: MLPConfig, width: int) -> dict[str, tuple[Piece, ...]]:
    names = {"up_proj": "dense_h_to_4h", "down_proj": "dense_4h_to_h"}
    return {f"{h}.{kind}": (Piece(f"{t}.{kind}"),) for h, t in names.items() for kind in ("weight", "bias")}


_NAMES = {
    "norms.0.": "input_layernorm.",
    "parts.0.": "attention.",
    "norms.1.": "post_attention_layernorm.",
    "parts.1.": "mlp.",
}

GPT_NEOX = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    options={
        ModelConfig: Options(
            ModelConfig,
            {
                "hidden_size": ("d_model", 6144),
                "vocab_size": ("vocab_size", 50432),
                "layer_norm_eps": ("norm_eps", 1e-5),
                "tie_word_embeddings": ("tie_embeddings", False),
            },
        ),
        AttentionConfig: Options(
            AttentionConfig,
            {"num_attention_heads": ("heads", 64), "rope_theta": ("rope", 10000.0), "attention_bias": ("bias", True)},
        ),
        MLPConfig: Options(MLPConfig, {"intermediate_size": ("d_hidden", 24576)}),
    },
    sizes=Options(
        _Sizes,
        {
            "num_hidden_layers": ("layers", 44),
            "partial_rotary_factor": ("turned", 0.25),
            "hidden_act": ("act", "gelu"),
            "use_parallel_residual": ("parallel", True),
        },
    ),
    build=_build,
    describe=_describe,
    outside={"embed": "gpt_neox.embed_in.", "norm": "gpt_neox.final_layer_norm.", "head": "embed_out."},
    layer="gpt_neox.layers.{}.",
    blocks={"P": {**_NAMES, **{f"parts.0.{here}": there for here, there in _NAMES.items()}}},
    names={AttentionConfig: _attention, MLPConfig: _mlp},
    buffers=("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
)
