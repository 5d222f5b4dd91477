"""Text at the edges of the process: prompts that come in, completions that go out."""

import io
import math
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from dualform.core.errors import ArgumentError, DataError
from dualform.core.json_file import to_json

_CONTROLS = {c: "\ufffd" for c in (*range(32), *range(127, 160)) if chr(c) not in "\n\t"}


def read_prompt(prompt: str | None, *, required: bool) -> str:
    """The text to continue: an argument, or standard input for ``-`` and where nothing is given but input is piped.

    Args:
        prompt: the argument, None where there is none.
        required: refuse an empty prompt.

    Raises:
        DataError: for what is not UTF-8 text.
        ArgumentError: for an empty prompt that is required.
    """
    if prompt == "-" or (prompt is None and sys.stdin is not None and not sys.stdin.isatty()):
        text = decode(sys.stdin.buffer.read(), "standard input")
    else:
        text = decode((prompt or "").encode("utf-8", "surrogateescape"), "the prompt")
    if required and not text:
        raise ArgumentError(
            "the prompt is empty",
            hint="give the text to continue, pipe it in, or continue a saved one with --state FILE",
        )
    return text


def decode(data: bytes, what: str) -> str:
    """UTF-8 bytes as text.

    Raises:
        DataError: says where ``what`` stops being text.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{data[error.start]:02x} at position {error.start} is not UTF-8"
        raise DataError(f"{what} is not text: {found}", hint="convert it first, such as with iconv -t UTF-8") from None
    if "\0" in text:
        raise DataError(f"{what} is not text: it holds a NUL byte at position {data.index(0)}")
    return text


def printable(text: str) -> str:
    """Text that cannot move a terminal's cursor or change its settings: control characters become U+FFFD."""
    return text.translate(_CONTROLS)


def encodable() -> None:
    """Let standard output and error escape a character that their encoding lacks, where they would raise."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def output() -> TextIO:
    """Standard output, for a command whose result goes there.

    Raises:
        ArgumentError: when it is closed.
    """
    if sys.stdout is None:
        raise ArgumentError("standard output is closed", hint="send it to a file, or to /dev/null")
    return sys.stdout


def print_json(document: dict[str, Any]) -> None:
    """Write one JSON document to standard output, in ASCII; a number that JSON does not have becomes null."""
    output().write(to_json(_numbered(document)))


def _numbered(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _numbered(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_numbered(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Until:
    """Streamed text up to the first of some endings; the ending and what follows it are held back.

    Args:
        endings: texts; an empty one never ends anything.
        before: text that was given out earlier, with which an ending may begin. An ending that is complete in it has
            had its effect, and does not count again.
    """

    def __init__(self, endings: Sequence[str], before: str = ""):
        self.endings, self.found = [e for e in endings if e], False
        done = max((before.rfind(e) + len(e) for e in self.endings if e in before), default=0)
        self._held = self._beginning(before[done:])
        self._out = len(self._held)  # characters of what is held that were given out earlier

    def push(self, text: str) -> str:
        """The part of the text so far that is certain not to begin an ending."""
        if self.found:
            return ""
        self._held += text
        starts = [i for i in (self._held.find(e) for e in self.endings) if i >= 0]
        if not starts:
            return self._give(len(self._held) - len(self._beginning(self._held)))
        self.found, given = True, self._give(min(starts))
        self._held = ""
        return given

    def flush(self) -> str:
        """What was held back and did not become an ending."""
        return self._give(len(self._held))

    def _beginning(self, text: str) -> str:
        """The longest end of a text with which an ending begins, without being complete."""
        size = max((n for e in self.endings for n in range(1, len(e)) if text.endswith(e[:n])), default=0)
        return text[len(text) - size :]

    def _give(self, size: int) -> str:
        given, self._held = self._held[self._out : size], self._held[size:]
        self._out = max(0, self._out - size)
        return given
