"""Qwen3-Next and the text models of Qwen3.5: gated delta nets, gated attention, experts or a feed-forward."""

from typing import Any, NamedTuple

import torch

from dualform.layers.attention import AttentionConfig
from dualform.layers.block import SublayerConfig
from dualform.layers.gated_delta_net import GatedDeltaNetConfig
from dualform.layers.mixer import PartConfig
from dualform.layers.mlp import MLPConfig
from dualform.layers.moe import MoEConfig
from dualform.models.config import ModelConfig
from dualform.models.tables.family import Family, Found
from dualform.models.tables.layout import DEPTHWISE, Options, Piece
from dualform.models.tables.names import is_attention, moe, stacked, type_names
from dualform.models.tables.rope import rotated, share


class _Sizes(NamedTuple):
    layers: int
    types: tuple[str, ...] | None
    interval: int
    turned: float
    dense: tuple[int, ...] | None = ()
    step: int = 1


def _build(found: Found) -> ModelConfig:
    s, model = found.sizes, found.of[ModelConfig]
    given = found.of[AttentionConfig]
    turned = rotated(s.turned, given["d_head"], found.where)
    attention = AttentionConfig(**given, d_rope=turned, qk_norm="rms_offset", gate=True, norm_eps=model["norm_eps"])
    delta, mlp = GatedDeltaNetConfig(**found.of[GatedDeltaNetConfig]), MLPConfig(**found.of[MLPConfig])
    routed: PartConfig = mlp
    if MoEConfig in found.of:
        routed = MoEConfig(**found.of[MoEConfig], shared_gate=True, z=0.0)
    parts: dict[str, tuple[PartConfig, ...]] = {
        letter: tuple(SublayerConfig(part, norm="rms_offset") for part in block)
        for letter, block in {
            "D": (delta, routed),
            "A": (attention, routed),
            "d": (delta, mlp),
            "a": (attention, mlp),
        }.items()
    }
    types = s.types or tuple("linear" if (i + 1) % s.interval else "full_attention" for i in range(s.layers))
    letters = ["A" if is_attention(kind) else "D" for kind in types]
    dense = {i for i in range(len(types)) if i in (s.dense or ()) or (i + 1) % s.step}
    if MoEConfig in found.of:
        letters = [letter.lower() if i in dense else letter for i, letter in enumerate(letters)]
    pattern = "".join(letters)
    parts = {letter: parts[letter] for letter in parts if letter in pattern}
    return ModelConfig(parts=parts, pattern=pattern, norm="rms_offset", **model)


def _describe(config: ModelConfig) -> dict[str, Any]:
    blocks: list[Any] = [[s.part for s in config.parts[letter]] for letter in config.pattern]  # pyright: ignore[reportAttributeAccessIssue]
    attention = next((a for a, _ in blocks if isinstance(a, AttentionConfig)), AttentionConfig(d_head=256, d_rope=64))
    about = {
        "num_hidden_layers": len(blocks),
        "layer_types": type_names(isinstance(mixer, AttentionConfig) for mixer, _ in blocks),
        "partial_rotary_factor": share(attention.d_rope, attention.d_head or 0),
    }
    if any(isinstance(routed, MoEConfig) for _, routed in blocks):
        dense = [i for i, (_, routed) in enumerate(blocks) if isinstance(routed, MLPConfig)]
        about |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    return about


def _sizes(part: GatedDeltaNetConfig, width: int) -> tuple[int, int, int, int]:
    """Key heads, heads for each, widths of a key and of a value."""
    groups, key = part.key_heads or part.heads, part.d_key or width // part.heads
    return groups, part.heads // groups, key, part.d_value or 2 * key


def _rest(part: GatedDeltaNetConfig, width: int) -> dict[str, tuple[Piece, ...]]:
    return {"conv_weight": (Piece("conv1d.weight", DEPTHWISE),)}


def _together(part: GatedDeltaNetConfig, width: int) -> dict[str, tuple[Piece, ...]]:
    """Two maps, whose rows stand by key heads: q, k, v and z of one, then of the next; b and a likewise."""
    groups, each, key, value = _sizes(part, width)
    sizes = {"q": key, "k": key, "v": each * value, "b": each, "z": each * value, "a": each}
    ends = torch.tensor([0, *(groups * size for size in sizes.values())], device="cpu").cumsum(0).tolist()
    at = {
        name: start + torch.arange(groups * size, device="cpu").view(groups, size)
        for (name, size), start in zip(sizes.items(), ends, strict=False)
    }
    rows = {name: torch.cat([at[letter] for letter in name], 1).flatten() for name in ("qkvz", "ba")}
    maps = tuple(Piece(f"in_proj_{name}.weight", rows=index) for name, index in rows.items())
    return {**_rest(part, width), "in_proj.weight": maps}


