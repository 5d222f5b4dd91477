"""Ctrl-C, a scheduler's SIGTERM and a closed terminal as requests that the loop answers between two steps."""

import signal
import threading
from collections.abc import Iterable
from types import FrameType, TracebackType
from typing import Any

_HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none


class Interrupts:
    """While inside, SIGINT, SIGTERM and SIGHUP only set ``signal``; a second SIGINT or SIGTERM acts as usual.

    A terminal that closes sends SIGHUP more than once, and a service manager sends it after SIGTERM: it never acts as
    usual inside. Where it is ignored, as under ``nohup``, it stays ignored. Outside the main thread, where Python
    allows no handlers, signals act as usual.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM]
            if _HANGUP is not None and signal.getsignal(_HANGUP) is not signal.SIG_IGN:
                numbers.append(_HANGUP)
            self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._restore(self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number
        if number != _HANGUP:
            self._restore({signal.SIGINT, signal.SIGTERM})

    def _restore(self, numbers: Iterable[int]) -> None:
        for number in [n for n in numbers if n in self._before]:
            handler = self._before.pop(number)
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
