"""How another library names, shapes and describes the same model: tables that are read in both directions.

A table says for each name here what its name is there. Loading looks a tensor up under that name, saving writes it
under that name, and a change of shape comes with its inverse. Options of configs are tables of the same kind.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from dualform.core.errors import ConfigError
from dualform.core.options import brief, fits, shown
from dualform.models.config import ModelConfig


class Change(NamedTuple):
    """A change of shape, and its inverse."""

    here: Callable[[Tensor], Tensor]  # what is stored there -> the tensor of the model
    there: Callable[[Tensor], Tensor]


class Place(NamedTuple):
    """Where a tensor lies in the files of another library, and how its shape differs."""

    name: str
    change: Change


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor."""
    return tensor


def unchanged(tensor: Tensor) -> Tensor:
    """The tensor."""
    return tensor


SAME = Change(unchanged, unchanged)


class Piece(NamedTuple):
    """A tensor in the files of another library, which is a tensor of the model or a part of one.

    Args:
        name: there.
        change: of its shape.
        view: where it lies in the tensor of the model.
        rows: of the tensor of the model, one for each row there, where they are in another order; None as they are.
    """

    name: str
    change: Change = SAME
    view: Callable[[Tensor], Tensor] = whole
    rows: Tensor | None = None

    @property
    def alone(self) -> bool:
        """Whether it is all of a tensor, in its order."""
        return self.view is whole and self.rows is None

    def of(self, tensor: Tensor) -> Tensor:
        """What is stored of a tensor of the model."""
        part = self.view(tensor) if self.rows is None else tensor.index_select(0, self.rows.to(tensor.device))
        return self.change.there(part)

    def put(self, stored: Tensor, tensor: Tensor) -> None:
        """Write what is stored into a tensor of the model."""
        part = self.change.here(stored)
        if self.rows is None:
            self.view(tensor).copy_(part)
        else:
            tensor.index_copy_(0, self.rows.to(tensor.device), part.to(tensor))


class PartNames(NamedTuple):
    """A sub-layer: what its names begin with there, and those that differ in more than that."""

    prefix: str
    names: Mapping[str, Place]


class Options(NamedTuple):
    """Options of a class of configs: for each key there, the field here and what holds where the key is missing."""

    cls: type[Any]
    keys: Mapping[str, tuple[str, Any]]
    least: int = 1  # of whole numbers

    def but(self, **defaults: Any) -> "Options":
        """The same options with other defaults of some keys."""
        return self._replace(keys={k: (f, defaults.get(k, default)) for k, (f, default) in self.keys.items()})

    def read(self, table: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The fields of the config.

        Args:
            table: of the other library; other keys are passed over.
            where: what errors begin with.

        Raises:
            ConfigError: for a value of another type, or a size below 1; names the key.
        """
        hints, found = get_type_hints(self.cls), {}
        for key, (field, default) in self.keys.items():
            value = decoded(table.get(key, default))
            if not fits(value, hints[field]):
                raise ConfigError(f"{where}{key} is {brief(value)}, expected {shown(hints[field])}")
            if key in table and type(value) is int and not self.least <= value < 2**63:
                least = "a positive number" if self.least else "a number of at least 0"
                raise ConfigError(f"{where}{key} is {brief(value)}, expected {least} of 64 bits")
            found[field] = value
        return found

    def write(self, config: Any) -> dict[str, Any]:
        """The keys there, of a config of the class."""
        return {key: getattr(config, field) for key, (field, _) in self.keys.items()}


@dataclass(frozen=True)
class Layout:
    """One architecture of another library.

    Args:
        name: as errors call it.
        outside: the embedding, last norm and head there, by their names here.
        block: what the names of a block begin with; ``{}`` is its number.
        norms: the norms of a block, first to last.
        parts: the sub-layers that there are, by the class of their config.
        read: a table of the other library, and what errors begin with -> the config here.
        write: the inverse; raises a ConfigError for a model that the other library does not have.
    """

    name: str
    outside: Mapping[str, str]
    block: str
    norms: tuple[str, ...]
    parts: Mapping[type[Any], PartNames]
    read: Callable[[Mapping[str, Any], str], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]

    def place(self, config: ModelConfig, name: str) -> Place:
        """Where the tensor called ``name`` in ``LanguageModel(config)`` lies."""
        first, _, rest = name.partition(".")
        if first != "blocks":
            return Place(self.outside[first] + rest, SAME)
        number, kind, index, rest = rest.split(".", 3)
        block = self.block.format(number)
        if kind == "norms":
            return Place(block + self.norms[int(index)] + rest, SAME)
        part = config.parts[config.pattern[int(number)]][int(index)]
        prefix, names = self.parts[type(part)]
        there = names.get(rest, Place(rest, SAME))
        return there._replace(name=block + prefix + there.name)

    def pieces(self, config: ModelConfig, name: str) -> tuple[Piece, ...]:
        """What the tensor called ``name`` in ``LanguageModel(config)`` is made of there."""
        return (Piece(*self.place(config, name)),)

    def variants(self) -> "list[Layout]":
        """The layout."""
        return [self]

    def spare(self, config: ModelConfig) -> set[str]:
        """Names of tensors that files may have beside those of the model: a head that is the embedding once more."""
        return {self.outside["head"] + "weight"} if config.tie_embeddings else set()


def _swapped(tensor: Tensor) -> Tensor:
    return torch.cat(tensor.chunk(2)[::-1])


DEPTHWISE = Change(lambda w: w.squeeze(1), lambda w: w.unsqueeze(1))
"""The weights of a convolution: ``(D, W)`` here, ``(D, 1, W)`` there."""
GATE_LAST = Change(_swapped, _swapped)
"""The two halves of a gated feed-forward: the gate comes first here, last there."""

CONV = {"conv_weight": Place("conv1d.weight", DEPTHWISE), "conv_bias": Place("conv1d.bias", SAME)}
MAMBA = PartNames("mixer.", {**CONV, "dt_bias": Place("dt_proj.bias", SAME)})
MAMBA2 = PartNames("mixer.", CONV)
"""The names of Mamba and Mamba-2, which mamba-ssm and transformers share."""


def decoded(value: Any) -> Any:
    """A value of JSON as configs here have it: lists are tuples, and "auto" is None."""
    if isinstance(value, list | tuple):
        return tuple(map(decoded, value))
    if isinstance(value, dict) and value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity"):
        return float(value["__float__"])
    return None if value == "auto" else value


def encoded(value: Any) -> Any:
    """The inverse of :func:`decoded`: a value as JSON has it."""
    if isinstance(value, tuple):
        return [encoded(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": "Infinity" if value > 0 else "-Infinity"}
    return value


def scan_width(channels: int, width: int) -> dict[str, int]:
    """The option of a scan of so many channels: how often the width of the model, or by itself."""
    return {"d_inner": channels} if channels % width else {"expand": channels // width}


def rank(d_model: int) -> int:
    """The usual width of the bottleneck that makes Mamba's step."""
    return math.ceil(d_model / 16)
