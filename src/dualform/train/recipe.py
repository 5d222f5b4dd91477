"""A recipe: everything that decides a training run, in one TOML file.

``[data]``, ``[optim]`` and, where it is no preset, ``[model]`` are tables; the rest stands at the top level.
``recipes/stdlib.toml`` names every key. On the command line, and in :meth:`Recipe.load`, ``a.b=c`` overrides one of
them, its value in TOML syntax.
"""

import json
import math
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from dualform.core.errors import ConfigError
from dualform.core.json_file import kind_of, parse_json, parse_toml, read_text
from dualform.core.options import brief, check_names, check_types, options, suggestion
from dualform.models.config import RATES, ModelConfig
from dualform.models.presets import PRESETS, preset
from dualform.models.saving.folder import RECIPE_FILE  # of a run; JSON, because TOML has no null

AUTO: Literal["auto"] = "auto"
RECIPES = Path(__file__).parent / "recipes"  # those that have a name
STDLIB = "stdlib"
WARMUP, WARMUP_SHARE = 50, 0.1  # steps and share of the run, whichever is less


@options(types=False)
class Data:
    """The training data, and how much of it a step takes.

    Args:
        path: a file or folder of text or JSON lines, or ``"stdlib"``, the Python standard library's own source.
        text_field: the key of a JSON line that holds its text.
        chat: whether JSON lines hold conversations, as a list of ``"messages"``. The chat template of the model that
            the run goes on from writes them; their answers are learned, the rest is only read. Each is a sequence of
            its own, as with ``packed``, which this implies; ``separator`` and ``text_field`` are not used.
        tokenizer: a ``tokenizer.json``; empty for bytes.
        separator: the text that goes before every document. Here the name of a special token means that token; in the
            documents it is text. The tokens with which the tokenizer opens a document follow the separator.
        held_out: one document in this many is held out, whole, chosen by a hash of its name; see
            :func:`dualform.train.corpus.split` for documents that are too few or too different in size.
        length: tokens of a training window.
        packed: whether a window holds whole documents, as many as fit, each a sequence with a state of its own; one
            longer than ``length`` is cut into several. If not, windows begin anywhere in the text, and a state passes
            from one document into the next.
        batch: windows per step, over all processes together.
        accumulate: portions into which each process divides its windows, computed one after another: less memory, same
            result.
    """

    path: str = STDLIB
    text_field: str = "text"
    chat: bool = False
    tokenizer: str = ""
    separator: str = "\n"
    held_out: int = 20
    length: int = 128
    packed: bool = False
    batch: int = 8
    accumulate: int = 1

    def __post_init__(self) -> None:
        _check_types(self, "data.")
        if self.chat:
            object.__setattr__(self, "packed", True)
        _demand(self.path != "", "data.path", self.path, "a file, a folder or 'stdlib'")
        _demand(self.separator != "", "data.separator", self.separator, "at least one character")
        _demand(self.held_out >= 2, "data.held_out", self.held_out, "at least 2")
        for name in ("length", "batch", "accumulate"):
            _demand(getattr(self, name) >= 1, f"data.{name}", getattr(self, name), "at least 1")


@options(types=False)
class Optim:
    """AdamW with a linear warm-up, a cosine down to a floor, and clipping.

    Args:
        lr: the peak learning rate; a parameter whose layer sets a lower one in its ``hints`` gets that.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay of matrices; embeddings, vectors and parameters with a hint have none.
        clip: largest norm of the whole gradient; 0 for no limit.
        warmup: steps over which the learning rate rises. ``"auto"`` is 50, or a tenth of the run where that is less: of
            its steps, and then the recipe of a run that starts says how many, or of its ``minutes``.
        floor: the learning rate at the end of the run, as a share of ``lr``.
        freeze: modules and parameters that are not trained, by their names in the model, such as ``"embed"`` or
            ``"blocks.0"``: they get no gradient and have no moments.
    """

    lr: float = 4e-3
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    warmup: int | Literal["auto"] = AUTO
    floor: float = 0.05
    freeze: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.betas, list):
            object.__setattr__(self, "betas", tuple(self.betas))
        _take_names(self, "optim.freeze", "embed")
        _check_types(self, "optim.")
        _demand(0 < self.lr < math.inf, "optim.lr", self.lr, "a positive number")
        _demand(all(0 <= b < 1 for b in self.betas), "optim.betas", list(self.betas), "two numbers from 0 to below 1")
        _demand(0 < self.eps < math.inf, "optim.eps", self.eps, "a positive number")
        for name in ("weight_decay", "clip", "warmup"):
            value = getattr(self, name)
            _demand(value == AUTO or 0 <= value < math.inf, f"optim.{name}", value, "0 or more")
        _demand(0 <= self.floor <= 1, "optim.floor", self.floor, "a share, from 0 to 1")


