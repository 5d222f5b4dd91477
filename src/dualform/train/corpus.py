"""Documents from files: text, JSON lines, whole folders, or the Python standard library; and which are held out."""

import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from dualform.core.errors import DataError
from dualform.train.recipe import STDLIB, Data

HELD_OUT_BYTES = 2**22  # held out at most: plenty for two decimals, and the rest is worth training on
_JSON_LINES = (".jsonl", ".ndjson")

# Tests, generated tables, and packages that not every supported Python has: 3.12 and 3.13 dropped some, and
# distributions ship others separately. What is left is nearly the same everywhere.
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
_NOT_STDLIB |= {"msilib", "lib2to3", "distutils", "idlelib", "tkinter", "turtledemo"}
_GENERATED = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize")


class Document(NamedTuple):
    """A name, unique in its corpus, and the UTF-8 bytes of a text."""

    name: str
    text: bytes


@dataclass
class Corpus:
    """The documents that a recipe names, read afresh at every iteration, in an order that is always the same.

    In a folder, files that are not text are passed over and listed in ``skipped``; a single such file is an error.

    Raises:
        DataError: for a path that does not exist, a file that is not text, or a JSON line without its field.
    """

    data: Data
    skipped: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Document]:
        self.skipped.clear()
        if self.data.path == STDLIB:
            root = Path(sysconfig.get_path("stdlib"))
            files = [path for path in _files(root) if _is_stdlib(path.relative_to(root))]
            if not files:
                raise DataError(f"{root} holds no Python source", hint="give data.path a file or folder of text")
        else:
            root = Path(self.data.path)
            if not root.exists():
                raise DataError(f"data.path {self.data.path!r} does not exist", hint="a file, a folder or 'stdlib'")
            files = _files(root) if root.is_dir() else [root]
        for path in files:
            name = path.relative_to(root).as_posix() if path != root else path.name
            text = _bytes_of(path)
            if (wrong := _not_text(text)) is None:
                yield from self._documents(path, name, text)
            elif path == root:
                raise DataError(f"{path}: not text: {wrong}", hint="give data.path UTF-8 text or JSON lines")
            else:
                self.skipped.append(name)

    def _documents(self, path: Path, name: str, text: bytes) -> Iterator[Document]:
        if path.suffix in _JSON_LINES:
            for number, line in enumerate(text.splitlines(), 1):
                if line.strip() and (inside := self._text_of(line, f"{path}, line {number}")):
                    yield Document(f"{name}:{number}", inside)
        elif text:
            yield Document(name, text)

    def _text_of(self, line: bytes, where: str) -> bytes:
        wanted = self.data.text_field
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: not JSON: {error}") from error
        text = record.get(wanted) if isinstance(record, dict) else None
        if not isinstance(text, str):
            has = f"has {', '.join(map(repr, record))}" if isinstance(record, dict) else f"is {type(record).__name__}"
            raise DataError(f"{where}: no text under {wanted!r}; it {has}", hint="set data.text_field")
        return text.encode("utf-8", "replace")


def split(corpus: Corpus) -> Iterator[tuple[Document, bool]]:
    """Documents, and whether each is held out.

    A document is held out when the SHA-256 of its name is a multiple of ``data.held_out``, until 4 MiB are; where
    that chooses none or all, the smallest document is. Of a corpus of one document, the last lines are held out.

    Raises:
        DataError: when there is no text.
    """
    every, held, size, count, smallest = corpus.data.held_out, set[str](), 0, 0, (sys.maxsize, "")
    for document in corpus:
        count += 1
        smallest = min(smallest, (len(document.text), document.name))
        if _hash(document.name) % every == 0 and size + len(document.text) <= HELD_OUT_BYTES:
            held.add(document.name)
            size += len(document.text)
    if count == 0:
        passed = f"; passed over {len(corpus.skipped)} files that are not text" if corpus.skipped else ""
        raise DataError(f"data.path {corpus.data.path!r} holds no text{passed}", hint="give it a file with text")
    if count == 1:
        (document,) = corpus
        cut = max(len(document.text) * (every - 1) // every, len(document.text) - HELD_OUT_BYTES)
        line = document.text.find(b"\n", cut, -1) + 1
        while not line and document.text[cut : cut + 1] and document.text[cut] & 0xC0 == 0x80:
            cut -= 1  # never inside a character
        cut = line or cut
        yield Document(document.name, document.text[:cut]), False
        yield Document(f"{document.name}, its end", document.text[cut:]), True
        return
    if not held or len(held) == count:
        held = {smallest[1]}
    for document in corpus:
        yield document, document.name in held


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _not_text(text: bytes) -> str | None:
    """Why these bytes are not text, or None."""
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"byte {error.start} is not UTF-8"
    return f"byte {text.index(0)} is zero" if b"\0" in text else None


def _files(root: Path) -> list[Path]:
    inside = (path for path in root.rglob("*") if not any(p.startswith(".") for p in path.relative_to(root).parts))
    return sorted(path for path in inside if path.is_file())


def _is_stdlib(path: Path) -> bool:
    return path.suffix == ".py" and not any(part in _NOT_STDLIB or part.startswith(_GENERATED) for part in path.parts)


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest(), "big")
