"""Kimi Linear: Kimi delta attention, latent attention without positions in some layers, experts behind the first."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from dualform.core.errors import ConfigError
from dualform.core.options import brief
from dualform.layers.kda import KDAConfig
from dualform.layers.mla import MLAConfig
from dualform.layers.mlp import MLPConfig
from dualform.layers.moe import MoEConfig
from dualform.models.config import ModelConfig
from dualform.models.tables.family import Family, Found
from dualform.models.tables.layout import DEPTHWISE, Change, Options, Piece
from dualform.models.tables.names import is_attention, mlp, moe, renamed, rows, rows_of_half, stacked, type_names


class _Sizes(NamedTuple):
    layers: int
    types: tuple[str, ...] | None
    kinds: tuple[str, ...] | None
    dense: int
    shared: int
    kv_heads: int | None
    linear: dict[str, Any] | None


def _types(found: Found) -> list[bool]:
    """Which layers have attention; older files number them from 1, in a table of their own."""
    s = found.sizes
    if s.types is not None:
        return [is_attention(kind) for kind in s.types]
    listed = (s.linear or {}).get("full_attn_layers")
    if isinstance(listed, list | tuple):
        return [i + 1 in listed for i in range(s.layers)]
    return [i > 0 and i % 4 == 0 for i in range(s.layers)]


def _build(found: Found) -> ModelConfig:
    s, model, where = found.sizes, found.of[ModelConfig], found.where
    attends = _types(found)
    kinds = s.kinds or ["dense" if i < s.dense else "sparse" for i in range(s.layers)]
    for name, listed in (("layer_types", attends), ("mlp_layer_types", kinds)):
        if len(listed) != s.layers:
            raise ConfigError(f"{where}{name} has {len(listed)} layers, expected num_hidden_layers = {s.layers}")
    latent = MLAConfig(**found.of[MLAConfig], rope=None)
    if s.kv_heads not in (None, latent.heads):
        raise ConfigError(f"{where}num_key_value_heads is {s.kv_heads}, expected num_attention_heads = {latent.heads}")
    given, old = dict(found.of[KDAConfig]), s.linear or {}
    for key, name in (("num_heads", "heads"), ("head_dim", "d_key"), ("short_conv_kernel_size", "d_conv")):
        given[name] = old.get(key, given[name])
        if type(given[name]) is not int:
            raise ConfigError(f"{where}linear_attn_config: {key} is {brief(given[name])}, expected a whole number")
    delta, dense = KDAConfig(**given), MLPConfig(**found.of[MLPConfig])
    routed = found.of[MoEConfig]
    shared = s.shared * routed["d_hidden"]
    experts = MoEConfig(**routed, scores="sigmoid", corrected=True, d_shared=shared, balance=0.0, z=0.0)
    parts = {"K": (delta, dense), "A": (latent, dense), "E": (delta, experts), "X": (latent, experts)}
    pattern = ""
    for attention, kind in zip(attends, kinds, strict=True):
        pattern += ("X" if attention else "E") if kind == "sparse" else ("A" if attention else "K")
    return ModelConfig(parts={letter: parts[letter] for letter in parts if letter in pattern}, pattern=pattern, **model)


def _describe(config: ModelConfig) -> dict[str, Any]:
    blocks: list[Any] = [config.parts[letter] for letter in config.pattern]
    latent = next((part for part, _ in blocks if isinstance(part, MLAConfig)), None)
    experts: Any = next((part for _, part in blocks if isinstance(part, MoEConfig)), None)
    about: dict[str, Any] = {
        "num_hidden_layers": len(blocks),
        "layer_types": type_names(isinstance(part, MLAConfig) for part, _ in blocks),
        "mlp_layer_types": ["sparse" if isinstance(part, MoEConfig) else "dense" for _, part in blocks],
    }
    if latent is not None:
        about["num_key_value_heads"] = latent.heads
    if experts is not None:
        about["num_shared_experts"] = experts.d_shared // experts.d_hidden
    return about


_FLAT = Change(lambda t: t.flatten(), lambda t: t.view(1, 1, -1, 1))
"""A number of each head, which lies among three other axes there."""


def _delta(part: KDAConfig, width: int) -> dict[str, tuple[Piece, ...]]:
    head = part.d_key or width // part.heads
    inner, rank = part.heads * head, part.rank or head
    sizes = {
        "q_proj": inner,
        "k_proj": inner,
        "v_proj": inner,
        "b_proj": part.heads,
        "f_a_proj": rank,
        "g_a_proj": rank,
    }

    def taps(i: int) -> Callable[[Tensor], Tensor]:
        return rows(i * inner, inner)

    return {
        "in_proj.weight": stacked(sizes),
        "conv_weight": tuple(Piece(f"{name}_conv1d.weight", DEPTHWISE, taps(i)) for i, name in enumerate("qkv")),
        "decay_proj.weight": (Piece("f_b_proj.weight"),),
        "gate_proj.weight": (Piece("g_b_proj.weight"),),
        "A_log": (Piece("A_log", _FLAT),),
        "norm.weight": (Piece("o_norm.weight"),),
        "out_proj.weight": (Piece("o_proj.weight"),),
    }


_LATENT = {
    "q_down": "q_a_proj",
    "q_norm": "q_a_layernorm",
    "q_up": "q_b_proj",
    "kv_down": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm",
    "kv_up": "kv_b_proj",
    "out_proj": "o_proj",
}


def _latent(part: MLAConfig, width: int) -> dict[str, tuple[Piece, ...]]:
    return {
        f"{here}.{kind}": (Piece(f"{there}.{kind}"),) for here, there in _LATENT.items() for kind in ("weight", "bias")
    }


def _moe(part: MoEConfig, width: int) -> dict[str, tuple[Piece, ...]]:
    halves = {"gate_proj": rows_of_half(0), "up_proj": rows_of_half(1)}
    return {
        **renamed(moe(part, width), {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}),
        "router.weight": (Piece("gate.weight"),),
        "router.correction": (Piece("gate.e_score_correction_bias"),),
        "shared.gate_up_proj.weight": tuple(
            Piece(f"shared_experts.{name}.weight", view=view) for name, view in halves.items()
        ),
        "shared.down_proj.weight": (Piece("shared_experts.down_proj.weight"),),
    }


def _mlp(part: MLPConfig, width: int) -> dict[str, tuple[Piece, ...]]:
    return {**mlp(part, width), "down_proj.weight": (Piece("down_proj.weight"),)}


def _within(module: str, names: dict[str, tuple[Piece, ...]]) -> dict[str, tuple[Piece, ...]]:
    """The same pieces inside of a module; transformers calls every feed-forward by the name of those with experts."""
    return {here: tuple(p._replace(name=f"{module}.{p.name}") for p in pieces) for here, pieces in names.items()}


_NAMES = {
    "norms.0.": "input_layernorm.",
    "parts.0.": "self_attn.",
    "norms.1.": "post_attention_layernorm.",
    "parts.1.": "",
}

KIMI_LINEAR = Family(
    model_type="kimi_linear",
    architecture="KimiLinearForCausalLM",
    options={
        ModelConfig: Options(
            ModelConfig,
            {
                "hidden_size": ("d_model", 2304),
                "vocab_size": ("vocab_size", 163840),
                "rms_norm_eps": ("norm_eps", 1e-5),
                "tie_word_embeddings": ("tie_embeddings", False),
            },
        ),
        KDAConfig: Options(
            KDAConfig,
            {
                "linear_num_heads": ("heads", 32),
                "linear_head_dim": ("d_key", 128),
                "linear_conv_kernel_dim": ("d_conv", 4),
                "rms_norm_eps": ("norm_eps", 1e-5),
            },
        ),
        MLAConfig: Options(
            MLAConfig,
            {
                "num_attention_heads": ("heads", 32),
                "qk_nope_head_dim": ("d_head", 128),
                "qk_rope_head_dim": ("d_rope", 64),
                "v_head_dim": ("d_value", 128),
                "kv_lora_rank": ("d_latent", 512),
                "q_lora_rank": ("d_query", None),
                "attention_bias": ("bias", False),
            },
        ),
        MLPConfig: Options(MLPConfig, {"intermediate_size": ("d_hidden", 9216)}),
        MoEConfig: Options(
            MoEConfig,
            {
                "moe_intermediate_size": ("d_hidden", 1024),
                "num_experts": ("experts", 256),
                "num_experts_per_token": ("top_k", 8),
                "routed_scaling_factor": ("scale", 2.446),
                "moe_renormalize": ("normalise", True),
                "num_expert_group": ("groups", 1),
                "topk_group": ("top_groups", 1),
            },
        ),
    },
    sizes=Options(
        _Sizes,
        {
            "num_hidden_layers": ("layers", 27),
            "layer_types": ("types", None),
            "mlp_layer_types": ("kinds", None),
            "first_k_dense_replace": ("dense", 1),
            "num_shared_experts": ("shared", 1),
            "num_key_value_heads": ("kv_heads", None),
            "linear_attn_config": ("linear", None),
        },
        least=0,
    ),
    build=_build,
    describe=_describe,
    outside={"embed": "model.embed_tokens.", "norm": "model.norm.", "head": "lm_head."},
    blocks=dict.fromkeys("KAEX", _NAMES),
    names={
        KDAConfig: _delta,
        MLAConfig: _latent,
        MLPConfig: lambda part, width: _within("block_sparse_moe", _mlp(part, width)),
        MoEConfig: lambda part, width: _within("block_sparse_moe", _moe(part, width)),
    },
    original={MLPConfig: lambda part, width: _within("mlp", _mlp(part, width))},
    only={
        "hidden_act": ("silu", "swish"),
        "mla_use_nope": (True,),
        "moe_router_activation_func": ("sigmoid",),
    },
)