@options(types=False)
class Lora:
    """Low-rank adapters on a model with weights, which alone are trained: less memory for the optimiser, small files.

    Args:
        rank: r of the adapters; 0 trains the model itself.
        alpha: their factor is ``alpha / rank``.
        dropout: the share of their inputs that are dropped in training.
        targets: the linear maps that get one, by their names in the model or the ends of those, such as
            ``"in_proj"``; none means every linear map of the blocks.
    """

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _take_names(self, "lora.targets", "in_proj")
        _check_types(self, "lora.")
        _demand(self.rank >= 0, "lora.rank", self.rank, "0 or more")
        _demand(0 < self.alpha < math.inf, "lora.alpha", self.alpha, "a positive number")
        _demand(0 <= self.dropout < 1, "lora.dropout", self.dropout, "a share, from 0 to below 1")


@options(types=False)
class Recipe:
    """A training run. It ends after ``steps`` or ``minutes``, whichever comes first; one of them must be given.

    With ``steps`` alone a run can be repeated exactly. With ``minutes`` the learning rate follows the clock, so that
    a run is complete on a slow machine, too.

    Args:
        model: the name of a preset, a folder with a saved model to go on from, its name on the Hugging
            Face Hub, ``owner/name``, or a table of a ModelConfig's keys.
        out: the run's folder.
        steps: optimiser steps, in all.
        minutes: minutes of training, in all; those before a resume count.
        seed: of the initial weights and the order of the data.
        eval_every: steps between evaluations; 0 for ten in a run.
        save_every: steps between checkpoints; 0 for ten in a run.
        log_every: steps between lines in ``metrics.jsonl``, each the mean since the line before.
        keep: checkpoints to keep, the newest.
        precision: ``"float32"``, ``"bfloat16"``, or ``"auto"``: bfloat16 where a CUDA device has it.
        recompute: whether the backward pass recomputes the activations of each block, which are then not stored: less
            memory, same result.
        graphs: whether a step on one CUDA device is captured in CUDA graphs, its blocks compiled: same result, without
            the overhead of launching kernels. A packed step is not captured, because its shapes change.
        dropout: the share of the numbers which each sub-layer adds to the stream that training drops. A number takes
            the place of what the model's config says, here and in the next two.
        drop_path: the share of sequences for which training leaves out a sub-layer of the last block; less below.
        embed_dropout: the share of the numbers that enter the first block which training drops.
        device: ``"auto"``, a GPU if there is one, or a name such as ``"cpu"``, ``"cuda"`` or ``"cuda:1"``. Of several
            processes each takes a GPU of its own.
        data: the training data.
        optim: the optimiser and its schedule.
        lora: adapters that are trained instead of the model.
    """

    model: str | dict[str, Any] = "byte-hybrid"
    out: str = "runs/stdlib"
    steps: int | None = None
    minutes: float | None = None
    seed: int = 0
    eval_every: int = 0
    save_every: int = 0
    log_every: int = 10
    keep: int = 2
    precision: str = "auto"
    recompute: bool = False
    graphs: bool = True
    dropout: float | None = None
    drop_path: float | None = None
    embed_dropout: float | None = None
    device: str = "auto"
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    lora: Lora = field(default_factory=Lora)

    def __post_init__(self) -> None:
        if isinstance(self.model, ModelConfig):
            object.__setattr__(self, "model", self.model.to_dict())
        _check_types(self, "")
        if self.steps is None and self.minutes is None:
            raise ConfigError("recipe: neither steps nor minutes is given", hint="--set minutes=2, or --set steps=1000")
        _demand(self.steps is None or self.steps >= 1, "steps", self.steps, "at least 1")
        _demand(self.minutes is None or 0 < self.minutes < math.inf, "minutes", self.minutes, "a positive number")
        _demand(0 <= self.seed < 2**63, "seed", self.seed, "0 to 2^63 - 1")
        for name in ("eval_every", "save_every"):
            _demand(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("log_every", "keep"):
            _demand(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _demand(self.out != "", "out", self.out, "a folder")
        for name, rate in self.rates.items():
            _demand(0 <= rate < 1, name, rate, "a share, from 0 to below 1")
        _one_of(self.precision, "precision", ("auto", "float32", "bfloat16"))
        _demand(self.device != "", "device", self.device, "'auto', or a name such as 'cpu' or 'cuda:1'")

    @property
    def rates(self) -> dict[str, float]:
        """Rates of the model's config that the recipe says in its place."""
        return {name: getattr(self, name) for name in RATES if getattr(self, name) is not None}

    def settled(self) -> "Recipe":
        """With a number for the warm-up, where the run is counted in steps alone: a longer one then keeps it."""
        if self.optim.warmup != AUTO or self.steps is None or self.minutes is not None:
            return self
        return replace(self, optim=replace(self.optim, warmup=min(WARMUP, int(WARMUP_SHARE * self.steps))))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> "Recipe":
        """The recipe of a parsed TOML file; keys that are left out keep their defaults.

        Raises:
            ConfigError: names an unknown key or a value that does not fit.
        """
        tables: dict[str, Any] = {"data": Data, "optim": Optim, "lora": Lora}
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known and (key := key_of(str(name))):
                hint = f"did you mean {key!r}? in a file it stands below [{key.partition('.')[0]}]"
                raise ConfigError(f"recipe: unknown key {brief(name)}", hint=hint)
        check_names(options, known, "recipe")
        chosen = dict(options)
        for name, table in tables.items():
            given = chosen.get(name, {})
            if not isinstance(given, Mapping):
                raise ConfigError(f"recipe: {name} is {brief(given)}, expected a table", hint=f"write [{name}]")
            check_names(given, [f.name for f in fields(table)], "recipe", prefix=f"{name}.")
            chosen[name] = table(**given)
        return cls(**chosen)

    @classmethod
    def load(
        cls, source: str | Path = STDLIB, overrides: Iterable[str] = (), tell: Callable[[str], object] | None = None
    ) -> "Recipe":
        """Read a recipe and override some of its keys.

        Args:
            source: a TOML or JSON file, the folder of a run, or the name of a recipe that comes with the package.
            overrides: such as ``"minutes=10"`` or ``"optim.lr=3e-3"``. A value is written as in TOML; a text
                needs no quotes. ``model.d_model=96`` changes a preset, too. One of ``steps`` and ``minutes`` replaces
                the other; both together hold both.
            tell: is given a sentence about each value of the source that an override of another key has replaced.

        Raises:
            ConfigError: for a recipe that does not exist, is no TOML, or has an unknown key or a wrong value.
        """
        options = _read(source)
        changed = {_override(options, override) for override in overrides}
        for name, other in (("steps", "minutes"), ("minutes", "steps")):
            if name in changed and other not in changed and (dropped := options.pop(other, None)) is not None and tell:
                tell(f"{name} = {options[name]} replaces {other} = {dropped} of {source}; set both to keep both limits")
        return cls.from_dict(options)


def _read(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    if path.is_dir():
        path = path / RECIPE_FILE
        if not path.exists():
            raise ConfigError(
                f"{source}: holds no training run: there is no {RECIPE_FILE}", hint=_on_the_text_of(source)
            )
    elif not path.exists() and (RECIPES / f"{source}.toml").is_file():
        path = RECIPES / f"{source}.toml"
    try:
        text = read_text(path)
        found = parse_json(text) if path.suffix == ".json" else parse_toml(text)
    except OSError as error:
        named = sorted(p.stem for p in RECIPES.glob("*.toml"))
        hint = f"a TOML file, the folder of a run, or one of: {', '.join(named)}"
        raise ConfigError(f"no recipe {str(source)!r}: {error.strerror}", hint=hint) from error
    except ValueError as error:
        text = path.suffix not in (".toml", ".json")
        hint = _on_the_text_of(source) if text else "a recipe to start from: dualform train --print-recipe > my.toml"
        raise ConfigError(f"{path}: not a recipe: {error}", hint=hint) from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: not a recipe: it holds {kind_of(found)}, expected an object")
    return found


def _on_the_text_of(path: str | Path) -> str:
    return f"to train on the text there: dualform train {setting('data.path', str(path))} --out runs/new"


def setting(key: str, text: str) -> str:
    """``--set KEY=TEXT`` for a shell; the text is quoted where it would be read as something else."""
    try:
        plain = not parse_toml(f"value = {text}")
    except ValueError:
        plain = text == text.strip()
    return f"--set {shlex.quote(f'{key}={text if plain else json.dumps(text)}')}"


def key_of(name: str) -> str:
    """The key that a name stands for, with its table: ``optim.lr`` for ``lr``; empty where there is none."""
    name = name.replace("-", "_")
    tables: dict[str, Any] = {"": Recipe, "data.": Data, "optim.": Optim, "lora.": Lora, "model.": ModelConfig}
    keys = [f"{prefix}{f.name}" for prefix, table in tables.items() for f in fields(table)]
    return next((key for key in keys if name in (key, key.rpartition(".")[2])), "")


def _override(options: dict[str, Any], override: str) -> str:
    """Set one key of a nested table from ``a.b=c``; gives ``a.b``."""
    key, equals, text = override.partition("=")
    *path, last = key.strip().split(".")
    if not equals or not last or not all(path):
        raise ConfigError(f"override {override!r} is not of the form a.b=c", hint="such as --set optim.lr=3e-3")
    try:
        value = parse_toml(f"value = {text}")["value"]
    except ValueError:
        value = text.strip()  # a bare word is a text; where a number is wanted the type check refuses it
    table = options
    for depth, name in enumerate(path):
        inner = table.setdefault(name, {})
        if depth == 0 and name == "model" and isinstance(inner, str):
            if last in RATES and inner not in PRESETS:
                hint = f"of a saved model it is a key of the recipe: --set {last}={text.strip()}"
                raise ConfigError(f"override {override!r}: model is {inner!r}, no preset", hint=hint)
            inner = table[name] = preset(inner).to_dict()
        if not isinstance(inner, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(path[: depth + 1])} is no table")
        table = inner
    table[last] = value
    return key.strip()


def _check_types(config: Any, prefix: str) -> None:
    check_types(type(config), {f.name: getattr(config, f.name) for f in fields(config)}, "recipe", prefix)


def _take_names(config: Any, key: str, example: str) -> None:
    """Make the list of names of a key a tuple."""
    name = key.rpartition(".")[2]
    given = getattr(config, name)
    if isinstance(given, str):  # as where a shell has taken the quotes
        hint = f"""in a shell: --set '{key}=["{example}"]'"""
        raise ConfigError(f"recipe: {key} is {brief(given)}, expected a list of names", hint=hint)
    if isinstance(given, list):
        object.__setattr__(config, name, tuple(given))


def _demand(holds: bool, name: str, value: Any, expected: str) -> None:
    if not holds:
        raise ConfigError(f"recipe: {name} is {brief(value)}, expected {expected}")


def _one_of(value: str, name: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"recipe: {name} is {brief(value)}", hint=suggestion(value, choices))
