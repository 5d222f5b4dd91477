"""Equal models with different mixers, trained alike and measured at rising lengths: what each is good for, here.

compare/MIXER/          the run of each, as ``dualform train`` leaves it
        comparison.json all results
        comparison.png  quality, time and memory
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dualform.core.errors import CheckpointError
from dualform.core.json_file import read_table, to_json
from dualform.models.config import ModelConfig
from dualform.models.lm import LanguageModel
from dualform.models.saving.files import replacing_file
from dualform.models.saving.model import load
from dualform.ops.device import chosen_device
from dualform.train.claim import SUMMARY_FILE
from dualform.train.cost import Cost, costs, crossing
from dualform.train.loop import train
from dualform.train.recipe import RECIPE_FILE, Recipe

RESULTS_FILE, PICTURE_FILE = "comparison.json", "comparison.png"
ATTENTION = "attention"


def trained(
    models: Mapping[str, ModelConfig], recipe: Recipe, out: Path, console: Console
) -> Iterator[tuple[str, Path]]:
    """Train each model by one recipe, in a folder of its own; what is trained already is not trained again.

    Args:
        models: configs by the names of their mixers.
        recipe: for all of them; its model and its folder are replaced.
        out: where the folders go.
        console: where lines and progress go.

    Yields:
        The name and the run's folder.

    Raises:
        CheckpointError: for a folder whose run has another recipe.
    """
    for name, config in models.items():
        own = replace(recipe, model=config.to_dict(), out=str(out / name))
        if (own_folder := Path(own.out)).joinpath(SUMMARY_FILE).exists():
            _demand_same(own_folder, own)
        else:
            console.rule(name)
            train(own, resume=(own_folder / "checkpoints").exists(), console=console)
        yield name, own_folder


def measured(
    models: Mapping[str, ModelConfig],
    folders: Mapping[str, Path],
    lengths: list[int],
    recipe: Recipe,
    limit: float,
    tell: Callable[[str, Cost], object],
) -> dict[str, list[Cost]]:
    """The costs of each model at each length, those of trained weights where there is a folder."""
    device = chosen_device(recipe.device, f"device {recipe.device!r}")
    bfloat16 = recipe.precision == "bfloat16" or (recipe.precision == "auto" and device.type == "cuda")
    found: dict[str, list[Cost]] = {}
    for name, config in models.items():
        model = load(folders[name], kind=LanguageModel) if name in folders else LanguageModel(config)
        found[name] = []
        for cost in costs(model.to(device), lengths, limit=limit, bfloat16=bfloat16):
            found[name].append(cost)
            tell(name, cost)
    return found


def results(
    models: Mapping[str, ModelConfig], folders: Mapping[str, Path], found: Mapping[str, list[Cost]]
) -> dict[str, dict[str, Any]]:
    """What there is to say of each model: parameters, quality, costs, and the length from which it beats attention."""
    table: dict[str, dict[str, Any]] = {}
    attention = found.get(ATTENTION, [])
    for name, config in models.items():
        row: dict[str, Any] = {"parameters": _parameters(config), "costs": [cost._asdict() for cost in found[name]]}
        if name in folders:
            summary = read_table(folders[name] / SUMMARY_FILE)
            row |= {key: summary[key] for key in ("bits_per_byte", "seconds", "steps", "tokens")}
        if name != ATTENTION and attention:
            for what in ("seconds", "step", "kept", "state"):
                mine, theirs = ([(c.length, getattr(c, what)) for c in some] for some in (found[name], attention))
                row.setdefault("beats_attention_from", {})[what] = crossing(mine, theirs)
        table[name] = row
    return table


def write(out: Path, recipe: Recipe, machine: str, table: Mapping[str, Any]) -> None:
    """Write :data:`RESULTS_FILE`."""
    document = {"machine": machine, "recipe": {**recipe.to_dict(), "model": None}, "models": dict(table)}
    with replacing_file(out / RESULTS_FILE) as path:
        path.write_text(to_json(document), encoding="utf-8")


def _parameters(config: ModelConfig) -> int:
    with torch.device("meta"):
        return LanguageModel(config).parameter_count()


def _demand_same(folder: Path, recipe: Recipe) -> None:
    before = Recipe.load(folder)
    wanted = {**recipe.to_dict(), "out": before.out, "optim": before.to_dict()["optim"]}
    changed = [key for key, value in before.to_dict().items() if wanted[key] != value]
    if changed:
        raise CheckpointError(
            f"{folder / RECIPE_FILE}: trained with another {', '.join(changed)}",
            hint="choose another folder with --out, or remove this one",
        )
