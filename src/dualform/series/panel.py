"""Sequences in the forms that people have them in, as one padded tensor."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dualform.core.errors import ArgumentError
from dualform.series.times import INDEX, gaps_between, times_of

FORMS = "an array (n, T) or (n, T, C), or a list of n arrays (T,) or (T, C)"


class Panel(NamedTuple):
    """Some sequences of the same channels.

    Attributes:
        x: ``(n, T, C)``, float64; NaN where a value is missing, and behind the length of a row.
        lengths: ``(n,)``, int64, at least 1.
        names: what errors call the rows, beside their numbers; None for nothing.
        intervals: ``(n, T)``, float64, the time from the sample before to each one; None where they are equal. Those
            that :func:`panel` makes are in the unit of the times, and NaN for the first sample of a row and behind its
            length; a model is given :func:`~dualform.series.times.in_steps` of them.
    """

    x: Tensor
    lengths: Tensor
    names: Sequence[Any] | None = None
    intervals: Tensor | None = None

    @property
    def there(self) -> Tensor:
        """``(n, T)``, whether an element is no padding."""
        return torch.arange(self.x.shape[1]) < self.lengths[:, None]

    @property
    def holes(self) -> bool:
        """Whether a value is missing that is no padding."""
        return bool((self.x.isnan().any(-1) & self.there).any())

    def take(self, rows: Tensor) -> "Panel":
        """Some of its rows, padded to the longest of them."""
        lengths = self.lengths[rows]
        names = None if self.names is None else [self.names[i] for i in rows.tolist()]
        longest = int(lengths.max()) if len(rows) else 0
        intervals = None if self.intervals is None else self.intervals[rows, :longest]
        return Panel(self.x[rows, :longest], lengths, names, intervals)

    def bridged(self) -> "Panel":
        """The same with a line, in time, from value to value where some are missing.

        Before the first value of a channel and behind its last one it is that value; a channel without any is left.
        """
        x, there = self.x.clone(), self.there
        at = torch.arange(x.shape[1], dtype=x.dtype).expand(x.shape[:2])
        if self.intervals is not None:
            at = self.intervals.nan_to_num(nan=1.0).cumsum(1)
        for row, channel in (x.isnan() & there[..., None]).any(1).nonzero().tolist():
            values, known = x[row, :, channel].numpy(), (there[row] & ~x[row, :, channel].isnan()).numpy()
            if known.any():
                gone, time = there[row].numpy() & ~known, at[row].numpy()
                values[gone] = np.interp(time[gone], time[known], values[known])
        return self._replace(x=x)

    def filled(self) -> Tensor:
        """``x`` with 0 in place of padding."""
        return self.x.masked_fill(~self.there[..., None], 0)


def row_name(row: int, names: Sequence[Any] | None) -> str:
    """``row 3``, or ``row 3 ('pump 7')``."""
    return f"row {row}" if names is None else f"row {row} ({names[row]!r})"


def is_table(X: Any) -> bool:
    """Whether X is of the form that scikit-learn takes, too: a row for each sequence, a column for each step.

    A list is one where it holds lists of numbers, equally many; of arrays it is a list of sequences.
    """
    if isinstance(X, list | tuple):
        shapes = {_shape(one) for one in X}
        if any(hasattr(one, "__array__") and _shape(one) != () for one in X):
            return False
        return len(shapes) <= 1 and all(shape is not None and len(shape) <= 1 for shape in shapes)
    if hasattr(X, "columns"):
        return not _levels(X) and not _nested(X)
    if hasattr(X, "index") and hasattr(X, "iloc"):
        return False  # a pandas.Series, of arrays
    dims = getattr(X, "ndim", 2)
    return dims != 3 and not (dims == 1 and getattr(X, "dtype", None) == np.dtype(object) and len(X) and _shape(X[0]))


def panel(
    where: str, X: Any, *, channels_first: bool = False, names: Sequence[Any] | None = None, times: Any = None
) -> Panel:
    """Sequences as a :class:`Panel`.

    Args:
        where: whose argument X is, first word of every error.
        X: ``(n, T)``, ``(n, T, C)``, a list of arrays ``(T,)`` or ``(T, C)`` of any lengths, or a frame of
            pandas: with a row for each sequence and a column for each step, with series as cells, a column for each
            channel, or with two levels of index, the sequence and the time. What is shorter than the array is padded
            with NaN.
        channels_first: whether what has two axes for each sequence is ``(C, T)``.
        names: what errors call the rows; None for the index of a frame.
        times: when the samples were taken: see :func:`~dualform.series.times.times_of`, or ``"index"`` for those of a
            frame with two levels of index; None where they are even.

    Raises:
        ArgumentError: for another form, a sequence that is empty or has other channels than the first one, a value
            that is infinite or no number, or times that do not rise; names the row.
    """
    if hasattr(X, "columns") and _levels(X):
        sequences, names, index = _of_levels(where, X)
        channels_first, times = False, index if isinstance(times, str) and times == INDEX else times
    elif hasattr(X, "columns") and _nested(X):
        names, channels_first = index_names(X.index), False
        sequences = [_stacked(where, row, cells) for row, cells in enumerate(X.itertuples(index=False, name=None))]
    elif isinstance(X, Tensor | np.ndarray) and X.ndim in (2, 3) and X.dtype != np.dtype(object):
        return _of_array(where, _numbers(where, X, "X"), channels_first, names, times)
    else:
        if hasattr(X, "iloc"):
            series: Any = X  # a pandas.Series of arrays
            names, X = names or index_names(series.index), series.to_numpy()
        if not isinstance(X, list | tuple | np.ndarray) or (isinstance(X, np.ndarray) and X.ndim == 0):
            raise ArgumentError(f"{where}: X is {type(X).__name__}, expected {FORMS}")
        sequences = list(X)
    arrays = []
    for row, one in enumerate(sequences):
        name = row_name(row, names)
        array = _numbers(where, one, f"{name} of X")
        if array.ndim not in (1, 2):
            raise ArgumentError(f"{where}: {name} of X has {array.ndim} axes, expected {FORMS}")
        array = array[:, None] if array.ndim == 1 else array.T if channels_first else array
        if len(array) == 0 or array.shape[1] == 0:
            raise ArgumentError(f"{where}: {name} of X is empty", hint="leave it out, with its y")
        if array.shape[1] != (first := arrays[0].shape[1] if arrays else array.shape[1]):
            raise ArgumentError(f"{where}: {name} of X has {array.shape[1]} channels, row 0 has {first}")
        arrays.append(torch.from_numpy(np.ascontiguousarray(array)))
    if not arrays:
        raise ArgumentError(f"{where}: X has no sequences, expected at least 1")
    return _of_tensor(where, pad_sequence(arrays, batch_first=True, padding_value=torch.nan), names, times, arrays)


def check_words(where: str, X: Any) -> None:
    """Refuse a table in which a word stands.

    Raises:
        ArgumentError: names the row.
    """
    table = np.asarray(X)
    if table.ndim != 2 or table.dtype.kind not in "OUS":
        return
    names = index_names(X.index) if hasattr(X, "columns") else None
    for row, one in enumerate(table):
        for column, value in enumerate(one):
            try:
                float(value) if isinstance(value, str) else None
            except ValueError:
                what = f"{row_name(row, names)} of X is {str(value)!r} in column {column}, expected a number"
                raise ArgumentError(f"{where}: {what}") from None


def check_channels(where: str, given: Panel, channels: int) -> None:
    """That there are as many channels as in training.

    Raises:
        ArgumentError: names both numbers.
    """
    if given.x.shape[2] != channels:
        came = f"the sequences, such as {row_name(0, given.names)}, have {given.x.shape[2]} channels"
        raise ArgumentError(f"{where}: {came}, expected {channels}, as in fit")


def _of_array(where: str, X: np.ndarray, channels_first: bool, names: Sequence[Any] | None, times: Any) -> Panel:
    X = X[..., None] if X.ndim == 2 else X.swapaxes(1, 2) if channels_first else X
    if X.size == 0:
        axes = ("sequences", "elements", "channels")
        lacking = next(name for name, size in zip(axes, X.shape, strict=True) if size == 0)
        raise ArgumentError(f"{where}: X has shape {tuple(X.shape)}: no {lacking}")
    x = torch.from_numpy(np.ascontiguousarray(X))
    return _of_tensor(where, x, names, times, x)


def _of_tensor(where: str, x: Tensor, names: Sequence[Any] | None, times: Any, rows: Iterable[Tensor]) -> Panel:
    """The panel of ``(n, T, C)``, where the end of each row that is NaN in all channels is padding.

    ``times`` are of ``rows``, which are as long as they were given.
    """
    if (wrong := x.isinf()).any():
        row, step, channel = wrong.nonzero()[0].tolist()
        what = f"{row_name(row, names)} of X is {x[row, step, channel].item()} in element {step}, channel {channel}"
        raise ArgumentError(f"{where}: {what}, expected finite numbers, or NaN for those that are missing")
    there = x.isnan().all(-1).logical_not()
    lengths = (torch.arange(1, x.shape[1] + 1) * there).amax(1)
    if (empty := lengths == 0).any():
        row = int(empty.nonzero()[0])
        raise ArgumentError(f"{where}: {row_name(row, names)} of X has no values, only NaN", hint="leave it out")
    longest = int(lengths.max())
    if times is None:
        return Panel(x[:, :longest], lengths, names)
    called = [row_name(row, names) for row in range(len(x))]
    taken = times_of(where, times, [len(row) for row in rows], called)
    return Panel(x[:, :longest], lengths, names, gaps_between(where, taken[:, :longest], lengths, called))


def _numbers(where: str, value: Any, what: str) -> np.ndarray:
    """An array in float64."""
    try:
        array = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
        if array.dtype.kind == "c":
            raise TypeError("complex numbers")
        return array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"{where}: {what} is not of numbers: {error}", hint=f"expected {FORMS}") from None


def _shape(value: Any) -> tuple[int, ...] | None:
    """Of an array, or of what becomes one; None where that is ragged."""
    try:
        return tuple(np.shape(value))
    except ValueError:
        return None


def _levels(X: Any) -> bool:
    return getattr(X.index, "nlevels", 1) > 1


def _nested(X: Any) -> bool:
    """Whether the cells of a frame are sequences themselves."""
    return X.size > 0 and all(kind == np.dtype(object) for kind in X.dtypes) and bool(_shape(X.iloc[0, 0]) != ())


def index_names(index: Any) -> list[Any] | None:
    """What an index calls the rows, where it is more than their numbers."""
    names = index.tolist()
    return None if names == list(range(len(names))) else names


def _stacked(where: str, row: int, cells: tuple[Any, ...]) -> np.ndarray:
    """The channels of one row, side by side."""
    arrays = [_numbers(where, cell, f"row {row} of X") for cell in cells]
    if len({array.shape for array in arrays}) > 1 or arrays[0].ndim != 1:
        shapes = ", ".join(str(array.shape) for array in arrays)
        raise ArgumentError(f"{where}: row {row} of X has channels of the shapes {shapes}, expected one length")
    return np.stack(arrays, 1)


def _of_levels(where: str, X: Any) -> tuple[list[np.ndarray], list[Any], list[np.ndarray]]:
    """The sequences of a frame with the index (sequence, time), in the order in which they begin, names, and times."""
    if X.index.nlevels != 2:
        raise ArgumentError(f"{where}: X has {X.index.nlevels} levels of index, expected 2: the sequence and the time")
    sequences, names, taken = [], [], []
    for name, part in X.groupby(level=0, sort=False):
        times = part.index.get_level_values(1)
        check_times(where, str(name), times)
        sequences.append(part.to_numpy())
        names.append(name)
        taken.append(times.to_numpy())
    return sequences, names, taken


def check_times(where: str, name: str, times: Any) -> None:
    """That the times of a sequence, a pandas.Index or Series, rise.

    Raises:
        ArgumentError: names the sequence, and the first two times that do not.
    """
    values = times.to_numpy()
    wrong = ~(values[1:] > values[:-1])
    if wrong.any():
        i = int(wrong.argmax())
        what = f"time {values[i + 1]} after {values[i]}" if values[i + 1] != values[i] else f"time {values[i]} twice"
        raise ArgumentError(f"{where}: sequence {name!r} has {what}, expected rising times", hint="sort by time first")
