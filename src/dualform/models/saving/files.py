"""Files that are replaced all together or not at all.

The files of a saved model belong together, and no system call replaces two files at once. So the new ones are
written to a hidden folder beside their places, ``.incoming``, and synced to the disk. Renaming that folder to
``.committed`` is the one atomic instant: before it the old files count, after it the new ones. Then the files move
to their places, and the hidden folder is gone. Where a kill leaves the moving unfinished, :func:`current` looks into
``.committed`` first, and the next save finishes the move.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from dualform.core.errors import CheckpointError

CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE = "config.json", "model.safetensors", "tokenizer.json"  # of a model
_INCOMING, _COMMITTED = ".incoming", ".committed"


@contextmanager
def replacing(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Files written to the folder this gives replace those of the same name in ``folder``, all at once.

    Other files of ``folder`` stay. One process writes to a folder at a time; only files, no folders, are written.
    After a full disk, an exception inside the block or a kill, :func:`current` finds either all the old files or
    all the new ones.

    Raises:
        CheckpointError: when the disk refuses.
    """
    folder = Path(folder)
    incoming, committed = folder / _INCOMING, folder / _COMMITTED
    saved = False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _move_to_places(folder)
        shutil.rmtree(incoming, ignore_errors=True)
        incoming.mkdir()
        yield incoming
        for path in [*incoming.iterdir(), incoming]:
            _sync(path)
        os.replace(incoming, committed)
        saved = True
        _sync(folder)
        _move_to_places(folder)
    except (OSError, SafetensorError) as error:
        if saved:
            what, hint = "saved, but not all files moved to their places", "it loads as it is; save again to finish"
        else:
            what, hint = "cannot save", "free some space or choose another folder; what was saved there still loads"
        raise CheckpointError(f"{folder}: {what}: {_reason(error)}", hint=hint) from error
    finally:
        shutil.rmtree(incoming, ignore_errors=True)


@contextmanager
def replacing_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The file written to the path this gives replaces ``path`` at once, or not at all.

    Raises:
        CheckpointError: when the disk refuses.
    """
    path = Path(path)
    incoming = path.with_name(f".{path.name}{_INCOMING}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield incoming
        _sync(incoming)
        os.replace(incoming, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        hint = "free some space or choose another place; a file saved there before is unchanged"
        raise CheckpointError(f"{path}: cannot save: {_reason(error)}", hint=hint) from error
    finally:
        with suppress(OSError):
            incoming.unlink()


def current(folder: str | os.PathLike[str], name: str) -> Path:
    """Where the file called ``name`` of a folder written by :func:`replacing` is to be read; it may not exist."""
    committed = Path(folder) / _COMMITTED / name
    return committed if committed.exists() else Path(folder) / name


def _move_to_places(folder: Path) -> None:
    committed = folder / _COMMITTED
    if committed.is_dir():
        for path in committed.iterdir():
            os.replace(path, folder / path.name)
        _sync(folder)
        committed.rmdir()


def _sync(path: Path) -> None:
    folder = path.is_dir()
    if folder and os.name == "nt":
        return  # Windows opens no folders, and its renames reach the disk by themselves
    handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
