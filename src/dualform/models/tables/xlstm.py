"""xLSTM as of the model of 7 billion parameters: blocks of an mLSTM and a feed-forward."""

from typing import Any, NamedTuple

from dualform.core.errors import ConfigError
from dualform.core.options import brief
from dualform.layers.mlp import MLPConfig
from dualform.layers.mlstm import MLSTMConfig
from dualform.models.config import ModelConfig
from dualform.models.tables.family import Family, Found
from dualform.models.tables.layout import Options, Piece
from dualform.models.tables.names import rows_of_half, stacked

_MULTIPLE = 64
"""What inner widths are rounded up to there, unless the config says otherwise."""


class _Sizes(NamedTuple):
    layers: int
    blocks: int | None
    keys: float
    values: float
    hidden: float
    multiple: int


def _inner(share: float, width: int, multiple: int) -> int:
    """The inner width of the feed-forward, as the library there rounds it."""
    return int((share * width + multiple - 1) // multiple * multiple)


def _build(found: Found) -> ModelConfig:
    s, model, heads = found.sizes, found.of[ModelConfig], found.of[MLSTMConfig]["heads"]
    if s.blocks not in (None, s.layers):
        raise ConfigError(f"{found.where}num_blocks is {s.blocks}, expected num_hidden_layers = {s.layers}")
    width, widths = model["d_model"], {}
    for key, field, share in (("qk_dim_factor", "d_key", s.keys), ("v_dim_factor", "d_value", s.values)):
        if not 1 <= share * width < 2**63 or int(share * width) % heads:
            raise ConfigError(f"{found.where}{key} is {brief(share)}, which gives no multiple of num_heads = {heads}")
        widths[field] = int(share * width) // heads
    if not 0 < s.hidden * width < 2**62:
        raise ConfigError(f"{found.where}ffn_proj_factor is {brief(s.hidden)}, expected a positive number")
    mlstm = MLSTMConfig(**found.of[MLSTMConfig], **widths)
    mlp = MLPConfig(d_hidden=_inner(s.hidden, width, s.multiple))
    return ModelConfig(parts={"X": (mlstm, mlp)}, pattern="X" * s.layers, tie_embeddings=False, **model)


def _describe(config: ModelConfig) -> dict[str, Any]:
    parts: Any = config.parts[config.pattern[0]]
    mlstm, mlp = parts
    width = config.d_model
    head = width // mlstm.heads
    hidden, multiple = mlp.d_hidden, _MULTIPLE if mlp.d_hidden % _MULTIPLE == 0 else 1
    share = hidden / width
    if _inner(share, width, multiple) != hidden:  # rounded up there
        share = (hidden - 0.5) / width
    return {
        "num_hidden_layers": len(config.pattern),
        "num_blocks": len(config.pattern),
        "qk_dim_factor": _share(mlstm.heads * (mlstm.d_key or head), width),
        "v_dim_factor": _share(mlstm.heads * (mlstm.d_value or head), width),
        "ffn_proj_factor": share,
        **({} if multiple == _MULTIPLE else {"ffn_round_up_to_multiple_of": multiple}),
    }


def _share(total: int, width: int) -> float:
    """Of a width, which is rounded down there."""
    return total / width if int(total / width * width) == total else (total + 0.5) / width


def _mlstm(part: MLSTMConfig, width: int) -> dict[str, tuple[Piece, ...]]:
    """The maps that are one here are maps of their own there."""
    head = width // part.heads
    keys, values = part.heads * (part.d_key or head), part.heads * (part.d_value or head)
    gates = {"igate_preact": part.heads, "fgate_preact": part.heads}
    return {
        "in_proj.weight": stacked({"q": keys, "k": keys, "v": values, "ogate_preact": values}),
        "gate_proj.weight": stacked(gates),
        "gate_bias": stacked(gates, "bias"),
        "norm_weight": (Piece("multihead_norm.weight"),),
    }


def _mlp(part: MLPConfig, width: int) -> dict[str, tuple[Piece, ...]]:
    gate, up = Piece("proj_up_gate.weight", view=rows_of_half(0)), Piece("proj_up.weight", view=rows_of_half(1))
    return {"gate_up_proj.weight": (gate, up), "down_proj.weight": (Piece("proj_down.weight"),)}


XLSTM = Family(
    model_type="xlstm",
    architecture="xLSTMForCausalLM",
    options={
        ModelConfig: Options(
            ModelConfig,
            {
                "hidden_size": ("d_model", 4096),
                "vocab_size": ("vocab_size", 50304),
                "norm_eps": ("norm_eps", 1e-6),
                "output_logit_soft_cap": ("logit_cap", 30.0),
            },
        ),
        MLSTMConfig: Options(
            MLSTMConfig,
            {
                "num_heads": ("heads", 8),
                "gate_soft_cap": ("gate_cap", 15.0),
                "eps": ("eps", 1e-6),
                "norm_eps": ("norm_eps", 1e-6),
            },
        ),
        MLPConfig: Options(MLPConfig, {}),
    },
    sizes=Options(
        _Sizes,
        {
            "num_hidden_layers": ("layers", 32),
            "num_blocks": ("blocks", None),
            "qk_dim_factor": ("keys", 0.5),
            "v_dim_factor": ("values", 1.0),
            "ffn_proj_factor": ("hidden", 2.667),
            "ffn_round_up_to_multiple_of": ("multiple", _MULTIPLE),
        },
    ),
    build=_build,
    describe=_describe,
    outside={"embed": "backbone.embeddings.", "norm": "backbone.out_norm.", "head": "lm_head."},
    layer="backbone.blocks.{}.",
    blocks={
        "X": {
            "norms.0.": "norm_mlstm.",
            "parts.0.": "mlstm_layer.",
            "norms.1.": "norm_ffn.",
            "parts.1.": "ffn.",
        },
    },
    names={MLSTMConfig: _mlstm, MLPConfig: _mlp},
    only={
        "use_bias": (False,),
        "weight_mode": ("single",),
        "tie_word_embeddings": (False,),
        "autocast_kernel_dtype": ("float32", "bfloat16", "float16"),  # the precision is the caller's here
    },
)
