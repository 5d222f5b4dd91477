"""Text as the bytes of UTF-8, for tokenizers whose tokens are bytes."""

import codecs
from collections.abc import Callable, Sequence

from dualform.core.errors import ArgumentError


def utf8(text: str) -> bytes:
    """The bytes of a text.

    Bytes that are not UTF-8, which Python keeps as surrogates in arguments and file names, come out as they were.

    Raises:
        ArgumentError: for any other lone surrogate, which is not text.
    """
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise surrogate(error) from error


def surrogate(error: UnicodeEncodeError) -> ArgumentError:
    """What is said of a text that is none."""
    return ArgumentError(f"encode: character {error.start} of the text is a lone surrogate, which is not text")


class ByteStream:
    """Takes one token at a time, and gives text as soon as it is certain.

    Args:
        bytes_of: the bytes of tokens.
    """

    def __init__(self, bytes_of: Callable[[Sequence[int]], bytes]):
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that has become certain with ``token``; empty in the middle of a character."""
        return self._decoder.decode(self._bytes_of([token]))

    def flush(self) -> str:
        """The rest of the text: an unfinished character as U+FFFD. Afterwards the stream is as new."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
