"""``manifest.json``: the files of a folder that were saved together, the size of each and its digest.

    {"format": 1, "digest": "xxh3-128", "files": {"model.safetensors": {"bytes": 5120, "digest": "0f3a..."}}}

It is written with them and takes its place in the same instant. Files that it does not list are none of its business.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from dualform.core.errors import CheckpointError, DualformError
from dualform.core.json_file import entry, read_table, to_json
from dualform.models.saving.digest import ALGORITHM, file_digest

MANIFEST_FILE = "manifest.json"
FORMAT = 1
_LENGTH = 32  # hexadecimal digits of a digest


class Entry(NamedTuple):
    """One file: its size in bytes, and the digest of its content."""

    bytes: int
    digest: str


def entries_of(folder: Path) -> dict[str, Entry]:
    """The files of a folder as they are now, read back; without folders inside and without a manifest.

    Raises:
        OSError: from the operating system.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != MANIFEST_FILE)
    return {path.name: Entry(path.stat().st_size, file_digest(path)) for path in files}


def write_manifest(folder: Path, entries: Mapping[str, Entry]) -> None:
    """Write the manifest of a folder that is not in its place yet.

    Raises:
        OSError: from the operating system.
    """
    files = {name: entries[name]._asdict() for name in sorted(entries)}
    about = {"format": FORMAT, "digest": ALGORITHM, "files": files}
    (folder / MANIFEST_FILE).write_text(to_json(about), encoding="utf-8")


def read_manifest(path: str | os.PathLike[str], *, error: type[DualformError] = CheckpointError) -> dict[str, Entry]:
    """What a manifest lists, by the name of the file.

    Raises:
        DualformError: for a file that cannot be read or is no manifest; names it.
    """
    hint = "it is damaged; copy the folder again, or delete this file to do without sizes and digests"
    about = read_table(path, error=error, hint=hint)
    for name, want in (("format", FORMAT), ("digest", ALGORITHM)):
        if (found := entry(about, name, type(want), path, error=error)) != want:
            raise error(f"{path}: {name} is {found!r}, expected {want!r}", hint="upgrade dualform, or " + hint)
    entries: dict[str, Entry] = {}
    for name, given in entry(about, "files", dict, path, error=error).items():
        where = f"{path}, {name!r}"
        if name in ("", ".", "..") or Path(name).name != name or "\\" in name or "\0" in name:
            raise error(f"{where}: not the name of a file in this folder", hint=hint)
        if not isinstance(given, dict):
            raise error(f"{where}: is {given!r}, expected bytes and digest", hint=hint)
        found = Entry(*(entry(given, key, kind, where, error=error) for key, kind in Entry.__annotations__.items()))
        if found.bytes < 0 or len(found.digest) != _LENGTH or set(found.digest) - set("0123456789abcdef"):
            raise error(f"{where}: {found.bytes} bytes, digest {found.digest[:40]!r}, expected a size and "
                        f"{_LENGTH} hexadecimal digits", hint=hint)  # fmt: skip
        entries[name] = found
    return entries
