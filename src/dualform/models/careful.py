"""Calls of the ``tokenizers`` library, whose errors are bare exceptions, or panics that are not even exceptions."""

from collections.abc import Callable
from typing import TypeVar

from dualform.core.errors import ArgumentError, DualformError
from dualform.core.options import brief

T = TypeVar("T")
AGAIN = "its tokenizer.json may be damaged, or lack a token for unknown words"


def carefully(call: Callable[[], T], where: str = "tokenizer", error: type[DualformError] = ArgumentError) -> T:
    """The result of calls of the ``tokenizers`` library.

    Raises:
        DualformError: for the library's bare ``Exception``, and for a panic of its Rust code, which is no ``Exception``
            and would pass through every ``except`` to the user.
    """
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as wrong:
        raise error(f"{where}: {brief(str(wrong))}", hint=AGAIN) from wrong
