"""What a model is made of. A hybrid is a string: one letter per block."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field, fields, is_dataclass
from typing import Any

from dualform.core.errors import ConfigError
from dualform.core.options import brief, check_keys, check_types, joined, options, suggestion
from dualform.layers.block import COMPOSED, SublayerConfig, standing
from dualform.layers.context import EMBEDDING
from dualform.layers.drop import check_rates
from dualform.layers.mixer import PartConfig
from dualform.layers.norms import check_norm_kind
from dualform.layers.recall import RecallConfig
from dualform.layers.registry import config_of, kind_of, kinds

DEEPEST = 10_000
"""Sub-layers of a model; a file that asks for more is damaged."""
NESTED = 8
"""Parts inside of parts; no model here comes near."""
RATES = ("dropout", "drop_path", "embed_dropout")
"""What a model leaves out at random while it trains. Evaluated, it is the same function with any."""


@options
class ModelConfig:
    """A model: embedding, one block per letter of ``pattern``, norm, head.

    Describes the function, never dtype, device, kernels or parallelism. Jamba's order of layers is
    ``pattern="MMMMAMMM" * 4``; Zamba's repeated attention block is a letter in ``shared``. A sub-layer is the config of
    a part, which then has an RMS norm before it and is added to the stream, or a
    :class:`~dualform.layers.block.SublayerConfig` around one, which says where it differs from that; parts may hold
    parts.

    Args:
        vocab_size: V; 0 where a classifier or regressor reads features and not tokens.
        d_model: D, the width of the residual stream.
        parts: what each letter is: its sub-layers, in order.
        pattern: the letters of the blocks, first block first.
        shared: letters whose every use is the same module, but for low-rank matrices; each use keeps its own state.
        tie_embeddings: the head is the transpose of the embedding.
        norm_eps: epsilon of the norms around the sub-layers and before the head.
        norm: the norm before the head, by its name; see :class:`~dualform.layers.block.SublayerConfig`.
        embed_norm: that of what enters the first block; None for none.
        embed_scale: a factor of the embedding.
        logit_scale: a factor of the logits.
        logit_cap: c, with which logits are ``c tanh(logits / c)``; None for no such bound.
        head_bias: whether a head that is not tied has a bias.
        dropout: the share of the numbers which each sub-layer adds to the stream that training drops; for those that
            a letter lists, where they do not say it themselves.
        drop_path: the share of rows, or of packed sequences, for which training leaves out a sub-layer of the last
            block; in block ``l`` of L it is ``drop_path l / L``.
        embed_dropout: the share of the numbers that enter the first block which training drops.

    Raises:
        ConfigError: for a letter that is not defined, an empty pattern, a shared letter that is not used, a size
            that is out of range, or a part that reads what no part before it saves.
    """

    vocab_size: int
    d_model: int
    parts: dict[str, tuple[PartConfig, ...]] = field(hash=False)
    pattern: str
    shared: str = ""
    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    norm: str = "rms"
    embed_norm: str | None = None
    embed_scale: float = 1.0
    logit_scale: float = 1.0
    logit_cap: float | None = None
    head_bias: bool = False
    dropout: float = 0.0
    drop_path: float = 0.0
    embed_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("vocab_size", 0), ("d_model", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"model: {name} is {getattr(self, name)}, expected at least {least}")
        if not 0 < self.norm_eps < math.inf:
            raise ConfigError(f"model: norm_eps is {self.norm_eps}, expected a small positive number")
        self._check_ends()
        for letter, parts in self.parts.items():
            _check_letter(letter, parts)
        object.__setattr__(self, "parts", {letter: tuple(parts) for letter, parts in self.parts.items()})
        defined = f"parts defines {joined(self.parts) or 'no letters'}"
        if not self.pattern:
            raise ConfigError("model: pattern is empty", hint=f"one letter per block; {defined}")
        if unknown := sorted(set(self.pattern) - set(self.parts)):
            raise ConfigError(f"model: pattern {brief(self.pattern)} uses {joined(unknown)}", hint=defined)
        sizes = {letter: sum(1 for _ in sublayers(parts)) for letter, parts in self.parts.items()}
        if (depth := sum(sizes[letter] for letter in self.pattern)) > DEEPEST:
            raise ConfigError(f"model: pattern has {depth:,} sub-layers in all, expected at most {DEEPEST:,}")
        if unused := sorted(set(self.shared) - set(self.pattern)):
            raise ConfigError(
                f"model: shared names {joined(unused)}, which the pattern {brief(self.pattern)} does not use",
                hint="shared holds letters of the pattern whose blocks are one module",
            )
        self._check_names()

    def _check_ends(self) -> None:
        """What stands before the first block and after the last."""
        check_norm_kind("model: norm", self.norm)
        check_norm_kind("model: embed_norm", self.embed_norm)
        for name in ("embed_scale", "logit_scale"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"model: {name} is {getattr(self, name)}, expected a finite number")
        if self.logit_cap is not None and not 0 < self.logit_cap < math.inf:
            raise ConfigError(f"model: logit_cap is {self.logit_cap}, expected a positive number, or none")
        check_rates("model", **{name: getattr(self, name) for name in RATES})
        if self.head_bias and self.tie_embeddings:
            raise ConfigError("model: head_bias is True, and the head is the embedding", hint="tie_embeddings=False")

    def _check_names(self) -> None:
        """That what a part reads has a name that some part before it saves."""
        known = {EMBEDDING}
        for letter in dict.fromkeys(self.pattern):  # a later use reads what an earlier one could
            for sub in sublayers(self.parts[letter]):
                read = sub.part.name if isinstance(sub.part, RecallConfig) else sub.joined
                if read is not None and read not in known:
                    raise ConfigError(
                        f"model: a part of {letter!r} reads {read!r}, which nothing before it saves",
                        hint=f"there is {joined(sorted(known))}",
                    )
                if sub.saved is not None:
                    known.add(sub.saved)

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


def sublayers(parts: Sequence[PartConfig], depth: int = 1) -> Iterator[SublayerConfig]:
    """All sub-layers of a block in the order in which they run, those inside of a part before it.

    Raises:
        ConfigError: where parts hold parts too often.
    """
    if depth > NESTED:
        raise ConfigError(f"model: parts hold parts more than {NESTED} times", hint="put fewer chains inside chains")
    for sub in map(standing, parts):
        if isinstance(sub.part, COMPOSED):
            inside = (sub.part,) if isinstance(sub.part, SublayerConfig) else sub.part.parts
            yield from sublayers(inside, depth + 1)
        yield sub


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


def _part_from_dict(listed: Any, where: str, depth: int = 1) -> PartConfig:
    if depth > 2 * NESTED:
        raise ConfigError(f"{where}: parts hold parts more than {NESTED} times")
    if not isinstance(listed, Mapping) or "kind" not in listed:
        raise ConfigError(f"{where}: {brief(listed)} has no kind", hint=f"known: {', '.join(kinds())}")
    given = dict(listed)
    kind = given.pop("kind")
    if not isinstance(kind, str) or kind not in kinds():
        raise ConfigError(f"{where}: unknown kind {brief(kind)}", hint=suggestion(str(kind), kinds()))
    config, where = config_of(kind), f"{where} ({kind})"
    check_keys(config, given, where)
    values = {name: _inside(value, f"{where}.{name}", depth) for name, value in given.items()}
    check_types(config, values, where)
    return config(**values)


def _inside(value: Any, where: str, depth: int) -> Any:
    """The value of an option: another part, several, or something plain."""
    if isinstance(value, Mapping):
        return _part_from_dict(value, where, depth + 1)
    if isinstance(value, list | tuple) and any(isinstance(v, Mapping) for v in value):
        return tuple(_part_from_dict(v, f"{where}[{i}]", depth + 1) for i, v in enumerate(value))
    return _decode(value)


def _encode(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_encode(v) for v in value]
    if is_dataclass(value) and not isinstance(value, type):
        return _part_to_dict(value)  # pyright: ignore[reportArgumentType]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(f"a config value is {value!r}, which has no JSON form")


def _decode(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_decode(v) for v in value)
    return float(value) if value in ("inf", "-inf", "nan") else value
