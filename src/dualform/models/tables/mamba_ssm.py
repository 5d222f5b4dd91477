"""The names and sizes of mamba-ssm in this library's terms."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dualform.core.errors import ConfigError
from dualform.core.options import brief
from dualform.layers.attention import AttentionConfig
from dualform.layers.mamba import MambaConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.layers.mixer import PartConfig
from dualform.layers.mlp import MLPConfig
from dualform.models.config import ModelConfig

MIXER = {"conv1d.weight": "conv_weight", "conv1d.bias": "conv_bias", "dt_proj.bias": "dt_bias"}
"""Parameters of Mamba and Mamba2 that have another name here; the others keep theirs."""
ATTENTION = {"in_proj.weight": "qkv_proj.weight", "in_proj.bias": "qkv_proj.bias"}
"""Those of attention."""
MODEL = (
    (r"backbone\.embedding\.", "embed."),
    (r"backbone\.norm_f\.", "norm."),
    (r"backbone\.layers\.(\d+)\.norm\.", r"blocks.\1.norms.0."),
    (r"backbone\.layers\.(\d+)\.norm2\.", r"blocks.\1.norms.1."),
    (r"backbone\.layers\.(\d+)\.mixer\.", r"blocks.\1.parts.0."),
    (r"backbone\.layers\.(\d+)\.mlp\.fc1\.", r"blocks.\1.parts.1.gate_up_proj."),
    (r"backbone\.layers\.(\d+)\.mlp\.fc2\.", r"blocks.\1.parts.1.down_proj."),
    (r"lm_head\.", "head."),
)
"""What names of a language model begin with, there and here."""

_SAME = {name: name for name in ("d_state", "d_conv", "expand", "dt_min", "dt_max", "bias", "conv_bias")}
_START = {"dt_init", "dt_scale", "dt_init_floor", "conv_init", "A_init_range"}  # of fresh parameters only
_SPEED = {"use_fast_path", "use_mem_eff_path", "chunk_size", "layer", "sequence_parallel", "process_group"}
_MAMBA = {**_SAME, "dt_rank": "dt_rank"}
_MAMBA2 = {**_SAME, "headdim": "d_head", "ngroups": "groups", "dt_limit": "dt_limit"}
_ONLY2 = {"rmsnorm": True, "norm_before_gate": False, "D_has_hdim": False, "d_ssm": None}
_ATTENTION = {"num_heads": "heads", "num_heads_kv": "kv_heads", "head_dim": "d_head", "rotary_emb_base": "rope"}
_ONLY = {"causal": True, "d_conv": 0, "mlp_dim": 0, "rotary_emb_interleaved": False, "softmax_scale": None}


def mixer_tensors(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a Mamba or Mamba2, under this library's names and in its shapes."""
    found = {MIXER.get(name, name): tensor for name, tensor in given.items()}
    if "conv_weight" in found:
        found["conv_weight"] = found["conv_weight"].squeeze(1)  # (D, 1, W)
    return found


def model_tensors(given: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of a ``MambaLMHeadModel``, for ``LanguageModel(config).load_state_dict``.

    Args:
        given: its state dict.
        config: of :func:`model_config`.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in given.items():
        for pattern, here in MODEL:
            if match := re.match(pattern, name):
                found[match.expand(here) + name[match.end() :]] = tensor
                break
        else:
            found[name] = tensor
    if config.tie_embeddings:
        found.pop("head.weight", None)
    for i, letter in enumerate(config.pattern):
        prefix = f"blocks.{i}.parts.0."
        own = {name.removeprefix(prefix): found.pop(name) for name in list(found) if name.startswith(prefix)}
        attends = isinstance(config.parts[letter][0], AttentionConfig)
        own = {ATTENTION.get(name, name): m for name, m in own.items()} if attends else mixer_tensors(own)
        found.update({prefix + name: tensor for name, tensor in own.items()})
        for kind in ("weight", "bias"):
            name = f"blocks.{i}.parts.1.gate_up_proj.{kind}"
            if name in found:
                up, gate = found[name].chunk(2)  # there the gate comes last
                found[name] = torch.cat([gate, up])
    return found


def model_config(about: Mapping[str, Any]) -> ModelConfig:
    """The config of the ``LanguageModel`` that a ``MambaConfig``, as a dict, describes.

    Raises:
        ConfigError: for an option that no layer of this library has; names it.
    """
    if not about.get("rms_norm", True):
        raise ConfigError("mamba_ssm: rms_norm is False, and LanguageModel has no norm with a mean")
    ssm, width = about.get("ssm_cfg") or {}, about["d_model"]
    two = ssm.get("layer", "Mamba1") == "Mamba2"
    mixer: PartConfig
    if two:
        mixer = Mamba2Config(**_options("ssm_cfg", ssm, _MAMBA2, _ONLY2))
    else:
        options = _options("ssm_cfg", ssm, _MAMBA, {})
        mixer = MambaConfig(**{k: v for k, v in options.items() if (k, v) != ("dt_rank", "auto")})
    inner = about.get("d_intermediate", 0)
    beside = (MLPConfig(d_hidden=-(-inner // 128) * 128),) if inner else ()
    parts: dict[str, tuple[PartConfig, ...]] = {"M": (mixer, *beside)}
    attends = set(about.get("attn_layer_idx") or ())
    if attends:
        parts["A"] = (_attention(about.get("attn_cfg") or {}, width), *beside)
    multiple = about.get("pad_vocab_size_multiple", 8)
    return ModelConfig(
        -(-about["vocab_size"] // multiple) * multiple,
        width,
        parts,
        "".join("A" if i in attends else "M" for i in range(about["n_layer"])),
        tie_embeddings=about.get("tie_embeddings", True),
    )


def _attention(given: Mapping[str, Any], width: int) -> AttentionConfig:
    given = dict(given)
    biases = {given.pop("qkv_proj_bias", True), given.pop("out_proj_bias", True)}
    rotated = given.pop("rotary_emb_dim", 0)
    head = given.get("head_dim") or width // given["num_heads"]
    if len(biases) > 1 or rotated not in (0, head):
        what = "one of two biases" if len(biases) > 1 else f"rotary_emb_dim = {rotated} of {head}"
        raise ConfigError(f"mamba_ssm: attn_cfg has {what}, which Attention does not have")
    options = _options("attn_cfg", {"causal": False, **given}, _ATTENTION, _ONLY)
    return AttentionConfig(**{"rope": 10000.0, **options, **({} if rotated else {"rope": None})}, bias=biases.pop())


def _options(where: str, given: Mapping[str, Any], names: Mapping[str, str], only: Mapping[str, Any]) -> dict[str, Any]:
    """Options by this library's names; those that it does not have must be at what its layers do."""
    found = {}
    for name, value in given.items():
        if name in names:
            found[names[name]] = tuple(value) if isinstance(value, list) else value
        elif name in only and value != only[name]:
            raise ConfigError(f"mamba_ssm: {where} has {name} = {brief(value)}; the layer here has {only[name]!r}")
        elif name not in only and name not in _START | _SPEED:
            raise ConfigError(f"mamba_ssm: {where} has {name!r}, which the layer here does not have")
    return found
