"""Sequences in files: a table with a row for each, one with a row for each step, or a folder with a file for each."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from dualform.core.errors import DataError, DualformError
from dualform.core.options import suggestion
from dualform.series.panel import Panel, check_times, panel
from dualform.series.times import usual_step

try:
    import pandas as pd
except ImportError as error:
    raise DualformError("tables need pandas, which is not installed", hint='pip install "dualform[series]"') from error

SEPARATORS = {".csv": ",", ".tsv": "\t"}
_UNEVEN = 0.01  # how much longer than the shortest interval the longest may be, as a share


class Table(NamedTuple):
    """What was read.

    Attributes:
        panel: the sequences; their names are those of the file, or the lines.
        target: ``(n,)``, what is to be said of each.
        channels: the names of the channels.
        notes: what a reader should know, in sentences.
    """

    panel: Panel
    target: np.ndarray
    channels: list[str]
    notes: list[str]


def read_table(path: str | Path, target: str, *, id: str | None = None, time: str | None = None) -> Table:
    """Sequences and what is to be said of them.

    Args:
        path: a file, ``.csv`` or ``.tsv``, or a folder of such files, each a sequence with a row for each step.
        target: the column with what is to be said; it is the same in all steps of a sequence.
        id: the column that says which sequence a row is a step of. Without it every row is a sequence and every other
            column one of its steps, in their order; so it is, too, where every row has an id of its own.
        time: the column with the times of the steps of a sequence, which must rise. Numbers, or dates in ISO 8601, are
            intervals of the panel where they are not even; other words order the steps.

    Raises:
        DataError: for a file that is no table, a column that is not there, or a value that is no number; names the
            line.
        ArgumentError: for times out of order, infinities, and sequences without a value; names the sequence.
    """
    path = Path(path)
    if path.is_dir():
        frame, id = _folder(path), id or _FILE
    else:
        frame = _file(path)
    _check_columns(path, frame, {"--target": target, "--id": id, "--time": time})
    if (gone := frame[target].isna()).any():
        raise DataError(f"{path}, {_line(frame, gone)}: {target!r} is missing", hint="fill it in, or leave the row out")
    wide = id is None or (frame[id].is_unique and time is None)
    return _wide(path, frame, target, id) if wide else _long(path, frame, target, str(id), time)


_FILE = "(file)"  # the column that says which file a row is of


def _wide(path: Path, frame: Any, target: str, id: str | None) -> Table:
    steps = [name for name in frame.columns if name not in (target, id)]
    if not steps:
        raise DataError(f"{path}: no columns beside {target!r}", hint="every other column is a step of the sequence")
    values = _numbers(path, frame, steps)
    names = [f"line {line}" for line in frame.index] if id is None else frame[id].tolist()
    found = panel(str(path), values.to_numpy(), names=names)
    return Table(found, frame[target].to_numpy(), ["value"], [])


def _long(path: Path, frame: Any, target: str, id: str, time: str | None) -> Table:
    channels = [name for name in frame.columns if name not in (target, id, time)]
    if not channels:
        raise DataError(
            f"{path}: no columns beside {target!r}, the id and the time", hint="every other one is a channel"
        )
    values, names, sequences, targets, taken = _numbers(path, frame, channels), [], [], [], []
    if time is not None:
        frame[time] = _dates(frame[time])
    for name, rows in frame.groupby(id, sort=False):
        if time is not None:
            check_times(str(path), str(name), rows[time])
            taken.append(rows[time].to_numpy())
        if (differ := rows[target] != rows[target].iloc[0]).any():
            first, other = rows[target].iloc[0], rows[target][differ].iloc[0]
            what = f"sequence {name!r} has {target!r} {first!r} and, in {_line(rows, differ)}, {other!r}"
            raise DataError(f"{path}: {what}", hint="expected one for each sequence")
        names.append(name)
        sequences.append(values.loc[rows.index].to_numpy())
        targets.append(rows[target].iloc[0])
    times = taken if taken and taken[0].dtype.kind in "iufM" else None
    found = panel(str(path), pd.Series(sequences), names=names, times=times)
    notes = [] if found.intervals is None else _uneven(found.intervals, names)
    found = found if notes else found._replace(intervals=None)
    return Table(found, np.array(targets), [str(name) for name in channels], notes)


def _file(path: Path) -> Any:
    """A frame whose index is the lines of the file, the header being line 1."""
    separator = SEPARATORS.get(path.suffix.lower())
    if separator is None:
        raise DataError(f"{path}: expected a file that ends in {' or '.join(SEPARATORS)}, or a folder of such files")
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    try:
        frame = pd.read_csv(path, sep=separator)
    except (ValueError, OSError) as error:  # of which pandas' own errors are
        raise DataError(f"{path}: cannot be read as a table: {str(error).strip()}") from None
    if not len(frame):
        raise DataError(f"{path}: a table without rows")
    frame.index += 2
    return frame


def _folder(path: Path) -> Any:
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in SEPARATORS)
    if not files:
        raise DataError(f"{path}: no files that end in {' or '.join(SEPARATORS)}")
    frames = []
    for file in files:
        frame = _file(file)
        if frames and list(frame.columns) != list(frames[0].columns):
            came, first = ", ".join(map(str, frame.columns)), ", ".join(map(str, frames[0].columns))
            raise DataError(f"{file}: the columns {came}, expected those of {files[0].name}: {first}")
        frames.append(frame)
    names = [file.stem for file, frame in zip(files, frames, strict=True) for _ in range(len(frame))]
    joined = pd.concat(frames, ignore_index=True)
    joined[_FILE] = names
    return joined


def _check_columns(path: Path, frame: Any, wanted: dict[str, str | None]) -> None:
    for option, name in wanted.items():
        if name is not None and name not in frame.columns:
            known = [str(column) for column in frame.columns if column != _FILE]
            raise DataError(f"{path}: no column {name!r} ({option})", hint=suggestion(name, known))


def _numbers(path: Path, frame: Any, columns: list[Any]) -> Any:
    """Those columns as numbers."""
    found = frame[columns].apply(pd.to_numeric, errors="coerce")
    wrong = found.isna() & frame[columns].notna()
    for name in columns:
        if wrong[name].any():
            value = frame[name][wrong[name]].iloc[0]
            what = f"{_line(frame, wrong[name])}: {str(name)!r} is {value!r}, expected a number"
            raise DataError(f"{path}, {what}", hint="leave the column out of the file, or name it with --id or --time")
    return found.astype(np.float64)


def _line(frame: Any, marked: Any) -> str:
    """Where the first marked row is."""
    row = marked[marked].index[0]
    return f"a row of {frame[_FILE][row]!r}" if _FILE in frame.columns else f"line {row}"


def _dates(times: Any) -> Any:
    """Words as dates, where all of them are dates."""
    if pd.api.types.is_numeric_dtype(times) or pd.api.types.is_datetime64_any_dtype(times):
        return times
    found = pd.to_datetime(times, format="ISO8601", errors="coerce", utc=True).dt.tz_localize(None)
    return times if found.isna().any() else found


def _uneven(gaps: Tensor, names: list[Any]) -> list[str]:
    """A note, where the times between two steps are not all the same."""
    known = gaps[~gaps.isnan()]
    if not len(known) or known.max() <= (1 + _UNEVEN) * known.min():
        return []
    short, long = ((gaps == edge).nonzero()[0, 0] for edge in (known.min(), known.max()))
    what = f"{known.min():g} in {names[int(short)]!r} and {known.max():g} in {names[int(long)]!r}"
    return [f"times are not even, such as {what}: the model reads the intervals, in steps of {usual_step(gaps):g}"]
