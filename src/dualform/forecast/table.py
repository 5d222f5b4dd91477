"""Series from a file: a column of times, columns of values, and a column that says which series a row is of."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from dualform.core.errors import DataError
from dualform.core.options import joined, suggestion
from dualform.forecast.frames import regular
from dualform.forecast.panel import LEAST

DEMO = Path(__file__).with_name("nile.csv")
"""The annual flow of the Nile at Aswan, 1871 to 1970, in 10^8 cubic metres (Cobb 1978)."""
_PARQUET = (".parquet", ".pq")
_QUARTER = r"\d{4}[ -]?[Qq][1-4]"
_OFFSET = r"\d:\d\d\S*([+-]\d\d:?\d\d)$"


class Table(NamedTuple):
    """Series with regular times; a time without a row is a missing value."""

    series: dict[str, Any]  # by name, pandas Series with a DatetimeIndex that has a frequency, or whole numbers
    keys: dict[str, tuple[str, str]]  # of each name, the value of the id column, empty without one, and its column
    gaps: dict[str, int]  # of each name, how many values are missing


def read_table(
    path: Path, time: str, values: list[str], *, id: str | None = None, frequency: str | None = None
) -> Table:
    """Read series from a CSV or Parquet file.

    Args:
        path: of the file, by whose suffix ``.parquet`` or ``.pq`` it is Parquet, and CSV otherwise.
        time: the column of times: dates, times, or whole numbers such as years; 20240131 and 202401 are dates, if all
            of them are.
        values: the columns of values, each a series.
        id: the column that names the series of a row.
        frequency: of the times, as pandas names it, such as "MS"; None finds it.

    Raises:
        DataError: for a file that cannot be read, a column that is missing, times that are no times, are there twice or
            out of order, or have no frequency, and values that are no numbers or infinite, too few or all missing. It
            names the column, and the row, of which the first below the header is row 1.
    """
    frame = _frame(path)
    for column in {time, *values} if id is None else {time, id, *values}:
        if (count := [time, id, *values].count(column)) > 1:
            raise DataError(
                f"{path}: column {column!r} is named {count} times, expected one each for time, value and id"
            )
    for column in [time, *values, *([] if id is None else [id])]:
        if column not in frame.columns:
            raise DataError(f"{path}: no column {column!r}", hint=suggestion(column, [str(c) for c in frame.columns]))
    if not len(frame):
        raise DataError(f"{path}: no rows below the header")
    numbers = {column: _numbers(path, frame[column]) for column in values}
    times = _times(path, frame[time])
    groups = {"": np.arange(len(frame))} if id is None else _groups(path, frame[id])
    made: dict[str, Any] = {}
    keys: dict[str, tuple[str, str]] = {}
    for key, rows in groups.items():
        of = f"{path}: column {time!r}" + (f", series {key!r}" if key else "")
        _check_order(of, times, rows, id)
        grid = regular(of, times[rows], frequency)
        for column in values:
            name = " ".join(filter(None, [key, column if len(values) > 1 or not key else ""]))
            series = pd.Series(numbers[column][rows], index=times[rows]).reindex(grid)
            _check_values(f"{path}: column {column!r}" + (f", series {key!r}" if key else ""), series)
            made[name], keys[name] = series.rename(name), (key, column)
    gaps = {name: int(series.isna().sum()) for name, series in made.items()}
    return Table(made, keys, gaps)


def _frame(path: Path) -> Any:
    if not path.is_file():
        raise DataError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}, expected a CSV or Parquet file")
    try:
        if path.suffix.lower() in _PARQUET:
            return pd.read_parquet(path)
        return _csv(path)
    except ImportError:
        raise DataError(f"{path}: Parquet needs pyarrow", hint="pip install 'dualform[forecast]'") from None
    except (OSError, ValueError) as error:  # what pandas and pyarrow raise of a file are ValueErrors
        raise DataError(f"{path}: cannot be read as a table: {str(error).splitlines()[0]}") from error


def _csv(path: Path) -> Any:
    """A file whose header has semicolons, as spreadsheets write it where the comma is a decimal one, or tabs."""
    if path.suffix.lower() in (".gz", ".bz2", ".zip", ".xz", ".zst"):  # which pandas opens
        return pd.read_csv(path)
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        header = file.readline()
    separator = max(",;\t", key=header.count)
    return pd.read_csv(path, sep=separator, decimal="," if separator == ";" else ".")


def _numbers(path: Path, column: Any) -> np.ndarray:
    """Float64 values, NaN where one is missing."""
    coerced: Any = pd.to_numeric(column, errors="coerce")
    made = coerced.to_numpy(dtype=np.float64, na_value=np.nan)
    lost = np.isnan(made) & ~column.isna().to_numpy()
    if lost.any():
        row = int(lost.nonzero()[0][0])
        hint = "leave a missing value empty; a decimal comma has to become a point"
        raise DataError(f"{path}: column {column.name!r}, row {row + 1}: {column.iloc[row]!r} is no number", hint=hint)
    if np.isinf(made).any():
        row = int(np.isinf(made).nonzero()[0][0])
        raise DataError(f"{path}: column {column.name!r}, row {row + 1}: an infinite value", hint="leave it empty")
    return made


def _times(path: Path, column: Any) -> Any:
    if column.isna().any():
        row = int(column.isna().to_numpy().nonzero()[0][0])
        raise DataError(f"{path}: column {column.name!r}, row {row + 1}: the time is missing")
    if pd.api.types.is_integer_dtype(column.dtype):
        return _dates_of_numbers(column.to_numpy())
    if pd.api.types.is_numeric_dtype(column.dtype):
        whole = column.to_numpy() == np.floor(column.to_numpy())
        if not whole.all():
            row = int((~whole).nonzero()[0][0])
            raise DataError(
                f"{path}: column {column.name!r}, row {row + 1}: {column.iloc[row]} is no time",
                hint="expected dates, times, or whole numbers such as years",
            )
        return _dates_of_numbers(column.astype(np.int64).to_numpy())
    words = column.astype(str)
    if words.str.fullmatch(_QUARTER).all():
        return pd.PeriodIndex(words.str.replace(r"[ -]", "", regex=True), freq="Q").to_timestamp()
    if len(offsets := words.str.extract(_OFFSET)[0].dropna().unique()) > 1:
        raise DataError(
            f"{path}: column {column.name!r}: times with the offsets {joined(sorted(offsets))}, expected one of them",
            hint="bring them to one time zone first, such as UTC",
        )
    made = pd.to_datetime(column, errors="coerce", format="ISO8601")
    if made.isna().all():
        made = pd.to_datetime(column, errors="coerce")
    if made.isna().any():
        row = int(made.isna().to_numpy().nonzero()[0][0])
        raise DataError(
            f"{path}: column {column.name!r}, row {row + 1}: {column.iloc[row]!r} is no time that can be read",
            hint="dates such as 2024-01-31 can be",
        )
    return pd.DatetimeIndex(made)


def _dates_of_numbers(numbers: np.ndarray) -> Any:
    """Dates where all numbers are such as 20240131 or 202401, and the numbers themselves otherwise."""
    for form, low, high in (("%Y%m%d", 19000101, 21001231), ("%Y%m", 190001, 210012)):
        if ((low <= numbers) & (numbers <= high)).all():
            made = pd.to_datetime(pd.Series(numbers.astype(str)), format=form, errors="coerce")
            if not made.isna().any():
                return pd.DatetimeIndex(made)
    return pd.Index(numbers)


def _groups(path: Path, column: Any) -> dict[str, np.ndarray]:
    """The rows of each series, in the order in which they begin."""
    if column.isna().any():
        row = int(column.isna().to_numpy().nonzero()[0][0])
        raise DataError(f"{path}: column {column.name!r}, row {row + 1}: the id of the series is missing")
    words = column.astype(str).to_numpy()
    return {str(word): (words == word).nonzero()[0] for word in pd.unique(words)}


def _check_order(where: str, times: Any, rows: np.ndarray, id: str | None) -> None:
    here = times[rows]
    first: dict[Any, int] = {}
    for place, at in enumerate(here):
        if at in first:
            hint = (
                ""
                if id is not None
                else "if the file holds several series, --id names the column that tells them apart"
            )
            raise DataError(
                f"{where}: row {rows[place] + 1} has the time {at} again, which row {first[at] + 1} has", hint=hint
            )
        first[at] = int(rows[place])
    if not here.is_monotonic_increasing:
        place = next(k for k in range(1, len(here)) if here[k] < here[k - 1])
        raise DataError(
            f"{where}: row {rows[place] + 1} ({here[place]}) is earlier than row {rows[place - 1] + 1} "
            f"({here[place - 1]}) before it",
            hint="sort the file by its times",
        )


def _check_values(where: str, series: Any) -> None:
    seen = series.dropna()
    if not len(seen):
        raise DataError(f"{where}: all of its {len(series)} values are missing")
    if len(seen) < LEAST:
        raise DataError(f"{where}: {len(seen)} values, expected {LEAST} or more")
    if (seen == seen.iloc[0]).all():
        raise DataError(
            f"{where}: all of its {len(seen)} values are {seen.iloc[0]:g}: nothing can be estimated of a constant",
            hint="leave it out",
        )


def columns_of(text: str) -> list[str]:
    """The names in ``A,B,C``.

    Raises:
        DataError: for none, and one that is there twice.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise DataError(f"--value {text!r}: expected names of columns, each once", hint=joined(names))
    return names
