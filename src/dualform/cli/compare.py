"""``dualform compare``: equal models with different mixers, side by side on this machine."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dualform.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

EPILOG = """[bold]Examples[/bold]
  dualform compare                                         Mamba-2, attention and an LSTM, two minutes each
  dualform compare --mixers mamba2,retnet,gated_delta_net,attention --set steps=2000
  dualform compare --no-train --longest 65536              time and memory alone
  dualform compare --set data.path=notes --option mamba2.d_state=64

The folder holds comparison.png, comparison.json, and the run of each model. The same command goes on where it
stopped."""

_WHAT = {"seconds": "to train", "step": "to generate", "kept": "in memory of training", "state": "in state"}


def compare(
    mixers: Annotated[str, typer.Option(help="Names of layers, with commas between.")] = "mamba2,attention,lstm",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help="Change a key of the recipe. Repeatable.", show_default=False),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="MIXER.KEY=VALUE", help="Change an option of a mixer. Repeatable.", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder for all of it.")] = Path("runs/compare"),
    d_model: Annotated[int, typer.Option(min=1, help="The width of the models.")] = 128,
    layers: Annotated[int, typer.Option(min=1, help="Blocks, each a mixer and a feed-forward.")] = 4,
    longest: Annotated[int, typer.Option(min=128, help="The longest sequence that is measured.")] = 8192,
    limit: Annotated[float, typer.Option(min=0, help="Seconds; no longer sequence is tried after such a step.")] = 10.0,
    train: Annotated[bool, typer.Option("--train/--no-train", help="Whether the models are trained, too.")] = True,
) -> None:
    """Train models of equal size on the same text, and measure time and memory against length.

    They differ in their mixer alone: a wider feed-forward makes up for a mixer with fewer parameters.
    """
    from rich.console import Console

    from dualform.models.saving.files import replacing_file
    from dualform.ops.device import chosen_device
    from dualform.train import compare as comparison
    from dualform.train.curves import plot_comparison
    from dualform.train.equal import equal_models
    from dualform.train.recipe import Recipe
    from dualform.train.told import devices

    names = list(dict.fromkeys(name.strip() for name in mixers.split(",") if name.strip()))
    if not names:
        raise ConfigError("compare: no mixers are given", hint="such as --mixers mamba2,attention")
    recipe = Recipe.load(overrides=set_ or [])
    models = equal_models(names, d_model=d_model, layers=layers, options=_options(option or []))
    console = Console()
    folders = dict(comparison.trained(models, recipe, out, console)) if train else {}
    console.rule("costs")
    lengths = [128 << i for i in range((longest // 128).bit_length())]
    found = comparison.measured(models, folders, lengths, recipe, limit, lambda name, cost: _tell(console, name, cost))
    table = comparison.results(models, folders, found)
    machine = devices(chosen_device(recipe.device, f"device {recipe.device!r}"), 1)
    comparison.write(out, recipe, machine, table)
    with replacing_file(out / comparison.PICTURE_FILE) as new:
        plot_comparison(new.with_suffix(".png"), table, f"models of {layers} blocks of {d_model}, on {machine}")
        new.with_suffix(".png").replace(new)
    console.print(_table(table))
    for line in _crossings(table):
        console.print(line, highlight=False)
    console.print(f"saved {out / comparison.PICTURE_FILE} and {comparison.RESULTS_FILE}", highlight=False)


def _options(given: list[str]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for one in given:
        key, equals, text = one.partition("=")
        name, dot, field = key.partition(".")
        if not (equals and dot and name and field):
            raise ConfigError(f"--option {one!r} is not of the form MIXER.KEY=VALUE", hint="mamba2.d_state=64")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        found.setdefault(name, {})[field] = tuple(value) if isinstance(value, list) else value
    return found


def _tell(console: "Console", name: str, cost: Any) -> None:
    train = f"{1e3 * cost.seconds:10.2f} ms a training step, {cost.kept / 2**20:9.2f} MiB kept"
    generate = f"{1e3 * cost.step:8.3f} ms a token, state {cost.state / 2**20:8.3f} MiB"
    console.print(f"{name:20} {cost.length:>8,} tokens  {train}; {generate}", highlight=False, soft_wrap=True)


def _table(table: dict[str, dict[str, Any]]) -> "Table":
    from rich.table import Table

    shown = Table("mixer", "parameters", "bits per byte", "trained", "longest", "a training step", "a token", "state")
    for name, row in table.items():
        last = row["costs"][-1]
        shown.add_row(
            name,
            f"{row['parameters']:,}",
            f"{row['bits_per_byte']:.3f}" if "bits_per_byte" in row else "-",
            f"{row['steps']} steps, {row['seconds']:.0f} s" if "steps" in row else "-",
            f"{last['length']:,}",
            f"{1e3 * last['seconds']:.1f} ms",
            f"{1e3 * last['step']:.3f} ms",
            f"{last['state'] / 2**20:.3f} MiB",
        )
    return shown


def _crossings(table: dict[str, dict[str, Any]]) -> "list[str]":
    """From which length on each costs less than attention."""
    lines = []
    for name, row in table.items():
        if beats := row.get("beats_attention_from"):
            parts = [f"{what} from {beats[key]:,.0f} tokens" for key, what in _WHAT.items() if beats.get(key)]
            lines.append(f"{name} costs less than attention {', '.join(parts) or 'at none of these lengths'}")
    return lines
