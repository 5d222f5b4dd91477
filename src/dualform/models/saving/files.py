"""Files that are replaced all together or not at all.

The files of a saved model belong together, and no system call replaces two files at once. So the new ones are
written to a hidden folder beside their places, read back for the manifest, and synced to the disk. Renaming that folder
to ``.committed`` is the one atomic instant: before it the old files count, after it the new ones. Then the files move
to their places, and the hidden folder is gone. Where a kill leaves the moving unfinished, :func:`current` looks into
``.committed`` first, and the next save finishes the move.
"""

import errno
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dualform.core.errors import CheckpointError
from dualform.models.saving.incoming import incoming, remove_stale
from dualform.models.saving.manifest import MANIFEST_FILE, Entry, entries_of, read_manifest, write_manifest

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE = "config.json", "model.safetensors", "tokenizer.json"  # of a model
GENERATION_FILE, CHAT_TEMPLATE_FILE = "generation_config.json", "chat_template.jinja"  # of how it is used
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
ADAPTER_CONFIG_FILE, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"  # PEFT's
COMMITTED = ".committed"
_THERE = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
_PATIENCE, _PAUSE = 60.0, 0.02  # seconds that a save waits for another process, and between two looks
_FULL = "free some space or choose another folder; what was saved there still loads"


@contextmanager
def replacing(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Files written to the folder this gives replace those of the same name in ``folder``, all at once.

    Other files of ``folder`` stay; only files, no folders, are written. A manifest lists them, with those of the
    manifest before that stay. Of several processes that write to a folder the last one counts.
    After a full disk, an exception inside the block or a kill, :func:`current` finds either all the old files or
    all the new ones.

    Raises:
        CheckpointError: when the disk refuses, or another process holds the folder for a minute.
    """
    folder = Path(folder)
    committed, target = folder / COMMITTED, folder / "all"
    saved = False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            _move_to_places(folder)
        remove_stale(target)
        shutil.rmtree(folder / ".incoming", ignore_errors=True)  # of a version that had one name for all
        with incoming(target) as new:
            new.mkdir()
            yield new
            entries = _finish(new)
            with _alone(folder):
                _move_to_places(folder)
                _list(new, {**_staying(folder), **entries})
                os.replace(new, committed)
                saved = True
                _sync(folder)
                _move_to_places(folder)
    except (OSError, SafetensorError) as error:
        what, hint = "cannot save", _FULL
        if saved:
            what, hint = "saved, but not all files moved to their places", "it loads as it is; save again to finish"
        raise CheckpointError(f"{folder}: {what}: {_reason(error)}", hint=hint) from error


@contextmanager
def creating(place: str | os.PathLike[str]) -> Iterator[Path]:
    """The folder this gives becomes ``place``, which appears only when it is complete, with a manifest of its files.

    Folders inside are left as they are.

    Raises:
        CheckpointError: when the disk refuses, or ``place`` is there already and not an empty folder.
    """
    place = Path(place)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(place)
        with incoming(place) as new:
            new.mkdir()
            try:
                yield new
            except CheckpointError as error:  # of a save inside, which names a folder that will be gone
                raise CheckpointError(str(error).replace(str(new), str(place))) from error
            _list(new, _finish(new))
            os.replace(new, place)
            _sync(place.parent)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno in _THERE:  # made by another process meanwhile, or of a file
            taken = place if place.exists() else place.parent
            raise CheckpointError(f"{taken}: is there already", hint="give a folder that is not there yet") from error
        raise CheckpointError(f"{place}: cannot save: {_reason(error)}", hint=_FULL) from error


@contextmanager
def replacing_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The file written to the path this gives replaces ``path`` at once, or not at all.

    Of several processes that write to ``path``, the last one counts.

    Raises:
        CheckpointError: when the disk refuses.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path)
        with incoming(path) as new:
            new.touch(exist_ok=False)
            mode = new.stat().st_mode
            yield new
            _permit(new, mode)
            _sync(new)
            os.replace(new, path)
            _sync(path.parent)
    except (OSError, SafetensorError) as error:
        hint = "free some space or choose another place; a file saved there before is unchanged"
        raise CheckpointError(f"{path}: cannot save: {_reason(error)}", hint=hint) from error


def current(folder: str | os.PathLike[str], name: str) -> Path:
    """Where the file called ``name`` of a folder written by :func:`replacing` is to be read; it may not exist."""
    committed = Path(folder) / COMMITTED / name
    return committed if committed.exists() else Path(folder) / name


def _finish(folder: Path) -> dict[str, Entry]:
    """Give new files the mode that the umask asks for and bring them to the disk; their sizes and digests."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.iterdir():
        if path.is_file():
            _permit(path, mode)
            _sync(path)
    return entries_of(folder)


def _list(folder: Path, entries: dict[str, Entry]) -> None:
    write_manifest(folder, entries)
    _sync(folder / MANIFEST_FILE)
    _sync(folder)


def _staying(folder: Path) -> dict[str, Entry]:
    """What the manifest lists that is there, of files that are still there; nothing where it is damaged."""
    try:
        listed = read_manifest(folder / MANIFEST_FILE)
    except CheckpointError:
        return {}
    return {name: entry for name, entry in listed.items() if (folder / name).is_file()}


def _permit(path: Path, mode: int) -> None:
    """Undo what safetensors does, whose files only their owner may read."""
    with suppress(OSError):  # a file system without modes
        path.chmod(mode & 0o777)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time moves the files of a folder. The lock is the kernel's, and ends with its process.

    Raises:
        CheckpointError: when another one holds it for longer than moving takes, such as one that was stopped.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(fcntl, handle, folder)
        yield
    finally:
        with suppress(OSError):  # closing is not enough: a process that was forked meanwhile holds the same lock
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def _lock(fcntl: Any, handle: int, folder: Path) -> None:
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= until:
                raise CheckpointError(
                    f"{folder}: cannot save: another process has held this folder for {_PATIENCE:g} seconds",
                    hint="end that process, which may have been stopped (lsof and fuser name it), and save again; or "
                    "choose another folder; what was saved there still loads",
                ) from None
            time.sleep(_PAUSE)
        except OSError:  # a file system without locks
            return


def _move_to_places(folder: Path) -> None:
    committed = folder / COMMITTED
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
