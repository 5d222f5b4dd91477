"""JSON, and the TOML of recipes, read within limits: what a file may hold is a value or a sentence, and nothing else.

RFC 8259, and stricter where a file that was damaged would otherwise pass: no ``NaN`` or ``Infinity``, no number that
is too large for a float64, no key twice in one object, at most :data:`DEEPEST` objects or lists inside one another.
"""

import json
import math
import os
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn, TypeVar, overload

from dualform.core.errors import CheckpointError, DualformError
from dualform.core.options import brief, fits, joined, shown

T = TypeVar("T")

LARGEST = 2**24
"""Bytes of a file; the largest that the library writes has a few thousand."""
DEEPEST = 32
"""Levels of nesting; the deepest that the library writes has six."""


def read_json(
    path: str | os.PathLike[str],
    *,
    error: type[DualformError] = CheckpointError,
    hint: str = "",
    infinite: bool = False,
) -> Any:
    """The value that a JSON file holds.

    Args:
        path: of the file.
        error: the class of what is raised.
        hint: the remedy where the file cannot be read or is no JSON.
        infinite: whether ``Infinity`` and ``-Infinity`` are numbers, as Python's own writer has them.

    Raises:
        DualformError: names the file and says why it cannot be read, or where it stops being JSON.
    """
    try:
        return parse_json(read_text(path), infinite=infinite)
    except OSError as wrong:
        raise error(f"{path}: cannot be read: {wrong.strerror or wrong}", hint=hint) from wrong
    except ValueError as wrong:
        raise error(f"{path}: cannot be read as JSON: {wrong}", hint=hint) from wrong


def read_table(
    path: str | os.PathLike[str], *, error: type[DualformError] = CheckpointError, hint: str = ""
) -> dict[str, Any]:
    """The object that a JSON file holds, as :func:`read_json`; another value is refused.

    Raises:
        DualformError: names the file.
    """
    found = read_json(path, error=error, hint=hint)
    if not isinstance(found, dict):
        raise error(f"{path}: holds {kind_of(found)}, expected an object", hint=hint)
    return found


def read_text(path: str | os.PathLike[str], largest: int = LARGEST) -> str:
    """A file of UTF-8 text, without the byte order mark that some editors write first.

    Raises:
        OSError: from the operating system.
        ValueError: for a file of more than ``largest`` bytes, or one that is not UTF-8.
    """
    with Path(path).open("rb") as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise ValueError(f"more than {largest:,} bytes, expected a small file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as wrong:
        raise ValueError(f"byte {wrong.start} is not UTF-8") from None


def parse_json(text: str | bytes, *, infinite: bool = False) -> Any:
    """The value of a JSON text; ``infinite`` as for :func:`read_json`.

    Raises:
        ValueError: in words that follow the name of the file.
    """
    try:
        constant = _infinity if infinite else _no_constant
        value = json.loads(text, parse_constant=constant, parse_float=_finite, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError(f"nested more than {DEEPEST} levels deep") from None
    except UnicodeDecodeError as wrong:
        raise ValueError(f"byte {wrong.start} is not UTF-8") from None
    return shallow(value)


def parse_toml(text: str) -> dict[str, Any]:
    """The table of a TOML text, nested as little as :func:`parse_json` asks for.

    Raises:
        ValueError: in words that follow the name of the file.
    """
    try:
        return shallow(tomllib.loads(text))
    except RecursionError:
        raise ValueError(f"nested more than {DEEPEST} levels deep") from None


def shallow(value: T) -> T:
    """A tree of dicts and lists that is nested at most :data:`DEEPEST` levels deep, as it came.

    Raises:
        ValueError: for one that is deeper.
    """
    level: list[Any] = [value]
    for _ in range(DEEPEST + 1):
        level = [one for one in level if isinstance(one, dict | list)]
        if not level:
            return value
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]
    raise ValueError(f"nested more than {DEEPEST} levels deep")


@overload
def entry(table: dict[str, Any], name: str, kind: type[T], where: Any, *, error: type[DualformError] = ...) -> T: ...
@overload
def entry(table: dict[str, Any], name: str, kind: Any, where: Any, *, error: type[DualformError] = ...) -> Any: ...
def entry(
    table: dict[str, Any], name: str, kind: Any, where: Any, *, error: type[DualformError] = CheckpointError
) -> Any:
    """``table[name]``, a value of a type as :func:`dualform.core.options.options` takes it, such as ``int | None``.

    Raises:
        DualformError: for a key that is missing or a value of another type; ``where`` is the file.
    """
    if name not in table:
        raise error(f"{where}: the key {name!r} is missing", hint=f"it has {joined(table) or 'none'}")
    if not fits(table[name], kind):
        raise error(f"{where}: {name} is {brief(table[name])}, expected {shown(kind)}")
    return table[name]


def to_json(value: Any) -> str:
    """The text of a JSON file: indented, a newline at its end.

    Raises:
        ValueError: for a number that JSON does not have, NaN or infinity.
    """
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def kind_of(value: Any) -> str:
    """What JSON calls the type of a value, with its article."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _infinity(name: str) -> float:
    return _no_constant(name) if name == "NaN" else float(name)


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {brief(text)} is too large")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {brief(name)} stands twice in one object")
    return table
