"""``dualform info``: what a model is made of, and what it costs."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from dualform.core.json_file import entry, read_table

if TYPE_CHECKING:
    from pathlib import Path

    from dualform.models.backbone import Backbone

EPILOG = """[bold]Examples[/bold]
  dualform info mamba2-130m     a preset: no weights needed
  dualform info runs/demo       a trained model"""

_NEAR, _FAR = 2**14, 2**15  # context lengths between which the growth of a state is measured


def info(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A preset, or the folder of a saved model or a training run.")
    ],
) -> None:
    """Show a model's parameters, layers, and how large its state is per sequence."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from dualform.models.presets import PRESETS

    table = Table(box=box.SIMPLE_HEAD, show_header=False, title=model, title_justify="left", title_style="bold")
    rows = _trained(model) if model not in PRESETS or _exists(model) else _preset(model)
    for name, value in rows:
        table.add_row(name, value)
    Console().print(table)


def _exists(model: str) -> bool:
    from pathlib import Path

    return Path(model).is_dir()


def _preset(name: str) -> list[tuple[str, str]]:
    import torch

    from dualform.models.lm import LanguageModel
    from dualform.models.presets import preset

    with torch.device("meta"):
        model = LanguageModel(preset(name))
    return [*_shape(model), ("weights", "none: a preset is a shape")]


def _trained(name: str) -> list[tuple[str, str]]:
    from dualform.cli.folders import model_folder
    from dualform.models.saving.files import WEIGHTS_FILE, current
    from dualform.models.saving.model import shape

    folder = model_folder(name)
    model, weights = shape(folder), current(folder, WEIGHTS_FILE)
    size = f"{weights.stat().st_size:,} bytes in {weights}" if weights.exists() else "[red]missing[/red]"
    return [*_shape(model), ("weights", size), *_history(folder.parent)]


def _history(run: "Path") -> list[tuple[str, str]]:
    """What the summary of a training run says of the model inside it; nothing where there is none."""
    from dualform.cli.folders import RUN_SUMMARY

    path = run / RUN_SUMMARY
    if not path.exists():
        return []
    hint = "remove it, or train the run again; the model is whole without it"
    summary = read_table(path, hint=hint)
    tokens, steps = (entry(summary, name, int, path) for name in ("tokens", "steps"))
    bits = entry(summary, "bits_per_byte", float, path)
    known = {name: entry(summary, name, float | None, path) for name in ("gzip", "xz") if name in summary}
    compressors = ", ".join(f"{name} {bits:.2f}" for name, bits in known.items() if bits)
    return [
        ("trained on", f"{tokens:,} tokens in {steps:,} steps"),
        ("held-out", f"{bits:.3f} bits per byte" + (f" ({compressors})" if compressors else "")),
    ]


def _shape(model: "Backbone") -> list[tuple[str, str]]:
    """What follows from the config alone; the model is on the meta device, where it costs no memory."""
    config, count = model.config, model.parameter_count()
    rows = [("parameters", f"{count:,} ({_mib(4 * count)} in float32, {_mib(2 * count)} in bfloat16)")]
    rows.append(("reads", f"{model.inputs:,} features") if model.inputs else ("vocabulary", f"{config.vocab_size:,}"))
    rows.append(("d_model", f"{config.d_model:,}"))
    rows.append(("pattern", f"{_folded(config.pattern)} ({len(config.pattern)} blocks)"))
    for letter, parts in config.parts.items():
        shared = ", one module, shared" if letter in config.shared else ""
        described = "\n".join(_described(part) for part in parts)
        rows.append((f"  {letter} x {config.pattern.count(letter)}{shared}", described))
    return [*rows, ("state", _state(model))]


def _state(model: "Backbone") -> str:
    """Bytes of one sequence's state: what it always holds, and what it adds per token of context."""
    from dualform.core.tree import nbytes

    if not model.causal:
        return "none: a bidirectional model reads whole sequences"
    near, far = (nbytes(model.init_state(1, max_len=length)) for length in (_NEAR, _FAR))
    slope = (far - near) // (_FAR - _NEAR)
    constant = f"{near - slope * _NEAR:,} bytes per sequence, whatever its length"
    return f"{constant}, and {slope:,} bytes per token of context" if slope else constant


def _described(part: Any) -> str:
    from dataclasses import fields

    from dualform.layers.registry import kind_of

    options = ", ".join(f"{f.name}={value}" for f in fields(part) if (value := getattr(part, f.name)) is not None)
    return f"[bold]{kind_of(type(part)) or type(part).__name__}[/bold] [dim]{options}[/dim]"


def _folded(pattern: str) -> str:
    """``MMMA`` repeated 4 times reads ``MMMA x 4``."""
    for size in range(1, len(pattern) // 2 + 1):
        times, rest = divmod(len(pattern), size)
        if not rest and pattern[:size] * times == pattern:
            return f"{pattern[:size]} x {times}"
    return pattern


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB" if size < 2**30 else f"{size / 2**30:,.2f} GiB"
