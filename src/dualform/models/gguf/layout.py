"""Models in files of GGUF, as llama.cpp has them: the names and shapes of their tensors.

A block's tensors are called alike in every architecture there. So one table names them by the class of the part that
they belong to, and an architecture says what its norms are called, and which tensors it orders in another way.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dualform.layers.attention import AttentionConfig
from dualform.layers.mamba import MambaConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.layers.mlp import MLPConfig
from dualform.layers.moe import MoEConfig
from dualform.layers.rwkv4 import RWKVChannelConfig
from dualform.layers.rwkv7 import RWKV7Config
from dualform.layers.short_conv import GatedShortConvConfig
from dualform.models.config import ModelConfig
from dualform.models.gguf.file import SCALES, WHOLE, Packed
from dualform.models.lm import LanguageModel
from dualform.models.tables.family import part_within
from dualform.models.tables.layout import SAME, Change, Piece
from dualform.models.tables.names import Names, attention, mlp, renamed, rows_of_half

_WORDS = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
}


def _decay(stored: Tensor) -> Tensor:
    return (-stored).log()


def _rate(log: Tensor) -> Tensor:
    return -log.exp()


_RATE = Change(_decay, _rate)
"""The rate of decay: its logarithm here, the negative number itself there."""
_COLUMN = Change(lambda t: t.flatten(), lambda t: t[:, None])
_RATE_COLUMN = Change(lambda t: _decay(t).flatten(), lambda t: _rate(t)[:, None])


def _plain(**names: str) -> dict[str, tuple[Piece, ...]]:
    """Tensors that differ in their names; ``__`` stands for a dot."""
    return {here.replace("__", "."): (Piece(there),) for here, there in names.items()}


def _weights(**names: str) -> dict[str, tuple[Piece, ...]]:
    """Modules that differ in their names: their weights and biases."""
    kinds = ("weight", "bias")
    return {f"{here}.{kind}": (Piece(f"{there}.{kind}"),) for here, there in names.items() for kind in kinds}


_CONV = _plain(conv_weight="ssm_conv1d.weight", conv_bias="ssm_conv1d.bias", dt_bias="ssm_dt.bias")


def _mamba(part: MambaConfig, width: int) -> dict[str, tuple[Piece, ...]]:
    maps = _weights(in_proj="ssm_in", x_proj="ssm_x", dt_proj="ssm_dt", out_proj="ssm_out")
    norms = _weights(dt_norm="ssm_dt_norm", B_norm="ssm_b_norm", C_norm="ssm_c_norm")
    return {**maps, **norms, **_CONV, "A_log": (Piece("ssm_a", _RATE),), "D": (Piece("ssm_d"),)}


def _mamba2(part: Mamba2Config, width: int) -> dict[str, tuple[Piece, ...]]:
    groups = part.groups
    by_group = Change(lambda t: t.flatten(), lambda t: t if groups == 1 else t.unflatten(0, (groups, -1)))
    return {
        **_weights(in_proj="ssm_in", out_proj="ssm_out"),
        **_CONV,
        "A_log": (Piece("ssm_a", _RATE_COLUMN),),
        "D": (Piece("ssm_d", _COLUMN),),
        "norm.weight": (Piece("ssm_norm.weight", by_group),),
    }


def _attention(part: AttentionConfig, width: int) -> dict[str, tuple[Piece, ...]]:
    norms = _weights(q_norm="attn_q_norm", k_norm="attn_k_norm")
    return {**renamed(attention(part, width), _WORDS), **norms}


def turned_attention(part: AttentionConfig, width: int) -> dict[str, tuple[Piece, ...]]:
    """Attention whose rotary embedding turns neighbours there, and halves of a head here."""
    head, kv = part.d_head or width // part.heads, part.kv_heads or part.heads

    def order(start: int, heads: int) -> Tensor:
        count = torch.arange(start, start + heads * head, device="cpu")
        return count.view(heads, 2, head // 2).transpose(1, 2).flatten()

    orders = {"attn_q": order(0, part.heads), "attn_k": order(part.heads * head, kv)}

    def turned(piece: Piece) -> Piece:
        rows = orders.get(piece.name.partition(".")[0])
        return piece if rows is None else Piece(piece.name, rows=rows)

    return {here: tuple(map(turned, pieces)) for here, pieces in _attention(part, width).items()}


def _mlp(part: MLPConfig, width: int) -> dict[str, tuple[Piece, ...]]:
    return {**_weights(down_proj="ffn_down", up_proj="ffn_up"), **renamed(mlp(part, width), _WORDS)}


def _moe(part: MoEConfig, width: int) -> dict[str, tuple[Piece, ...]]:
    def half(which: int) -> Callable[[Tensor], Tensor]:
        return lambda t: t.chunk(2, 1)[which]

    shared = {"gate": "ffn_gate_shexp", "up": "ffn_up_shexp"}
    return {
        **_plain(router__weight="ffn_gate_inp.weight", router__correction="exp_probs_b.bias"),
        "gate_up_proj": tuple(Piece(f"ffn_{n}_exps.weight", view=half(i)) for i, n in enumerate(("gate", "up"))),
        **_plain(up_proj="ffn_up_exps.weight", down_proj="ffn_down_exps.weight"),
        "shared.gate_up_proj.weight": tuple(
            Piece(f"{name}.weight", view=rows_of_half(i)) for i, name in enumerate(shared.values())
        ),
        **_plain(shared__down_proj__weight="ffn_down_shexp.weight"),
    }


def _short_conv(part: GatedShortConvConfig, width: int) -> dict[str, tuple[Piece, ...]]:
    maps = _weights(in_proj="shortconv.in_proj", out_proj="shortconv.out_proj")
    return {**maps, **_plain(conv_weight="shortconv.conv.weight", conv_bias="shortconv.conv.bias")}


_LOW = {"decay": "w", "rate": "a", "gate": "g", "value_mix": "v"}
_MIXED = Change(lambda t: t.view(t.shape[0], t.shape[-1]), lambda t: t[:, None, None])


def _rwkv7(part: RWKV7Config, width: int) -> dict[str, tuple[Piece, ...]]:
    heads = Change(lambda t: t.view(-1, part.d_head), lambda t: t.flatten())
    low: dict[str, tuple[Piece, ...]] = {}
    for here, letter in _LOW.items():
        for inner, number in {"bias": 0, "down.weight": 1, "up.weight": 2}.items():
            low[f"{here}.{inner}"] = (Piece(f"time_mix_{letter}{number}.weight"),)
    return {
        **low,
        **{f"{name}.weight": (Piece(f"time_mix_{name}.weight"),) for name in ("receptance", "key", "value")},
        "mix": (Piece("time_mix_lerp_fused.weight", _MIXED),),
        "bonus": (Piece("time_mix_r_k.weight", heads),),
        **_plain(
            key_scale="time_mix_k_k.weight",
            rate_scale="time_mix_k_a.weight",
            norm_weight="time_mix_ln.weight",
            norm_bias="time_mix_ln.bias",
            out_proj__weight="time_mix_output.weight",
        ),
    }


def _channel(part: RWKVChannelConfig, width: int) -> dict[str, tuple[Piece, ...]]:
    return _plain(
        key__weight="channel_mix_key.weight",
        value__weight="channel_mix_value.weight",
        mix_key="channel_mix_lerp_k.weight",
    )


_NAMES: Mapping[type[Any], Names] = {
    MambaConfig: _mamba,
    Mamba2Config: _mamba2,
    AttentionConfig: _attention,
    MLPConfig: _mlp,
    MoEConfig: _moe,
    GatedShortConvConfig: _short_conv,
    RWKV7Config: _rwkv7,
    RWKVChannelConfig: _channel,
}
OUTSIDE = {"embed": "token_embd.", "norm": "output_norm.", "head": "output.", "embed_norm": "token_embd_norm."}
NORMS = ("attn_norm.", "ffn_norm.")


@dataclass(frozen=True, eq=False)
class GGUF:
    """The layout of one file.

    Args:
        architecture: as the file calls it.
        tensors: of the file.
        outside: the embedding, norms and head there, by their names here.
        norms: of a block, first to last; one whose name ends without a dot is called so and no more.
        names: of parts whose tensors lie otherwise than usual.
        unused: names of tensors that the file may have beside those of the model.
        whole: the modules here whose matrices stay whole numbers of 8 bits; :meth:`fitted` finds them.
        kept: the other linear maps and embeddings here.
        used: the names of those tensors that the model is made of.
    """

    architecture: str
    tensors: Mapping[str, Packed]
    outside: Mapping[str, str] = field(default_factory=lambda: OUTSIDE)
    norms: tuple[str, ...] = NORMS
    names: Mapping[type[Any], Names] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()
    whole: frozenset[str] = frozenset()
    kept: frozenset[str] = frozenset()
    used: frozenset[str] = frozenset()

    name = "gguf"

    def fitted(self, config: ModelConfig) -> "GGUF":
        """The layout that keeps the matrices of 8 bits which the model of a config can have."""
        with torch.device("meta"):
            model = LanguageModel(config)
        used = {piece.name for name in model.state_dict() for piece in self.pieces(config, name)}
        maps = {n for n, m in model.named_modules() if type(m) in (nn.Linear, nn.Embedding)}
        whole = {name for name in maps if self._keeps(config, f"{name}.weight")}
        return replace(self, whole=frozenset(whole), kept=frozenset(maps - whole), used=frozenset(used))

    def _keeps(self, config: ModelConfig, name: str) -> bool:
        pieces = self.pieces(config, name)
        found = [self.tensors.get(piece.name) for piece in pieces]
        return all(t is not None and t.eight for t in found) and all(piece.change is SAME for piece in pieces)

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the model's floats, of which files have several: that of its matrices, or float32 where one is blocks."""
        matrices = {t.dtype for t in self.tensors.values() if len(t.shape) > 1 and t.dtype != torch.float32}
        return matrices.pop() if len(matrices) == 1 and None not in matrices else torch.float32

    def pieces(self, config: ModelConfig, name: str) -> tuple[Piece, ...]:
        """What the tensor called ``name`` in ``LanguageModel(config)`` is made of there."""
        module, _, kind = name.rpartition(".")
        if module in self.whole and kind in ("weight", "scales"):
            suffix = WHOLE if kind == "weight" else SCALES
            return tuple(p._replace(name=p.name + suffix) for p in self._pieces(config, f"{module}.weight"))
        return self._pieces(config, name)

    def _pieces(self, config: ModelConfig, name: str) -> tuple[Piece, ...]:
        outer, _, rest = name.partition(".")
        if outer != "blocks":
            return (Piece(self.outside[outer] + rest),)
        number, rest = rest.split(".", 1)
        begin = f"blk.{number}."
        part, tail = part_within(config, config.pattern[int(number)], rest)
        if tail is None:
            _, index, kind = rest.split(".")
            norm = self.norms[int(index)]
            return (Piece(begin + norm + (kind if norm.endswith(".") else "")),)
        pieces = {**_NAMES, **self.names}[type(part)](part, config.d_model).get(tail, (Piece(tail),))
        return tuple(piece._replace(name=begin + piece.name) for piece in pieces)

    def variants(self) -> "list[GGUF]":
        """The layout."""
        return [self]

    def spare(self, config: ModelConfig) -> set[str]:
        """Names of tensors that the file has beside those of the model: the other ways to read those of 8 bits."""
        eight = {name for name, t in self.tensors.items() if t.eight} & self.used
        return {name + part for name in eight for part in ("", WHOLE, SCALES)} | self.unused
