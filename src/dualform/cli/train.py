"""``dualform train``: run a recipe."""

import json
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

EPILOG = """[bold]Examples[/bold]
  dualform train --set minutes=10                  Python's own library
  dualform train --set data.path=notes --out runs/notes    your text files
  dualform train --set model=byte-mamba2 --set steps=500   another preset
  dualform train --set model=FOLDER --set lora.rank=8      adapters on a saved model
  dualform train my.toml --set optim.lr=3e-3       a recipe, one key changed
  dualform train runs/notes --resume               go on where a run stopped
  torchrun --nproc-per-node 2 -m dualform train my.toml
  dualform train --print-recipe > my.toml          every key, with what it means

A run folder holds model/, checkpoints/, metrics.jsonl, loss.png, tensorboard/."""


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="[RECIPE]", help="A recipe (TOML), or a run's folder. Default: the built-in recipe."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help="Change a key of the recipe. Repeatable.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The run's folder; short for --set out=FOLDER.", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in that folder.")] = False,
    print_recipe: Annotated[
        bool, typer.Option("--print-recipe", help="Print the built-in recipe with its comments, a start for yours.")
    ] = False,
) -> None:
    """Train a language model from a recipe. Ctrl-C saves, and --resume continues exactly."""
    if print_recipe:
        source = resources.files("dualform") / "train" / "recipes" / "stdlib.toml"  # no import: it loads torch
        typer.echo(source.read_text(encoding="utf-8"), nl=False)
        return
    from dualform.train.loop import train as run
    from dualform.train.recipe import RECIPE_FILE, STDLIB, Recipe

    if recipe is None:
        recipe = str(out) if resume and out is not None and (out / RECIPE_FILE).exists() else STDLIB
    if out is None and resume and Path(recipe).is_dir():
        out = Path(recipe)  # where the run is now, wherever it began
    overrides = list(set_ or [])
    if out is not None:
        overrides.append(f"out={json.dumps(str(out))}")  # JSON's texts are TOML's
    run(Recipe.load(recipe, overrides, tell=typer.echo), resume=resume)
