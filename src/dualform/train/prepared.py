"""The folder of prepared tokens: what is in it, and whether it is still what was written.

data/about.json       where the tokens come from, and the counts of documents, bytes and tokens
     train.ids        tokens end to end; held_out.ids likewise
     train.starts     where each document begins, int64; held_out.starts likewise
     held_out.nbytes  bytes of text that each token stands for, uint32
     manifest.json    sizes and digests of these
     .verified        which files were read and compared, as they were then
"""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from dualform.core.errors import CheckpointError, DataError
from dualform.core.json_file import entry, read_table
from dualform.models.saving.files import replacing_file
from dualform.models.saving.manifest import MANIFEST_FILE
from dualform.models.saving.verify import check_files
from dualform.train.commands import elsewhere
from dualform.train.mapped import Mapped

ABOUT_FILE = "about.json"
PARTS = ("train", "held_out")
_VERIFIED_FILE = ".verified"
_DTYPES = ("uint8", "uint16", "uint32", "int8", "int16", "int32")  # those with a sign for conversations
_COUNTS = ("documents", "bytes", "tokens")
_NAMES = (ABOUT_FILE, "train.ids", "held_out.ids", "train.starts", "held_out.starts", "held_out.nbytes", MANIFEST_FILE)
_HINT = "copy the folder again, or start a new run in another folder"
_TICK = 2 * 10**9  # nanoseconds in which two writes may get the same time, on the coarsest of file systems
_SPAN = 2**22  # tokens that are looked at together


def read_about(folder: Path) -> dict[str, Any]:
    """What ``about.json`` holds, with every key and of the right kind.

    Raises:
        DataError: names the file, and the key that is missing or wrong.
    """
    path = folder / ABOUT_FILE
    if not path.is_file():
        raise DataError(f"{folder}: no prepared data: no {ABOUT_FILE}", hint="start a new run in another folder")
    about = read_table(path, error=DataError, hint=_HINT)
    for name, kind in (
        ("source", dict),
        ("dtype", str),
        ("skipped", int),
        ("gzip", float | None),
        ("xz", float | None),
    ):
        entry(about, name, kind, path, error=DataError)
    if about["dtype"] not in _DTYPES:
        raise DataError(f"{path}: dtype is {about['dtype'][:40]!r}, expected {', '.join(_DTYPES)}", hint=_HINT)
    for part in PARTS:
        counts = entry(about, part, dict, path, error=DataError)
        for name in _COUNTS:
            if not 1 <= entry(counts, name, int, f"{path}, {part}", error=DataError) < 2**62:
                raise DataError(f"{path}: {part}.{name} is {counts[name]}, expected at least 1", hint=_HINT)
        if _signed(about) and not 1 <= (learned := _learned(counts, path, part)) <= counts["tokens"]:
            expected = f"expected 1 to {part}.tokens, {counts['tokens']}"
            raise DataError(f"{path}: {part}.learned is {learned}, {expected}", hint=_HINT)
    for name, least in (("skipped", 0), ("gzip", 0), ("xz", 0)):
        if about[name] is not None and about[name] < least:
            raise DataError(f"{path}: {name} is {about[name]}, expected {least} or more", hint=_HINT)
    return about


def _signed(about: dict[str, Any]) -> bool:
    """Whether tokens have a sign: of conversations, in which one that is only read stands as ``~token``."""
    return about["dtype"].startswith("int")


def _learned(counts: dict[str, Any], path: Path, part: str) -> int:
    return entry(counts, "learned", int, f"{path}, {part}", error=DataError)


def open_arrays(folder: Path, about: dict[str, Any], *, starts: bool = True) -> dict[str, Mapped]:
    """The arrays of a folder by the names of their files, mapped, each as long as ``about`` says.

    Args:
        folder: written by :func:`dualform.train.data.prepare`.
        about: from :func:`read_about`.
        starts: whether to open where documents begin, and see that they rise from 0 and lie inside the tokens.

    Raises:
        DataError: for a file that is missing or of another size; names it.
    """
    found: dict[str, Mapped] = {}
    for name, (dtype, count) in _layout(about, starts).items():
        path, want = folder / name, count * np.dtype(dtype).itemsize
        try:
            if (size := path.stat().st_size) != want:
                raise DataError(
                    f"{path}: {size:,} bytes, but {ABOUT_FILE} speaks of {want:,}: it was cut short or changed",
                    hint=_HINT,
                )
            found[name] = Mapped.open(path, dtype)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}", hint=_HINT) from error
    for part in PARTS if starts else ():
        begins, tokens = found[f"{part}.starts"], about[part]["tokens"]
        if begins[0] != 0 or begins[-1] > tokens or bool((np.diff(begins) < 0).any()):
            raise DataError(f"{folder / part}.starts: not places that rise from 0 to {tokens}", hint=_HINT)
    return found


