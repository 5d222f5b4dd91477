"""Whether the files of a folder are those that were saved: against the manifest beside them."""

import os
from collections.abc import Iterator
from pathlib import Path

from dualform.core.errors import CheckpointError, DualformError
from dualform.models.saving.digest import file_digest
from dualform.models.saving.files import current
from dualform.models.saving.manifest import MANIFEST_FILE, Entry, read_manifest

Folder = str | os.PathLike[str]


def manifest_of(folder: Folder, *, error: type[DualformError] = CheckpointError) -> dict[str, Entry] | None:
    """The manifest of a folder; None where it has none, as what older versions or other programs wrote.

    Raises:
        DualformError: for one that is damaged; names it.
    """
    path = current(folder, MANIFEST_FILE)
    return read_manifest(path, error=error) if path.exists() else None


def examine(
    folder: Folder, *, digests: bool, error: type[DualformError] = CheckpointError
) -> Iterator[tuple[Path, str]]:
    """The files that a manifest lists, each with what is wrong with it; an empty text says that nothing is.

    Args:
        folder: with or without a manifest.
        digests: whether to read every file; if not, only sizes are compared.
        error: what is raised for a damaged manifest.
    """
    for name, entry in (manifest_of(folder, error=error) or {}).items():
        path = current(folder, name)
        yield path, _wrong(path, entry, digests)


def check_files(folder: Folder, *, digests: bool, error: type[DualformError] = CheckpointError, hint: str = "") -> None:
    """Compare the files of a folder with its manifest; without one there is nothing to compare.

    Raises:
        DualformError: names the first file that is missing, of another size or, with ``digests``, of other content.
    """
    for path, wrong in examine(folder, digests=digests, error=error):
        if wrong:
            usual = f"copy or save it again; if you changed it yourself, delete the {MANIFEST_FILE} beside it"
            raise error(f"{path}: {wrong}", hint=hint or usual)


def _wrong(path: Path, entry: Entry, digests: bool) -> str:
    try:
        size = path.stat().st_size
        if size != entry.bytes:
            return f"{size:,} bytes, but {entry.bytes:,} were saved: it was cut short or changed"
        if digests and (found := file_digest(path)) != entry.digest:
            return f"damaged: its digest is {found}, and {entry.digest} was saved"
    except FileNotFoundError:
        return f"missing, but listed in {MANIFEST_FILE}"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return ""
