"""``dualform info``: what a model is made of, and what it costs."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from dualform.cli.text import print_json, printable
from dualform.core.json_file import entry, read_table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dualform.models.backbone import Backbone

EPILOG = """[bold]Examples[/bold]
  dualform info mamba2-130m     a preset: no weights needed
  dualform info runs/demo       a trained model
  dualform info model.gguf      a file of GGUF
  dualform info runs/demo --json | jq .parameters"""

_SUMMARY = {"tokens": int, "steps": int, "bits_per_byte": float}  # what is shown of a run, and its types
_COMPRESSORS = ("gzip", "xz")
_NEAR, _FAR = 2**14, 2**15  # context lengths between which the growth of a state is measured


def info(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A preset, a name of the Hub, or the folder of a saved model or a training run."
        ),
    ],
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON document: kind, config, parameters, state, weights, run."),
    ] = False,
) -> None:
    """Show a model's parameters, layers, and how large its state is per sequence."""
    from dualform.models.presets import PRESETS

    trained = model not in PRESETS or _exists(model)
    built = _trained(model) if trained else _preset(model)
    weights, run = _weights(model) if trained else None, _history(model) if trained else None
    if as_json:
        about = {"model": model, "kind": type(built).__name__, "config": built.config.to_dict()}
        about |= {"inputs": built.inputs, "parameters": built.parameter_count()}
        about |= {"active_parameters": built.active_parameter_count()}
        about["quantization"] = None if built.quantization is None else built.quantization._asdict()
        print_json({**about, "state": _state(built), "weights": weights, "run": run})
        return
    _print_table(model, [*_shape(built), ("weights", _told(weights)), *(_run_rows(run) if run else [])])


def _exists(model: str) -> bool:
    from pathlib import Path

    return Path(model).exists()


def _preset(name: str) -> "Backbone":
    import torch

    from dualform.models.lm import LanguageModel
    from dualform.models.presets import preset

    with torch.device("meta"):
        return LanguageModel(preset(name))


def _trained(name: str) -> "Backbone":
    from dualform.cli.folders import model_folder
    from dualform.models.saving.model import shape

    return shape(model_folder(name))


def _weights(name: str) -> dict[str, Any]:
    """Where the weights of a saved model are, whose layout they have, and their bytes; None where one is missing."""
    from dualform.cli.folders import model_folder
    from dualform.models.saving.described import described
    from dualform.models.saving.weights import weight_paths

    folder = model_folder(name)
    layout, paths = described(folder).layout, weight_paths(folder)
    size = sum(path.stat().st_size for path in paths) if all(path.exists() for path in paths) else None
    where = paths[0] if len(paths) == 1 else folder
    return {"path": str(where), "bytes": size, "layout": "dualform" if layout is None else layout.name}


def _history(name: str) -> dict[str, Any] | None:
    """What a training run says of a model inside it, in its summary or beside the best one; None where it does not."""
    from dualform.cli.folders import RUN_SUMMARY, model_folder
    from dualform.models.saving.files import current
    from dualform.models.saving.folder import EVALUATION_FILE, MODEL

    folder = model_folder(name)
    if current(folder, EVALUATION_FILE).exists():
        from dualform.train.best import read_evaluation

        step, bits = read_evaluation(folder)
        return {"steps": step, "bits_per_byte": bits}
    path = folder.parent / RUN_SUMMARY
    if folder.name != MODEL or not path.exists():
        return None
    summary = read_table(path, hint="remove it, or train the run again; the model is whole without it")
    found = {name: entry(summary, name, of, path) for name, of in _SUMMARY.items()}
    return found | {name: entry(summary, name, float | None, path) for name in _COMPRESSORS if name in summary}


def _run_rows(run: "Mapping[str, Any]") -> list[tuple[str, str]]:
    compressors = ", ".join(f"{name} {run[name]:.2f}" for name in _COMPRESSORS if run.get(name))
    held_out = f"{run['bits_per_byte']:.3f} bits per byte" + (f" ({compressors})" if compressors else "")
    trained = f"{run['tokens']:,} tokens in {run['steps']:,} steps" if "tokens" in run else f"{run['steps']:,} steps"
    return [("trained on" if "tokens" in run else "trained for", trained), ("held-out", held_out)]


