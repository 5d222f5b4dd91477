"""Zamba: Mamba, and before some of its layers one block of attention that they share and that reads the embedding."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from dualform.core.errors import ConfigError
from dualform.layers.attention import AttentionConfig
from dualform.layers.block import ChainConfig, SublayerConfig
from dualform.layers.mamba import MambaConfig
from dualform.layers.mixer import PartConfig
from dualform.layers.mlp import MLPConfig
from dualform.layers.recall import RecallConfig
from dualform.models.config import ModelConfig
from dualform.models.tables.family import Family, Found
from dualform.models.tables.layout import Change, Options, Piece, rank, scan_width
from dualform.models.tables.names import ACTIVATIONS, CONVOLUTION, activation_of

SHARED = "shared"
"""The name under which the shared block keeps its output."""


class _Sizes(NamedTuple):
    layers: int
    types: tuple[str, ...] | None
    period: int
    offset: int
    expand: int
    rank: int | None
    wide: int | None
    head: int | None
    act: str


def hybrid(scan: PartConfig, attention: SublayerConfig, mlp: SublayerConfig) -> dict[str, tuple[PartConfig, ...]]:
    """The blocks of a Zamba: M is a Mamba alone, S the shared block, and H a Mamba that reads what S has kept.

    ``s = mlp(norm(attention(norm([x, e]))))``, then ``x = x + mamba(norm(x + W s))``; e is the embedding.
    """
    shared = SublayerConfig(ChainConfig((attention, mlp)), norm=None, saved=SHARED)
    reader = ChainConfig((SublayerConfig(RecallConfig(SHARED), norm=None), SublayerConfig(scan, stream=0.0)))
    return {"M": (scan,), "S": (shared,), "H": (SublayerConfig(reader, norm=None),)}


def in_blocks(types: tuple[str, ...], shared: str) -> str:
    """The pattern of layers: before each that is a hybrid one of the shared blocks, in turn."""
    pattern, uses = "", 0
    for kind in types:
        pattern += shared[uses % len(shared)] + "H" if kind == "hybrid" else "M"
        uses += kind == "hybrid"
    return pattern


def names_of_hybrids(transformer: str, mlp: str) -> dict[str, Mapping[str, str]]:
    """What the blocks of :func:`hybrid` are called."""
    scan = {"norms.0.": "input_layernorm.", "parts.0.": "mamba."}
    return {
        "M": scan,
        "S": {
            "parts.0.norms.0.": f"{transformer}.input_layernorm.",
            "parts.0.parts.0.": f"{transformer}.self_attn.",
            "parts.0.norms.1.": f"{transformer}.pre_ff_layernorm.",
            "parts.0.parts.1.": f"{transformer}.{mlp}.",
        },
        "H": {
            "parts.0.parts.0.out_proj.": "linear.",
            "parts.0.norms.1.": "mamba_decoder.input_layernorm.",
            "parts.0.parts.1.": "mamba_decoder.mamba.",
        },
    }


def saves(config: ModelConfig, letter: str) -> bool:
    """Whether a letter is that of a shared block."""
    first = config.parts[letter][0]
    return isinstance(first, SublayerConfig) and first.saved == SHARED


def found_in(config: ModelConfig) -> tuple[Any, Any, Any]:
    """The Mamba, and the shared attention and feed-forward as they stand, of a model of such blocks."""
    chain: Any = next(config.parts[letter][0] for letter in config.pattern if saves(config, letter))
    attention, mlp = chain.part.parts
    scan: Any = next(config.parts[letter][0] for letter in config.pattern if not saves(config, letter))
    if isinstance(scan, SublayerConfig):
        reader: Any = scan.part
        scan = reader.parts[1].part
    return scan, attention, mlp


def layer_types(config: ModelConfig) -> list[str]:
    """What each layer is."""
    kinds: list[str] = []
    for i, letter in enumerate(config.pattern):
        if not saves(config, letter):
            kinds.append("hybrid" if i and saves(config, config.pattern[i - 1]) else "linear_attention")
    return kinds


def _build(found: Found) -> ModelConfig:
    s, model = found.sizes, found.of[ModelConfig]
    width = model["d_model"]
    mamba = {**found.of[MambaConfig], **scan_width(s.expand * width, width)}
    scan = MambaConfig(**mamba, dt_rank=None if s.rank in (None, rank(width)) else s.rank)
    heads = found.of[AttentionConfig]["heads"]
    head = s.head or 2 * width // heads
    if s.wide not in (None, 2 * width):
        raise ConfigError(f"{found.where}attention_hidden_size is {s.wide}, expected 2 * hidden_size = {2 * width}")
    attention = AttentionConfig(
        **found.of[AttentionConfig], d_head=head, d_out=width, rope=None, scale=(head / 2) ** -0.5
    )
    mlp = MLPConfig(**found.of[MLPConfig], activation=activation_of(s.act, found.where))
    parts = hybrid(scan, SublayerConfig(attention, joined="embedding", stream=0.0), SublayerConfig(mlp, stream=0.0))
    later = ("hybrid" if i % s.period == s.offset else "mamba" for i in range(s.layers - 3))
    types = s.types or ("mamba", "mamba", "hybrid", *later)
    shared = "S" if "hybrid" in types and model["tie_embeddings"] else ""  # both are tied there, or none
    return ModelConfig(parts=parts, pattern=in_blocks(types, "S"), shared=shared, **model)


def _describe(config: ModelConfig) -> dict[str, Any]:
    scan, attention, mlp = found_in(config)
    types = layer_types(config)
    channels = scan.expand * config.d_model if scan.d_inner is None else scan.d_inner
    act = next(there for there, here in ACTIVATIONS.items() if here == mlp.part.activation)
    return {
        "num_hidden_layers": len(types),
        "layers_block_type": types,
        "mamba_expand": channels // config.d_model,
        "mamba_dt_rank": scan.dt_rank or rank(config.d_model),
        "attention_hidden_size": 2 * config.d_model,
        "attention_head_dim": attention.part.d_head,
        "hidden_act": act,
    }


def _mamba(part: MambaConfig, width: int) -> dict[str, tuple[Piece, ...]]:
    """Mamba in heads: tensors have an axis for them, and the rows of x and z alternate."""
    apart = Change(lambda t: t.flatten(0, 1), lambda t: t.unflatten(0, (part.heads, -1)))
    one = (
        Change(lambda t: t.squeeze(0), lambda t: t.unsqueeze(0))
        if part.heads == 1
        else Change(lambda t: t, lambda t: t)
    )
    turns = Change(
        lambda t: t.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1),
        lambda t: t.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1),
    )
    return {
        **CONVOLUTION,
        "in_proj.weight": (Piece("in_proj.weight", turns),),
        "in_proj.bias": (Piece("in_proj.bias", turns),),
        "x_proj.weight": (Piece("x_proj_weight", one),),
        "dt_proj.weight": (Piece("dt_proj_weight", one),),
        "dt_bias": (Piece("dt_proj_bias", apart),),
        "A_log": (Piece("A_log", apart),),
        "D": (Piece("D", apart),),
    }


ZAMBA = Family(
    model_type="zamba",
    architecture="ZambaForCausalLM",
    options={
        ModelConfig: Options(
            ModelConfig,
            {
                "hidden_size": ("d_model", 3712),
                "vocab_size": ("vocab_size", 32000),
                "rms_norm_eps": ("norm_eps", 1e-5),
                "tie_word_embeddings": ("tie_embeddings", True),
            },
        ),
        MambaConfig: Options(
            MambaConfig,
            {
                "mamba_d_state": ("d_state", 16),
                "mamba_d_conv": ("d_conv", 4),
                "mamba_conv_bias": ("conv_bias", True),
                "mamba_proj_bias": ("bias", False),
                "n_mamba_heads": ("heads", 2),
                "time_step_min": ("dt_min", 1e-3),
                "time_step_max": ("dt_max", 1e-1),
            },
        ),
        AttentionConfig: Options(
            AttentionConfig, {"num_attention_heads": ("heads", 16), "num_key_value_heads": ("kv_heads", 16)}
        ),
        MLPConfig: Options(MLPConfig, {"intermediate_size": ("d_hidden", 14848)}),
    },
    sizes=Options(
        _Sizes,
        {
            "num_hidden_layers": ("layers", 76),
            "layers_block_type": ("types", None),
            "attn_layer_period": ("period", 6),
            "attn_layer_offset": ("offset", 4),
            "mamba_expand": ("expand", 2),
            "mamba_dt_rank": ("rank", None),
            "attention_hidden_size": ("wide", None),
            "attention_head_dim": ("head", None),
            "hidden_act": ("act", "gelu"),
        },
        least=0,
    ),
    build=_build,
    describe=_describe,
    outside={"embed": "model.embed_tokens.", "norm": "model.final_layernorm.", "head": "lm_head."},
    blocks=names_of_hybrids("shared_transf", "feed_forward"),
    beside="S",
    names={MambaConfig: _mamba},
    only={"hidden_mamba_act": ("silu", "swish")},
)
