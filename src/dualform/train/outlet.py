"""A stream that people read, which may close before a run ends: the head of a pipe, a terminal that is gone."""

import errno
import os
import sys
from contextlib import suppress
from typing import IO, Any

_HUNG_UP = (errno.EPIPE, errno.EIO, errno.ECONNRESET)


class Outlet:
    """A text stream that passes on what it is given until a write fails; ``error`` is then why, and the rest is lost.

    The descriptor of a standard stream then leads to the null device, so that Python's last flush of it is quiet.
    """

    def __init__(self, stream: IO[str]):
        self.stream, self.error = stream, None

    @property
    def hung_up(self) -> bool:
        """Whether the reader has gone, which is no fault."""
        return self.error is not None and self.error.errno in _HUNG_UP

    def write(self, text: str) -> int:
        """As of any stream."""
        self._try(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        """As of any stream."""
        self._try(self.stream.flush)

    def _try(self, act: Any, *args: Any) -> None:
        if self.error is None:
            try:
                act(*args)
            except OSError as error:
                self.error = error
                if self.stream in (sys.stdout, sys.stderr):
                    with suppress(OSError, ValueError):
                        _silence(self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _silence(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)
