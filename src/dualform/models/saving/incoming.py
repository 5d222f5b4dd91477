"""Names for what is not complete: one for each save, so that no two processes write to the same.

Such a name tells the machine and the process that writes: ``.a.state.1f0c9b2e-4711-9d3a77c0.incoming``. What a process
left behind that was killed is removed by the next save to the same place; what another one is writing is not.
"""

import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash

_SUFFIX = ".incoming"
_LONGEST = 50  # characters of the target's name; file systems allow 255 bytes in all
_OLD = 24 * 3600.0  # seconds after which no save is still going on, whoever began it
_writing: set[str] = set()  # names in use by this process


@contextmanager
def incoming(place: Path) -> Iterator[Path]:
    """A path beside ``place`` that is this save's own, for a file or a folder; at the end it is gone."""
    owner = f"{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"
    path = place.with_name(f".{place.name[:_LONGEST]}.{owner}{_SUFFIX}")
    _writing.add(path.name)
    try:
        yield path
    finally:
        _writing.discard(path.name)
        _remove(path)


def remove_stale(place: Path, names: str = "") -> None:
    """Remove what saves to ``place`` left behind whose process has ended, or that are older than a day.

    Args:
        place: the target of the saves.
        names: a pattern that names further targets beside it.
    """
    targets = rf"{re.escape(place.name[:_LONGEST])}|{names or '(?!)'}"  # which may have groups of their own
    pattern = re.compile(rf"\.(?:{targets})(?:\.(?P<owner>.+))?{re.escape(_SUFFIX)}")
    with suppress(OSError), os.scandir(place.parent) as inside:
        for found in inside:
            if found.name.endswith(_SUFFIX) and (match := pattern.fullmatch(found.name)):
                owner = re.fullmatch(r"([0-9a-f]{8})-(\d{1,9})-[0-9a-f]{8}", match["owner"] or "")
                if match["owner"] is None or (owner and not _in_use(found, owner[1], int(owner[2]))):
                    _remove(Path(found.path))  # without an owner: of a version that had one name for all


def lives(process: object) -> bool:
    """Whether there is a process of this number on this machine; True where that cannot be asked."""
    if os.name == "nt" or not isinstance(process, int):
        return True  # on Windows there is no harmless signal to ask with
    try:
        os.kill(process, 0)
    except (OSError, OverflowError) as error:
        return isinstance(error, PermissionError)  # of another user
    return True


def _in_use(found: "os.DirEntry[str]", machine: str, process: int) -> bool:
    if found.name in _writing:
        return True
    try:
        recent = time.time() - found.stat(follow_symlinks=False).st_mtime < _OLD
    except OSError:
        return False  # gone
    if not recent or machine != _machine():
        return recent
    return process != os.getpid() and lives(process)


def _machine() -> str:
    return f"{xxhash.xxh32_intdigest(platform.node().encode()):08x}"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
