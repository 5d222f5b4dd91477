"""Lines of numbers as they come in a pipe: what each column is, and what a field says."""

import csv
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from dualform.core.errors import ArgumentError, DataError
from dualform.core.options import brief, suggestion

_MISSING = ("", "na", "nan", "null", "none")


class Columns(NamedTuple):
    """The columns of lines: their names, and which of them are what."""

    names: tuple[str, ...]
    values: tuple[int, ...]  # the channels, in order
    id: int | None
    time: int | None

    @property
    def channels(self) -> tuple[str, ...]:
        """The names of the channels."""
        return tuple(self.names[i] for i in self.values)


class Sample(NamedTuple):
    """One line: of which stream, when, and the numbers; NaN where one is missing."""

    line: int
    id: str
    time: float | None
    shown: str  # the time as it came
    values: list[float]


def decoded(line: bytes, number: int) -> str:
    """A line as text, without its end.

    Raises:
        DataError: for bytes that are no UTF-8; names the line.
    """
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8").removesuffix("\r")
    except UnicodeDecodeError as error:
        wrong = f"byte 0x{line[error.start]:02x} at position {error.start}"
        raise DataError(f"line {number}: {wrong} is not UTF-8") from None


def fields(line: str, number: int) -> list[str]:
    """The fields of a line, separated by commas, perhaps in quotes.

    Raises:
        DataError: for quotes that do not end; names the line.
    """
    if '"' not in line:
        return [field.strip() for field in line.split(",")]
    try:
        (found,) = csv.reader([line], skipinitialspace=True, strict=True)
    except csv.Error as error:
        raise DataError(f"line {number}: {error}", hint=f"it reads {brief(line)}") from None
    return [field.strip() for field in found]


def is_header(found: Sequence[str]) -> bool:
    """Whether a first line names columns: at least one field is neither a number nor missing."""
    return any(not _is_number(field) for field in found)


def columns_of(
    found: Sequence[str], *, id: str | None = None, time: str | None = None, values: Sequence[str] | None = None
) -> Columns:
    """The columns that a header names.

    Args:
        found: the names, in order.
        id: the column that says which stream a line is of.
        time: the column with the time.
        values: the columns with numbers; None for all others.

    Raises:
        DataError: for a name that stands twice.
        ArgumentError: for a name that the header does not have, and no column that is left.
    """
    names = list(found)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"line 1: the header names {brief(twice[0])} twice")

    def place(option: str, name: str) -> int:
        if name not in names:
            where = f"the header has {', '.join(map(brief, names))}"
            raise ArgumentError(f"{option} {name}: no such column, {where}", hint=suggestion(name, names))
        return names.index(name)

    kinds = {option: None if name is None else place(option, name) for option, name in (("--id", id), ("--time", time))}
    others = [i for i in range(len(names)) if i not in kinds.values()]
    chosen = others if values is None else [place("--value", name) for name in values]
    if clash := [names[i] for i in chosen if i not in others]:
        raise ArgumentError(f"--value {clash[0]}: is the column of --id or --time already")
    if not chosen:
        raise ArgumentError("the lines have no column with values", hint="beside those of --id and --time")
    return Columns(tuple(names), tuple(chosen), kinds["--id"], kinds["--time"])


def unnamed(count: int, *, id: str | None, time: str | None, values: Sequence[str] | None) -> Columns:
    """The columns of lines without a header.

    Raises:
        ArgumentError: where an option names a column.
    """
    for option, given in (("--id", id), ("--time", time), ("--value", values)):
        if given is not None:
            raise ArgumentError(
                f"line 1 has numbers and no names, and {option} names a column", hint="begin with a header: id,time,x"
            )
    names = ("value",) if count == 1 else tuple(f"value_{i}" for i in range(1, count + 1))
    return Columns(names, tuple(range(count)), None, None)


def sample(columns: Columns, line: str, number: int) -> Sample:
    """What a line says.

    Raises:
        DataError: for a field that is no number, an infinity, or other fields than the columns; names the line.
    """
    found = fields(line, number)
    if len(found) != len(columns.names):
        raise DataError(
            f"line {number} has {len(found)} field{'s' * (len(found) != 1)}, expected {len(columns.names)}: "
            f"{', '.join(columns.names)}",
            hint=f"it reads {brief(line)}; a missing value is an empty field between its commas",
        )
    values = [number_of(found[i], columns.names[i], number) for i in columns.values]
    shown = "" if columns.time is None else found[columns.time]
    time = None if columns.time is None else _time(shown, columns.names[columns.time], number)
    identity = "" if columns.id is None else found[columns.id]
    if columns.id is not None and not identity:
        raise DataError(f"line {number}, {columns.names[columns.id]}: is empty, expected the name of a stream")
    return Sample(number, identity, time, shown, values)


def number_of(field: str, column: str, line: int) -> float:
    """A number; NaN for one that is missing.

    Raises:
        DataError: names the line and the column.
    """
    try:
        value = _float(field)
    except ValueError:
        if field.lower() in _MISSING:
            return math.nan
        hint = "a missing value is an empty field, or NaN"
        raise DataError(f"line {line}, {column}: {brief(field)} is no number", hint=hint) from None
    if math.isinf(value):
        raise DataError(f"line {line}, {column}: is {field}, expected a finite number, or nothing where it is missing")
    return value


def _time(field: str, column: str, line: int) -> float:
    """A time: a number, or an ISO 8601 date in seconds."""
    try:
        value = _float(field)
    except ValueError:
        try:
            when = datetime.fromisoformat(field)
        except ValueError:
            hint = "such as 12.5 or 2026-03-01T12:00:00"
            raise DataError(
                f"line {line}, {column}: {brief(field)} is no time, expected a number or an ISO 8601 date", hint=hint
            ) from None
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    if not math.isfinite(value):
        raise DataError(f"line {line}, {column}: is {field}, expected a finite time")
    return value


def _float(field: str) -> float:
    if "_" in field:  # which Python takes between digits
        raise ValueError
    return float(field)


def _is_number(field: str) -> bool:
    try:
        _float(field)
    except ValueError:
        return field.lower() in _MISSING
    return True
