"""Packages whose names are resolved on first use, so that importing them costs nothing, and that are no functions."""

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

from dualform.core.errors import ArgumentError


def lazy(
    package: str, home: Mapping[str, str], packages: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The functions ``__getattr__`` and ``__dir__`` of a package.

    Args:
        package: its ``__name__``.
        home: the module of each name, from the package on.
        packages: names that are packages themselves.
    """

    def getattribute(name: str) -> Any:
        if name in home:
            value = getattr(import_module(f"{package}.{home[name]}"), name)
        elif name in packages:
            value = import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {', '.join(sorted(home))}")
        setattr(sys.modules[package], name, value)
        return value

    def directory() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home, *packages})

    return getattribute, directory


class _Package(ModuleType):
    """A package whose name reads like that of a function."""

    _instead: str

    def __call__(self, *args: Any, **given: Any) -> Any:
        raise ArgumentError(f"{self.__name__} is a package, not a function", hint=self._instead)


def explain_call(package: str, instead: str) -> None:
    """Let a call of a package, for the function that it is not, raise an ArgumentError with what to call instead."""
    module: Any = sys.modules[package]
    module.__class__, module._instead = _Package, instead
