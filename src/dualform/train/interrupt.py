"""Ctrl-C and a scheduler's SIGTERM as requests that the loop answers between two steps."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupts:
    """While inside, SIGINT and SIGTERM only set ``signal``; the second one acts as usual.

    Outside the main thread, where Python allows no handlers, signals act as usual.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}
