"""``dualform inspect``: pictures of what a model, a layer or a memory does."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.figure import Figure
    from torch import nn

EPILOG = """[bold]Examples[/bold]
  dualform inspect s4d                      poles, impulse and frequency response of a fresh layer
  dualform inspect hippo:legs --out pics    what a HiPPO memory keeps of a signal
  dualform inspect runs/demo                every layer of a trained model that has a linear system"""

_HIPPO = "hippo:"


def inspect(
    what: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|LAYER",
            help="The folder of a saved model or a training run, a preset, a layer such as s4d, or hippo:MEASURE.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where the pictures go.")] = Path("pictures"),
    d_model: Annotated[int, typer.Option(min=1, help="Channels of a fresh layer.")] = 64,
    seed: Annotated[int, typer.Option(help="Of a fresh layer or preset.")] = 0,
) -> None:
    """Draw poles, impulse and frequency responses of a model's layers, or what a HiPPO memory remembers."""
    import torch

    from dualform.inspect.folder import save

    torch.manual_seed(seed)
    for path in save(_pictures(what, d_model), out):
        typer.echo(path)


def _pictures(what: str, d_model: int) -> "Iterator[tuple[str, Figure]]":
    from dualform.inspect.folder import pictures_of_layer, pictures_of_measure, pictures_of_model
    from dualform.layers.registry import MIXERS
    from dualform.models.lm import LanguageModel
    from dualform.models.presets import PRESETS

    if what.startswith(_HIPPO):
        return pictures_of_measure(what.removeprefix(_HIPPO))
    if Path(what).is_dir():
        return pictures_of_model(_load(what))
    if what in MIXERS:
        return pictures_of_layer(MIXERS[what]().build(d_model), what)
    if what in PRESETS:
        return pictures_of_model(LanguageModel(PRESETS[what]))
    raise _unknown(what)


def _load(what: str) -> "nn.Module":
    from dualform.cli.folders import model_folder
    from dualform.models.saving.model import load

    return load(model_folder(what))


def _unknown(what: str) -> Exception:
    from dualform.core.errors import ArgumentError
    from dualform.core.options import suggestion
    from dualform.layers.registry import MIXERS

    hint = suggestion(what, [*MIXERS, f"{_HIPPO}legs"])
    return ArgumentError(f"inspect: {what!r} is no folder, preset, layer or {_HIPPO}MEASURE", hint=hint)
