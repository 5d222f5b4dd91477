"""What ``dualform watch`` keeps: the streams of a model by their ids, the time of each, and all of it in a file."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualform.cli.lines import Columns, Sample
from dualform.core.errors import ArgumentError, CheckpointError, DataError, DualformError
from dualform.core.json_file import entry, parse_json, to_json
from dualform.core.options import brief
from dualform.core.recurrence import State
from dualform.core.tree import state_class
from dualform.generation.streams import TILE, Streams, watched
from dualform.models.saving.state import fingerprint, load_meta, load_state, save_state

_KEY = "dualform_watch"  # of the file's metadata
_NAMES = tuple[str, ...]
_ABOUT: dict[str, Any] = {
    "model": str,
    "columns": _NAMES,
    "values": _NAMES,
    "id": str | None,
    "time": str | None,
    "step": float | None,
    "window": int | None,
    "samples": int,
    "ids": _NAMES,
}


class Options(NamedTuple):
    """How a model watches.

    Attributes:
        level: the probability of a band.
        alarm: the score from which a sample is an anomaly.
        step: the time between two samples of training; None for times that say nothing to the model.
        window: the last elements that a model pools over.
    """

    level: float = 0.95
    alarm: float = 4.0
    step: float | None = None
    window: int | None = None


@state_class
class Kept(NamedTuple):
    """The state of a file: of every slot, and the time of its last sample, NaN where there is none."""

    streams: State
    time: Tensor  # (slots,), float64


class Watch:
    """A model that watches lines.

    Args:
        model: as :func:`~dualform.generation.streams.watched` takes.
        columns: of the lines.
        options: how.

    Raises:
        ArgumentError: for a model that cannot watch, other channels than it has, and a time that it needs and that the
            lines do not have.
    """

    def __init__(self, model: Any, columns: Columns, options: Options):
        self.model, self.columns, self.options = model, columns, options
        self.watched = watched(model, columns.channels, level=options.level, window=options.window)
        have, want = len(columns.channels), self.watched.channels
        if have != want:
            raise ArgumentError(
                f"the lines have {have} channel{'s' * (have != 1)}, {', '.join(columns.channels)}, and the model has "
                f"{want}",
                hint="--value COL,COL names the columns that are channels, in the order of training",
            )
        if columns.time is None and (self.watched.elapses or options.step is not None):
            why = "--step is given" if options.step is not None else "the model is one in continuous time"
            raise ArgumentError(f"{why}, and no column has the time", hint="--time COL, and a header that names it")
        self._step = 1.0 if options.step is None and self.watched.elapses else options.step
        if self._step is not None:
            self.watched.check_intervals()
        self.samples = 0
        self._slots: dict[str, int] = {}
        self._times: list[float] = []
        self._streams = Streams(self.watched, 1 if columns.id is None else TILE)

    @property
    def header(self) -> list[str]:
        """The names of what comes out."""
        names, scores = self.columns.names, ["score", "anomaly"] if self.watched.scores else []
        keys = [names[i] for i in (self.columns.id, self.columns.time) if i is not None]
        return [*keys, *self.watched.columns, *scores]

    def push(self, samples: Iterable[Sample]) -> Iterator[list[list[str]]]:
        """What is said of samples, in their order, some at a time.

        Raises:
            DataError: for a time that does not rise, or a value that is missing where none may be; names the line. All
                samples before it have been taken in.
        """
        for some in self._rounds(samples):
            yield self._advance(some)

    def _rounds(self, samples: Iterable[Sample]) -> Iterator[list[Sample]]:
        """Samples of different streams, which may be stepped together."""
        some: dict[str, Sample] = {}
        try:
            for one in samples:
                if one.id in some:
                    yield list(some.values())
                    some = {}
                self._check(one)
                some[one.id] = one
        except DualformError:
            if some:
                yield list(some.values())
            raise
        if some:
            yield list(some.values())

    def _check(self, one: Sample) -> None:
        columns = self.columns
        if self.watched.refuses_missing:
            for name, value in zip(columns.channels, one.values, strict=True):
                if math.isnan(value):
                    raise DataError(f"line {one.line}, {name}: is missing, and {self.watched.refuses_missing}")
        slot = self._slots.get(one.id)
        if one.time is None or columns.time is None or slot is None:
            return
        where, before = f"line {one.line}, {columns.names[columns.time]}", self._times[slot]
        if not one.time > before:
            of = f" of stream {brief(one.id)}" if columns.id is not None else ""
            hint = "sort the lines by time; a stream is never taken back"
            raise DataError(f"{where}: {one.shown} is not after {before:.12g}, the time before it{of}", hint=hint)
        if self._step is not None and (wrong := self.watched.refuses_interval((one.time - before) / self._step)):
            raise DataError(f"{where}: {wrong}", hint=f"--step is {self._step:g}, the time between two samples")

    def _advance(self, some: list[Sample]) -> list[list[str]]:
        slots, intervals = [], []
        for one in some:
            slot = self._slots.setdefault(one.id, len(self._slots))
            if slot == len(self._times):
                self._times.append(math.nan)
            slots.append(slot)
            if one.time is not None:
                gone = one.time - self._times[slot]
                intervals.append(1.0 if math.isnan(gone) or self._step is None else gone / self._step)
                self._times[slot] = one.time
        x = torch.tensor([one.values for one in some], dtype=torch.float64)
        timed = self._step is not None
        said = self._streams.step(slots, x, torch.tensor(intervals, dtype=torch.float64) if timed else None)
        self.samples += len(some)
        cells, scores = said.cells.tolist(), said.score.tolist()
        return [self._told(*row) for row in zip(some, cells, scores, strict=True)]

    def _told(self, one: Sample, cells: list[float], score: float) -> list[str]:
        told = [key for key, at in ((one.id, self.columns.id), (one.shown, self.columns.time)) if at is not None]
        for name, value in zip(self.watched.columns, cells, strict=True):
            words = self.watched.words.get(name)
            told.append("" if math.isnan(value) else f"{value:.7g}" if words is None else words[int(value)])
        if self.watched.scores:
            nothing = math.isnan(score)
            told += ["", ""] if nothing else [f"{score:.3f}", str(int(score >= self.options.alarm))]
        return told

    def _about(self) -> dict[str, Any]:
        columns = self.columns
        id, time = (None if at is None else columns.names[at] for at in (columns.id, columns.time))
        about = {"model": fingerprint(self.model), "columns": columns.names, "values": columns.channels}
        about |= {"id": id, "time": time, "step": self.options.step, "window": self.options.window}
        return {**about, "samples": self.samples, "ids": tuple(self._slots)}

    def save(self, path: Path) -> None:
        """Write the state, all or nothing.

        Raises:
            CheckpointError: when the disk refuses.
        """
        streams = self._streams.state()
        time = torch.full((self._streams.slots,), math.nan, dtype=torch.float64)
        time[: len(self._times)] = torch.tensor(self._times, dtype=torch.float64)
        save_state(Kept(streams, time), path, {_KEY: to_json(self._about())})

    def restore(self, path: Path) -> None:
        """Go on from a file.

        Raises:
            CheckpointError: for a file that is missing or damaged, or the state of another model or of other options.
        """
        found, now = saved_about(path), self._about()
        if found["model"] != now["model"]:
            raise CheckpointError(f"{path}: the state of another model", hint="give that model, or another file")
        for name in ("columns", "values", "id", "time", "step", "window"):
            if found[name] != now[name]:
                hint = "go on with the same columns and options, or give another file"
                raise CheckpointError(f"{path}: {name} was {brief(found[name])}, now {brief(now[name])}", hint=hint)
        kept = load_state(path, Kept(self.watched.start(1), torch.zeros(1, dtype=torch.float64)))
        slots, tile, ids = len(kept.time), self._streams.tile, found["ids"]
        if slots % tile or slots < max(len(ids), 1) or len(set(ids)) < len(ids):
            raise CheckpointError(f"{path}: {slots} slots of {len(ids)} streams, in tiles of {tile}", hint="damaged?")
        self._streams.restore(kept.streams)
        self._slots = {id: slot for slot, id in enumerate(ids)}
        self._times, self.samples = kept.time[: len(ids)].tolist(), found["samples"]


def saved_about(path: Path) -> dict[str, Any]:
    """What the file of a watch says of its model, its lines and its streams.

    Raises:
        CheckpointError: for a file that is missing, damaged or of something else.
    """
    meta = load_meta(path)
    if _KEY not in meta:
        raise CheckpointError(f"{path}: a state, but none that dualform watch wrote")
    try:
        about = parse_json(meta[_KEY])
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}", hint="damaged?") from None
    if not isinstance(about, dict):
        raise CheckpointError(f"{path}: {brief(about)}, expected a table", hint="damaged?")
    about = {name: tuple(value) if isinstance(value, list) else value for name, value in about.items()}
    return {name: entry(about, name, kind, path) for name, kind in _ABOUT.items()}


def saved_columns(path: Path) -> Columns:
    """The columns of the lines of a file's watch.

    Raises:
        CheckpointError: as :func:`saved_about`.
    """
    about = saved_about(path)
    names = about["columns"]
    wanted = [*about["values"], *(about[name] for name in ("id", "time") if about[name] is not None)]
    if strange := [name for name in wanted if name not in names]:
        raise CheckpointError(f"{path}: {brief(strange[0])} is no column of {', '.join(names)}", hint="damaged?")
    id, time = (None if about[name] is None else names.index(about[name]) for name in ("id", "time"))
    return Columns(names, tuple(map(names.index, about["values"])), id, time)
