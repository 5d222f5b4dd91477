"""Functions that explain a call whose arguments they do not have."""

from collections.abc import Callable, Mapping
from functools import wraps
from inspect import signature
from types import FunctionType
from typing import Any, TypeVar, overload

from dualform.core.errors import ArgumentError
from dualform.core.options import misfit

F = TypeVar("F", bound=Callable[..., Any])


@overload
def explained(of: F) -> F: ...
@overload
def explained(*, elsewhere: Mapping[str, str]) -> Callable[[F], F]: ...
def explained(of: Any = None, *, elsewhere: Mapping[str, str] | None = None) -> Any:
    """A function whose call with arguments that it does not have raises an ArgumentError that explains them.

    In place of a ``TypeError``, that is, for a keyword that is none of its own, with the nearest one as the hint; an
    argument that is missing, given twice, or one too many. A call that fits costs nothing more, and ``inspect`` sees
    the function's own signature.

    Args:
        of: a function, or a class, of which it is the constructor and the public methods.
        elsewhere: hints for keywords that belong to something else, by their names.
    """
    if of is None:
        return lambda of: _class(of, elsewhere or {}) if isinstance(of, type) else _function(of, elsewhere or {})
    return explained(elsewhere={})(of)


def _class(of: type[Any], elsewhere: Mapping[str, str]) -> type[Any]:
    for name, value in list(vars(of).items()):
        if name.startswith("_") and name != "__init__":
            continue
        if isinstance(value, FunctionType):
            setattr(of, name, _function(value, elsewhere))
        elif isinstance(value, classmethod):
            setattr(of, name, classmethod(_function(value.__func__, elsewhere)))
    return of


def _function(function: Callable[..., Any], elsewhere: Mapping[str, str]) -> Callable[..., Any]:
    shape = signature(function)

    @wraps(function)
    def run(*args: Any, **given: Any) -> Any:
        try:
            return function(*args, **given)
        except TypeError:
            if wrong := misfit(shape, args, given, elsewhere):
                raise ArgumentError(f"{_name(function, args)}: {wrong[0]}", hint=wrong[1]) from None
            raise

    return run


def _name(function: Callable[..., Any], args: tuple[Any, ...]) -> str:
    """``LanguageModel`` for its constructor and its forward, ``LanguageModel.loss``, ``generate``."""
    if "." not in function.__qualname__.rpartition("<locals>.")[2] or not args:
        return function.__qualname__.rpartition("<locals>.")[2]
    owner = args[0] if isinstance(args[0], type) else type(args[0])
    plain = function.__name__ in ("__init__", "forward")
    return owner.__name__ if plain else f"{owner.__name__}.{function.__name__}"
