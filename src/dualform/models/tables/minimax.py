"""MiniMax-01: lightning attention, attention in some layers, and experts; the stream is what the norms return."""

import string
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from dualform.core.errors import ConfigError
from dualform.core.options import brief
from dualform.layers.attention import AttentionConfig
from dualform.layers.block import SublayerConfig
from dualform.layers.lightning_attention import LightningAttentionConfig
from dualform.layers.mixer import PartConfig
from dualform.layers.moe import MoEConfig
from dualform.models.config import DEEPEST, ModelConfig, sublayers
from dualform.models.tables.family import Family, Found
from dualform.models.tables.layout import Change, Options, Piece
from dualform.models.tables.names import NUMBERED, moe, renamed

_LETTERS = string.ascii_lowercase + "".join(map(chr, range(0x100, 0x100 + DEEPEST)))
"""Of layers by their numbers, as each layer of lightning attention has decays of its own; A is attention."""
_TYPES = ("linear_attention", "full_attention")


class _Sizes(NamedTuple):
    layers: int
    types: tuple[str, ...] | None
    full_stream: float
    full_added: float
    linear_stream: float
    linear_added: float
    moe_stream: float
    moe_added: float


def _build(found: Found) -> ModelConfig:
    s = found.sizes
    types = s.types or tuple(_TYPES[(i + 1) % 2] for i in range(s.layers))
    if len(types) != s.layers or not set(types) <= {*_TYPES}:
        raise ConfigError(f"{found.where}layer_types is {brief(types)}, expected {s.layers} of {', '.join(_TYPES)}")

    def placed(part: PartConfig, stream: float, added: float) -> SublayerConfig:
        return SublayerConfig(part, normed=True, stream=stream, scale=added)

    moe = placed(MoEConfig(**found.of[MoEConfig], z=0.0), s.moe_stream, s.moe_added)
    parts: dict[str, tuple[PartConfig, ...]] = {}
    pattern = ""
    for i, kind in enumerate(types):
        if kind == "full_attention":
            letter = "A"
            mixer = placed(AttentionConfig(**found.of[AttentionConfig]), s.full_stream, s.full_added)
        else:
            letter, decay = _LETTERS[i], 1 - i / (s.layers - 1 + 1e-5) + 1e-5
            linear = LightningAttentionConfig(**found.of[LightningAttentionConfig], decay=decay)
            mixer = placed(linear, s.linear_stream, s.linear_added)
        pattern, parts[letter] = pattern + letter, (mixer, moe)
    return ModelConfig(parts=parts, pattern=pattern, **found.of[ModelConfig])


def _describe(config: ModelConfig) -> dict[str, Any]:
    blocks = [tuple(sublayers(config.parts[letter])) for letter in config.pattern]
    found: dict[str, Any] = {
        "num_hidden_layers": len(blocks),
        "layer_types": [_TYPES[isinstance(mixer.part, AttentionConfig)] for mixer, _ in blocks],
        "mlp_alpha_factor": blocks[0][1].stream,
        "mlp_beta_factor": blocks[0][1].scale,
    }
    for mixer, _ in blocks:
        name = "full" if isinstance(mixer.part, AttentionConfig) else "linear"
        found |= {f"{name}_attn_alpha_factor": mixer.stream, f"{name}_attn_beta_factor": mixer.scale}
    return found


def _lightning(part: LightningAttentionConfig, width: int) -> dict[str, tuple[Piece, ...]]:
    """There a head's queries, keys and values lie together; here all queries do."""

    def turn(first: int, second: int) -> Callable[[Tensor], Tensor]:
        return lambda m: m.unflatten(0, (first, second, -1)).transpose(0, 1).flatten(0, 2)

    change = Change(turn(part.heads, 3), turn(3, part.heads))
    return {
        "qkv_proj.weight": (Piece("qkv_proj.weight", change),),
        "gate_proj.weight": (Piece("output_gate.weight"),),
    }


def _moe(part: MoEConfig, width: int) -> dict[str, tuple[Piece, ...]]:
    """The matrices of an expert are called by numbers: the gate, the last map, and what the gate multiplies."""
    return {**renamed(moe(part, width), NUMBERED), "router.weight": (Piece("gate.weight"),)}


_BLOCK = {
    "norms.0.": "input_layernorm.",
    "parts.0.": "self_attn.",
    "norms.1.": "post_attention_layernorm.",
    "parts.1.": "block_sparse_moe.",
}

MINIMAX = Family(
    model_type="minimax",
    architecture="MiniMaxForCausalLM",
    options={
        ModelConfig: Options(
            ModelConfig,
            {
                "hidden_size": ("d_model", 4096),
                "vocab_size": ("vocab_size", 32000),
                "rms_norm_eps": ("norm_eps", 1e-5),
                "tie_word_embeddings": ("tie_embeddings", False),
            },
        ),
        LightningAttentionConfig: Options(
            LightningAttentionConfig, {"num_attention_heads": ("heads", 32), "head_dim": ("d_head", None)}
        ),
        AttentionConfig: Options(
            AttentionConfig,
            {
                "num_attention_heads": ("heads", 32),
                "num_key_value_heads": ("kv_heads", 8),
                "head_dim": ("d_head", None),
                "sliding_window": ("window", None),
                "rope_theta": ("rope", 1000000.0),
            },
        ),
        MoEConfig: Options(
            MoEConfig,
            {
                "intermediate_size": ("d_hidden", 14336),
                "num_local_experts": ("experts", 8),
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
            "full_attn_alpha_factor": ("full_stream", 1.0),
            "full_attn_beta_factor": ("full_added", 1.0),
            "linear_attn_alpha_factor": ("linear_stream", 1.0),
            "linear_attn_beta_factor": ("linear_added", 1.0),
            "mlp_alpha_factor": ("moe_stream", 1.0),
            "mlp_beta_factor": ("moe_added", 1.0),
        },
        least=0,
    ),
    build=_build,
    describe=_describe,
    outside={"embed": "model.embed_tokens.", "norm": "model.norm.", "head": "lm_head."},
    blocks=dict.fromkeys("A" + _LETTERS, _BLOCK),
    names={LightningAttentionConfig: _lightning, MoEConfig: _moe},
    buffers=tuple(f"self_attn.{name}" for name in ("slope_rate", "query_decay", "key_decay", "diagonal_decay")),
    only={"hidden_act": ("silu", "swish")},
)
