"""The plain form of a function: the same call on the loops that define the operators."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from dualform.ops.op import backend

P = ParamSpec("P")
R = TypeVar("R")


def plain(function: Callable[P, R], name: str) -> Callable[P, R]:
    """A function of that name and of the same signature, which runs as a plain loop."""

    @wraps(function)
    def run(*args: P.args, **options: P.kwargs) -> R:
        with backend("reference"):
            return function(*args, **options)

    run.__name__ = run.__qualname__ = name
    run.__doc__ = f":func:`{function.__name__}` as a plain loop."
    return run
