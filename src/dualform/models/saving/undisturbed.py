"""Reading what another process may be replacing: what was read is of one save, or it is read again.

A file that is open stays what it was when another one takes its name, so no single read is wrong. But a config, weights
and a tokenizer are several files, and a file is opened several times; between two of these a save may end.
"""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from dualform.core.errors import CheckpointError
from dualform.models.saving.files import COMMITTED

_KINDS = (".json", ".safetensors", ".bin", ".pth")  # of files that belong together in a folder
_PAUSES = (0.0, 0.02, 0.1, 0.3, 1.0)  # seconds before each try
Mark = dict[str, tuple[int, int, int, int]]
T = TypeVar("T")


def undisturbed(find: Callable[[], Path], read: Callable[[Path], T]) -> T:
    """What ``read`` gives of a file or a folder none of whose files was replaced meanwhile.

    Args:
        find: the file or folder. It is asked before each try: the newest checkpoint of a run may be another by then.
        read: of what ``find`` gave; called again, five times at most, where files were replaced while it read.

    Raises:
        CheckpointError: when files were replaced each time.
        Exception: what ``read`` raises of files that were not.
    """
    for pause in _PAUSES:
        time.sleep(pause)
        place = find()
        before = mark(place)
        try:
            found = read(place)
        except Exception:  # it may come of files that do not belong together
            if mark(place) == before:
                raise
            continue
        if mark(place) == before:
            return found
    raise CheckpointError(
        f"{find()}: another process replaced it each of the {len(_PAUSES)} times that it was read",
        hint="wait until that process has saved",
    )


def mark(place: Path) -> Mark:
    """What tells a file, or the files of a folder, from those of another save; by their paths."""
    committed, marks = place / COMMITTED, Mark()
    for folder in (committed, place):  # in this order, in which files move to their places
        with suppress(OSError), os.scandir(folder) as inside:
            for path in [folder / found.name for found in inside if found.name.endswith(_KINDS)]:
                _add(path, marks)
    if not place.is_dir():
        _add(place, marks)
    return marks


def _add(path: Path, marks: Mark) -> None:
    with suppress(OSError):
        there = path.stat()  # of what a link leads to
        marks[str(path)] = there.st_dev, there.st_ino, there.st_size, there.st_mtime_ns
