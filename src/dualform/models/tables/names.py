"""What transformers usually calls the tensors of a part, and how it cuts them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dualform.core.errors import ConfigError
from dualform.core.options import brief
from dualform.layers.attention import AttentionConfig
from dualform.layers.mamba import MambaConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.layers.mlp import MLPConfig
from dualform.layers.moe import MoEConfig
from dualform.models.tables.layout import DEPTHWISE, Piece

Names = Callable[[Any, int], Mapping[str, tuple[Piece, ...]]]
"""A part and D -> for the names of its tensors here that differ there, what they are made of."""


def rows(start: int, count: int) -> Callable[[Tensor], Tensor]:
    """The view of some rows of a matrix, or of some entries of a vector."""
    return lambda tensor: tensor.narrow(0, start, count)


def stacked(sizes: Mapping[str, int], kind: str = "weight") -> tuple[Piece, ...]:
    """Maps that are the rows of one matrix here, in order: the name of each and its rows."""
    pieces, start = [], 0
    for name, size in sizes.items():
        pieces.append(Piece(f"{name}.{kind}", view=rows(start, size)))
        start += size
    return tuple(pieces)


def attention(part: AttentionConfig, width: int) -> dict[str, tuple[Piece, ...]]:
    """Queries, keys and values are maps of their own there; what gates a head stands behind its queries."""
    head, kv = part.d_head or width // part.heads, part.kv_heads or part.heads
    value = head if part.d_value is None else part.d_value
    sizes = {"q_proj": part.heads * head, "k_proj": kv * head, "v_proj": kv * value}

    def pieces(kind: str) -> tuple[Piece, ...]:
        found = stacked(sizes, kind)
        if not part.gate:
            return found
        gates = sum(sizes.values()) + _arange(part.heads * value).view(part.heads, -1)
        turns = torch.cat([_arange(part.heads * head).view(part.heads, -1), gates], 1).flatten()
        return Piece(f"q_proj.{kind}", rows=turns), *found[1:]

    found = {f"qkv_proj.{inner}{kind}": pieces(kind) for kind in ("weight", "bias") for inner in ("", "base.")}
    return found | {f"out_proj.{kind}": (Piece(f"o_proj.{kind}"),) for kind in ("weight", "bias")}


def _arange(count: int) -> Tensor:
    return torch.arange(count, device="cpu")


def mlp(part: MLPConfig, width: int) -> dict[str, tuple[Piece, ...]]:
    """The gate and what it multiplies are maps of their own there."""
    names = {"gate_proj": rows_of_half(0), "up_proj": rows_of_half(1)}
    kinds = ("weight", "bias")
    return {f"gate_up_proj.{k}": tuple(Piece(f"{n}.{k}", view=view) for n, view in names.items()) for k in kinds}


def rows_of_half(which: int) -> Callable[[Tensor], Tensor]:
    """The view of the first or the second half of the rows."""
    return lambda tensor: tensor.chunk(2)[which]


def moe(part: MoEConfig, width: int) -> dict[str, tuple[Piece, ...]]:
    """Every expert's matrices are tensors of their own there."""

    def of(name: str, *, half: int | None = None) -> list[Piece]:
        def view(e: int) -> Callable[[Tensor], Tensor]:
            return lambda t: t[e] if half is None else t[e].chunk(2)[half]

        return [Piece(f"experts.{e}.{name}.weight", view=view(e)) for e in range(part.experts)]

    return {
        "gate_up_proj": (*of("gate_proj", half=0), *of("up_proj", half=1)),
        "up_proj": tuple(of("up_proj")),
        "down_proj": tuple(of("down_proj")),
    }


def renamed(names: Mapping[str, tuple[Piece, ...]], words: Mapping[str, str]) -> dict[str, tuple[Piece, ...]]:
    """The same pieces, with other words in their names between dots."""

    def name(piece: Piece) -> Piece:
        return piece._replace(name=".".join(words.get(word, word) for word in piece.name.split(".")))

    return {here: tuple(map(name, pieces)) for here, pieces in names.items()}


def activation_of(act: str, where: str) -> str:
    """The activation of a feed-forward by its name there.

    Raises:
        ConfigError: for one that the layers here do not have.
    """
    if act not in ACTIVATIONS:
        raise ConfigError(f"{where}hidden_act is {brief(act)}, expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[act]


def is_attention(kind: str) -> bool:
    """Whether a layer's type, as files of any age call it, is attention."""
    return kind in ("full_attention", "attention")


def type_names(attends: Iterable[bool]) -> list[str]:
    """The types of layers, as transformers writes them today."""
    return ["full_attention" if attention else "linear_attention" for attention in attends]


def periodic(places: list[int], count: int) -> tuple[int, int]:
    """A period and an offset that give these places among so many; the period divides the number if it can.

    Raises:
        LookupError: where there are none.
    """
    periods = sorted(range(1, count + 2), key=lambda p: (count % p != 0, p))
    for period in periods:
        for offset in range(period):
            if [i for i in range(count) if i % period == offset] == places:
                return period, offset
    raise LookupError(places)


ACTIVATIONS = {"gelu": "gelu", "silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "relu2": "relu2"}
"""Those of feed-forwards, there and here."""
NUMBERED = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
"""What the maps of a feed-forward or an expert are called where they have numbers."""
CONVOLUTION = {"conv_weight": (Piece("conv1d.weight", DEPTHWISE),), "conv_bias": (Piece("conv1d.bias"),)}

NAMES: Mapping[type[Any], Names] = {
    AttentionConfig: attention,
    MLPConfig: mlp,
    MoEConfig: moe,
    MambaConfig: lambda part, width: {**CONVOLUTION, "dt_bias": (Piece("dt_proj.bias"),)},
    Mamba2Config: lambda part, width: CONVOLUTION,
}
"""By the class of a part."""
