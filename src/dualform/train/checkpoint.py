"""Checkpoints of a run: a folder per step with the model, the optimiser's moments and where the run stood.

    checkpoints/step-00000200/model/            loadable with dualform.load
                              optimizer.safetensors
                              run.json
                              manifest.json     sizes and digests, which resuming compares

A checkpoint is written beside its place and renamed when it is complete, so every folder called ``step-`` and eight
digits (more for more steps) can be resumed from, whatever happened. Randomness needs no file: it follows from the seed
and the step.
"""

import os
import re
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dualform.core.errors import CheckpointError, ConfigError
from dualform.core.json_file import entry, read_table, to_json
from dualform.models.config import RATES
from dualform.models.lm import LanguageModel
from dualform.models.saving.described import read_config
from dualform.models.saving.files import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    CONFIG_FILE,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    creating,
)
from dualform.models.saving.folder import MODEL, STEP, checkpoint_name, checkpoints
from dualform.models.saving.incoming import incoming, remove_stale
from dualform.models.saving.manifest import MANIFEST_FILE
from dualform.models.saving.model import read_tensors
from dualform.models.saving.verify import check_files
from dualform.models.tokenizer import Tokenizer
from dualform.train.commands import beginning, elsewhere, resuming
from dualform.train.recipe import Recipe

FORMAT = 1
MOMENTS_FILE, POSITION_FILE = "optimizer.safetensors", "run.json"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_FILES = {MOMENTS_FILE, POSITION_FILE, MANIFEST_FILE, MODEL}
_MODEL_FILES = {CONFIG_FILE, WEIGHTS_FILE, ADAPTER_CONFIG_FILE, ADAPTER_FILE, TOKENIZER_FILE, MANIFEST_FILE}
# What a resumed run may change: how long, how often, where and how fast, but not what it sees.
_FREE = ("out", "steps", "minutes", "eval_every", "save_every", "log_every", "keep")
_FREE += ("precision", "recompute", "graphs", "device", *RATES)
_FREE_TABLES, _HELD = ("optim.", "data.accumulate"), "optim.freeze"


@dataclass(frozen=True)
class Position:
    """Where a run stands.

    Args:
        step: optimiser steps done.
        elapsed: seconds of training done.
        loss_sum: of the losses since the last line in ``metrics.jsonl``.
        loss_count: how many they are.
    """

    step: int = 0
    elapsed: float = 0.0
    loss_sum: float = 0.0
    loss_count: int = 0


def save_checkpoint(
    folder: Path,
    recipe: Recipe,
    position: Position,
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    tokenizer: Tokenizer,
) -> Path:
    """Write ``folder/step-...``, then drop all but the newest ``recipe.keep``.

    A checkpoint to which somebody added a file, or that is a link, is never dropped.

    Raises:
        CheckpointError: when it cannot be written, as on a full disk; earlier checkpoints still load.
    """
    place = folder / checkpoint_name(position.step)
    remove_stale(place, names=STEP)
    if not place.exists():
        _write(place, recipe, position, model, optimizer, tokenizer)
    for old in checkpoints(folder)[: -recipe.keep]:  # also where a kill came before this
        _drop(old)
    return place


