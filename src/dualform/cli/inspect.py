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
            help="The folder or Hub name of a model, a training run, a preset, a layer such as s4d, or hippo:MEASURE.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where the pictures go.")] = Path("pictures"),
    d_model: Annotated[int, typer.Option(min=1, help="Channels of a fresh layer.")] = 64,
    seed: Annotated[int, typer.Option(help="Of a fresh layer or preset.")] = 0,
) -> None:
    """Draw poles, impulse and frequency responses of a model's layers, or what a HiPPO memory remembers."""
    import torch

    from dualform.inspect.folder import pictures_of_model, save
    from dualform.inspect.systems import other_parts

    torch.manual_seed(seed)
    model = _model(what)
    for path in save(_pictures(what, d_model) if model is None else pictures_of_model(model), out):
        typer.echo(path)
    for name, part in other_parts(model).items() if model is not None else ():
        typer.echo(f"not drawn: {name} ({type(part).__name__}) is not one linear time-invariant system", err=True)


def _model(what: str) -> "nn.Module | None":
    """The model of a folder or a preset; None for anything else."""
    from dualform.models.lm import LanguageModel
    from dualform.models.presets import PRESETS
    from dualform.models.saving.hub import hub_name

    if Path(what).is_dir() or hub_name(what):
        return _load(what)
    return LanguageModel(PRESETS[what]) if what in PRESETS else None


def _pictures(what: str, d_model: int) -> "Iterator[tuple[str, Figure]]":
    from dualform.inspect.folder import pictures_of_layer, pictures_of_measure
    from dualform.layers.registry import MIXERS

    if what.startswith(_HIPPO):
        return pictures_of_measure(what.removeprefix(_HIPPO))
    if what in MIXERS:
        return pictures_of_layer(MIXERS[what]().build(d_model), what)
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
