"""The output of a run: a progress bar and lines for people, ``metrics.jsonl`` for programs, TensorBoard, a picture."""

import json
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from dualform.core.json_file import parse_json
from dualform.core.options import fits
from dualform.models.saving.files import replacing_file
from dualform.train.events import EventFile
from dualform.train.outlet import Outlet
from dualform.train.plot import plot_losses

METRICS_FILE, PICTURE_FILE, TENSORBOARD_FOLDER = "metrics.jsonl", "loss.png", "tensorboard"
_REDRAW = 60.0  # seconds between pictures while the run goes on


class Report:
    """The record of one run, from ``step`` on; lines in ``metrics.jsonl`` after ``step`` are dropped.

    A context manager: it ends the progress bar, closes the files and draws the last picture. While inside, the console
    writes through ``outlet``, which notes where its reader is gone.

    Args:
        out: the run's folder.
        step: steps already done.
        console: for the lines and, on a terminal, the progress bar.
        baselines: bits per byte of the compressors.
        title: of the picture.
    """

    def __init__(self, out: Path, step: int, console: Console, baselines: Mapping[str, float | None], title: str = ""):
        self._out, self._console, self._baselines, self._title = out, console, baselines, title
        self.outlet, self._file = Outlet(console.file), console.file
        self._rows = [_finite(row) for row in read_metrics(out) if row["step"] <= step]
        with replacing_file(out / METRICS_FILE) as kept:
            kept.write_text("".join(map(_line, self._rows)), encoding="utf-8")
        self._metrics = (out / METRICS_FILE).open("a", encoding="utf-8")
        self._events = EventFile(out / TENSORBOARD_FOLDER, step + 1 if step else 0)
        self._drawn = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[bits]} bits per byte  {task.fields[rate]} tokens/s  {task.fields[left]} left"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=1.0, bits="-", rate="-", left="-")

    def __enter__(self) -> "Report":
        self._console.file = cast("IO[str]", self.outlet)
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()
        self._console.file = self._file
        self._metrics.close()
        self._events.close()
        self._draw()

    def say(self, line: str) -> None:
        """One line for a person."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def show(self, progress: float, bits: float, rate: float, left: float) -> None:
        """Move the bar: done share, bits per byte of the text that is trained on, tokens per second, seconds left.

        Before the first measurement ``bits`` is NaN.
        """
        shown, pace = ("-", "-") if math.isnan(bits) else (f"{bits:.3f}", f"{rate:,.0f}")
        self._bar.update(self._task, completed=progress, bits=shown, rate=pace, left=duration(left))

    def record(self, kind: str, step: int, elapsed: float, **values: float) -> None:
        """One line of ``metrics.jsonl``, and a point in each TensorBoard curve ``kind/name``.

        A number that is not finite is ``null`` in the line, as JSON has none. What the last line says is not said
        again, as after a kill between the last evaluation and the end of the run.
        """
        row = _finite({"kind": kind, "step": step, "elapsed": round(elapsed, 3), **values})
        if self._rows and row == {**self._rows[-1], "elapsed": row["elapsed"]}:
            return
        self._rows.append(row)
        self._metrics.write(_line(row))
        self._metrics.flush()
        self._events.add(step, {f"{kind}/{name}": value for name, value in values.items()})
        if time.monotonic() - self._drawn > _REDRAW:
            self._draw()

    def _draw(self) -> None:
        with suppress(OSError):  # a picture that cannot be written is no reason to end a run
            plot_losses(self._out / PICTURE_FILE, self._rows, self._baselines, self._title)
        self._drawn = time.monotonic()


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``; none where there is no file.

    Lines that are damaged, such as one that a kill has cut short, are left out: they are no reason to lose a run.
    """
    try:
        lines = (out / METRICS_FILE).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    return [row for line in lines if (row := _row(line)) is not None]


def _row(line: bytes) -> dict[str, Any] | None:
    """What :meth:`Report.record` wrote; None for anything else."""
    try:
        row = parse_json(line)
    except ValueError:
        return None
    whole = isinstance(row, dict) and fits(row.get("kind"), str) and fits(row.get("step"), int)
    if not whole or not 0 <= row["step"] < 2**63:
        return None
    numbers = (value for key, value in row.items() if key != "kind" and value is not None)
    return row if all(fits(value, float) and abs(value) < 2.0**1023 for value in numbers) else None


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def duration(seconds: float) -> str:
    """``1:05``, or ``2:01:05`` from an hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def amount(count: int, unit: str) -> str:
    """``768 B``, ``49 kB``, ``7.3 MB``; a unit that is a word keeps its space: ``1.2 M tokens``."""
    for size, prefix in ((1e9, "G"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.1f} {prefix}{unit}"
    return f"{count / 1e3:.0f} k{unit}" if count >= 1e4 else f"{count} {unit.strip()}"
