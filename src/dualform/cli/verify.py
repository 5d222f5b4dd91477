"""``dualform verify``: whether the files of models, runs and states are those that were saved."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from dualform.cli.text import print_json

EPILOG = """[bold]Examples[/bold]
  dualform verify runs/notes           a run: data, checkpoints, models
  dualform verify runs/notes/model     a model
  dualform verify a.state b.state      states that generate saved
  dualform verify runs/notes --json    one JSON document, for a program"""

OK, DAMAGED, UNKNOWN = "ok", "damaged", "no digest"
_STYLES = {OK: "green", DAMAGED: "bold red", UNKNOWN: "yellow"}
_NO_MANIFEST = "no manifest.json beside it: saved by an older version, or by hand"


class Row(NamedTuple):
    """One file or folder: ``ok``, ``damaged``, or ``no digest`` to compare it with; and why."""

    path: Path
    status: str
    detail: str


def verify(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH...", help="Folder of a model or a training run, or the file of a state."),
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document: status, path and detail of each.")
    ] = False,
) -> None:
    """Compare files with the sizes and digests that were saved with them.

    Exit code 2 if a file is damaged or missing, or there is nothing to verify. What older versions saved carries no
    digests; that is said, and is no failure. Logs, recipes and pictures carry none either, and are passed over.
    """
    from rich.console import Console

    console, rows = Console(highlight=False, soft_wrap=True), list[Row]()
    for row in (row for path in paths for row in _examined(path)):
        rows.append(row)
        if not as_json:
            console.print(f"{row.status:<9}", style=_STYLES[row.status], end="  ")
            console.print(f"{row.path}  {row.detail}", markup=False)
    counts = {status: sum(row.status == status for row in rows) for status in (OK, DAMAGED, UNKNOWN)}
    if as_json:
        files = [{"path": str(row.path), "status": row.status, "detail": row.detail} for row in rows]
        print_json({"ok": not counts[DAMAGED], "counts": counts, "files": files})
    else:
        console.print(", ".join(f"{count} {status}" for status, count in counts.items() if count))
    if counts[DAMAGED]:
        raise typer.Exit(2)


def _examined(path: Path) -> Iterator[Row]:
    from dualform.core.errors import CheckpointError

    if path.is_dir():
        parts = list(_parts(path))
        for folder, names, check in parts:
            rows = _undisturbed(folder, partial(_folder, names=names, check=check))
            if folder == path or folder.exists():  # a run that goes on drops its old checkpoints
                yield from rows
        if not parts:
            hint = "give the folder of a model or of a training run, or the file of a state"
            raise CheckpointError(f"{path}: no model, checkpoint or prepared data in this folder", hint=hint)
    elif path.exists():
        yield from _undisturbed(path.parent, lambda _: [_file(path)])
    else:
        raise CheckpointError(f"{path}: no such file or folder")


def _undisturbed(folder: Path, rows: Callable[[Path], Iterable[Row]]) -> list[Row]:
    """The rows of a folder, anew where a save ended meanwhile."""
    from dualform.models.saving.undisturbed import undisturbed

    return undisturbed(lambda: folder, lambda folder: list(rows(folder)))


def _parts(folder: Path) -> Iterator[tuple[Path, tuple[str, ...], Callable[[Path], None]]]:
    """The folders of a model, of a checkpoint, of prepared data or of all of them in a run.

    With each come the files that it cannot be without, and what else can be said of it.
    """
    from dualform.models.saving.files import ADAPTER_CONFIG_FILE, CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE, current
    from dualform.models.saving.folder import BEST, CHECKPOINTS, MODEL, checkpoints
    from dualform.models.saving.weights import weight_names
    from dualform.train.checkpoint import MOMENTS_FILE, POSITION_FILE
    from dualform.train.claim import DATA
    from dualform.train.prepared import ABOUT_FILE

    about = ADAPTER_CONFIG_FILE if current(folder, ADAPTER_CONFIG_FILE).exists() else CONFIG_FILE
    if any(current(folder, name).exists() for name in (about, WEIGHTS_FILE)):
        beside = [TOKENIZER_FILE] if current(folder, TOKENIZER_FILE).exists() else []
        names = (about, *weight_names(folder), *beside)
        yield folder, names, _check_model
        return
    if any((folder / name).exists() for name in (POSITION_FILE, MOMENTS_FILE)):
        yield folder, (POSITION_FILE, MOMENTS_FILE), _check_checkpoint
    elif (folder / ABOUT_FILE).exists():
        arrays = sorted(path.name for path in folder.iterdir() if path.suffix in (".ids", ".nbytes", ".starts"))
        yield folder, (ABOUT_FILE, *arrays), _check_data
    for inside in (folder / DATA, *checkpoints(folder / CHECKPOINTS), folder / MODEL, folder / BEST):
        if inside.is_dir():
            yield from _parts(inside)


def _folder(folder: Path, names: tuple[str, ...], check: Callable[[Path], None]) -> Iterator[Row]:
    from dualform.core.errors import DualformError
    from dualform.models.saving.files import current
    from dualform.models.saving.manifest import MANIFEST_FILE
    from dualform.models.saving.verify import examine, manifest_of

    whole = True
    try:
        listed = manifest_of(folder) or {}
        for path, wrong in examine(folder, digests=True):
            whole &= not wrong
            yield Row(path, DAMAGED, wrong) if wrong else Row(path, OK, f"{path.stat().st_size:,} bytes")
    except DualformError as error:
        listed, whole = {name: None for name in names}, False
        yield Row(current(folder, MANIFEST_FILE), DAMAGED, _sentence(error))
    for path in (current(folder, name) for name in names if name not in listed):
        whole &= path.exists()
        yield Row(path, UNKNOWN, _NO_MANIFEST) if path.exists() else Row(path, DAMAGED, "missing")
    if whole:
        try:
            check(folder)
        except (DualformError, OSError) as error:
            yield Row(folder, DAMAGED, _sentence(error))


def _file(path: Path) -> Row:
    """A file that a manifest beside it lists, or a state."""
    from dualform.core.errors import DualformError
    from dualform.models.saving.state import verify_state
    from dualform.models.saving.verify import examine, manifest_of

    try:
        if path.name in (manifest_of(path.parent) or {}):
            (wrong,) = (wrong for found, wrong in examine(path.parent, digests=True) if found.name == path.name)
        else:
            if not verify_state(path):
                return Row(path, UNKNOWN, "a state saved by an older version")
            wrong = ""
    except DualformError as error:
        wrong = _sentence(error)
    return Row(path, DAMAGED, wrong) if wrong else Row(path, OK, f"{path.stat().st_size:,} bytes")


def _check_model(folder: Path) -> None:
    from dualform.models.saving.described import read_config
    from dualform.models.saving.files import TOKENIZER_FILE, current
    from dualform.models.saving.model import check_tensors
    from dualform.models.tokenizer import load_tokenizer

    check_tensors(folder)
    if current(folder, TOKENIZER_FILE).exists():
        load_tokenizer(folder, read_config(folder).vocab_size)


def _check_checkpoint(folder: Path) -> None:
    from dualform.train.checkpoint import read_moments, read_position

    read_position(folder)
    read_moments(folder)


def _check_data(folder: Path) -> None:
    from dualform.train.prepared import check_numbers, read_about

    check_numbers(folder, read_about(folder))


def _sentence(error: Exception) -> str:
    """The first line of an error: the hint speaks of loading."""
    return str(error).splitlines()[0]
