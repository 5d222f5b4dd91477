"""Tables of pandas: the frequency of their times, the season that goes with it, and the times to come."""

from typing import Any

import numpy as np
import pandas as pd

from dualform.core.errors import ArgumentError, DataError

_SEASONS = {"h": 24, "D": 7, "B": 5, "W": 52, "M": 12, "ME": 12, "MS": 12, "Q": 4, "QE": 4, "QS": 4}
"""Steps of a season by the unit of a frequency: a day of hours, a week of days, a year of weeks, months or quarters."""


def season_of(frequency: Any) -> int:
    """The season of a frequency of pandas in steps: 24 for hours, 7 for days, 12 for months; 1 for all others.

    A multiple of a unit has as many fewer steps: 12 for "2h". Minutes that divide an hour have a day.
    """
    offset = pd.tseries.frequencies.to_offset(frequency)
    if offset is None:
        return 1
    unit, count = offset.name.split("-")[0], offset.n
    if unit == "min" and 60 % count == 0 and count >= 10:
        return 1440 // count
    whole = _SEASONS.get(unit, 1)
    return whole // count if whole % count == 0 else 1


def season_of_index(index: Any) -> int:
    """The season of the times of an index; 1 where they are no times, or not regular."""
    frequency = getattr(index, "freq", None)
    if frequency is None and isinstance(index, pd.DatetimeIndex) and len(index) > 2:
        frequency = pd.infer_freq(index)
    return 1 if frequency is None else season_of(frequency)


def future_index(where: str, index: Any, steps: int) -> Any:
    """The next places of a regular index.

    Raises:
        ArgumentError: for one that is not regular.
    """
    if isinstance(index, pd.PeriodIndex):
        return pd.period_range(index[-1] + 1, periods=steps, freq=index.freq, name=index.name)
    if isinstance(index, pd.DatetimeIndex):
        frequency = index.freq or (pd.infer_freq(index) if len(index) > 2 else None)
        if frequency is None:
            hint = "y.asfreq(...) makes one that is, with NaN where there are gaps"
            raise ArgumentError(f"{where}: the times of y have no regular frequency", hint=hint)
        return pd.date_range(index[-1], periods=steps + 1, freq=frequency, name=index.name)[1:]
    if pd.api.types.is_integer_dtype(index.dtype):
        changes = np.unique(np.diff(index.to_numpy()))
        if len(changes) == 1 and changes[0] > 0:
            first = int(index[-1]) + int(changes[0])
            return pd.RangeIndex(first, first + int(changes[0]) * steps, int(changes[0]), name=index.name)
    raise ArgumentError(
        f"{where}: the index of y ({index.dtype}) does not say what comes next",
        hint="times with a frequency, or whole numbers at equal distances; y.reset_index(drop=True) counts from 0",
    )


def future_table(where: str, given: Any, values: list[Any], levels: list[Any] | None) -> Any:
    """Results ``(h,)`` or ``(h, K)`` of each series as a table of the next times.

    Args:
        where: the first word of an error.
        given: a Series, or a DataFrame with a column for each series.
        values: of each series.
        levels: names of the K columns.
    """
    index = future_index(where, given.index, len(values[0]))
    if given.ndim == 1:
        if levels is None:
            return pd.Series(values[0], index=index, name=given.name)
        return pd.DataFrame(values[0], index=index, columns=pd.Index(levels))
    if levels is None:
        return pd.DataFrame(np.stack(values, 1), index=index, columns=given.columns)
    columns = pd.MultiIndex.from_product([given.columns, levels])
    return pd.DataFrame(np.concatenate(values, 1), index=index, columns=columns)


def regular(where: str, times: Any, frequency: str | None) -> Any:
    """The regular times that some times lie on, from the first to the last: an index with a frequency.

    Args:
        where: the first word of an error, naming the column.
        times: a DatetimeIndex that increases, with gaps; or whole numbers, which lie at multiples of the smallest
            distance.
        frequency: of pandas, such as "MS"; None finds one.

    Raises:
        DataError: where there is none, naming the first time that is not on it, and for an unknown one.
    """
    if not isinstance(times, pd.DatetimeIndex):
        step = int(np.gcd.reduce(np.diff(times))) if len(times) > 1 else 1
        places = range(int(times[0]), int(times[-1]) + step, step)
        _check_dense(where, len(times), len(places), f"steps of {step}")
        return pd.RangeIndex(places)
    if frequency is not None:
        try:
            grid = _grid(times, frequency)
        except (ValueError, KeyError):
            hint = "pandas' names: h, D, B, W, MS (begin of a month), ME (its end), QS, YS, ..."
            raise DataError(f"{where}: frequency {frequency!r} is not known", hint=hint) from None
        if not (there := times.isin(grid)).all():
            bad = times[~there][0]
            raise DataError(f"{where}: the time {bad} is not on the frequency {frequency!r} that begins at {times[0]}")
        return grid
    for guess in _guesses(times):
        grid = _grid(times, guess)
        if times.isin(grid).all():
            _check_dense(where, len(times), len(grid), f"the frequency {guess!r}")
            weekdays = guess == "D" and len(times) > 10 and max(time.weekday() for time in times) < 5
            return _grid(times, "B") if weekdays else grid
    if len(times) < 3:
        raise DataError(f"{where}: {len(times)} times do not tell a frequency", hint="--freq D, MS, h, ...")
    steps = pd.Series(np.diff(times))
    usual = steps.mode()[0]
    bad = int((steps != usual).to_numpy().nonzero()[0][0])
    raise DataError(
        f"{where}: no frequency fits its times: {usual} is the most common step, but {times[bad + 1]} follows "
        f"{times[bad]}",
        hint="--freq says what it is; times that lie on none have to be brought to one first, such as by a mean",
    )


def _check_dense(where: str, count: int, places: int, steps: str) -> None:
    """Raise where nearly all values would be missing."""
    if places > 50 * count + 1000:
        raise DataError(
            f"{where}: {count} times are spread over {places:,} places in {steps}",
            hint="a coarser --freq, after bringing the values to it, or --id for several series",
        )


def _grid(times: Any, frequency: str) -> Any:
    return pd.date_range(times[0], times[-1], freq=frequency)


def _guesses(times: Any) -> list[str]:
    """Frequencies that hold for some three neighbours or more, the finest first."""
    found: dict[str, None] = {}
    for size in (len(times), 8, 5, 3):
        for first in range(0, max(1, len(times) - size + 1)):
            if len(window := times[first : first + size]) > 2 and (guess := pd.infer_freq(window)):
                found.setdefault(guess)
            if len(found) > 8 or first > 200:
                break
    start = times[0]
    return sorted(found, key=lambda f: start + pd.tseries.frequencies.to_offset(f) - start)
