"""RWKV-7 as its authors publish it ("x070"): one file of tensors, whose names and shapes say all that the model is.

Vectors are stored ``(1, 1, D)``, matrices of low rank the other way round, and mixes as shares of the previous input.
"""

import re
from collections.abc import Mapping
from string import ascii_letters
from typing import Any

import torch
from torch import Tensor

from dualform.core.errors import ConfigError
from dualform.core.options import brief
from dualform.layers.block import SublayerConfig, standing
from dualform.layers.rwkv4 import RWKVChannelConfig
from dualform.layers.rwkv7 import RWKV7Config
from dualform.models.config import DEEPEST, ModelConfig
from dualform.models.lm import LanguageModel
from dualform.models.tables.family import difference, explicit
from dualform.models.tables.layout import Change, Piece
from dualform.models.tables.names import rows

Shape = tuple[int, ...]
_MIXED = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")  # the rows of ``mix`` here


def _turned(matrix: Tensor) -> Tensor:
    return matrix.t()


_TURNED = Change(_turned, _turned)
_ROW = Change(lambda t: t.flatten(), lambda t: t[None, None])
_ROW_OF_MIX = Change(lambda t: t.flatten()[None], lambda t: t[None])
_LOW = {"decay": "w", "rate": "a", "gate": "g", "value_mix": "v"}
_TIME = {
    "mix": tuple(Piece(name, _ROW_OF_MIX, view=rows(i, 1)) for i, name in enumerate(_MIXED)),
    **{f"{low}.bias": (Piece(f"{name}0", _ROW),) for low, name in _LOW.items()},
    **{f"{low}.down.weight": (Piece(f"{name}1", _TURNED),) for low, name in _LOW.items()},
    **{f"{low}.up.weight": (Piece(f"{name}2", _TURNED),) for low, name in _LOW.items()},
    "key_scale": (Piece("k_k", _ROW),),
    "rate_scale": (Piece("k_a", _ROW),),
    "bonus": (Piece("r_k"),),
    "norm_weight": (Piece("ln_x.weight"),),
    "norm_bias": (Piece("ln_x.bias"),),
    "out_proj.weight": (Piece("output.weight"),),
}
_CHANNEL = {"mix_key": (Piece("x_k", _ROW),)}
_OUTSIDE = {"embed": "emb.", "embed_norm": "blocks.0.ln0.", "norm": "ln_out.", "head": "head."}
_BLOCK = {"norms.0.": "ln1.", "norms.1.": "ln2."}
_PARTS = {"parts.0.": ("att.", _TIME), "parts.1.": ("ffn.", _CHANNEL)}


class RWKV7File:
    """The layout of a file; a model is found by the shapes of its tensors, since there is no ``config.json``."""

    name = "rwkv7"

    def known(self, names: Mapping[str, Any]) -> bool:
        """Whether a file with tensors of these names has this layout."""
        return {"emb.weight", "blocks.0.att.r_k", "blocks.0.att.x_r"} <= names.keys()

    def read(self, table: Mapping[str, Any], where: str) -> ModelConfig:
        """The config of the model whose tensors have these shapes.

        Args:
            table: shapes by name.
            where: what errors begin with.

        Raises:
            ConfigError: for a tensor that is missing or whose shape is none of this layout; names it.
        """
        layers = 1 + max(int(m[1]) for m in map(re.compile(r"blocks\.(\d{1,9})\.").match, table) if m)
        if layers > DEEPEST:
            raise ConfigError(f"{where}a tensor of block {layers - 1:,}, expected at most {DEEPEST:,} blocks")
        letters: dict[tuple[Any, ...], str] = {}
        pattern = ""
        for i in range(layers):
            block = _block(table, i, where)
            if block not in letters and len(letters) == len(ascii_letters):
                raise ConfigError(f"{where}blocks of more than {len(ascii_letters)} different sizes")
            pattern += letters.setdefault(block, ascii_letters[len(letters) - 26])  # capitals first
        vocab_size, d_model = _shape(table, "emb.weight", 2, where)
        return ModelConfig(
            vocab_size,
            d_model,
            {letter: block for block, letter in letters.items()},
            pattern,
            tie_embeddings=False,
            norm="layer",
            embed_norm="layer",
        )

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Nothing, for a model that the layout has: there is no config beside the tensors.

        Raises:
            ConfigError: for another one; says what differs.
        """
        kinds = [tuple(type(standing(part).part) for part in config.parts[letter]) for letter in config.pattern]
        if any(kind != (RWKV7Config, RWKVChannelConfig) for kind in kinds):
            raise _lacks("a block other than rwkv7 and rwkv_channel")
        config = explicit(config)
        with torch.device("meta"):
            tensors = LanguageModel(config).state_dict()
        try:
            shapes = {p.name: p.of(t).shape for name, t in tensors.items() for p in self.pieces(config, name)}
            again = self.read(shapes, "")
        except (KeyError, ConfigError) as error:
            raise _lacks(f"a tensor {error}") from error
        if differing := difference(config, explicit(again)):
            raise _lacks(differing)
        return {}

    def pieces(self, config: ModelConfig, name: str) -> tuple[Piece, ...]:
        """What the tensor called ``name`` in ``LanguageModel(config)`` is made of there."""
        first, _, rest = name.partition(".")
        if first != "blocks":
            return (Piece(_OUTSIDE[first] + rest),)
        number, kind, index, rest = rest.split(".", 3)
        begin, here = f"blocks.{number}.", f"{kind}.{index}."
        if here in _BLOCK:
            return (Piece(begin + _BLOCK[here] + rest),)
        prefix, table = _PARTS[here]
        return tuple(piece._replace(name=begin + prefix + piece.name) for piece in table.get(rest, (Piece(rest),)))

    def variants(self) -> "list[RWKV7File]":
        """The layout."""
        return [self]

    def spare(self, config: ModelConfig) -> set[str]:
        """How much of the first value the first block takes, which has no meaning; some files have it."""
        return {f"blocks.0.att.v{i}" for i in range(3)}


RWKV7_FILE = RWKV7File()


def _block(table: Mapping[str, Any], i: int, where: str) -> tuple[SublayerConfig, SublayerConfig]:
    """The sub-layers of block i."""

    def rank(name: str) -> int:
        return _shape(table, f"blocks.{i}.att.{name}", 2, where)[1]

    _, d_head = _shape(table, f"blocks.{i}.att.r_k", 2, where)
    time = RWKV7Config(
        d_head=d_head,
        decay_rank=rank("w1"),
        rate_rank=rank("a1"),
        gate_rank=rank("g1"),
        value_rank=rank("v1") if i else 0,
    )
    d_hidden = _shape(table, f"blocks.{i}.ffn.key.weight", 2, where)[0]
    channel = RWKVChannelConfig(d_hidden=d_hidden, receptance=False, previous=True)
    return SublayerConfig(time, norm="layer"), SublayerConfig(channel, norm="layer")


def _shape(table: Mapping[str, Any], name: str, axes: int, where: str) -> Shape:
    shape = table.get(name)
    if shape is None:
        raise ConfigError(f"{where}{name} is missing")
    if len(shape) != axes or min(shape) < 1:
        raise ConfigError(f"{where}{name} has shape {brief(tuple(shape))}, expected {axes} axes of at least 1")
    return tuple(shape)


def _lacks(what: str) -> ConfigError:
    return ConfigError(f"model: {what}, which a file of RWKV-7 does not have")
