"""The models of mamba-ssm: names of tensors, and options by the keys of its ``config.json``."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualform.core.errors import ConfigError
from dualform.core.options import brief
from dualform.layers.attention import AttentionConfig
from dualform.layers.mamba import MambaConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.layers.mixer import PartConfig
from dualform.layers.mlp import MLPConfig
from dualform.layers.rotary import RotaryConfig
from dualform.models.config import DEEPEST, ModelConfig
from dualform.models.lm import LanguageModel
from dualform.models.tables.layout import (
    CONV,
    GATE_LAST,
    MAMBA,
    MAMBA2,
    SAME,
    Layout,
    Options,
    PartNames,
    Place,
    rank,
    scan_width,
)


class _Sizes(NamedTuple):
    """What a config here says in another way."""

    layers: int
    multiple: int
    hidden: int | None
    rms: bool
    mixer: dict[str, Any]
    attention: dict[str, Any]
    attends: tuple[int, ...]


_MODEL = Options(
    ModelConfig,
    {
        "d_model": ("d_model", 2560),
        "vocab_size": ("vocab_size", 50277),
        "tie_embeddings": ("tie_embeddings", True),
    },
)
_SIZES = Options(
    _Sizes,
    {
        "n_layer": ("layers", 64),
        "pad_vocab_size_multiple": ("multiple", 8),
        "d_intermediate": ("hidden", None),
        "rms_norm": ("rms", True),
        "ssm_cfg": ("mixer", {}),
        "attn_cfg": ("attention", {}),
        "attn_layer_idx": ("attends", ()),
    },
)
_SAME = {
    "d_conv": ("d_conv", 4),
    "dt_min": ("dt_min", 1e-3),
    "dt_max": ("dt_max", 1e-1),
    "bias": ("bias", False),
    "conv_bias": ("conv_bias", True),
}
_MIXERS = {
    "Mamba1": Options(MambaConfig, {**_SAME, "d_state": ("d_state", 16), "dt_rank": ("dt_rank", "auto")}),
    "Mamba2": Options(
        Mamba2Config,
        {
            **_SAME,
            "d_state": ("d_state", 128),
            "headdim": ("d_head", 64),
            "ngroups": ("groups", 1),
            "dt_limit": ("dt_limit", (0.0, float("inf"))),
        },
    ),
}
_ATTENTION = Options(
    AttentionConfig,
    {
        "num_heads": ("heads", None),
        "num_heads_kv": ("kv_heads", None),
        "head_dim": ("d_head", None),
        "rotary_emb_base": ("rope", 10000.0),
        "qkv_proj_bias": ("bias", True),
        "d_conv": ("d_conv", 0),
    },
)
_START = {"dt_init", "dt_scale", "dt_init_floor", "conv_init", "A_init_range"}  # of fresh parameters only
_SPEED = {"use_fast_path", "use_mem_eff_path", "chunk_size", "layer", "sequence_parallel", "process_group", "expand"}
_ONLY = {"rmsnorm": True, "norm_before_gate": False, "D_has_hdim": False, "d_ssm": None}
_ONLY_ATTENTION = {
    "causal": True,
    "mlp_dim": 0,
    "rotary_emb_interleaved": False,
    "softmax_scale": None,
}
_ENDS = ("norm", "embed_norm", "embed_scale", "logit_scale", "logit_cap", "head_bias")  # as there, by default
_MLP_MULTIPLE = 128  # of the inner width of a feed-forward, which is rounded up to it


def model_config(table: Mapping[str, Any], where: str = "mamba_ssm: ") -> ModelConfig:
    """The config of the ``LanguageModel`` that a ``MambaConfig`` of mamba-ssm, as a dict, describes.

    Raises:
        ConfigError: for an option that no layer of this library has, or a value that none can have; names it.
    """
    model = _MODEL.read(table, where)
    sizes = _Sizes(**_SIZES.read({**table, "d_intermediate": table.get("d_intermediate") or None}, where))
    if not sizes.rms:
        raise ConfigError(f"{where}rms_norm is False, and LanguageModel has no norm with a mean")
    if sizes.layers > DEEPEST:
        raise ConfigError(f"{where}n_layer is {sizes.layers:,}, expected at most {DEEPEST:,}")
    if wrong := [i for i in sizes.attends if i not in range(sizes.layers)]:
        raise ConfigError(f"{where}attn_layer_idx has {wrong[0]}, expected 0 to {sizes.layers - 1}")
    beside: tuple[PartConfig, ...] = ()
    if sizes.hidden:
        beside = (MLPConfig(d_hidden=-(-sizes.hidden // _MLP_MULTIPLE) * _MLP_MULTIPLE),)
    parts: dict[str, tuple[PartConfig, ...]] = {"M": (_read_mixer(sizes.mixer, model["d_model"], where), *beside)}
    if sizes.attends:
        parts["A"] = (_read_attention(sizes.attention, model["d_model"], where), *beside)
    model["vocab_size"] = -(-model["vocab_size"] // sizes.multiple) * sizes.multiple
    attends = set(sizes.attends)
    pattern = "".join("A" if i in attends else "M" for i in range(sizes.layers))
    return ModelConfig(parts={letter: parts[letter] for letter in parts if letter in pattern}, pattern=pattern, **model)


def upstream_config(config: ModelConfig) -> dict[str, Any]:
    """The inverse of :func:`model_config`.

    Raises:
        ConfigError: for a model that mamba-ssm does not have; says what it lacks.
    """
    mixers = {config.parts[letter][0] for letter in config.pattern}
    beside = {config.parts[letter][1:] for letter in config.pattern}
    ours = {part for part in mixers if isinstance(part, MambaConfig | Mamba2Config)}
    attention = {part for part in mixers if isinstance(part, AttentionConfig)}
    hidden = _hidden(beside.copy().pop(), config.d_model)
    if config.shared or len(ours) > 1 or len(attention) > 1 or len(beside) > 1 or mixers - ours - attention:
        raise _lacks("blocks that are shared, or that are neither one kind of Mamba nor attention")
    if config.norm_eps != 1e-5:
        raise _lacks(f"a norm_eps of {config.norm_eps}, where its own is 1e-05")
    for f in fields(ModelConfig):
        value = getattr(config, f.name)
        if f.name in _ENDS and value != f.default:
            raise _lacks(f"{f.name} = {value!r}")
    sizes = {
        "n_layer": len(config.pattern),
        "d_intermediate": hidden,
        "ssm_cfg": _written_mixer(ours.pop(), config.d_model) if ours else {},
        "attn_layer_idx": [
            i for i, letter in enumerate(config.pattern) if isinstance(config.parts[letter][0], AttentionConfig)
        ],
        "attn_cfg": _written_attention(attention.pop(), config.d_model) if attention else {},
        "pad_vocab_size_multiple": 1 if config.vocab_size % 8 else 8,
    }
    return {**_MODEL.write(config), **sizes, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True}


MAMBA_SSM = Layout(
    name="mamba_ssm",
    outside={"embed": "backbone.embedding.", "norm": "backbone.norm_f.", "head": "lm_head."},
    block="backbone.layers.{}.",
    norms=("norm.", "norm2."),
    parts={
        MambaConfig: MAMBA,
        Mamba2Config: MAMBA2,
        AttentionConfig: PartNames(
            "mixer.",
            {
                "qkv_proj.weight": Place("in_proj.weight", SAME),
                "qkv_proj.bias": Place("in_proj.bias", SAME),
                **CONV,
            },
        ),
        MLPConfig: PartNames(
            "mlp.",
            {
                "gate_up_proj.weight": Place("fc1.weight", GATE_LAST),
                "down_proj.weight": Place("fc2.weight", SAME),
            },
        ),
    },
    read=model_config,
    write=upstream_config,
)
"""The layout of mamba-ssm."""


def mixer_tensors(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a Mamba or Mamba2, under this library's names and in its shapes."""
    here = {place.name: Place(name, place.change) for name, place in MAMBA.names.items()}
    places = {there: here.get(there, Place(there, SAME)) for there in given}
    return {places[there].name: places[there].change.here(tensor) for there, tensor in given.items()}


