"""Short runs of training that tests share: a recipe of a few steps on a small saved model, and what became of it."""

from pathlib import Path
from typing import Any

from rich.console import Console

from dualform.train.recipe import Data, Optim, Recipe
from dualform.train.report import read_metrics

QUIET = Console(quiet=True)


def small_recipe(model: Path, text: Path, out: Path, *, data: dict[str, Any], **options: Any) -> Recipe:
    """Six steps on the CPU, with a checkpoint after three and a line after two.

    Args:
        model: the folder that the run goes on from.
        text: what is trained on.
        out: the run's folder.
        data: more of :class:`~dualform.train.recipe.Data`.
        options: more of the recipe.
    """
    given = {"steps": 6, "save_every": 3, "log_every": 2, "device": "cpu", "optim": Optim(lr=0.02, warmup=1), **options}
    return Recipe(model=str(model), out=str(out), data=Data(path=str(text), batch=2, **data), **given)


def losses(out: Path) -> list[float]:
    """Those of the lines of a run."""
    return [row["loss"] for row in read_metrics(out) if row["kind"] == "train"]
