"""Text to tokens, and tokens to text, also one token at a time without ever cutting a character.

Training and generation share one rule. ``encode`` gives the tokens of a text and nothing else: the name of a special
token is text. A document is opened by ``begin``, the tokens that the tokenizer itself puts before a text, such as
``<s>``: training puts them before every document, after its separator, and ``dualform generate`` before the prompt that
begins a session. Tokens that the tokenizer would put after a text, such as ``</s>``, are never added, because the text
goes on.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import tokenizers

from dualform.core.errors import ArgumentError, CheckpointError
from dualform.core.json_file import read_text
from dualform.models.careful import AGAIN, carefully
from dualform.models.gguf.file import SUFFIX, read_header
from dualform.models.gguf.vocabulary import vocabulary
from dualform.models.saving.files import TOKENIZER_FILE, current
from dualform.models.special_tokens import opening, text_only, unlimited
from dualform.models.text_bytes import ByteStream, surrogate, utf8
from dualform.models.world_tokenizer import VOCABULARY_FILE, WorldTokenizer

T = TypeVar("T")
_REPLACEMENT = "\ufffd"
_WINDOW = 16  # tokens that a stream keeps as context for the next one
_MOST = 2**24  # tokens of a vocabulary; the largest have 2**20
_LARGEST = 2**28  # bytes of a tokenizer.json; those of the largest vocabularies have 2**25


@runtime_checkable
class TextStream(Protocol):
    """Takes one token at a time, and gives text as soon as it is certain."""

    def push(self, token: int) -> str:
        """The text that has become certain with ``token``; empty in the middle of a character."""
        ...

    def flush(self) -> str:
        """The rest of the text: an unfinished character as U+FFFD. Afterwards the stream is as new."""
        ...


@runtime_checkable
class Tokenizer(Protocol):
    """What training and generation need of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """The largest token plus one."""
        ...

    @property
    def begin(self) -> Sequence[int]:
        """The tokens that open a document; empty where the tokenizer has none."""
        ...

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The tokens of a text alone, without ``begin``.

        Args:
            text: what to encode.
            special: whether the names of special tokens in the text stand for those tokens. Only for a text that
                nobody else has written.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens. Bytes that are not UTF-8 become U+FFFD, and special tokens are left out."""
        ...

    def stream(self) -> TextStream:
        """A decoder of one token at a time; its pieces join to the text that :meth:`decode` gives."""
        ...

    def to_json(self) -> str | None:
        """The content of ``tokenizer.json``, or None for a tokenizer that needs no file."""
        ...


class ByteTokenizer:
    """Each byte of UTF-8 is a token. There are no special tokens."""

    vocab_size = 256
    begin: Sequence[int] = ()

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The bytes of a text.

        Bytes that are not UTF-8, which Python keeps as surrogates in arguments and file names, come out as they were.

        Raises:
            ArgumentError: for any other lone surrogate, which is not text.
        """
        return list(utf8(text))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of bytes; those that are not UTF-8 become U+FFFD."""
        return _bytes(ids).decode("utf-8", "replace")

    def stream(self) -> TextStream:
        """A decoder of one byte at a time."""
        return ByteStream(_bytes)

    def to_json(self) -> str | None:
        """None: a saved model with 256 tokens and without ``tokenizer.json`` gets this tokenizer."""
        return None


class SubwordTokenizer:
    """A tokenizer of the ``tokenizers`` library: BPE, WordPiece, Unigram or word level.

    Truncation and padding, which a ``tokenizer.json`` may ask for, are left aside: every text is encoded whole.

    Args:
        tokenizer: not to be changed afterwards.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._tokenizer = tokenizer

    @classmethod
    def from_file(cls, path: str | Path) -> "SubwordTokenizer":
        """Read a ``tokenizer.json``.

        Raises:
            CheckpointError: when it is missing, or does not describe a tokenizer that works.
        """
        try:
            text = read_text(path, _LARGEST)
        except FileNotFoundError as error:
            raise CheckpointError(f"{path}: no such file") from error
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: not a tokenizer: {error}", hint=AGAIN) from error
        return cls.from_json(text, str(path))

    @classmethod
    def from_json(cls, text: str, where: str) -> "SubwordTokenizer":
        """The tokenizer that the content of a ``tokenizer.json`` describes.

        Args:
            text: the content.
            where: what errors begin with.

        Raises:
            CheckpointError: where it does not describe a tokenizer that works.
        """

        def tried() -> SubwordTokenizer:
            made = cls(tokenizers.Tokenizer.from_str(text))
            if made.vocab_size > _MOST:  # the library would count up to it
                raise ValueError(f"a token has the number {made.vocab_size - 1:,}, expected below {_MOST:,}")
            made._tokenizer.decode(made._text.encode("").ids)  # some faults show only in use
            return made

        return carefully(tried, f"{where}: not a tokenizer", CheckpointError)

    @property
    def vocab_size(self) -> int:
        """The largest token plus one, added tokens included."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def begin(self) -> Sequence[int]:
        """The tokens that the tokenizer puts before a text, such as ``<s>``."""
        return carefully(lambda: opening(self._text))

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The tokens of a text.

        Args:
            text: what to encode.
            special: whether the names of special tokens in the text stand for those tokens.

        Raises:
            ArgumentError: for a lone surrogate, which is not text, or a tokenizer that does not work.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise surrogate(error) from error
        return carefully(lambda: (self._names if special else self._text).encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        return carefully(lambda: self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def stream(self) -> TextStream:
        """A decoder of one token at a time; the memory that it needs does not grow."""
        return _SubwordStream(self.decode)

    def to_json(self) -> str | None:
        """The content of ``tokenizer.json``."""
        return self._tokenizer.to_str(pretty=True)

    @cached_property
    def _text(self) -> tokenizers.Tokenizer:
        return text_only(self._tokenizer)

    @cached_property
    def _names(self) -> tokenizers.Tokenizer:
        return unlimited(tokenizers.Tokenizer.from_str(self._tokenizer.to_str()))


def read_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a file: a ``tokenizer.json``, or the vocabulary of RWKV's World models, a ``.txt``.

    Raises:
        CheckpointError: where it is missing, or describes no tokenizer.
    """
    path = Path(path)
    if path.suffix == ".txt":
        return WorldTokenizer.from_file(path)
    return WorldTokenizer.from_json(path) or SubwordTokenizer.from_file(path)


