"""Arguments that do not fit, explained; and frozen dataclasses of options, whose constructors do so."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from functools import cache, wraps
from inspect import Parameter, Signature, signature
from types import MappingProxyType, UnionType
from typing import Any, Literal, TypeVar, Union, dataclass_transform, get_args, get_origin, get_type_hints, overload

from dualform.core.errors import ConfigError, DualformError

T = TypeVar("T")
_LONG = 10**60  # a number that errors do not write out
_WORDS: dict[Any, str] = {
    int: "a whole number", float: "a number", str: "a text", bool: "true or false", tuple: "a list", list: "a list",
    dict: "an object", Mapping: "an object",
}  # fmt: skip
_PLURALS: dict[Any, str] = {int: "whole numbers", float: "numbers", str: "texts", bool: "values, true or false"}
_NOWHERE: Mapping[str, str] = MappingProxyType({})


@overload
def options(cls: type[T]) -> type[T]: ...
@overload
def options(*, error: type[DualformError] = ..., types: bool = ...) -> Callable[[type[T]], type[T]]: ...
@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def options(cls: type[Any] | None = None, *, error: type[DualformError] = ConfigError, types: bool = True) -> Any:
    """``dataclass(frozen=True)`` whose constructor raises an ``error`` that says what is wrong.

    That is: a keyword that is no field, with the nearest field as the hint; a field without a default that is missing;
    a value that is not of the annotated type of its field (an int passes for a float, a bool does not for an int).
    Without ``types`` the class looks at the values itself.
    """
    if cls is None:
        return lambda cls: _explained(cls, error, types)
    return _explained(cls, error, types)


def _explained(cls: type[T], error: type[DualformError], types: bool) -> type[T]:
    made: Any = dataclass(frozen=True)(cls)
    plain: Callable[..., None] = made.__init__
    shape = signature(plain)

    @wraps(plain)
    def init(self: Any, *args: Any, **given: Any) -> None:
        if wrong := misfit(shape, (self, *args), given):
            raise error(f"{made.__name__}: {wrong[0]}", hint=wrong[1])
        if types:
            try:
                check_types(made, {**dict(zip([*shape.parameters][1:], args, strict=False)), **given}, made.__name__)
            except ConfigError as wrong:
                raise error(str(wrong)) from None
        plain(self, *args, **given)

    made.__init__ = init
    return made


def misfit(
    shape: Signature, args: Sequence[Any], given: Mapping[str, Any], elsewhere: Mapping[str, str] = _NOWHERE
) -> tuple[str, str] | None:
    """What is wrong with the arguments of a call, and a hint; None where they fit the signature.

    Args:
        shape: of the function; a first parameter ``self`` or ``cls`` is not spoken of.
        args: those by place.
        given: those by name.
        elsewhere: hints for names that other functions have.
    """
    parameters = list(shape.parameters.values())
    if parameters and parameters[0].name in ("self", "cls"):
        parameters, args = parameters[1:], args[1:]
    placed = [p.name for p in parameters if p.kind is Parameter.POSITIONAL_OR_KEYWORD]
    named = [*placed, *(p.name for p in parameters if p.kind is Parameter.KEYWORD_ONLY)]
    kinds = {p.kind for p in parameters}
    if len(args) > len(placed) and Parameter.VAR_POSITIONAL not in kinds:
        others = f"by name: {', '.join(named[len(placed) :])}" if len(named) > len(placed) else ""
        return f"{len(args)} values, expected at most {len(placed)}: {', '.join(placed)}", others
    if twice := [name for name in placed[: len(args)] if name in given]:
        return f"{twice[0]} is given twice, by its place and by its name", ""
    if Parameter.VAR_KEYWORD not in kinds and (unknown := [name for name in given if name not in named]):
        name = unknown[0]
        belongs = elsewhere.get(name, "") if not get_close_matches(name, named, cutoff=0.9) else ""
        return f"unknown keyword {brief(name)}", belongs or suggestion(name, named)
    needed = [p.name for p in parameters if p.name in named and p.default is Parameter.empty]
    if missing := [name for name in needed if name not in {*placed[: len(args)], *given}]:
        return f"missing keyword {', '.join(missing)}", f"required: {', '.join(needed)}"
    return None


def suggestion(word: str, known: Sequence[str]) -> str:
    """``did you mean 'mamba2'? known: ...``, the hint for a name that does not exist."""
    near = get_close_matches(word, known, n=1) or [name for name in known if word and name.startswith(word)]
    return (f"did you mean {near[0]!r}? " if near else "") + f"known: {', '.join(known) or 'none'}"


def check_names(given: Iterable[Any], known: Sequence[str], where: str, prefix: str = "") -> None:
    """That every name is a known one.

    Raises:
        ConfigError: names the first that is not, ``prefix`` before it, and suggests the nearest.
    """
    for name in given:
        if name not in known:
            raise ConfigError(f"{where}: unknown key {brief(f'{prefix}{name}')}", hint=suggestion(str(name), known))


def check_keys(cls: type[Any], given: Mapping[str, Any], where: str) -> None:
    """That every key is a field of a dataclass, and every field without a default is there.

    Raises:
        ConfigError: names the key.
    """
    check_names(given, [f.name for f in fields(cls)], where)
    needed = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in needed if name not in given]:
        raise ConfigError(f"{where}: missing key {', '.join(missing)}", hint=f"required: {', '.join(needed)}")


def check_types(cls: type[Any], values: Mapping[str, Any], where: str, prefix: str = "") -> None:
    """That every value is of the annotated type of its field.

    Raises:
        ConfigError: names the field, ``prefix`` before it, the value and the type.
    """
    hints = _hints(cls)
    for name, value in values.items():
        if not fits(value, hints[name]):
            raise ConfigError(f"{where}: {prefix}{name} is {brief(value)}, expected {shown(hints[name])}")
        if _beyond(value):
            raise ConfigError(f"{where}: {prefix}{name} is {brief(value)}, expected whole numbers of 64 bits")


@cache
def _hints(cls: type[Any]) -> dict[str, Any]:
    return get_type_hints(cls)


def brief(value: Any) -> str:
    """A value as an error shows it, cut where it is long."""
    text = repr(value) if not isinstance(value, int) or abs(value) < _LONG else f"a number of {value.bit_length()} bits"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)"


def joined(words: Iterable[Any], most: int = 20) -> str:
    """``a, b, c``, as an error shows it: the first ones of many."""
    words = list(map(str, words))
    return ", ".join(words[:most]) + (f" and {len(words) - most:,} more" if len(words) > most else "")


def shown(hint: Any) -> str:
    """An annotated type in words, as an error shows it: ``int | None`` is ``a whole number, or none``."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        words = [shown(a) for a in args if a is not type(None)]
        return " or ".join(words) + (", or none" if type(None) in args else "")
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin is tuple and args:
        many = _PLURALS.get(args[0], "values")
        return f"a list of {many}" if args[1:] == (...,) else f"{len(args)} {many}"
    plain = origin or hint
    return _WORDS.get(plain, plain.__name__ if isinstance(plain, type) else str(hint))


def _beyond(value: Any) -> bool:
    """Whether a whole number, or one in a tuple, has more than 64 bits: no tensor holds it, and not every float."""
    if isinstance(value, tuple):
        return any(map(_beyond, value))
    return isinstance(value, int) and not -(2**63) <= value < 2**63


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type; of containers other than tuples the elements are not looked at."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, a) for a in args)
    if origin is Literal:
        return value in args
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        each = args[:1] * len(value) if args[1:] == (...,) else args
        return len(each) == len(value) and all(fits(v, a) for v, a in zip(value, each, strict=True))
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    plain = origin or hint
    return isinstance(value, plain) if isinstance(plain, type) else True
