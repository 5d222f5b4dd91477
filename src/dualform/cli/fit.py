"""``dualform fit``: a classifier or regressor of sequences from a table, and a report on it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dualform.core.errors import ArgumentError

if TYPE_CHECKING:
    from dualform.series.tables import Table

EPILOG = """[bold]Examples[/bold]
  dualform fit --demo                                       digits, as eight sensors of eight steps
  dualform fit gestures.csv --target gesture                a row for each sequence, a column for each step
  dualform fit pumps.csv --target broken --id pump --time hour    a row for each step
  dualform fit recordings --target activity                 a folder, a file for each sequence
  dualform fit cells.csv --target capacity --bidirectional  more accurate, and nothing for streams

The folder holds model/, which dualform.load reads, report.md with pictures, report.json, predictions.csv."""


def fit(
    data: Annotated[
        Path | None,
        typer.Argument(metavar="[DATA]", help="A table, .csv or .tsv, or a folder of them.", show_default=False),
    ] = None,
    target: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="What is to be said of a sequence.", show_default=False)
    ] = None,
    id_: Annotated[
        str | None,
        typer.Option("--id", metavar="COLUMN", help="Which sequence a row is a step of.", show_default=False),
    ] = None,
    time: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="What orders the steps of a sequence.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder. Default: runs/TARGET.", show_default=False)] = None,
    task: Annotated[str, typer.Option(help="classes, numbers; auto looks at the target.")] = "auto",
    test: Annotated[float, typer.Option(help="The share of the sequences that is kept for the report.")] = 0.2,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Of training, if not what suits the data.", show_default=False)
    ] = None,
    bidirectional: Annotated[
        bool, typer.Option("--bidirectional", help="Read in both directions: for whole sequences, not for streams.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 0,
    demo: Annotated[bool, typer.Option("--demo", help="Fit scikit-learn's digits; downloads nothing.")] = False,
) -> None:
    """Fit a classifier or regressor of sequences to a table, and report on sequences that it has not seen.

    Without --id every row is a sequence, and every column but the target one of its steps. With it, every row is a
    step, and every other column a channel. An empty cell is a missing value.
    """
    import sys

    from dualform.series.fitting import Fitting
    from dualform.series.fitting import fit as run
    from dualform.series.report import costs, summary

    table = _table(data, target, id_, time, demo)
    target = target or "digit"
    out = out or Path("runs") / target
    given = Fitting(target, task, test, steps, bidirectional, seed, verbose=sys.stderr.isatty())
    about = run(table, out, given, typer.echo, again=demo)
    for name, value in (*summary(about), *costs(about["cost"])):
        typer.echo(f"{name:32}{value}")
    typer.echo(f"{out}: model, report.md, predictions.csv")


def _table(data: Path | None, target: str | None, id_: str | None, time: str | None, demo: bool) -> "Table":
    if demo:
        if data is not None or target is not None:
            raise ArgumentError("fit: --demo has its own data and target", hint="dualform fit --demo, and nothing else")
        from dualform.series.demo import digits

        return digits()
    if data is None or target is None:
        lacking = "DATA" if data is None else "--target"
        raise ArgumentError(f"fit: {lacking} is missing", hint="dualform fit DATA.csv --target COLUMN, or --demo")
    from dualform.series.tables import read_table

    return read_table(data, target, id=id_, time=time)