def _write(
    place: Path,
    recipe: Recipe,
    position: Position,
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    tokenizer: Tokenizer,
) -> None:
    tensors = {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    about = {"format": FORMAT, "recipe": recipe.to_dict(), "position": asdict(position)}
    with creating(place) as new:
        model.save(new / MODEL, tokenizer)
        save_file(tensors, new / MOMENTS_FILE)
        (new / POSITION_FILE).write_text(to_json(about), encoding="utf-8")


def read_position(place: Path) -> tuple[Position, Recipe]:
    """Where a run stood at a checkpoint, and its recipe.

    Raises:
        CheckpointError: names the file, and the key that is missing or wrong.
    """
    path, hint = place / POSITION_FILE, _remedy(place)
    about = read_table(path, hint=hint)
    if (version := entry(about, "format", int, path)) != FORMAT:
        raise CheckpointError(f"{path}: format {version}, expected {FORMAT}", hint="resume with its own version")
    given = entry(about, "position", dict, path)
    values = {f.name: entry(given, f.name, f.type, f"{path}, position") for f in fields(Position)}
    for name in ("step", "elapsed", "loss_count"):
        if not 0 <= values[name] < 2**53:
            raise CheckpointError(f"{path}: position.{name} is {values[name]}, expected 0 or more", hint=hint)
    position = Position(**values)
    if (match := re.fullmatch(STEP, place.name)) and int(match[1]) != position.step:
        raise CheckpointError(f"{path}: of step {position.step}, expected {place.name}", hint=hint)
    try:
        return position, Recipe.from_dict(
            entry(about, "recipe", dict, path)
        )  # keys that an older version lacked: defaults
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def restore_checkpoint(
    place: Path, recipe: Recipe, model: LanguageModel, optimizer: torch.optim.Optimizer
) -> tuple[Position, list[str]]:
    """Give a model and its optimiser the values of a checkpoint.

    Returns:
        Where the run stood, and what the recipe has changed since, such as ``"steps: 100, now 200"``.

    Raises:
        CheckpointError: for a damaged checkpoint, or one of another model or other data; names the field.
    """
    for folder in (place, place / MODEL):
        check_files(folder, digests=True, hint=_remedy(place))
    position, trained = read_position(place)
    moments = read_moments(place)
    differing = _differences(read_config(place / MODEL).to_dict(), model.config.to_dict())
    ours = {*trained.rates, *recipe.rates}  # which a model with adapters does not save, and a resumed run may change
    if differing := {name: pair for name, pair in differing.items() if name not in ours}:
        hint = f"begin a new run: the same command with {elsewhere(recipe.out)}, and without --resume"
        raise CheckpointError(f"{place} is of another model: {_told(differing)[0]}", hint=hint)
    differing = _differences(trained.to_dict(), recipe.to_dict())
    differing = {name: pair for name, pair in differing.items() if not name.startswith("model")}
    if fixed := {name: pair for name, pair in differing.items() if not _may_change(name)}:
        new = {name: now for name, (_, now) in fixed.items() if isinstance(now, str | float | int)}
        new = {"model": str(place / MODEL)} | {name: now for name, now in new.items() if not name[-1].isdigit()}
        hint = f"begin a new run from these weights: {beginning(recipe.out, recipe.out, new)}"
        raise CheckpointError(f"{place}: a resumed run cannot change {_told(fixed)[0]}", hint=hint)
    state = _moments_by_index(place, moments, model, optimizer)
    model.load_state_dict(read_tensors(place / MODEL, model), strict=False)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return position, _told(differing)


def read_moments(place: Path) -> dict[str, Tensor]:
    """The optimiser's moments at a checkpoint, by parameter and kind.

    Raises:
        CheckpointError: for a file that is missing or no safetensors file.
    """
    path = place / MOMENTS_FILE
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}", hint=_remedy(place)) from error


def _moments_by_index(
    place: Path, moments: dict[str, Tensor], model: LanguageModel, optimizer: torch.optim.Optimizer
) -> dict[int, dict[str, Tensor]]:
    """The moments of every parameter that is trained, by its place in the optimiser."""
    path, hint = place / MOMENTS_FILE, _remedy(place)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state: dict[int, dict[str, Tensor]] = {}
    for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        name = names[id(parameter)]
        state[index] = {key: moments[f"{name}.{key}"] for key in MOMENTS if f"{name}.{key}" in moments}
        shapes = {"step": (), "exp_avg": tuple(parameter.shape), "exp_avg_sq": tuple(parameter.shape)}
        if {key: tuple(value.shape) for key, value in state[index].items()} != shapes:
            raise CheckpointError(f"{path}: the moments of {name} are missing or of another shape", hint=hint)
        if any(value.dtype != torch.float32 for value in state[index].values()):
            raise CheckpointError(f"{path}: the moments of {name} are not all float32", hint=hint)
        if not 0 <= (steps := state[index]["step"].item()) < 2**53:
            raise CheckpointError(f"{path}: {name} has had {steps} steps, expected 0 or more", hint=hint)
    if strange := moments.keys() - {f"{name}.{key}" for name in names.values() for key in MOMENTS}:
        raise CheckpointError(f"{path}: holds {min(strange)!r}, of no parameter of the model", hint=hint)
    return state


def _may_change(name: str) -> bool:
    return (name in _FREE or name.startswith(_FREE_TABLES)) and not name.startswith(_HELD)


def _remedy(place: Path) -> str:
    again = resuming(place.parent.parent)
    return f"remove {place}, and the run resumes from an earlier checkpoint: {again}"


def _drop(place: Path) -> None:
    """Remove a checkpoint at once, if all in it was written by the run."""
    with suppress(OSError), incoming(place) as gone:
        model = place / MODEL
        inside = {*os.listdir(place)} - _FILES, {*os.listdir(model)} - _MODEL_FILES
        if not any(inside) and not place.is_symlink():
            os.replace(place, gone)


def _differences(old: Any, new: Any, name: str = "") -> dict[str, tuple[Any, Any]]:
    """Values of two JSON trees that are not the same, by dotted name."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return {} if old == new else {name: (old, new)}
    found: dict[str, tuple[Any, Any]] = {}
    for key in {**old, **new}:
        found |= _differences(old.get(key), new.get(key), f"{name}.{key}" if name else str(key))
    return found


def _told(differing: dict[str, tuple[Any, Any]]) -> list[str]:
    return [f"{name}: {old!r}, now {new!r}" for name, (old, new) in differing.items()]
