"""Tokens of a corpus on disk, and the windows that each step trains on.

The documents lie end to end in one flat array of the narrowest integer that holds the vocabulary, each after the
tokens of a separator. The array is mapped, not read, so a corpus may be larger than memory.

Which windows a step sees follows from the seed and the step alone. So a resumed run continues exactly, and several
processes see disjoint parts of what one process would see.
"""

import gzip
import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import numpy as np
import tokenizers
import torch
from torch import Tensor

from dualform.core.errors import DataError
from dualform.core.json_file import to_json
from dualform.models.careful import carefully
from dualform.models.chat import ChatTemplate
from dualform.models.saving.files import creating
from dualform.models.special_tokens import text_only
from dualform.models.tokenizer import Tokenizer
from dualform.models.world_tokenizer import WorldTokenizer
from dualform.train.chat import Encoded, conversations
from dualform.train.corpus import Corpus, Document, split
from dualform.train.mapped import Mapped
from dualform.train.prepared import ABOUT_FILE, clear, open_arrays, read_about, verify_once
from dualform.train.recipe import Data

try:
    import lzma
except ImportError:  # a Python that was compiled without it
    lzma = None

COMPARABLE = 2**14
"""Bytes of held-out text from which on compressors are a comparison: of less they write mostly headers."""
_BATCH = 256  # documents tokenised together
Encode = Callable[[Sequence[Document]], list[Encoded]]


@dataclass(frozen=True)
class Dataset:
    """The tokens of a run, mapped from its folder.

    ``nbytes`` are the bytes of text that each held-out token stands for, 0 for those of a separator. ``about`` has the
    counts of documents and bytes, and the bits per byte to which gzip and xz compress the held-out text alone, None
    where it has fewer than :data:`COMPARABLE` bytes. ``train_starts`` and ``held_out_starts`` are where each document
    begins with its separator.
    """

    train: np.ndarray  # uint8, uint16 or uint32; of conversations signed, with ~token for one that is only read
    held_out: np.ndarray
    nbytes: np.ndarray  # uint32
    about: dict[str, Any]
    train_starts: np.ndarray | None = None  # int64; read for packed runs alone
    held_out_starts: np.ndarray | None = None

    def windows(self, data: Data, seed: int, step: int, rank: int = 0, ranks: int = 1) -> Iterator[Tensor]:
        """This process's share of a step's windows, ``(B, length + 1)`` int64, in ``data.accumulate`` portions."""
        random = np.random.Generator(np.random.Philox(key=np.array([seed, step], np.uint64)))
        starts = random.integers(0, len(self.train) - data.length, data.batch)[rank::ranks]
        for some in np.split(starts, data.accumulate):
            yield torch.from_numpy(self.train[some[:, None] + np.arange(data.length + 1)].astype(np.int64))


def prepare(data: Data, tokenizer: Tokenizer, folder: Path, template: ChatTemplate | None = None) -> None:
    """Tokenise the corpus into a new folder, which appears only when it is complete.

    Prepared data that is there already is replaced. Conversations are written by the template.

    Raises:
        DataError: for a corpus that cannot be read, is empty, or is shorter than one window; for a folder that holds
            something else.
        CheckpointError: when the disk refuses.
    """
    clear(folder)
    with creating(folder) as new:
        _write(new, data, tokenizer, template)


@contextmanager
def whole_text(data: Data, tokenizer: Tokenizer, template: ChatTemplate | None = None) -> Iterator[Dataset]:
    """All of a corpus as the held-out part of a data set, in a temporary folder: for evaluation alone.

    Raises:
        DataError: for a corpus that cannot be read, or is empty.
    """
    corpus, (encode, before, dtype) = Corpus(data), _encoding(data, tokenizer, template)
    with TemporaryDirectory(prefix="dualform-") as name:
        folder = Path(name)
        with (folder / "ids").open("wb") as ids_file, (folder / "nbytes").open("wb") as nbytes_file:
            part = _Part(ids_file, dtype)
            for batch in _batches((document, True) for document in corpus):
                encoded = encode([document for document, _ in batch])
                for (_, _), (ids, nbytes) in zip(batch, encoded, strict=True):
                    part.add(np.concatenate([before, ids]), int(nbytes.sum()))
                    nbytes_file.write(np.concatenate([np.zeros(len(before)), nbytes]).astype(np.uint32).tobytes())
        if not part.bytes:
            raise DataError(f"data.path {data.path!r} holds no text", hint="give it a file with text")
        ids, nbytes = Mapped.open(folder / "ids", dtype), Mapped.open(folder / "nbytes", np.uint32)
        about = {"held_out": part.counts(), "skipped": len(corpus.skipped)}
        yield Dataset(ids[:0], ids, nbytes, about, None, np.array(part.starts, np.int64))


