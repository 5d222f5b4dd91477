"""Text to tokens and back; streaming never emits half a character."""

import codecs
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import tokenizers

from dualform.core.errors import ArgumentError, CheckpointError
from dualform.models.saving.files import TOKENIZER_FILE, current

_REPLACEMENT = "\ufffd"
_WINDOW = 16  # tokens a stream keeps as context for the next one


@runtime_checkable
class TextStream(Protocol):
    """Tokens go in one at a time, the text that is certain comes out."""

    def push(self, token: int) -> str:
        """The text that ``token`` completes; empty in the middle of a character."""
        ...

    def flush(self) -> str:
        """What is left at the end: an unfinished character as U+FFFD. The stream is then as new."""
        ...


@runtime_checkable
class Tokenizer(Protocol):
    """What generation and training need of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token."""
        ...

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens; bytes that are no UTF-8 become U+FFFD."""
        ...

    def stream(self) -> TextStream:
        """A decoder of one token at a time; its pieces join to what :meth:`decode` gives."""
        ...

    def to_json(self) -> str | None:
        """The content of tokenizer.json, or None for a tokenizer that needs no file."""
        ...


class ByteTokenizer:
    """A token is a byte of UTF-8."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        """The bytes of a text.

        Undecodable bytes that Python carries as surrogates (in arguments and file names) pass unchanged.

        Raises:
            ArgumentError: for any other lone surrogate, which is not text.
        """
        try:
            return list(text.encode("utf-8", "surrogateescape"))
        except UnicodeEncodeError as error:
            raise ArgumentError(f"encode: character {error.start} of the text is a lone surrogate") from error

    def decode(self, ids: Sequence[int]) -> str:
        """The text of bytes; what is no UTF-8 becomes U+FFFD."""
        return _bytes(ids).decode("utf-8", "replace")

    def stream(self) -> TextStream:
        """A decoder of one byte at a time."""
        return _ByteStream()

    def to_json(self) -> str | None:
        """None: a model with 256 tokens and no tokenizer.json is read with this one."""
        return None


class SubwordTokenizer:
    """A tokenizer of the ``tokenizers`` library: BPE, WordPiece, Unigram, with its own special tokens."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._tokenizer = tokenizer

    @classmethod
    def from_file(cls, path: str | Path) -> "SubwordTokenizer":
        """Read a ``tokenizer.json``.

        Raises:
            CheckpointError: when it is missing or no tokenizer.
        """
        if not Path(path).is_file():
            raise CheckpointError(f"{path}: no such file")
        try:
            return cls(tokenizers.Tokenizer.from_str(Path(path).read_text(encoding="utf-8")))
        except Exception as error:  # the library raises bare Exception for a file that it cannot read
            raise CheckpointError(f"{path}: not a tokenizer: {error}") from error

    @property
    def vocab_size(self) -> int:
        """One more than the largest token, added tokens included."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, with the special tokens that the tokenizer itself adds."""
        return self._tokenizer.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def stream(self) -> TextStream:
        """A decoder of one token at a time; what it keeps does not grow."""
        return _SubwordStream(self.decode)

    def to_json(self) -> str | None:
        """The content of tokenizer.json."""
        return self._tokenizer.to_str(pretty=True)


def load_tokenizer(folder: str | Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a saved model: its ``tokenizer.json``, or bytes where there is none and 256 tokens.

    Raises:
        CheckpointError: when neither fits a model of ``vocab_size`` tokens.
    """
    path = current(folder, TOKENIZER_FILE)
    if path.exists():
        tokenizer = SubwordTokenizer.from_file(path)
        if tokenizer.vocab_size > vocab_size:
            raise CheckpointError(f"{path} has {tokenizer.vocab_size} tokens, but the model only {vocab_size}")
        return tokenizer
    if vocab_size != ByteTokenizer.vocab_size:
        raise CheckpointError(
            f"{folder}: no {TOKENIZER_FILE}, and a vocabulary of {vocab_size} is not bytes",
            hint=f"put the model's {TOKENIZER_FILE} beside its weights",
        )
    return ByteTokenizer()


class _ByteStream:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(_bytes([token]))

    def flush(self) -> str:
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


class _SubwordStream:
    """Decodes the last few tokens again at every push, because a token's text depends on its neighbours.

    A text that ends in U+FFFD may be waiting for up to three more bytes of a character, and so does the stream.
    What is still U+FFFD then is no text, and leaves as such.
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
        """Keep half a window of tokens as context, cut where a character begins."""
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
