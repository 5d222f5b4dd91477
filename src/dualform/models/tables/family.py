"""A family of models of transformers as data: options by the keys of ``config.json``, tensors by their names.

A family says what its keys mean (:class:`~dualform.models.tables.layout.Options`), how they make a config, and what the
blocks are called there. Reading and writing follow from that; what is written is read back and compared, so that a
model which a family cannot say is refused with what differs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any, NamedTuple

from dualform.core.errors import ConfigError
from dualform.core.options import brief
from dualform.layers.attention import AttentionConfig
from dualform.layers.block import COMPOSED, ChainConfig, ParallelConfig, SublayerConfig, standing
from dualform.layers.lightning_attention import LightningAttentionConfig
from dualform.layers.mamba import MambaConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.layers.mlp import MLPConfig, hidden_width
from dualform.layers.mlstm import MLSTMConfig
from dualform.layers.moe import MoEConfig
from dualform.layers.rglru import RGLRUConfig
from dualform.layers.rwkv4 import RWKVChannelConfig
from dualform.models.config import DEEPEST, RATES, ModelConfig, sublayers
from dualform.models.tables.layout import Options, Piece, encoded, rank, scan_width
from dualform.models.tables.names import NAMES, Names
from dualform.models.tables.rope import flat, nested

SILENT = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
"""Keys whose defaults there would be taken for this model's; the tokens are the tokenizer's here."""


class Found(NamedTuple):
    """What a file says: fields of configs by the class, and the sizes that a config says in another way."""

    of: Mapping[type[Any], dict[str, Any]]
    sizes: Any
    where: str  # what errors begin with


@dataclass(frozen=True, eq=False)
class Family:
    """A ``model_type``.

    Args:
        model_type: of ``config.json``.
        architecture: the class there.
        options: the keys of the model's config and of each class of parts.
        sizes: keys that make the pattern and such; of a NamedTuple.
        build: what was found -> the config; its letters are those of ``blocks``.
        describe: the inverse, for the keys of ``sizes``.
        outside: the embedding, last norm and head there, by their names here.
        layer: what the names of a layer begin with; ``{}`` is its number.
        blocks: by letter, what each beginning of a name in a block is called there.
        beside: letters whose blocks belong to the layer of the block after them.
        names: of parts whose names differ from the usual ones.
        original: names of parts in files of the publisher, read where those of transformers do not fit.
        buffers: names in a layer that files may have beside its weights.
        only: values, the first the default, of keys that change what is computed and that the layers here have.
    """

    model_type: str
    architecture: str
    options: Mapping[type[Any], Options]
    sizes: Options
    build: Callable[[Found], ModelConfig]
    describe: Callable[[ModelConfig], dict[str, Any]]
    outside: Mapping[str, str]
    blocks: Mapping[str, Mapping[str, str]]
    layer: str = "model.layers.{}."
    beside: str = ""
    names: Mapping[type[Any], Names] = field(default_factory=dict)
    original: Mapping[type[Any], Names] = field(default_factory=dict)
    buffers: tuple[str, ...] = ()
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As errors call it."""
        return f"{self.model_type} of transformers"

    @property
    def parts(self) -> set[type[Any]]:
        """The classes of the parts that there are."""
        return {*self.options, *self.names} - {ModelConfig}

    def read(self, table: Mapping[str, Any], where: str) -> ModelConfig:
        """The config that a table of transformers describes.

        Raises:
            ConfigError: for a value that the layers here do not have, or that none can have; names its key.
        """
        table = flat(table, where)
        for key, values in {**self.only, "quantization_config": (None,)}.items():
            if table.get(key, values[0]) not in values:
                raise ConfigError(f"{where}{key} is {brief(table[key])}, which the layers here do not have")
        found = {cls: options.read(table, where) for cls, options in self.options.items()}
        sizes = self.sizes.cls(**self.sizes.read(table, where))
        if not 0 < sizes.layers <= DEEPEST:
            raise ConfigError(f"{where}num_hidden_layers is {sizes.layers:,}, expected 1 to {DEEPEST:,}")
        try:
            return self.build(Found(found, sizes, where))
        except (ArithmeticError, TypeError) as error:  # of sizes that are 0 or missing
            raise ConfigError(f"{where}sizes that do not fit together: {error}") from error

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The inverse of :meth:`read`.

        Raises:
            ConfigError: for a model that the family does not have; says what differs.
        """
        about: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        about |= {key: values[0] for key, values in self.only.items()}
        config = explicit(config)
        first: dict[type[Any], Any] = {ModelConfig: config}
        for letter in config.pattern:
            for sub in sublayers(config.parts[letter]):
                first.setdefault(type(sub.part), sub.part)
        for cls, options in reversed(list(self.options.items())):  # the model's own keys count where two have the same
            if cls in first:
                about |= options.write(first[cls])
        try:
            about = {key: encoded(v) for key, v in nested(about | self.describe(config) | SILENT).items()}
            again = self.read(about, "")
        except ConfigError as error:
            raise self._lacks(str(error).split("\n")[0]) from error
        except (LookupError, StopIteration, AttributeError, TypeError, ValueError, ArithmeticError) as error:
            raise self._lacks("blocks in another order") from error
        if differing := difference(config, explicit(again)):
            raise self._lacks(differing)
        return about

    def pieces(self, config: ModelConfig, name: str) -> tuple[Piece, ...]:
        """What the tensor called ``name`` in ``LanguageModel(config)`` is made of there."""
        outer, _, rest = name.partition(".")
        if outer != "blocks":
            return (Piece(self.outside[outer] + rest),)
        number, rest = rest.split(".", 1)
        config = _written(self, config)  # whose letters are those of the table
        at = int(number)
        letter = config.pattern[at]
        layer = sum(other not in self.beside for other in config.pattern[:at])
        use = sum(other in self.beside for other in config.pattern[:at])
        table = self.blocks[letter]
        here = max((key for key in table if rest.startswith(key)), key=len, default=None)
        if here is None:
            raise ConfigError(f"{self.name}: no name for {name}")
        part, tail = part_within(config, letter, rest)
        of_part = {**NAMES, **self.names}.get(type(part))
        known = {} if of_part is None or tail is None else of_part(part, config.d_model)
        inner = rest.removeprefix(here)
        pieces = known.get(inner, (Piece(inner),))
        first = sum(other not in self.beside for other in config.pattern[: config.pattern.index(letter)])
        names = []
        for piece in pieces:  # what is a use's own lies there beside what the uses share
            begin = self.layer.format(first if "{use}" in piece.name else layer) + table[here]
            names.append((begin + piece.name).replace("{use}", str(use)))
        return tuple(piece._replace(name=name) for piece, name in zip(pieces, names, strict=True))

    def variants(self) -> "list[Family]":
        """The family, and the same with the names of the publisher where those differ."""
        others = [replace(self, names={**self.names, **self.original}, original={})] if self.original else []
        return [self, *others]

    def spare(self, config: ModelConfig) -> set[str]:
        """Names of tensors that files may have beside those of the model: what follows from others."""
        layers = range(sum(letter not in self.beside for letter in config.pattern))
        found = {self.layer.format(i) + name for i in layers for name in self.buffers}
        return found | ({self.outside["head"] + "weight"} if config.tie_embeddings else set())

    def _lacks(self, what: str) -> ConfigError:
        return ConfigError(f"model: {what}, which {self.architecture} of transformers does not have")


@lru_cache(maxsize=8)
def _written(family: "Family", config: ModelConfig) -> ModelConfig:
    return family.read(family.write(config), "")


def explicit(config: ModelConfig) -> ModelConfig:
    """The same function with the widths written out that its parts would choose, and without what training drops."""
    parts = {letter: tuple(_explicit(part, config.d_model) for part in parts) for letter, parts in config.parts.items()}
    return replace(config, parts=parts, **dict.fromkeys(RATES, 0.0))


def _explicit(part: Any, width: int) -> Any:
    if isinstance(part, SublayerConfig):
        inner = _explicit(part.part, 2 * width if part.joined else width)
        plain = replace(part, part=inner, dropout=None, drop_path=None)
        said = (part.dropout, part.drop_path) != (None, None)
        return inner if said and plain == SublayerConfig(inner) else plain
    if isinstance(part, ChainConfig | ParallelConfig):
        return replace(part, parts=tuple(_explicit(inner, width) for inner in part.parts))
    if isinstance(part, MLPConfig | MoEConfig) and part.d_hidden is None:
        return replace(part, d_hidden=hidden_width("mlp", None, width, gated=part.gated))
    if isinstance(part, AttentionConfig):
        kv_heads, d_head = part.kv_heads or part.heads, part.d_head or width // part.heads
        return replace(part, kv_heads=kv_heads, d_head=d_head)
    if isinstance(part, MambaConfig | Mamba2Config):
        channels = part.expand * width if part.d_inner is None else part.d_inner
        own = {"dt_rank": part.dt_rank or rank(width)} if isinstance(part, MambaConfig) else {}
        unused = {"d_inner": None, "expand": type(part).expand}  # one of them says the width
        return replace(part, **{**own, **unused, **scan_width(channels, width)})
    if isinstance(part, RWKVChannelConfig):
        return replace(part, d_hidden=part.d_hidden or 4 * width)
    if isinstance(part, MLSTMConfig):
        head = width // part.heads
        return replace(part, d_key=part.d_key or head, d_value=part.d_value or head)
    if isinstance(part, LightningAttentionConfig):
        return replace(part, d_head=part.d_head or width // part.heads)
    if isinstance(part, RGLRUConfig):
        return replace(part, d_inner=part.d_inner or width)
    return part


def part_within(config: ModelConfig, letter: str, rest: str) -> tuple[Any, str | None]:
    """The part that a name inside of a block leads to, and what is left of the name there."""
    parts = config.parts[letter]
    while True:
        kind, index, rest = rest.split(".", 2)
        if kind != "parts":
            return None, None  # a norm
        part = standing(parts[int(index)]).part
        if not isinstance(part, COMPOSED):
            return part, rest
        parts = (part,) if isinstance(part, SublayerConfig) else part.parts


def difference(config: ModelConfig, again: ModelConfig) -> str:
    """What a model has that the one read from its description does not; empty where there is nothing."""
    for f in fields(ModelConfig):
        if f.name in ("parts", "pattern", "shared") or getattr(config, f.name) == getattr(again, f.name):
            continue
        return f"{f.name} = {getattr(config, f.name)!r}"
    if len(config.pattern) != len(again.pattern):
        return f"{len(config.pattern)} blocks of these kinds"
    for i, (a, b) in enumerate(zip(config.pattern, again.pattern, strict=True)):
        if (mine := config.parts[a]) != (theirs := again.parts[b]):
            return f"block {i}: {_other(mine, theirs)}"
    if [_first(config, i) for i in range(len(config.pattern))] != [_first(again, i) for i in range(len(again.pattern))]:
        return f"{config.pattern!r} with shared = {config.shared!r}"
    return ""


def _first(config: ModelConfig, i: int) -> int:
    """The first block that is one module with block i."""
    letter = config.pattern[i]
    return config.pattern.index(letter) if letter in config.shared else i


def _other(mine: Any, theirs: Any) -> str:
    """Where two parts differ, in a few words."""
    if isinstance(mine, tuple):
        kinds = [", ".join(_kind(part) for part in parts) for parts in (mine, theirs)]
        if kinds[0] != kinds[1]:
            return f"{kinds[0]} where it has {kinds[1]}"
        return next(_other(a, b) for a, b in zip(mine, theirs, strict=True) if a != b)
    if type(mine) is not type(theirs):
        return f"{_kind(mine)} where it has {_kind(theirs)}"
    name = next(f.name for f in fields(mine) if getattr(mine, f.name) != getattr(theirs, f.name))
    a, b = getattr(mine, name), getattr(theirs, name)
    if name in ("part", "parts"):
        return _other(a, b)
    return f"{_kind(mine)} with {name} = {a!r}"


def _kind(part: Any) -> str:
    return type(part).__name__.removesuffix("Config")