def model_tensors(given: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of a ``MambaLMHeadModel``, for ``LanguageModel(config).load_state_dict``.

    Args:
        given: its state dict.
        config: of :func:`model_config`.
    """
    with torch.device("meta"):
        places = {name: MAMBA_SSM.place(config, name) for name in LanguageModel(config).state_dict()}
    return {name: change.here(given[there]) for name, (there, change) in places.items()}


def _read_mixer(given: Mapping[str, Any], width: int, where: str) -> PartConfig:
    where = f"{where}ssm_cfg"
    layer, expand = given.get("layer", "Mamba1"), given.get("expand", 2)
    if not isinstance(layer, str) or layer not in _MIXERS:
        raise ConfigError(f"{where} has the layer {brief(layer)}, expected {' or '.join(_MIXERS)}")
    options = _MIXERS[layer]
    _check(given, options, _ONLY if layer == "Mamba2" else {}, where)
    if isinstance(expand, bool) or not isinstance(expand, int | float) or not 1 <= expand * width < 2**63:
        raise ConfigError(f"{where} has expand = {brief(expand)}, expected a positive number")
    found, channels = options.read(given, f"{where}: "), int(expand * width)
    found |= scan_width(channels, width)
    if found.get("dt_rank") == rank(width):
        found["dt_rank"] = None
    return options.cls(**found)


def _written_mixer(part: MambaConfig | Mamba2Config, width: int) -> dict[str, Any]:
    channels = part.expand * width if part.d_inner is None else part.d_inner
    expand = channels / width if channels % width else channels // width
    if int(expand * width) != channels:
        raise _lacks(f"a mixer with d_inner = {channels}")
    if isinstance(part, MambaConfig):
        if part.norm_maps is not None:
            raise _lacks(f"a mixer with norm_maps = {part.norm_maps}")
        rate = "auto" if part.dt_rank is None else part.dt_rank
        return {"layer": "Mamba1", "expand": expand, **_MIXERS["Mamba1"].write(part), "dt_rank": rate}
    if part.norm_eps != 1e-5:
        raise _lacks(f"a mixer with a norm_eps of {part.norm_eps}")
    found = {"layer": "Mamba2", "expand": expand, **_MIXERS["Mamba2"].write(part)}
    if part.dt_limit == Mamba2Config.dt_limit:
        del found["dt_limit"]  # its end is infinite, which not every reader of JSON takes
    return found


def _read_attention(given: Mapping[str, Any], width: int, where: str) -> AttentionConfig:
    where, given = f"{where}attn_cfg", dict(given)
    rotated, biased = given.pop("rotary_emb_dim", 0), given.pop("out_proj_bias", True)
    if given.get("d_conv") == 0:
        del given["d_conv"]
    found = _ATTENTION.read(given, f"{where}: ")
    head = found["d_head"] or width // found["heads"]
    if biased != found["bias"]:
        raise ConfigError(f"{where} has one of two biases, and Attention has both or none")
    if type(rotated) is not int or rotated % 2 or not 0 <= rotated <= head:
        raise ConfigError(f"{where} has rotary_emb_dim = {brief(rotated)} of {head}, expected an even number of those")
    _check({"causal": False, **given}, _ATTENTION, _ONLY_ATTENTION, where)
    turned: dict[str, Any] = {"rope": None} if not rotated else {} if rotated == head else {"d_rope": rotated}
    return AttentionConfig(**{**found, **turned})


def _written_attention(part: AttentionConfig, width: int) -> dict[str, Any]:
    if part.window is not None:
        raise _lacks(f"attention with a window of {part.window}")
    known = {field for field, _ in _ATTENTION.keys.values()} | {"window", "d_rope"}
    for f in fields(AttentionConfig):
        value = getattr(part, f.name)
        if (f.name not in known and value != f.default) or isinstance(value, RotaryConfig):
            raise _lacks(f"attention with {f.name} = {value!r}")
    found = {"causal": True, **_ATTENTION.write(part), "out_proj_bias": part.bias}
    if part.rope is None:
        del found["rotary_emb_base"]
        return found
    return {**found, "rotary_emb_dim": part.d_rope or part.d_head or width // part.heads}


def _hidden(beside: tuple[PartConfig, ...], width: int) -> int:
    """The inner width of the feed-forward after a mixer; 0 for none."""
    if not beside:
        return 0
    part = beside[0]
    if len(beside) > 1 or not isinstance(part, MLPConfig) or part != MLPConfig(part.d_hidden):
        raise _lacks("a block other than a mixer and a SwiGLU without biases")
    hidden = -(-width // 3) * 8 if part.d_hidden is None else part.d_hidden
    if hidden % _MLP_MULTIPLE:
        raise _lacks(f"a feed-forward of inner width {hidden}, no multiple of {_MLP_MULTIPLE}")
    return hidden


def _check(given: Mapping[str, Any], options: Options, only: Mapping[str, Any], where: str) -> None:
    """That options which the layers here do not have are at what those compute."""
    for name, value in given.items():
        if name in only and value != only[name]:
            raise ConfigError(f"{where} has {name} = {brief(value)}; the layer here has {only[name]!r}")
        if name not in options.keys and name not in only and name not in _START | _SPEED:
            raise ConfigError(f"{where} has {brief(name)}, which the layer here does not have")


def _lacks(what: str) -> ConfigError:
    return ConfigError(f"model: {what}, which mamba-ssm does not have")
