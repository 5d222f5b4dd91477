"""The architectures of GGUF that this library has: what their keys say, as the options of the families of transformers.

Sizes that a tensor shows are taken from the tensor.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from dualform.core.errors import CheckpointError, ConfigError
from dualform.core.options import brief, suggestion
from dualform.layers.attention import AttentionConfig
from dualform.models.config import DEEPEST, ModelConfig
from dualform.models.gguf.file import Header
from dualform.models.gguf.layout import GGUF, OUTSIDE, turned_attention
from dualform.models.tables.falcon_h1 import FALCON_H1
from dualform.models.tables.granite import GRANITE
from dualform.models.tables.jamba import JAMBA
from dualform.models.tables.lfm2 import LFM2
from dualform.models.tables.mamba import FALCON_MAMBA, MAMBA, MAMBA2
from dualform.models.tables.names import periodic
from dualform.models.tables.rwkv7 import RWKV7_FILE

_REQUIRED: Any = object()
_RMS = "attention.layer_norm_rms_epsilon"


class Keys:
    """The keys of an architecture, and the shapes of its tensors.

    Args:
        header: of the file.
        where: what errors begin with.

    Raises:
        CheckpointError: for a file that does not say its architecture.
    """

    def __init__(self, header: Header, where: str):
        self.where, self.header = where, header
        name = header.about.get("general.architecture")
        if not isinstance(name, str):
            raise CheckpointError(f"{where}general.architecture is {brief(name)}, expected the name of an architecture")
        self.architecture = name

    def get(self, key: str, of: type[Any], default: Any = _REQUIRED) -> Any:
        """A value.

        Raises:
            ConfigError: for one that is missing or of another type.
        """
        value = self.header.about.get(f"{self.architecture}.{key}", default)
        if value is _REQUIRED:
            raise ConfigError(f"{self.where}the key {self.architecture}.{key} is missing")
        if value is not default and not (isinstance(value, of) and isinstance(value, bool) == (of is bool)):
            raise ConfigError(
                f"{self.where}{self.architecture}.{key} is {brief(value)}, expected a value of type {of.__name__}"
            )
        return value

    def size(self, key: str, default: Any = _REQUIRED) -> int:
        """A positive number.

        Raises:
            ConfigError: for another value.
        """
        value = self.get(key, int, default)
        if value is not default and not 0 < value < 2**31:
            raise ConfigError(f"{self.where}{self.architecture}.{key} is {brief(value)}, expected a positive number")
        return value

    def each(self, key: str) -> list[int]:
        """A number for each layer, which the file gives for each or for all.

        Raises:
            ConfigError: for another value.
        """
        layers = self.layers
        value = self.header.about.get(f"{self.architecture}.{key}")
        found: list[Any] = value if isinstance(value, list) else [value] * layers
        if len(found) != layers or not all(type(one) is int and 0 <= one < 2**31 for one in found):
            came = f"{self.where}{self.architecture}.{key} is {brief(value)}"
            raise ConfigError(f"{came}, expected a number, or one for each of {layers} layers")
        return found

    def same(self, key: str) -> int:
        """The number of those layers that have one."""
        found = {one for one in self.each(key) if one}
        if len(found) != 1:
            raise ConfigError(f"{self.where}{self.architecture}.{key} has {brief(sorted(found))}, expected one number")
        return found.pop()

    @property
    def layers(self) -> int:
        """How many blocks there are."""
        layers = self.size("block_count")
        if layers > DEEPEST:
            raise ConfigError(
                f"{self.where}{self.architecture}.block_count is {layers:,}, expected at most {DEEPEST:,}"
            )
        return layers

    def has(self, name: str) -> bool:
        """Whether there is a tensor; ``{}`` in its name is any block."""
        return any(name.format(i) in self.header.tensors for i in range(self.layers if "{}" in name else 1))

    def shape(self, name: str, axes: int) -> tuple[int, ...]:
        """The shape of a tensor; ``{}`` in its name is the first block that has one.

        Raises:
            ConfigError: where it is missing or has other axes.
        """
        for i in range(self.layers if "{}" in name else 1):
            if (found := self.header.tensors.get(name.format(i))) is not None:
                if len(found.shape) != axes or min(found.shape) < 1:
                    raise ConfigError(f"{self.where}{name.format(i)} has shape {found.shape}, expected {axes} axes")
                return found.shape
        raise ConfigError(f"{self.where}{name.format(0)} is missing")

    def model(self, eps: str) -> dict[str, Any]:
        """What every family has, under the names of transformers."""
        vocab, width = self.shape("token_embd.weight", 2)
        if width != self.size("embedding_length"):
            came = f"{self.architecture}.embedding_length is {self.size('embedding_length'):,}"
            raise ConfigError(f"{self.where}{came}, and token_embd.weight is {width:,} wide")
        return {
            "hidden_size": width,
            "vocab_size": vocab,
            "num_hidden_layers": self.layers,
            "tie_word_embeddings": not self.has("output.weight"),
            eps: self.get(_RMS, float),
        }

    def scan(self, begin: str = "mamba_") -> dict[str, Any]:
        """What Mamba and Mamba-2 have in hybrids of transformers."""
        return {
            f"{begin}d_state": self.size("ssm.state_size"),
            f"{begin}d_conv": self.size("ssm.conv_kernel"),
            f"{begin}conv_bias": self.has("blk.{}.ssm_conv1d.bias"),
            f"{begin}proj_bias": self.has("blk.{}.ssm_in.bias"),
        }

    def heads(self, begin: str = "mamba_") -> dict[str, Any]:
        """What Mamba-2 has beside that."""
        channels, heads = self.size("ssm.inner_size"), self.size("ssm.time_step_rank")
        if channels % heads:
            raise ConfigError(f"{self.where}{channels:,} channels in {heads:,} heads of Mamba-2 (ssm.time_step_rank)")
        groups = self.size("ssm.group_count", 1)
        return {f"{begin}n_heads": heads, f"{begin}d_head": channels // heads, f"{begin}n_groups": groups}

    def rope(self) -> float:
        """The base of a rotary embedding.

        Raises:
            ConfigError: for one that is scaled.
        """
        kind = self.header.about.get(f"{self.architecture}.rope.scaling.type", "none")
        if kind != "none" or self.has("rope_freqs.weight") or self.has("blk.{}.rope_freqs.weight"):
            raise ConfigError(f"{self.where}a rotary embedding that is scaled, which the layers here do not have")
        return self.get("rope.freq_base", float, 10000.0)


def _mamba(keys: Keys) -> tuple[ModelConfig, dict[str, Any]]:
    table = keys.model("layer_norm_epsilon") | {
        "state_size": keys.size("ssm.state_size"),
        "conv_kernel": keys.size("ssm.conv_kernel"),
        "intermediate_size": keys.size("ssm.inner_size"),
        "use_bias": keys.has("blk.{}.ssm_in.bias"),
        "use_conv_bias": keys.has("blk.{}.ssm_conv1d.bias"),
    }
    if keys.architecture == "mamba2":
        heads = keys.heads("")
        expand = table.pop("intermediate_size") / table["hidden_size"]
        more = {"num_heads": heads["n_heads"], "head_dim": heads["d_head"], "n_groups": heads["n_groups"]}
        return MAMBA2.read({**table, **more, "expand": expand}, keys.where), {}
    table["time_step_rank"] = keys.size("ssm.time_step_rank")
    if keys.get("ssm.dt_b_c_rms", bool, False):
        return FALCON_MAMBA.read({**table, "mixer_rms_eps": table["layer_norm_epsilon"]}, keys.where), {}
    return MAMBA.read(table, keys.where), {}


def _jamba(keys: Keys) -> tuple[ModelConfig, dict[str, Any]]:
    table, layers = keys.model("rms_norm_eps"), keys.layers
    attends = [i for i, heads in enumerate(keys.each("attention.head_count_kv")) if heads]
    routes = [i for i in range(layers) if keys.has(f"blk.{i}.ffn_gate_inp.weight")]
    try:
        attention, experts = periodic(attends, layers), periodic(routes, layers) if routes else (1, 0)
    except LookupError as error:
        raise ConfigError(f"{keys.where}layers of attention or experts that do not come in a period") from error
    table |= keys.scan() | {
        "mamba_expand": keys.size("ssm.inner_size") / table["hidden_size"],
        "mamba_dt_rank": keys.size("ssm.time_step_rank"),
        "attn_layer_period": attention[0],
        "attn_layer_offset": attention[1],
        "expert_layer_period": experts[0],
        "expert_layer_offset": experts[1],
        "num_experts": keys.size("expert_count") if routes else 1,
        "num_experts_per_tok": keys.size("expert_used_count") if routes else 1,
        "num_attention_heads": keys.same("attention.head_count"),
        "num_key_value_heads": keys.same("attention.head_count_kv") if attends else 1,
        "intermediate_size": keys.size("feed_forward_length"),
    }
    return JAMBA.read({**table, "mamba_expand": int(table["mamba_expand"])}, keys.where), {}


def _falcon_h1(keys: Keys) -> tuple[ModelConfig, dict[str, Any]]:
    # The factors of its embedding, maps and logits are in the weights there.
    table = keys.model("rms_norm_eps") | keys.scan() | keys.heads()
    table |= {
        "mamba_d_ssm": keys.size("ssm.inner_size"),
        "mamba_rms_norm": keys.has("blk.{}.ssm_norm.weight"),
        "mamba_norm_before_gate": False,
        "projectors_bias": table["mamba_proj_bias"],
        "num_attention_heads": keys.same("attention.head_count"),
        "num_key_value_heads": keys.same("attention.head_count_kv"),
        "head_dim": keys.shape("blk.{}.attn_q.weight", 2)[0] // keys.same("attention.head_count"),
        "attention_bias": keys.has("blk.{}.attn_q.bias"),
        "rope_theta": keys.rope(),
        "intermediate_size": keys.shape("blk.{}.ffn_gate.weight", 2)[0],
        "mlp_bias": keys.has("blk.{}.ffn_gate.bias"),
    }
    return FALCON_H1.read(table, keys.where), {"norms": ("attn_norm.", "ffn_norm")}


def _granite(keys: Keys) -> tuple[ModelConfig, dict[str, Any]]:
    table, attends = keys.model("rms_norm_eps"), keys.each("attention.head_count_kv")
    heads, experts = keys.same("attention.head_count"), keys.has("blk.{}.ffn_gate_inp.weight")
    turns = keys.get("rope.scaling.finetuned", bool, True)
    table |= {
        "layer_types": ["attention" if kv else "mamba" for kv in attends],
        "num_attention_heads": heads,
        "num_key_value_heads": keys.same("attention.head_count_kv") if any(attends) else heads,
        "attention_bias": keys.has("blk.{}.attn_q.bias"),
        "attention_multiplier": keys.get("attention.scale", float, (table["hidden_size"] // heads) ** -0.5),
        "position_embedding_type": "rope" if turns else None,
        "rope_theta": keys.rope() if turns else 10000.0,
        "embedding_multiplier": keys.get("embedding_scale", float, 1.0),
        "residual_multiplier": keys.get("residual_scale", float, 1.0),
        "logits_scaling": keys.get("logit_scale", float, 1.0),
        "num_local_experts": keys.size("expert_count") if experts else 0,
    }
    if not all(attends):
        channels = keys.size("ssm.inner_size")
        table |= keys.scan() | keys.heads() | {"mamba_expand": channels / table["hidden_size"]}
    if turns and keys.size("rope.dimension_count", table["hidden_size"] // heads) != table["hidden_size"] // heads:
        raise ConfigError(f"{keys.where}a rotary embedding of a part of each head, which this family does not have")
    if experts:
        table["num_experts_per_tok"] = keys.size("expert_used_count")
        table["intermediate_size"] = keys.shape("blk.{}.ffn_gate_exps.weight", 3)[1]
        shared = "blk.{}.ffn_gate_shexp.weight"
        table["shared_intermediate_size"] = keys.shape(shared, 2)[0] if keys.has(shared) else 0
    else:
        table["shared_intermediate_size"] = keys.shape("blk.{}.ffn_gate.weight", 2)[0]
    return GRANITE.read(table, keys.where), {"names": {AttentionConfig: turned_attention}}


def _lfm2(keys: Keys) -> tuple[ModelConfig, dict[str, Any]]:
    attends = keys.each("attention.head_count_kv")
    if keys.get("attention.sliding_window", int, 0):
        raise ConfigError(f"{keys.where}attention with a sliding window, which this family does not have")
    table = keys.model("norm_eps") | {
        "layer_types": ["full_attention" if kv else "conv" for kv in attends],
        "num_attention_heads": keys.same("attention.head_count"),
        "num_key_value_heads": keys.same("attention.head_count_kv") if any(attends) else 1,
        "rope_theta": keys.rope(),
        "conv_L_cache": keys.size("shortconv.l_cache"),
        "conv_bias": keys.has("blk.{}.shortconv.conv.bias"),
        "intermediate_size": keys.shape("blk.{}.ffn_gate.weight", 2)[0],
        "block_auto_adjust_ff_dim": False,
    }
    return LFM2.read(table, keys.where), {"outside": {**OUTSIDE, "norm": "token_embd_norm."}}


def _rwkv7(keys: Keys) -> tuple[ModelConfig, dict[str, Any]]:
    head, width = keys.size("wkv.head_size"), keys.size("embedding_length")
    shapes: dict[str, tuple[int, ...]] = {"emb.weight": keys.shape("token_embd.weight", 2)}
    for i in range(keys.layers):
        att = f"blocks.{i}.att."
        for letter in "wagv" if i else "wag":
            shapes[f"{att}{letter}1"] = keys.shape(f"blk.{i}.time_mix_{letter}1.weight", 2)[::-1]
        shapes[f"{att}r_k"] = (width // head, head)
        shapes[f"blocks.{i}.ffn.key.weight"] = keys.shape(f"blk.{i}.channel_mix_key.weight", 2)
    config = RWKV7_FILE.read(shapes, keys.where)
    eps = keys.get("attention.layer_norm_epsilon", float, 1e-5)
    unused = {f"blk.0.time_mix_v{i}.weight{part}" for i in range(3) for part in ("", ":whole", ":scales")}
    layout = {"norms": ("attn_norm.", "attn_norm_2."), "unused": frozenset(unused)}
    return replace(config, norm_eps=eps), layout


ARCHITECTURES: Mapping[str, Callable[[Keys], tuple[ModelConfig, dict[str, Any]]]] = {
    "mamba": _mamba,
    "mamba2": _mamba,
    "jamba": _jamba,
    "falcon-h1": _falcon_h1,
    "granitehybrid": _granite,
    "lfm2": _lfm2,
    "rwkv7": _rwkv7,
}
"""By their names there: how the config of a model is read, and what its layout has otherwise than usual."""


def layout_of_gguf(header: Header, where: str) -> tuple[GGUF, ModelConfig]:
    """The layout of a file, and the config of its model.

    Args:
        header: of the file.
        where: what errors begin with.

    Raises:
        CheckpointError: for an architecture that is not in the table; names it and those that are.
        ConfigError: for a key that is missing, or a value that the layers here do not have; names it.
    """
    keys = Keys(header, where)
    if keys.architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{where}a model of the architecture {brief(keys.architecture)}, which is not in the tables",
            hint=suggestion(keys.architecture, list(ARCHITECTURES)),
        )
    if (parts := header.about.get("split.count", 1)) not in (0, 1):
        hint = "join them with llama.cpp's own program: llama-gguf-split --merge"
        raise CheckpointError(f"{where}one of {brief(parts)} files of a model", hint=hint)
    config, otherwise = ARCHITECTURES[keys.architecture](keys)
    return GGUF(keys.architecture, header.tensors, **otherwise).fitted(config), config
