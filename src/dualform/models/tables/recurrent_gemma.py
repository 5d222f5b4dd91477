"""RecurrentGemma: Griffin's recurrent blocks, and attention with a window in some layers."""

from typing import Any, NamedTuple

import torch

from dualform.core.errors import ConfigError
from dualform.core.options import brief
from dualform.layers.attention import AttentionConfig
from dualform.layers.block import SublayerConfig
from dualform.layers.mlp import MLPConfig
from dualform.layers.rglru import RGLRUConfig
from dualform.models.config import ModelConfig, sublayers
from dualform.models.tables.family import Family, Found
from dualform.models.tables.layout import DEPTHWISE, Options, Piece
from dualform.models.tables.names import stacked
from dualform.models.tables.rope import rotated, share

_NORM = "rms_offset"


class _Sizes(NamedTuple):
    layers: int
    types: tuple[str, ...]
    hidden: int
    inner: int | None
    turned: float


def _build(found: Found) -> ModelConfig:
    s, model = found.sizes, found.of[ModelConfig]
    width, attention = model["d_model"], found.of[AttentionConfig]
    unit = RGLRUConfig(**found.of[RGLRUConfig], d_inner=s.inner or width, scale_first=False)
    window = AttentionConfig(**attention, d_rope=rotated(s.turned, width // attention["heads"]), out_bias=True)
    mlp = MLPConfig(d_hidden=s.hidden // 2, activation="gelu_tanh", bias=True)
    parts = {
        letter: tuple(SublayerConfig(part, norm=_NORM) for part in (mixer, mlp))
        for letter, mixer in (("R", unit), ("A", window))
    }
    kinds = {"recurrent": "R", "attention": "A"}
    if not s.types or not set(s.types) <= kinds.keys():
        raise ConfigError(f"{found.where}block_types is {brief(s.types)}, expected some of {', '.join(kinds)}")
    pattern = "".join(kinds[s.types[i % len(s.types)]] for i in range(s.layers))
    scale = torch.tensor(width**0.5, dtype=torch.bfloat16).item()  # which is what it is rounded to there
    return ModelConfig(
        parts={letter: parts[letter] for letter in parts if letter in pattern},
        pattern=pattern,
        norm=_NORM,
        embed_scale=scale,
        **model,
    )


def _describe(config: ModelConfig) -> dict[str, Any]:
    kinds = [next(sublayers(config.parts[letter])).part for letter in config.pattern]
    types = ["recurrent" if isinstance(part, RGLRUConfig) else "attention" for part in kinds]
    period = next(p for p in range(1, len(types) + 1) if types == [types[i % p] for i in range(len(types))])
    unit = next((part for part in kinds if isinstance(part, RGLRUConfig)), None)
    attention = next((part for part in kinds if isinstance(part, AttentionConfig)), None)
    mlp: Any = [sub.part for sub in sublayers(config.parts[config.pattern[0]])][1]
    found: dict[str, Any] = {
        "num_hidden_layers": len(types),
        "block_types": types[:period],
        "intermediate_size": 2 * mlp.d_hidden,
    }
    if unit is not None:
        found["lru_width"] = unit.d_inner or config.d_model
    if attention is not None:
        found["partial_rotary_factor"] = share(attention.d_rope, config.d_model // attention.heads)
    return found


def _unit(part: RGLRUConfig, width: int) -> dict[str, tuple[Piece, ...]]:
    """The branches are maps of their own there, and so are the gates."""
    inner = part.d_inner or width
    maps = {"linear_y": inner, "linear_x": inner}
    gates = [("recurrent", lambda t: t[0]), ("input", lambda t: t[1])]
    return {
        **{f"in_proj.{kind}": stacked(maps, kind) for kind in ("weight", "bias")},
        "conv_weight": (Piece("conv_1d.weight", DEPTHWISE),),
        "conv_bias": (Piece("conv_1d.bias"),),
        **{
            f"gate_{kind}": tuple(Piece(f"rg_lru.{name}_gate_{kind}", view=view) for name, view in gates)
            for kind in ("weight", "bias")
        },
        "decay": (Piece("rg_lru.recurrent_param"),),
        **{f"out_proj.{kind}": (Piece(f"linear_out.{kind}"),) for kind in ("weight", "bias")},
    }


_BLOCK = {
    "norms.0.": "temporal_pre_norm.",
    "parts.0.": "temporal_block.",
    "norms.1.": "channel_pre_norm.",
    "parts.1.": "mlp_block.",
}

RECURRENT_GEMMA = Family(
    model_type="recurrent_gemma",
    architecture="RecurrentGemmaForCausalLM",
    options={
        ModelConfig: Options(
            ModelConfig,
            {
                "hidden_size": ("d_model", 2560),
                "vocab_size": ("vocab_size", 256000),
                "rms_norm_eps": ("norm_eps", 1e-6),
                "logits_soft_cap": ("logit_cap", 30.0),
                "tie_word_embeddings": ("tie_embeddings", True),
            },
        ),
        RGLRUConfig: Options(RGLRUConfig, {"num_attention_heads": ("heads", 10), "conv1d_width": ("d_conv", 4)}),
        AttentionConfig: Options(
            AttentionConfig,
            {
                "num_attention_heads": ("heads", 10),
                "num_key_value_heads": ("kv_heads", None),
                "attention_window_size": ("window", 2048),
                "attention_bias": ("bias", False),
                "rope_theta": ("rope", 10000.0),
            },
        ),
        MLPConfig: Options(MLPConfig, {}),
    },
    sizes=Options(
        _Sizes,
        {
            "num_hidden_layers": ("layers", 26),
            "block_types": ("types", ("recurrent", "recurrent", "attention")),
            "intermediate_size": ("hidden", 7680),
            "lru_width": ("inner", None),
            "partial_rotary_factor": ("turned", 0.5),
        },
    ),
    build=_build,
    describe=_describe,
    outside={"embed": "model.embed_tokens.", "norm": "model.final_norm.", "head": "lm_head."},
    blocks={"R": _BLOCK, "A": _BLOCK},
    names={RGLRUConfig: _unit},
    only={"hidden_activation": ("gelu_pytorch_tanh",)},
)
