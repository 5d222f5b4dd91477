"""What a model is made of. A hybrid is a string: one letter per block."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import field, fields
from typing import Any

from dualform.core.errors import ConfigError
from dualform.core.options import brief, check_keys, check_types, joined, options, suggestion
from dualform.layers.mixer import PartConfig
from dualform.layers.registry import config_of, kind_of, kinds

DEEPEST = 10_000
"""Sub-layers of a model; a file that asks for more is damaged."""


@options
class ModelConfig:
    """A model: embedding, one block per letter of ``pattern``, norm, head.

    Describes the function, never dtype, device, kernels or parallelism. Jamba's order of layers is
    ``pattern="MMMMAMMM" * 4``; Zamba's repeated attention block is a letter in ``shared``.

    Args:
        vocab_size: V; 0 where a classifier or regressor reads features and not tokens.
        d_model: D, the width of the residual stream.
        parts: what each letter is: its sub-layers, in order, each with its own norm and residual connection.
        pattern: the letters of the blocks, first block first.
        shared: letters whose every use is the same module; each use keeps its own state.
        tie_embeddings: the head is the transpose of the embedding.
        norm_eps: epsilon of the RMS norms before every sub-layer and before the head.

    Raises:
        ConfigError: for a letter that is not defined, an empty pattern, a shared letter that is not used, or a size
            that is out of range.
    """

    vocab_size: int
    d_model: int
    parts: dict[str, tuple[PartConfig, ...]] = field(hash=False)
    pattern: str
    shared: str = ""
    tie_embeddings: bool = True
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name, least in (("vocab_size", 0), ("d_model", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"model: {name} is {getattr(self, name)}, expected at least {least}")
        if not 0 < self.norm_eps < math.inf:
            raise ConfigError(f"model: norm_eps is {self.norm_eps}, expected a small positive number")
        for letter, parts in self.parts.items():
            _check_letter(letter, parts)
        object.__setattr__(self, "parts", {letter: tuple(parts) for letter, parts in self.parts.items()})
        defined = f"parts defines {joined(self.parts) or 'no letters'}"
        if not self.pattern:
            raise ConfigError("model: pattern is empty", hint=f"one letter per block; {defined}")
        if unknown := sorted(set(self.pattern) - set(self.parts)):
            raise ConfigError(f"model: pattern {brief(self.pattern)} uses {joined(unknown)}", hint=defined)
        if (depth := sum(len(self.parts[letter]) for letter in self.pattern)) > DEEPEST:
            raise ConfigError(f"model: pattern has {depth:,} sub-layers in all, expected at most {DEEPEST:,}")
        if unused := sorted(set(self.shared) - set(self.pattern)):
            raise ConfigError(
                f"model: shared names {joined(unused)}, which the pattern {brief(self.pattern)} does not use",
                hint="shared holds letters of the pattern whose blocks are one module",
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: tuples become lists, infinities the words ``"inf"`` and ``"-inf"``."""
        parts = {letter: [_part_to_dict(part) for part in parts] for letter, parts in self.parts.items()}
        return {f.name: parts if f.name == "parts" else _encode(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> "ModelConfig":
        """The inverse of :meth:`to_dict`; optional keys may be left out.

        Raises:
            ConfigError: names an unknown or missing key, an unknown kind, or a value of the wrong type.
        """
        if not isinstance(table, Mapping):
            raise ConfigError(f"model: {type(table).__name__}, expected a table of options")
        check_keys(cls, table, "model")
        given = table["parts"]
        if not isinstance(given, Mapping):
            raise ConfigError(f"model: parts is {type(given).__name__}, expected a table from letters to sub-layers")
        values: dict[str, Any] = {name: _decode(value) for name, value in table.items() if name != "parts"}
        return cls(parts={letter: _parts_from_dicts(letter, listed) for letter, listed in given.items()}, **values)


def _check_letter(letter: Any, parts: Any) -> None:
    if not isinstance(letter, str) or len(letter) != 1:
        raise ConfigError(f"model: parts has the key {letter!r}, expected one letter")
    if not isinstance(parts, tuple | list) or not parts:
        raise ConfigError(
            f"model: parts[{letter!r}] is {parts!r}, expected a tuple of sub-layer configs",
            hint="one sub-layer alone is written (config,)",
        )
    for part in parts:
        if isinstance(part, type) or not callable(getattr(part, "build", None)):
            raise ConfigError(f"model: parts[{letter!r}] has {part!r}, expected a config with build(d_model)")


def _part_to_dict(part: PartConfig) -> dict[str, Any]:
    kind = kind_of(type(part))
    if kind is None:
        raise ConfigError(
            f"{type(part).__name__} has no kind to be written as",
            hint=f"register it: dualform.layers.MIXERS['name'] = {type(part).__name__}",
        )
    return {"kind": kind, **{f.name: _encode(getattr(part, f.name)) for f in fields(part)}}


def _parts_from_dicts(letter: str, listed: Any) -> tuple[PartConfig, ...]:
    if isinstance(listed, str | Mapping) or not isinstance(listed, Sequence):
        raise ConfigError(f"model: parts.{letter} is {type(listed).__name__}, expected a list of sub-layers")
    return tuple(_part_from_dict(options, f"parts.{letter}[{i}]") for i, options in enumerate(listed))


def _part_from_dict(listed: Any, where: str) -> PartConfig:
    if not isinstance(listed, Mapping) or "kind" not in listed:
        raise ConfigError(f"{where}: {brief(listed)} has no kind", hint=f"known: {', '.join(kinds())}")
    given = dict(listed)
    kind = given.pop("kind")
    if not isinstance(kind, str) or kind not in kinds():
        raise ConfigError(f"{where}: unknown kind {brief(kind)}", hint=suggestion(str(kind), kinds()))
    config, where = config_of(kind), f"{where} ({kind})"
    check_keys(config, given, where)
    values = {name: _decode(value) for name, value in given.items()}
    check_types(config, values, where)
    return config(**values)


def _encode(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_encode(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(f"a config value is {value!r}, which has no JSON form")


def _decode(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_decode(v) for v in value)
    return float(value) if value in ("inf", "-inf", "nan") else value