def _apart(part: GatedDeltaNetConfig, width: int) -> dict[str, tuple[Piece, ...]]:
    """Four maps, one after the other."""
    groups, each, key, value = _sizes(part, width)
    heads = groups * each
    sizes = {"qkv": 2 * groups * key + heads * value, "b": heads, "z": heads * value, "a": heads}
    maps = stacked({f"in_proj_{name}": size for name, size in sizes.items()})
    return {**_rest(part, width), "in_proj.weight": maps}


def _moe(part: MoEConfig, width: int) -> dict[str, tuple[Piece, ...]]:
    found = {
        **moe(part, width),
        "router.weight": (Piece("gate.weight"),),
        "shared.gate_up_proj.weight": stacked(
            {"shared_expert.gate_proj": part.d_shared, "shared_expert.up_proj": part.d_shared}
        ),
        "shared.down_proj.weight": (Piece("shared_expert.down_proj.weight"),),
        "shared_gate.weight": (Piece("shared_expert_gate.weight"),),
    }
    return found


_NAMES = {"norms.0.": "input_layernorm.", "norms.1.": "post_attention_layernorm.", "parts.1.": "mlp."}
_DELTA, _ATTENTION = {**_NAMES, "parts.0.": "linear_attn."}, {**_NAMES, "parts.0.": "self_attn."}
_MODEL = Options(
    ModelConfig,
    {
        "hidden_size": ("d_model", 2048),
        "vocab_size": ("vocab_size", 151936),
        "rms_norm_eps": ("norm_eps", 1e-6),
        "tie_word_embeddings": ("tie_embeddings", False),
    },
)
_OPTIONS = {
    ModelConfig: _MODEL,
    GatedDeltaNetConfig: Options(
        GatedDeltaNetConfig,
        {
            "linear_num_value_heads": ("heads", 32),
            "linear_num_key_heads": ("key_heads", 16),
            "linear_key_head_dim": ("d_key", 128),
            "linear_value_head_dim": ("d_value", 128),
            "linear_conv_kernel_dim": ("d_conv", 4),
            "rms_norm_eps": ("norm_eps", 1e-6),
        },
    ),
    AttentionConfig: Options(
        AttentionConfig,
        {
            "num_attention_heads": ("heads", 16),
            "num_key_value_heads": ("kv_heads", 2),
            "head_dim": ("d_head", 256),
            "rope_theta": ("rope", 10000.0),
            "attention_bias": ("bias", False),
        },
    ),
    MLPConfig: Options(MLPConfig, {"intermediate_size": ("d_hidden", 5632)}),
}
_KEYS = {
    "num_hidden_layers": ("layers", 48),
    "layer_types": ("types", None),
    "full_attention_interval": ("interval", 4),
    "partial_rotary_factor": ("turned", 0.25),
}
_OUTSIDE = {"embed": "model.embed_tokens.", "norm": "model.norm.", "head": "lm_head."}

QWEN3_NEXT = Family(
    model_type="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    options={
        **_OPTIONS,
        MoEConfig: Options(
            MoEConfig,
            {
                "moe_intermediate_size": ("d_hidden", 512),
                "shared_expert_intermediate_size": ("d_shared", 512),
                "num_experts": ("experts", 512),
                "num_experts_per_tok": ("top_k", 10),
                "norm_topk_prob": ("normalise", True),
                "router_aux_loss_coef": ("balance", 0.001),
            },
        ),
    },
    sizes=Options(_Sizes, {**_KEYS, "mlp_only_layers": ("dense", ()), "decoder_sparse_step": ("step", 1)}),
    build=_build,
    describe=_describe,
    outside=_OUTSIDE,
    blocks={"D": _DELTA, "d": _DELTA, "A": _ATTENTION, "a": _ATTENTION},
    names={GatedDeltaNetConfig: _together, MoEConfig: _moe},
    only={"hidden_act": ("silu", "swish")},
)
QWEN3_5 = Family(
    model_type="qwen3_5_text",
    architecture="Qwen3_5ForCausalLM",
    options={
        **_OPTIONS,
        ModelConfig: _MODEL.but(hidden_size=4096, vocab_size=248320),
        AttentionConfig: _OPTIONS[AttentionConfig].but(num_key_value_heads=4),
        MLPConfig: _OPTIONS[MLPConfig].but(intermediate_size=12288),
    },
    sizes=Options(_Sizes, {**_KEYS, "num_hidden_layers": ("layers", 32)}),
    build=_build,
    describe=_describe,
    outside=_OUTSIDE,
    blocks={"D": _DELTA, "A": _ATTENTION},
    names={GatedDeltaNetConfig: _apart},
    only={"hidden_act": ("silu", "swish")},
)