def _told(weights: "Mapping[str, Any] | None") -> str:
    if weights is None:
        return "none: a preset is a shape"
    size = weights["bytes"]
    layout = "" if weights["layout"] == "dualform" else f", {weights['layout']}"
    return "[red]missing[/red]" if size is None else f"{size:,} bytes in {_plain(weights['path'])}{layout}"


def _shape(model: "Backbone") -> list[tuple[str, str]]:
    """What follows from the config alone; the model is on the meta device, where it costs no memory."""
    config, count = model.config, model.parameter_count()
    rows = [("parameters", f"{count:,} ({_mib(4 * count)} in float32, {_mib(2 * count)} in bfloat16)")]
    if model.quantization is not None:
        rows = [("parameters", f"{count:,}, matrices in int8 with a scale for {model.quantization.group}")]
    if (active := model.active_parameter_count()) < count:
        rows.append(("active", f"{active:,} of them, used by one {'element' if model.inputs else 'token'}"))
    rows.append(("reads", f"{model.inputs:,} features") if model.inputs else ("vocabulary", f"{config.vocab_size:,}"))
    rows.append(("d_model", f"{config.d_model:,}"))
    rows.append(("pattern", f"{_plain(_folded(config.pattern))} ({len(config.pattern)} blocks)"))
    for letter, parts in config.parts.items():
        shared = ", one module, shared" if letter in config.shared else ""
        described = "\n".join(_described(part) for part in parts)
        rows.append((f"  {_plain(letter)} x {config.pattern.count(letter)}{shared}", described))
    if (state := _state(model)) is None:
        return [*rows, ("state", "none: a bidirectional model reads whole sequences")]
    constant = f"{state['bytes']:,} bytes per sequence, whatever its length"
    growing = f", and {state['bytes_per_token']:,} bytes per token of context" if state["bytes_per_token"] else ""
    return [*rows, ("state", constant + growing)]


def _state(model: "Backbone") -> dict[str, int] | None:
    """Bytes of one sequence's state: what it always holds, and what it adds per token of context."""
    from dualform.core.tree import nbytes

    if not model.causal:
        return None
    near, far = (nbytes(model.init_state(1, max_len=length)) for length in (_NEAR, _FAR))
    slope = (far - near) // (_FAR - _NEAR)
    return {"bytes": near - slope * _NEAR, "bytes_per_token": slope}


def _print_table(title: str, rows: list[tuple[str, str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_header=False, title=_plain(title), title_justify="left", title_style="bold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _described(part: Any) -> str:
    from dataclasses import fields

    from dualform.layers.block import COMPOSED
    from dualform.layers.registry import kind_of

    composed, inside, options = isinstance(part, COMPOSED), [], []
    for f in fields(part):
        value = getattr(part, f.name)
        if composed and f.name in ("part", "parts"):
            inside = [value] if f.name == "part" else list(value)
        elif value is not None if not composed else value != f.default:
            options.append(f"{f.name}={value}")
    kind = f"[bold]{kind_of(type(part)) or type(part).__name__}[/bold] [dim]{_plain(', '.join(options))}[/dim]"
    return "\n".join([kind, *("  " + line for p in inside for line in _described(p).split("\n"))])


def _plain(text: str) -> str:
    """A text from a file or a command line, without meaning for a terminal or for Rich."""
    from rich.markup import escape

    return escape(printable(text))


def _folded(pattern: str) -> str:
    """``MMMA`` repeated 4 times reads ``MMMA x 4``."""
    for size in range(1, len(pattern) // 2 + 1):
        times, rest = divmod(len(pattern), size)
        if not rest and pattern[:size] * times == pattern:
            return f"{pattern[:size]} x {times}"
    return pattern


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB" if size < 2**30 else f"{size / 2**30:,.2f} GiB"
