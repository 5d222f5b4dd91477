"""Errors of PyTorch, NumPy and Python over memory: which ones they are, and what they say in one line."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from dualform.core.errors import ConfigError

_SIZES = ("Storage size calculation overflowed", "Stride calculation overflowed", "integer multiplication overflow")
_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "Unable to allocate")


def exceeded(error: BaseException) -> str:
    """One line on what did not fit into memory, or has a size that no memory has; empty for any other error."""
    said = str(error)
    if asked := re.search(r"tried to allocate (\d+) bytes", said):
        return f"{int(asked[1]):,} bytes were asked for at once"
    if "Overflow when unpacking long" in said or isinstance(error, OverflowError):
        return "a size has more than 64 bits"
    line = said.strip().partition("\n")[0]
    if isinstance(error, MemoryError):
        return line or "no memory is left"
    over = isinstance(error, RuntimeError | ValueError) and any(words in said for words in (*_SIZES, *_MEMORY))
    return line if over else ""


@contextmanager
def sized(where: str) -> Iterator[None]:
    """Inside, the parts of a model are made.

    Raises:
        ConfigError: for sizes that memory cannot hold.
    """
    try:
        yield
    except (RuntimeError, MemoryError, TypeError, OverflowError) as error:
        if not (reason := exceeded(error)):
            raise
        hint = "check vocab_size, d_model, the pattern and the sizes of its parts"
        raise ConfigError(f"{where}: too large to be built: {reason}", hint=hint) from error
