"""The times at which samples were taken, and the intervals between them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dualform.core.errors import ArgumentError

INDEX = "index"
FORMS = "an array (T,) or (n, T), a list of n arrays (T,), or 'index'"


def times_of(where: str, times: Any, counts: Sequence[int], rows: Sequence[str]) -> Tensor:
    """The times of all samples, ``(n, T)``, float64, in their own unit, dates in seconds; NaN behind each row.

    Args:
        where: whose argument it is, first word of every error.
        times: ``(T,)``, the same for all rows, ``(n, T)``, or n arrays ``(T,)``; numbers or dates.
        counts: how many samples each row has.
        rows: what errors call the rows.

    Raises:
        ArgumentError: for another form, or a row with more times than samples, or fewer; names the row.
    """
    if isinstance(times, str):
        raise ArgumentError(f"{where}: times is {times!r}, expected {FORMS}", hint="'index' is of a frame of pandas")
    if isinstance(times, Tensor):
        times = times.detach().cpu().numpy()
    elif hasattr(times, "to_numpy"):
        times = times.to_numpy()
    if not isinstance(times, list | tuple | np.ndarray):
        raise ArgumentError(f"{where}: times is {type(times).__name__}, expected {FORMS}")
    if len(times) and all(np.ndim(one) == 0 for one in times):
        shared = _seconds(where, "times", times)
        found = [shared[:count] if count <= max(counts) == len(shared) else shared for count in counts]
    else:
        if len(times) != len(counts):
            raise ArgumentError(f"{where}: X has {len(counts)} sequences, times has {len(times)}")
        found = [_seconds(where, f"{row} of times", one) for row, one in zip(rows, times, strict=True)]
    for row, count, one in zip(rows, counts, found, strict=True):
        if one.shape != (count,):
            raise ArgumentError(f"{where}: {row} has {count} samples, and times of the shape {tuple(one.shape)}")
    return pad_sequence(found, batch_first=True, padding_value=torch.nan)


def gaps_between(where: str, times: Tensor, lengths: Tensor, rows: Sequence[str]) -> Tensor:
    """The time from the sample before to each one, ``(n, T)``; NaN for the first of a row, and behind its length.

    Raises:
        ArgumentError: for times that do not rise, or are missing or infinite; names the row.
    """
    there = torch.arange(times.shape[1]) < lengths[:, None]
    if (strange := there & ~times.isfinite()).any():
        row, step = strange.nonzero()[0].tolist()
        value = times[row, step].item()
        raise ArgumentError(f"{where}: {rows[row]} of times is {value} in element {step}, expected finite times")
    gaps = times.diff(dim=1, prepend=torch.full_like(times[:, :1], torch.nan))
    if (wrong := there & (gaps <= 0)).any():
        row, step = wrong.nonzero()[0].tolist()
        before, after = times[row, step - 1].item(), times[row, step].item()
        what = f"{after:g} after {before:g}" if after != before else f"{after:g} twice"
        raise ArgumentError(
            f"{where}: {rows[row]} of times has {what} in element {step}, expected rising times",
            hint="sort each sequence by time first",
        )
    return gaps.masked_fill(~there, torch.nan)


def usual_step(gaps: Tensor) -> float:
    """The median of all gaps; 1 where there are none, as every sequence has one sample."""
    found = gaps.nanmedian().item()
    return found if found == found else 1.0


def in_steps(gaps: Tensor, step: float) -> Tensor:
    """The gaps in units of a step, 1 where there is none."""
    return (gaps / step).nan_to_num(nan=1.0)


def _seconds(where: str, what: str, values: Any) -> Tensor:
    """Times as numbers: dates in seconds since the first of them."""
    try:
        array: Any = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
        if array.dtype.kind == "O":
            array = array.astype(np.float64) if _number(array) else array.astype("datetime64[ns]")
        if array.dtype.kind == "M" and array.size:
            array = array - array[~np.isnat(array)][0] if not np.isnat(array).all() else array - array
        if array.dtype.kind == "m":
            return torch.from_numpy(array / np.timedelta64(1, "s"))
        if array.dtype.kind not in "iuf":
            raise TypeError(f"values of the type {array.dtype}")
        return torch.from_numpy(array.astype(np.float64))
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"{where}: {what} is not of numbers or dates: {error}", hint=f"expected {FORMS}") from None


def _number(array: np.ndarray) -> bool:
    return bool(array.size) and isinstance(array.flat[0], int | float | np.number)
