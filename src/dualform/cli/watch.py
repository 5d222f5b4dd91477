"""``dualform watch``: what a model says of numbers as they come in a pipe."""

import csv
import os
import select
import signal
import sys
from io import UnsupportedOperation
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from dualform.cli.text import output
from dualform.core.errors import ArgumentError, DataError

if TYPE_CHECKING:
    from dualform.cli.lines import Columns
    from dualform.cli.watched import Watch

_READ, _LONGEST = 2**16, 2**20  # bytes that are read at a time, and of a line
EPILOG = """[bold]Examples[/bold]
  sensor | dualform watch MODEL                           numbers, one in a line
  sensor | dualform watch MODEL --state a.state           stop it, and go on later as if it had run on
  dualform watch MODEL --id pump --time at < log.csv      many streams, by a column with their names
  dualform watch MODEL --time at --step 0.5 < log.csv     samples at irregular times; 0.5 between those of training
  dualform watch MODEL < log.csv | grep ',1$'             the anomalies

[bold]Lines[/bold] are CSV: numbers between commas, an empty field or NaN where one is missing. The first may name the
columns; all of them but those of --id and --time are channels, unless --value names those that are.

[bold]What comes out[/bold] is CSV, a line for each that came in. Of a linear-Gaussian model, such as a structural
one: of each channel the value that was expected, the band in which it was, and the estimate once it is seen. Of a
classifier: the class and its probability; of a regressor: the value, and with quantiles a band.
The [bold]score[/bold] says how strange a sample is: 3 is one in a thousand, 4 one in ten thousand, if the model is
right. It is that of the distance from what was expected; for a classifier or regressor, of the inputs from those of
training. From --alarm on, anomaly is 1."""


def watch(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Folder of a saved model: a classifier, a regressor or a linear-Gaussian one."
        ),
    ],
    id_: Annotated[str | None, typer.Option("--id", metavar="COL", help="Column with the name of the stream.")] = None,
    time: Annotated[
        str | None, typer.Option("--time", metavar="COL", help="Column with the time: a number, or an ISO 8601 date.")
    ] = None,
    value: Annotated[
        str | None,
        typer.Option("--value", metavar="COL[,COL]", help="Columns of the channels, in the order of training."),
    ] = None,
    step: Annotated[
        float | None,
        typer.Option(help="The time between two samples of training, in the unit of --time, seconds for dates."),
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="Go on from this file if it exists, and keep the state there.")
    ] = None,
    save_every: Annotated[float, typer.Option(min=0.0, help="Seconds between two saves, beside that at the end.")] = 60,
    level: Annotated[float, typer.Option(help="Probability of the band of a linear-Gaussian model.")] = 0.95,
    alarm: Annotated[float, typer.Option(help="The score from which a sample is an anomaly.")] = 4.0,
    window: Annotated[
        int | None,
        typer.Option(min=1, help="Let a model that takes the mean of all samples take that of the last ones."),
    ] = None,
) -> None:
    """Estimates, bands and anomalies of numbers, as they come in a pipe, in constant memory.

    Reads lines from standard input and writes one for each to standard output. With --state the state is kept in a
    file: at the end, when the process is told to stop (Ctrl-C, SIGTERM), and every minute. A run that was stopped goes
    on bit for bit as if it had not been.
    """
    out = output()
    if not 0 < level < 1:
        raise ArgumentError(f"--level is {level}, expected a probability between 0 and 1", hint="such as 0.95")
    if step is not None and not 0 < step < float("inf"):
        raise ArgumentError(f"--step is {step}, expected a positive time")

    import torch

    from dualform.cli.folders import model_folder
    from dualform.cli.watched import Options, Watch, saved_columns
    from dualform.models.saving.model import load
    from dualform.models.saving.undisturbed import undisturbed

    torch.set_num_threads(1)  # steps are short; and sums are the same on every machine of a kind
    loaded = undisturbed(lambda: model_folder(model), load)
    names = None if value is None else [name.strip() for name in value.split(",")]
    saved = saved_columns(state) if state is not None and state.exists() else None
    with _Stop() as stop:
        lines = _Lines(stop)
        columns = _columns(lines, id_, time, names, saved)
        if columns is not None:
            watching = Watch(loaded, columns, Options(level, alarm, step, window))
            if state is not None and saved is not None:
                watching.restore(state)
            else:
                _write(out, [watching.header])
            _run(watching, lines, out, state, save_every)
    if stop.number:
        raise typer.Exit(128 + stop.number)