def open_dataset(data: Data, tokenizer: Tokenizer, folder: Path, template: ChatTemplate | None = None) -> Dataset:
    """Map what :func:`prepare` wrote.

    Sizes are compared every time. Digests are, and token ids with the vocabulary, when the folder is opened first and
    whenever a file of it was written to since.

    Raises:
        DataError: when it is missing, damaged, was made from another source, or is shorter than one window.
    """
    about = read_about(folder)
    for name, value in _source(data, tokenizer, template).items():
        if about["source"].get(name) != value:
            raise DataError(f"{folder} was made with {name} {about['source'].get(name)!r}, now it is {value!r}")
    arrays = open_arrays(folder, about, starts=data.packed)
    _check_length(data, about["train"]["tokens"])
    verify_once(folder, about, tokenizer.vocab_size)
    train, held_out, nbytes, *starts = arrays.values()
    return Dataset(train, held_out, nbytes, about, *starts)


def _write(folder: Path, data: Data, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
    """The files of :func:`prepare`."""
    corpus, (encode, before, dtype) = Corpus(data), _encoding(data, tokenizer, template)
    held, added = list[bytes](), list[np.ndarray]()
    with (folder / "train.ids").open("wb") as one, (folder / "held_out.ids").open("wb") as other:
        train, held_out = _Part(one, dtype), _Part(other, dtype)
        for batch in _batches(split(corpus)):
            encoded = encode([document for document, _ in batch])
            for (document, held_back), (ids, nbytes) in zip(batch, encoded, strict=True):
                (held_out if held_back else train).add(np.concatenate([before, ids]), int(nbytes.sum()))
                if held_back:
                    held.append(document.text)
                    added += [np.zeros(len(before)), nbytes]
    if not train.bytes:
        raise DataError(f"data.path {data.path!r} is too short: all of it is held out", hint="use more text")
    _check_length(data, train.tokens)
    text = b"".join(held)
    if not text:
        raise DataError(f"data.path {data.path!r} is too short to hold anything out", hint="use more text")
    np.concatenate(added).astype(np.uint32).tofile(folder / "held_out.nbytes")
    for name, part in (("train", train), ("held_out", held_out)):
        np.array(part.starts, np.int64).tofile(folder / f"{name}.starts")
    about = {
        "source": _source(data, tokenizer, template),
        "dtype": dtype.name,
        "train": train.counts(),
        "held_out": held_out.counts(),
        "skipped": len(corpus.skipped),
        "cut": corpus.cut,
        **_compressed(b"" if data.chat else text),
    }
    (folder / ABOUT_FILE).write_text(to_json(about), encoding="utf-8")


def _compressed(text: bytes) -> dict[str, float | None]:
    """Bits per byte of what compressors make of a text; None where there is no such, or the text is too short."""
    long = len(text) >= COMPARABLE
    return {
        "gzip": 8 * len(gzip.compress(text, 9)) / len(text) if long else None,
        "xz": 8 * len(lzma.compress(text, preset=9)) / len(text) if long and lzma else None,
    }


def _check_length(data: Data, tokens: int) -> None:
    if tokens <= data.length and not data.packed:
        raise DataError(
            f"data.path {data.path!r} gives {tokens} training tokens, fewer than one window of {data.length} + 1",
            hint=f"use more text, or shorter windows: --set data.length={max(1, tokens // 2)}",
        )


@dataclass
class _Part:
    """A flat file of tokens that grows by documents."""

    file: BinaryIO
    dtype: np.dtype
    bytes: int = 0
    tokens: int = 0
    learned: int = 0
    starts: "array[int]" = field(default_factory=lambda: array("q"))

    def add(self, ids: np.ndarray, size: int) -> None:
        """The tokens of a document, and the bytes that they stand for."""
        self.file.write(ids.astype(self.dtype).tobytes())
        self.starts.append(self.tokens)
        self.bytes += size
        self.tokens += len(ids)
        self.learned += int((ids >= 0).sum())

    def counts(self) -> dict[str, int]:
        learned = {"learned": self.learned} if self.dtype.kind == "i" else {}
        return {"documents": len(self.starts), "bytes": self.bytes, "tokens": self.tokens, **learned}


def _batches(documents: Iterable[tuple[Document, bool]]) -> Iterator[list[tuple[Document, bool]]]:
    rest = iter(documents)
    while batch := list(islice(rest, _BATCH)):
        yield batch


def _source(data: Data, tokenizer: Tokenizer, template: ChatTemplate | None) -> dict[str, Any]:
    """What the tokens depend on."""
    told = tokenizer.to_json()
    kind = "bytes" if told is None else hashlib.sha256(told.encode()).hexdigest()
    names = ("path", "text_field", "separator", "held_out")
    if template is not None:
        kind = f"{kind}, {hashlib.sha256(template.source.encode()).hexdigest()} of a chat template"
    return {**{f"data.{name}": getattr(data, name) for name in names}, "tokenizer": kind}


def _before(data: Data, tokenizer: Tokenizer) -> list[int]:
    """The tokens before each document: the separator, which may name special tokens, and those that open a document.

    A separator that ends in the latter already is enough.
    """
    separator, begin = tokenizer.encode(data.separator, special=True), list(tokenizer.begin)
    return separator if separator[len(separator) - len(begin) :] == begin else separator + begin


def _encoding(data: Data, tokenizer: Tokenizer, template: ChatTemplate | None) -> "tuple[Encode, np.ndarray, np.dtype]":
    """What makes tokens of documents, the tokens before each, and the dtype of all."""
    if data.chat:
        if template is None:
            raise DataError("data.chat is true, and no template was given", hint="that of the model's read_usage")
        return conversations(tokenizer, template), np.zeros(0, np.int64), np.min_scalar_type(-tokenizer.vocab_size)
    before = np.array(_before(data, tokenizer), np.uint32)
    return _encoder(tokenizer), before, np.min_scalar_type(tokenizer.vocab_size - 1)


def _encoder(tokenizer: Tokenizer) -> "Encode":
    """A function from documents to the tokens of each, with the bytes of text that each token stands for."""
    told = tokenizer.to_json()
    if told is None:
        return lambda texts: [(np.frombuffer(t.text, np.uint8), np.ones(len(t.text), np.uint32)) for t in texts]
    if isinstance(tokenizer, WorldTokenizer):
        return lambda texts: [_sized(tokenizer, tokenizer.encode_bytes(t.text)) for t in texts]
    raw = carefully(lambda: text_only(tokenizers.Tokenizer.from_str(told)), "data.tokenizer", DataError)

    def encode(texts: Sequence[Document]) -> list[Encoded]:
        decoded = [text.text.decode("utf-8") for text in texts]
        found = carefully(lambda: raw.encode_batch(decoded, add_special_tokens=False), "data.tokenizer", DataError)
        return [(np.array(e.ids, np.uint32), _added(t, e.offsets)) for t, e in zip(decoded, found, strict=True)]

    return encode


def _sized(tokenizer: WorldTokenizer, ids: list[int]) -> Encoded:
    return np.array(ids, np.uint32), np.array(tokenizer.sizes(ids), np.uint32)


def _added(text: str, offsets: list[tuple[int, int]]) -> np.ndarray:
    """Bytes up to the end of each token, less those up to the one before; the last token takes what is left.

    They sum to the bytes of the text, whatever the tokenizer drops or splits.
    """
    if not offsets:
        return np.zeros(0, np.uint32)
    upto = np.concatenate([[0], np.cumsum([len(c.encode("utf-8")) for c in text])])
    ends = upto[np.maximum.accumulate([end for _, end in offsets])]
    ends[-1] = upto[-1]
    return np.diff(ends, prepend=0)
