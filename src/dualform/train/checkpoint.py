"""Checkpoints of a run: a folder per step with the model, the optimiser's moments and where the run stood.

    checkpoints/step-00000200/model/            loadable with dualform.load
                              optimizer.safetensors
                              run.json

A checkpoint is written beside its place and renamed when it is complete, so every folder called ``step-...`` can be
resumed from, whatever happened. Randomness needs no file: it follows from the seed and the step.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dualform.core.errors import CheckpointError
from dualform.models.lm import LanguageModel
from dualform.models.saving.files import replacing
from dualform.models.saving.model import read_config, read_tensors
from dualform.models.tokenizer import Tokenizer
from dualform.train.recipe import Recipe

FORMAT = 1
MOMENTS_FILE, POSITION_FILE = "optimizer.safetensors", "run.json"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_FULL = "free some space; earlier checkpoints still load"
# What a resumed run may change: how long, how often, where and how fast, but not what it sees.
_FREE = ("out", "steps", "minutes", "eval_every", "save_every", "log_every", "keep", "precision", "device")
_FREE_TABLES = ("optim.", "data.accumulate")


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

    Raises:
        CheckpointError: when it cannot be written, as on a full disk; earlier checkpoints still load.
    """
    place = folder / f"step-{position.step:08d}"
    if place.exists():
        return place
    incoming = folder / f".{place.name}.incoming"
    tensors = {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }
    about = {"format": FORMAT, "recipe": recipe.to_dict(), "position": asdict(position)}
    try:
        shutil.rmtree(incoming, ignore_errors=True)
        incoming.mkdir(parents=True)
        model.save(incoming / "model", tokenizer)
        with replacing(incoming) as new:
            save_file(tensors, new / MOMENTS_FILE)
            (new / POSITION_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        os.replace(incoming, place)
    except OSError as error:
        raise CheckpointError(f"{place}: cannot save: {error.strerror}", hint=_FULL) from error
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
    for old in checkpoints(folder)[: -recipe.keep]:
        shutil.rmtree(old, ignore_errors=True)
    return place


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    return sorted(folder.glob("step-*"))


def restore_checkpoint(
    place: Path, recipe: Recipe, model: LanguageModel, optimizer: torch.optim.Optimizer
) -> tuple[Position, list[str]]:
    """Give a model and its optimiser the values of a checkpoint.

    Returns:
        Where the run stood, and what the recipe has changed since, such as ``"steps: 100, now 200"``.

    Raises:
        CheckpointError: for a damaged checkpoint, or one of another model or other data; names the field.
    """
    try:
        about = json.loads((place / POSITION_FILE).read_text(encoding="utf-8"))
        moments = load_file(place / MOMENTS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        hint = f"remove {place}, and the run resumes from an earlier checkpoint"
        raise CheckpointError(f"{place}: cannot be read: {error}", hint=hint) from error
    if about["format"] != FORMAT:
        raise CheckpointError(
            f"{place}: format {about['format']}, expected {FORMAT}", hint="resume with its own version"
        )
    if differing := _differences(read_config(place / "model").to_dict(), model.config.to_dict()):
        raise CheckpointError(f"{place} is of another model: {_told(differing)[0]}", hint="start a new run")
    trained = Recipe.from_dict(about["recipe"])  # of a version without some keys: those have their defaults
    differing = _differences(trained.to_dict(), recipe.to_dict())
    differing = {name: pair for name, pair in differing.items() if not name.startswith("model")}
    if fixed := {
        name: pair for name, pair in differing.items() if name not in _FREE and not name.startswith(_FREE_TABLES)
    }:
        hint = f'start a new run; with model = "{place / "model"}" it goes on from these weights'
        raise CheckpointError(f"{place}: a resumed run cannot change {_told(fixed)[0]}", hint=hint)
    model.load_state_dict(read_tensors(place / "model", model), strict=False)
    _restore_moments(place, moments, model, optimizer)
    return Position(**about["position"]), _told(differing)


def _restore_moments(
    place: Path, moments: dict[str, Tensor], model: LanguageModel, optimizer: torch.optim.Optimizer
) -> None:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state: dict[int, dict[str, Tensor]] = {}
    for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        name = names[id(parameter)]
        state[index] = {key: moments[f"{name}.{key}"] for key in MOMENTS if f"{name}.{key}" in moments}
        if len(state[index]) != len(MOMENTS) or state[index]["exp_avg"].shape != parameter.shape:
            raise CheckpointError(f"{place}: the optimiser's moments of {name} are missing or of another shape")
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


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