def load_tokenizer(folder: str | Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a saved model: its ``tokenizer.json``, or bytes where there is none and 256 tokens.

    A file of GGUF has its own, unless it is of a kind that is not known: then it is the ``tokenizer.json`` beside it.
    That of another file of weights is the vocabulary of RWKV's World models beside it.

    Raises:
        CheckpointError: when neither fits a model of ``vocab_size`` tokens.
    """
    file, within = Path(folder).is_file(), Path(folder).suffix == SUFFIX
    path = current(folder, TOKENIZER_FILE)
    if file:
        path = Path(folder).with_name(TOKENIZER_FILE if within else VOCABULARY_FILE)
    tokenizer = _within(Path(folder), path) if file and within else None
    if tokenizer is None and path.exists():
        tokenizer = read_tokenizer(path)
    if tokenizer is not None:
        if tokenizer.vocab_size > vocab_size:
            raise CheckpointError(f"{path} has {tokenizer.vocab_size} tokens, but the model only {vocab_size}")
        return tokenizer
    if vocab_size != ByteTokenizer.vocab_size:
        raise CheckpointError(
            f"{folder}: no {path.name}{' beside it' if file else ''}, and a vocabulary of {vocab_size} is not bytes",
            hint=f"put the model's {path.name} beside its weights",
        )
    return ByteTokenizer()


def _within(file: Path, beside: Path) -> Tokenizer | None:
    """The tokenizer in a file of GGUF; None where it has none, or none that is known while there is one beside it."""
    try:
        found = vocabulary(read_header(file), f"{file}: ")
        if found is None:
            return None
        return WorldTokenizer.from_text(found, str(file)) or SubwordTokenizer.from_json(found, str(file))
    except CheckpointError:
        if beside.exists():
            return None
        raise


class _SubwordStream:
    """Decodes the last few tokens again for every new one, because the text of a token depends on its neighbours.

    Where the text ends in U+FFFD, up to three more bytes may complete a character, and the stream waits for them. If
    they do not, the bytes are no text, and the stream gives U+FFFD for them.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._ids: list[int] = []
        self._given = 0  # characters of their text that are out
        self._waits = 0

    def push(self, token: int) -> str:
        self._ids.append(token)
        text = self._decode(self._ids)
        held = len(text) - len(text.rstrip(_REPLACEMENT))
        self._waits = self._waits + 1 if held else 0
        if self._waits > 3:
            held = min(held, 3)
        piece = text[self._given : len(text) - held]
        self._given += len(piece)
        if len(self._ids) > (4 * _WINDOW if held else _WINDOW):
            self._forget(held)
        return piece

    def flush(self) -> str:
        rest = self._decode(self._ids)[self._given :]
        self._ids, self._given, self._waits = [], 0, 0
        return rest

    def _forget(self, held: int) -> None:
        """Keep half a window of tokens as context, from one with which a character begins."""
        for keep in range(_WINDOW // 2, _WINDOW // 2 + 4):
            text = self._decode(self._ids[-keep:])
            if _REPLACEMENT not in text or len(self._ids) > 4 * _WINDOW:
                self._ids, self._given = self._ids[-keep:], max(0, len(text) - held)
                return


def _bytes(ids: Sequence[int]) -> bytes:
    try:
        return bytes(ids)
    except ValueError as error:
        wrong = next(i for i in ids if not 0 <= i < 256)
        raise ArgumentError(f"decode: token {wrong} is not a byte, expected 0 to 255") from error