def check_numbers(folder: Path, about: dict[str, Any], vocab: int | None = None) -> None:
    """Read the arrays, and compare sizes, places, token ids and bytes of text with what they index or sum to.

    Args:
        folder: written by :func:`dualform.train.data.prepare`.
        about: from :func:`read_about`.
        vocab: the tokens that there are; None where that is not known.

    Raises:
        DataError: names the first file that is damaged.
    """
    arrays = open_arrays(folder, about, starts=all((folder / f"{part}.starts").exists() for part in PARTS))
    for part in PARTS:
        ids = arrays[f"{part}.ids"]
        spans = [ids[at : at + _SPAN] for at in range(0, len(ids), _SPAN)]
        if vocab is not None and (largest := max(_largest(span) for span in spans)) >= vocab:
            raise DataError(f"{folder / part}.ids: token {largest}; the vocabulary is 0 to {vocab - 1}", hint=_HINT)
        learned = sum(int((span >= 0).sum()) for span in spans) if _signed(about) else 0
        if _signed(about) and learned != about[part]["learned"]:
            raise DataError(
                f"{folder / part}.ids: {learned:,} tokens are learned, but {ABOUT_FILE} speaks of "
                f"{about[part]['learned']:,}",
                hint=_HINT,
            )
    text, said = int(arrays["held_out.nbytes"].sum(dtype=np.int64)), about["held_out"]["bytes"]
    if text != said:
        raise DataError(f"{folder / 'held_out.nbytes'}: sums to {text} bytes, but {said} were held out", hint=_HINT)


def _largest(ids: np.ndarray) -> int:
    """The largest token; one that is only read stands as ``~token``."""
    return max(int(ids.max()), int(~ids.min()) if ids.dtype.kind == "i" else 0)


def verify_once(folder: Path, about: dict[str, Any], vocab: int) -> None:
    """Compare digests with the manifest, if there is one, then :func:`check_numbers`.

    That is done once, and again after any file was written to.

    Raises:
        DataError: names the first file that is damaged.
    """
    seen, newest = _stamp(folder, vocab)
    path = folder / _VERIFIED_FILE
    with suppress(OSError, ValueError):
        if path.read_text(encoding="utf-8") == seen and path.stat().st_mtime_ns - newest > _TICK:
            return
    check_files(folder, digests=True, error=DataError)
    check_numbers(folder, about, vocab)
    with suppress(CheckpointError), replacing_file(path) as new:  # where that cannot be noted, it is done each time
        new.write_text(seen, encoding="utf-8")


def clear(folder: Path) -> None:
    """Remove prepared data, and nothing else.

    Raises:
        DataError: for a folder that holds something else.
        OSError: from the operating system.
    """
    if not os.path.lexists(folder):
        return
    inside = sorted(os.listdir(folder)) if folder.is_dir() and not folder.is_symlink() else [folder.name]
    if strange := [name for name in inside if name not in (*_NAMES, _VERIFIED_FILE)]:
        hint = f"choose another folder for the run: {elsewhere(folder.parent)}"
        raise DataError(f"{folder}: has to hold the run's tokens, but holds {strange[0]!r}, not of a run", hint=hint)
    shutil.rmtree(folder)


def _layout(about: dict[str, Any], starts: bool) -> dict[str, tuple[Any, int]]:
    """The dtype and the length of each array."""
    layout: dict[str, tuple[Any, int]] = {f"{part}.ids": (about["dtype"], about[part]["tokens"]) for part in PARTS}
    layout["held_out.nbytes"] = np.uint32, about["held_out"]["tokens"]
    if starts:
        layout |= {f"{part}.starts": (np.int64, about[part]["documents"]) for part in PARTS}
    return layout


def _stamp(folder: Path, vocab: int) -> tuple[str, int]:
    """Sizes and times of the files, and the latest time: a write changes them, and a copy of the folder has others."""
    files: dict[str, list[int]] = {}
    for name in _NAMES:
        with suppress(OSError):
            about = (folder / name).stat()
            files[name] = [about.st_size, about.st_mtime_ns, about.st_ctime_ns]
    return json.dumps({"vocabulary": vocab, "files": files}), max(
        (max(times[1:]) for times in files.values()), default=0
    )
