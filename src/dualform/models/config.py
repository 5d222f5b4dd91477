"""What a model is made of. A hybrid is a string: one letter per block."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from dualform.core.errors import ConfigError
from dualform.layers.mixer import PartConfig
from dualform.layers.registry import FEEDFORWARDS, MIXERS

Config = TypeVar("Config")


@dataclass(frozen=True)
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
        _check_types(type(self), {f.name: getattr(self, f.name) for f in fields(self) if f.name != "parts"}, "model")
        for name, least in (("vocab_size", 0), ("d_model", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"model: {name} is {getattr(self, name)}, expected at least {least}")
        if not 0 < self.norm_eps < math.inf:
            raise ConfigError(f"model: norm_eps is {self.norm_eps}, expected a small positive number")
        for letter, parts in self.parts.items():
            _check_letter(letter, parts)
        object.__setattr__(self, "parts", {letter: tuple(parts) for letter, parts in self.parts.items()})
        defined = f"parts defines {', '.join(self.parts) or 'no letters'}"
        if not self.pattern:
            raise ConfigError("model: pattern is empty", hint=f"one letter per block; {defined}")
        if unknown := sorted(set(self.pattern) - set(self.parts)):
            raise ConfigError(f"model: pattern {self.pattern!r} uses {', '.join(unknown)}", hint=defined)
        if unused := sorted(set(self.shared) - set(self.pattern)):
            raise ConfigError(
                f"model: shared names {', '.join(unused)}, which the pattern {self.pattern!r} does not use",
                hint="shared holds letters of the pattern whose blocks are one module",
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: tuples become lists, infinities the words ``"inf"`` and ``"-inf"``."""
        parts = {letter: [_part_to_dict(part) for part in parts] for letter, parts in self.parts.items()}
        return {f.name: parts if f.name == "parts" else _encode(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> "ModelConfig":
        """The inverse of :meth:`to_dict`; optional keys may be left out.

        Raises:
            ConfigError: names an unknown or missing key, an unknown kind, or a value of the wrong type.
        """
        _check_keys(cls, options, "model")
        given = options["parts"]
        if not isinstance(given, Mapping):
            raise ConfigError(f"model: parts is {type(given).__name__}, expected a table from letters to sub-layers")
        values: dict[str, Any] = {name: _decode(value) for name, value in options.items() if name != "parts"}
        return cls(parts={letter: _parts_from_dicts(letter, listed) for letter, listed in given.items()}, **values)


def suggestion(word: str, known: Sequence[str]) -> str:
    """``did you mean 'mamba2'? known: ...``, the hint for a name that does not exist."""
    near = get_close_matches(word, known, n=1)
    return (f"did you mean {near[0]!r}? " if near else "") + f"known: {', '.join(known) or 'none'}"


def _kinds() -> dict[str, type[Any]]:
    return {**MIXERS, **FEEDFORWARDS}


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
    kind = next((kind for kind, config in _kinds().items() if config is type(part)), None)
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


def _part_from_dict(options: Any, where: str) -> PartConfig:
    if not isinstance(options, Mapping) or "kind" not in options:
        raise ConfigError(f"{where}: {options!r} has no kind", hint=f"known: {', '.join(_kinds())}")
    options = dict(options)
    kind = options.pop("kind")
    if not isinstance(kind, str) or kind not in _kinds():
        raise ConfigError(f"{where}: unknown kind {kind!r}", hint=suggestion(str(kind), list(_kinds())))
    config, where = _kinds()[kind], f"{where} ({kind})"
    _check_keys(config, options, where)
    values = {name: _decode(value) for name, value in options.items()}
    _check_types(config, values, where)
    return config(**values)


def _check_keys(config: type[Any], options: Any, where: str) -> None:
    """Every option is a field, and every field without a default is there."""
    if not isinstance(options, Mapping):
        raise ConfigError(f"{where}: {type(options).__name__}, expected a table of options")
    known = [f.name for f in fields(config)]
    for name in options:
        if name not in known:
            raise ConfigError(f"{where}: unknown key {name!r}", hint=suggestion(str(name), known))
    needed = [f.name for f in fields(config) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in needed if name not in options]:
        raise ConfigError(f"{where}: missing key {', '.join(missing)}", hint=f"required: {', '.join(needed)}")


def _check_types(config: type[Any], values: Mapping[str, Any], where: str) -> None:
    """Every value is of the annotated type of its field."""
    hints = get_type_hints(config)
    for name, value in values.items():
        hint = hints[name]
        if not _fits(value, hint):
            expected = hint.__name__ if isinstance(hint, type) and not get_origin(hint) else hint
            raise ConfigError(f"{where}: {name} is {value!r}, expected {expected}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a config value is of an annotated type; an int passes for a float, a bool does not for an int."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, a) for a in args)
    if origin is Literal:
        return value in args
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        each = args[:1] * len(value) if args[1:] == (...,) else args
        return len(each) == len(value) and all(_fits(v, a) for v, a in zip(value, each, strict=True))
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    if hint in (None, NoneType):
        return value is None
    plain = origin or hint
    return isinstance(value, plain) if isinstance(plain, type) else True


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