def _run(watching: "Watch", lines: "_Lines", out: TextIO, state: Path | None, save_every: float) -> None:
    """Take lines in until they end, or the process is to stop."""
    from dualform.cli.lines import decoded, sample

    saved = monotonic()
    try:
        while some := lines.some():
            texts = ((number, decoded(line, number)) for number, line in some)
            one = len(watching.columns.names) == 1  # where a blank line is a value that is missing
            taken = (sample(watching.columns, text, number) for number, text in texts if text or one)
            for told in watching.push(taken):
                _write(out, told)
            if state is not None and monotonic() - saved >= save_every:
                watching.save(state)
                saved = monotonic()
    except BrokenPipeError:  # whoever reads has seen enough, and nothing is to be flushed to it at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        if state is not None:
            watching.save(state)
            if sys.stderr.isatty():
                typer.secho(f"{watching.samples:,} samples, state saved to {state}", dim=True, err=True)
    if lines.rest:
        typer.echo(f"stopped within line {lines.number + 1}, which was not taken in", err=True)


def _columns(
    lines: "_Lines", id_: str | None, time: str | None, values: list[str] | None, saved: "Columns | None"
) -> "Columns | None":
    """The columns of the lines, by the first of them, which is taken away where it names them; None without lines.

    Raises:
        ArgumentError: for columns that are not there, or are not those of the saved state.
    """
    from dualform.cli.lines import columns_of, decoded, fields, is_header, number_of, unnamed

    if not (some := lines.some()):
        return None
    number, line = some[0]
    found = fields(decoded(line, number), number)
    if saved is None:
        if not is_header(found):
            lines.put_back(some)
            return unnamed(len(found), id=id_, time=time, values=values)
        lines.put_back(some[1:])
        return columns_of(found, id=id_, time=time, values=values)
    place = {"--id": saved.id, "--time": saved.time}
    was = {option: None if at is None else saved.names[at] for option, at in place.items()}
    now = {"--id": id_, "--time": time}
    for option, given in {**now, "--value": None if values is None else ",".join(values)}.items():
        before = ",".join(saved.channels) if option == "--value" else was[option]
        if given is not None and given != before:
            hint = "leave it out to go on, or give another file"
            raise ArgumentError(f"{option} {given}: the state was saved with {before or 'none'}", hint=hint)
    if tuple(found) == saved.names:
        lines.put_back(some[1:])
        return saved
    try:
        if len(found) == len(saved.names):
            for i in saved.values:
                number_of(found[i], saved.names[i], number)
    except DataError:
        hint = "go on with the same columns, or give another file"
        raise DataError(
            f"line {number} names {', '.join(found)}; the state is of {', '.join(saved.names)}", hint=hint
        ) from None
    lines.put_back(some)
    return saved


def _write(out: TextIO, rows: list[list[str]]) -> None:
    csv.writer(out, lineterminator="\n").writerows(rows)
    out.flush()


class _Stop:
    """Ctrl-C and SIGTERM are noted, so that what was read is taken in and the state is whole.

    Attributes:
        number: of the signal; 0 as long as none came.
    """

    def __init__(self) -> None:
        self.number = 0

    def __enter__(self) -> "_Stop":
        self._ends = os.pipe()
        for end in self._ends:
            os.set_blocking(end, False)
        self._fd = signal.set_wakeup_fd(self._ends[1], warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        signal.set_wakeup_fd(self._fd)
        for end in self._ends:
            os.close(end)

    def _note(self, number: int, frame: object) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number = number

    def allows(self, file: int) -> bool:
        """Wait until there is something to read; whether the process may go on, and was not told to stop."""
        while not self.number:
            ready, _, _ = select.select([file, self._ends[0]], [], [])
            if file in ready:
                break
            os.read(self._ends[0], _READ)
        return not self.number


class _Lines:
    """The lines of standard input, as many at a time as are there.

    Attributes:
        number: of the last whole line.
        rest: what came after it, where the process was told to stop.
    """

    def __init__(self, stop: _Stop):
        if sys.stdin is None:
            raise ArgumentError("standard input is closed", hint="pipe numbers in, one line for each sample")
        self.number, self.rest, self._stop = 0, b"", stop
        self._back: list[tuple[int, bytes]] = []
        try:
            self._file: int | None = sys.stdin.fileno() if os.name != "nt" else None  # where select knows no pipes
        except (UnsupportedOperation, OSError):
            self._file = None

    def put_back(self, lines: list[tuple[int, bytes]]) -> None:
        """Lines that come again."""
        self._back = lines

    def some(self) -> list[tuple[int, bytes]]:
        """Lines with their numbers; none at the end, or where the process is to stop.

        Raises:
            DataError: for one that has no end.
        """
        found, self._back = self._back, []
        while not found:
            if self._file is not None and not self._stop.allows(self._file):
                return []
            data = sys.stdin.buffer.read(_READ) if self._file is None else os.read(self._file, _READ)
            *whole, self.rest = (self.rest + data).split(b"\n")
            if not data and self.rest:
                whole, self.rest = [self.rest], b""
            found = list(enumerate(whole, self.number + 1))
            self.number += len(whole)
            if not found and len(self.rest) > _LONGEST:
                raise DataError(f"line {self.number + 1} does not end within {_LONGEST:,} bytes: not lines of numbers")
            if not data:
                break
        return found
