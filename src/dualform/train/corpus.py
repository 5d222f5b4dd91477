"""Documents from files: text, JSON lines, whole folders, or the Python standard library; and which are held out."""

import hashlib
import heapq
import json
import os
import shlex
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dualform.core.errors import DataError
from dualform.core.json_file import kind_of
from dualform.core.options import brief
from dualform.models.chat import ASSISTANT
from dualform.train.recipe import STDLIB, Data

MESSAGES = "messages"  # the key of a conversation in a line of JSON
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

    In a folder, files that are not text are passed over and listed in ``skipped``, as are links that lead nowhere; a
    single such file is an error. Links to folders are followed, and no folder is read twice.

    ``cut`` is the name of the document whose end :func:`split` holds out, where it could not keep all of them whole.

    Raises:
        DataError: for a path that does not exist, a file that is not text, or a JSON line without its field.
    """

    data: Data
    skipped: list[str] = field(default_factory=list)
    cut: str = ""

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
            text = _bytes_of(path) if path == root or path.is_file() else None
            if text is None:
                self.skipped.append(name)
            elif (wrong := _not_text(text)) is None:
                yield from self._documents(path, name, text)
            elif path == root:
                raise DataError(f"{path}: not text: {wrong}", hint="give data.path UTF-8 text or JSON lines")
            else:
                self.skipped.append(name)

    def _documents(self, path: Path, name: str, text: bytes) -> Iterator[Document]:
        if self.data.chat and path.suffix not in _JSON_LINES:
            if str(path) == self.data.path:
                raise DataError(
                    f"{path}: not JSON lines, which data.chat reads", hint="name it .jsonl, if it holds them"
                )
            self.skipped.append(name)
        elif path.suffix in _JSON_LINES:
            for number, line in enumerate(text.splitlines(), 1):
                if line.strip() and (inside := self._text_of(line, f"{path}, line {number}")):
                    yield Document(f"{name}:{number}", inside)
        elif text:
            yield Document(name, text)

    def _text_of(self, line: bytes, where: str) -> bytes:
        wanted = self.data.text_field
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON that can be read: {error}") from error
        if self.data.chat:
            return _conversation(record, where)
        text = record.get(wanted) if isinstance(record, dict) else None
        if not isinstance(text, str):
            if isinstance(record, dict) and wanted in record:
                raise DataError(
                    f"{where}: {wanted!r} is {kind_of(text)}, expected a text",
                    hint="leave such lines out, or set data.text_field to another key",
                )
            has = f"has {', '.join(map(repr, record))}" if isinstance(record, dict) else f"is {type(record).__name__}"
            texts = [key for key, value in record.items() if isinstance(value, str)] if isinstance(record, dict) else []
            named = shlex.quote(texts[0]) if texts else "KEY"
            hint = f"say which key holds the text: --set data.text_field={named}"
            if isinstance(record, dict) and isinstance(record.get(MESSAGES), list):
                hint = "to train on the answers of conversations: --set data.chat=true"
            raise DataError(f"{where}: no text under {wanted!r}; it {has}", hint=hint)
        return text.encode("utf-8", "replace")


def _conversation(record: Any, where: str) -> bytes:
    """The messages of a JSON line, as the text of a document.

    Raises:
        DataError: for a line without messages or without an answer; says where.
    """
    hint = 'a line is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
    messages = record.get(MESSAGES) if isinstance(record, dict) else None
    if not isinstance(messages, list):
        keys = ", ".join(map(brief, record)) if isinstance(record, dict) else ""
        found = f"has {keys or 'no key'}" if isinstance(record, dict) else f"is {kind_of(record)}"
        raise DataError(f"{where}: no list of messages under {MESSAGES!r}; it {found}", hint=hint)
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise DataError(f"{where}: message {number} is {brief(message)}, expected a role and a content", hint=hint)
        if message["role"] == ASSISTANT and not message["content"]:
            raise DataError(f"{where}: message {number} is an empty answer", hint="leave such lines out")
    if not any(message["role"] == ASSISTANT for message in messages):
        raise DataError(f"{where}: no message of the role {ASSISTANT!r}, so there is nothing to learn", hint=hint)
    return json.dumps(messages).encode()


def split(corpus: Corpus) -> Iterator[tuple[Document, bool]]:
    """Documents, and whether each is held out.

    A document is held out when the SHA-256 of its name is a multiple of ``data.held_out``, until 4 MiB are. Documents
    differ in size and may be few, so that this may be far from the share of the text that ``data.held_out`` asks for:
    less than two thirds of it, or more than three halves. Then other whole documents are chosen, in the order of their
    hashes, or the one whose size is nearest to that share. Where no whole documents come near it, and so in a corpus of
    one document, the end of the largest is held out; ``corpus.cut`` then has its name. Conversations are never cut: of
    them the smallest is held out.

    Raises:
        DataError: when there is no text, or one conversation alone.
    """
    corpus.cut, sizes = "", _Sizes()
    chosen = _choose(corpus, sizes)
    if chosen is None and corpus.data.chat:
        if sizes.documents == 1:
            what = f"data.path {corpus.data.path!r} holds one conversation, so that none can be held out"
            raise DataError(what, hint="give it two or more")
        chosen = {sizes.smallest[1]: sizes.smallest[0]}
    if chosen is not None:
        for document in corpus:
            yield document, document.name in chosen
        return
    size, corpus.cut = sizes.largest
    for document in corpus:
        if document.name == corpus.cut:
            head, tail = _cut(document, min(sizes.share(corpus.data.held_out), (size + 1) // 2))
            yield head, False
            yield tail, True
        else:
            yield document, False


def _choose(corpus: Corpus, sizes: "_Sizes") -> dict[str, int] | None:
    """The documents to hold out, names and bytes; None where whole ones are not near the share. Counts the sizes."""
    every, held, size = corpus.data.held_out, dict[str, int](), 0
    for document in sizes.counting(corpus):
        if _hash(document.name) % every == 0 and size + len(document.text) <= HELD_OUT_BYTES:
            held[document.name] = len(document.text)
            size += len(document.text)
    if not sizes.documents:
        passed = f"; passed over {len(corpus.skipped)} files that are not text" if corpus.skipped else ""
        raise DataError(f"data.path {corpus.data.path!r} holds no text{passed}", hint="give it a file with text")
    if sizes.are_fair(held, every):
        return held
    share = sizes.share(every)
    return next((some for some in _others(corpus, share, sizes.most(share)) if sizes.are_fair(some, every)), None)


@dataclass
class _Sizes:
    """How many documents there are, their bytes, and ``(bytes, name)`` of the largest and of the smallest."""

    documents: int = 0
    bytes: int = 0
    largest: tuple[int, str] = (0, "")
    smallest: tuple[int, str] = (2**63, "")

    def counting(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The documents as they come, each counted."""
        for document in documents:
            mine = len(document.text), document.name
            self.documents, self.bytes = self.documents + 1, self.bytes + mine[0]
            self.largest, self.smallest = max(self.largest, mine), min(self.smallest, mine)
            yield document

    def share(self, every: int) -> int:
        """The bytes to hold out: one in ``every``, and no more than the limit."""
        return min(self.bytes - self.bytes * (every - 1) // every, HELD_OUT_BYTES)

    def most(self, share: int) -> int:
        """The bytes that may be held out: three halves of the share, within the limit, and never all of the text."""
        return min(share * 3 // 2, HELD_OUT_BYTES, self.bytes - 1)

    def are_fair(self, chosen: dict[str, int], every: int) -> bool:
        """Whether these documents are near the share to hold out: from two thirds of it to three halves."""
        size, share = sum(chosen.values()), self.share(every)
        return size > 0 and 2 * share <= 3 * size and size <= self.most(share)


def _others(corpus: Corpus, share: int, most: int) -> tuple[dict[str, int], dict[str, int]]:
    """Two choices of documents of at most ``most`` bytes in all, names and bytes.

    Those whose hashes come first, without those that no longer fit, until they reach the share; and the one document
    whose size is nearest to the share. One of the two has two thirds of the share wherever any choice has, unless the
    limit of 4 MiB stands in the way.
    """
    heap, size, nearest = list[tuple[int, str, int]](), 0, dict[str, int]()  # the last hash on top
    for document in corpus:
        name, own = document.name, len(document.text)
        if own > most:
            continue
        if not nearest or abs(own - share) < abs(sum(nearest.values()) - share):
            nearest = {name: own}
        heapq.heappush(heap, (-_hash(name), name, own))
        size += own
        while size - heap[0][2] >= 2 * share:
            size -= heapq.heappop(heap)[2]
    first, size = dict[str, int](), 0
    for _, name, own in sorted(heap, reverse=True):
        if size < share and size + own <= most:
            first[name] = own
            size += own
    return first, nearest


def _cut(document: Document, size: int) -> tuple[Document, Document]:
    """A document without its end, some ``size`` bytes, and that end: whole lines, where those come near that size."""
    name, text = document
    cut = len(text) - size
    ends = [text.rfind(b"\n", 0, cut) + 1, text.find(b"\n", max(0, cut - 1), -1) + 1]
    line = min((end for end in ends if end and 3 * abs(end - cut) <= size), key=lambda end: abs(end - cut), default=0)
    while not line and text[cut : cut + 1] and text[cut] & 0xC0 == 0x80:
        cut -= 1  # never inside a character
    cut = line or cut
    return Document(name, text[:cut]), Document(f"{name}, its end", text[cut:])


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
    """The files below a folder, and links that lead nowhere, sorted; not those with a dot before a name.

    A folder is read once, under its own path if that is below ``root``, and else through the first link to it.
    """
    found, links, seen = list[Path](), [root], set[tuple[int, int]]()
    while links:
        top = links.pop(0)
        for at, folders, names in os.walk(top, onerror=_refuse):
            about, inside = os.stat(at), sorted(Path(at, name) for name in folders if not name.startswith("."))
            if (about.st_dev, about.st_ino) in seen:
                folders.clear()
                continue
            seen.add((about.st_dev, about.st_ino))
            links += [path for path in inside if path.is_symlink()]
            folders[:] = [path.name for path in inside if not path.is_symlink()]
            found += [Path(at, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error


def _is_stdlib(path: Path) -> bool:
    return path.suffix == ".py" and not any(part in _NOT_STDLIB or part.startswith(_GENERATED) for part in path.parts)


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest(), "big")
