"""``dualform forecast``: the next values of series in a table, with bands, and a report on them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dualform.cli.text import printable
from dualform.core.errors import ArgumentError, DataError

if TYPE_CHECKING:
    from dualform.forecast.families import Family
    from dualform.forecast.forecaster import Forecaster
    from dualform.forecast.report import Checked, Job
    from dualform.forecast.table import Table

EPILOG = """[bold]Examples[/bold]
  dualform forecast --demo                                                   the Nile, ten years ahead
  dualform forecast sales.csv --time month --value sold --horizon 12         one series
  dualform forecast shops.parquet --time day --value sold --id shop --horizon 28 --out next   one for each shop
  dualform forecast --pretrain any                                           a network for any series, in minutes
  dualform forecast sales.csv --time month --value sold --horizon 12 --weights any   which has not seen this one"""

_HORIZON = 10  # of the demonstration


def forecast(
    data: Annotated[Path | None, typer.Argument(metavar="DATA", help="A CSV or Parquet file.")] = None,
    time: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="The column of times: dates, or whole numbers such as years.")
    ] = None,
    value: Annotated[
        str | None, typer.Option(metavar="COLUMN[,COLUMN]", help="The columns of values, each a series.")
    ] = None,
    horizon: Annotated[int | None, typer.Option(help="How many steps ahead, 1 or more.")] = None,
    id: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="The column that says which series a row is of.")
    ] = None,
    model: Annotated[str, typer.Option(help="auto chooses; or local_level, structural, sarimax, ets, deep.")] = "auto",
    season: Annotated[
        int | None, typer.Option(min=1, help="In steps, 1 for none; without it, by the frequency: 12 for months.")
    ] = None,
    freq: Annotated[
        str | None, typer.Option(help="Of the times, as pandas names it, such as D, W, MS; without it, it is found.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where tables, pictures and report.md go.")] = Path(
        "forecast"
    ),
    demo: Annotated[bool, typer.Option("--demo", help="Forecast the flow of the Nile; needs no file.")] = False,
    weights: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Forecast by the network that --pretrain made.")
    ] = None,
    pretrain: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Make a network for any series, on synthetic ones; needs no file."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="How many steps --pretrain trains it for.")] = None,
) -> None:
    """Forecast series of a table: means, bands of 50, 80 and 95 %, components, pictures, and a report.

    Gaps stay missing. The report says what was chosen and why, whether the optimiser converged, and how the same
    procedure did on the last steps when they were held back, beside the seasonal naive.
    """
    if pretrain is not None:
        _pretrain(pretrain, steps, {"DATA": data, "--weights": weights, "--demo": demo or None})
        return
    if steps is not None:
        raise ArgumentError("forecast: --steps is of --pretrain", hint="dualform forecast --pretrain FOLDER --steps N")
    if weights is not None and model not in ("auto", "deep"):
        raise ArgumentError(f"forecast: --weights is of --model deep, and --model is {model}", hint="leave out --model")
    if demo:
        if data is not None or time or value or id:
            raise ArgumentError("forecast: --demo has its own data", hint="leave out DATA, --time, --value and --id")
    else:
        missing = [name for name, given in (("DATA", data), ("--time", time), ("--value", value)) if not given]
        missing += ["--horizon"] if horizon is None else []
        if missing:
            hint = "dualform forecast DATA --time COLUMN --value COLUMN --horizon N, or dualform forecast --demo"
            raise ArgumentError(f"forecast: missing {', '.join(missing)}", hint=hint)
    ahead = _HORIZON if horizon is None else horizon
    _check_pandas()
    from dualform.forecast.base import check_horizon
    from dualform.forecast.forecaster import Forecaster
    from dualform.forecast.report import Job, write
    from dualform.forecast.table import DEMO, columns_of, read_table
    from dualform.models.saving.files import replacing

    check_horizon("forecast", ahead)
    path, at = (DEMO, "year") if demo or data is None or time is None else (data, time)
    names = ["volume"] if demo or value is None else columns_of(value)
    table = read_table(path, at, names, id=id, frequency=freq)
    job = Job("the Nile" if demo else path.name, at, id, ahead, model if weights is None else "deep")
    forecaster = Forecaster(model if weights is None else _with(weights), season=season, horizon=ahead)
    with _bar() as bar:
        task = bar.add_task("choosing and fitting", total=None)
        forecaster.fit(table.series, tell=lambda done, whole: bar.update(task, completed=done, total=whole))
        bar.update(task, description="forecasting what was held back", total=None)
        checked = _checked(table, forecaster, ahead)
    with replacing(out) as folder:
        write(folder, job, table, forecaster, checked)
    _say(job, table, forecaster, checked, out)


def _with(weights: Path) -> "Family":
    """The family of a network that is there."""
    from functools import partial

    from dualform.forecast.deep.network import QuantileNetwork
    from dualform.forecast.families import deep

    QuantileNetwork.load(weights)  # says what is wrong with it before anything is read
    return partial(deep, weights=weights)


def _pretrain(folder: Path, steps: int | None, others: dict[str, object]) -> None:
    """Train a network on synthetic series, or go on where a run has stopped."""
    if unused := [name for name, value in others.items() if value is not None]:
        raise ArgumentError(f"forecast: --pretrain makes a network and reads no {unused[0]}", hint="two commands")
    from dualform.forecast.deep.training import STEPS, pretrain

    with _bar() as bar:
        task = bar.add_task("training on synthetic series", total=None)
        pretrain(folder, steps=steps or STEPS, tell=lambda done, whole: bar.update(task, completed=done, total=whole))
    typer.echo(f"{folder}: dualform forecast DATA --time COLUMN --value COLUMN --horizon N --weights {folder}")


def _check_pandas() -> None:
    from importlib.util import find_spec

    if find_spec("pandas") is None:
        raise DataError("forecast: pandas is not installed", hint="pip install 'dualform[forecast]'")


def _checked(table: "Table", forecaster: "Forecaster", horizon: int) -> "Checked | str":
    """How the forecaster and the seasonal naive do, or why that is not known."""
    from dualform.forecast.choose import held_back
    from dualform.forecast.evaluation import evaluate
    from dualform.forecast.forecaster import SeasonalNaive
    from dualform.forecast.report import Checked

    origins, reach = held_back(min(map(len, table.series.values())), horizon, forecaster.season_, count=3)
    if not origins:
        return "the series are too short to hold anything back"
    given: dict[str, Any] = {"origins": len(origins), "apart": (reach + 1) // 2}
    season = forecaster.season_
    first = origins[0]
    naive = SeasonalNaive(season if first > season else 1)
    try:
        return Checked(
            evaluate(forecaster, table.series, reach, **given), evaluate(naive, table.series, reach, **given)
        )
    except ArgumentError as error:  # what is left of a series is too little, or constant
        return str(error).splitlines()[0]


def _say(job: "Job", table: "Table", forecaster: "Forecaster", checked: "Checked | str", out: Path) -> None:
    for row, (name, choice) in enumerate(zip(table.series, forecaster.choices_, strict=True)):
        if row == 10:
            typer.echo(f"... and {len(table.series) - row} more series")
            break
        beside = ""
        if not isinstance(checked, str):
            beside = f", MASE {checked.ours.mase[row]:.3f} (seasonal naive {checked.naive.mase[row]:.3f})"
        typer.echo(f"{printable(name)}: {choice.found.candidate.label}{beside}")
    for name, choice in zip(table.series, forecaster.choices_, strict=True):
        if not choice.found.converged:
            typer.echo(f"{printable(name)}: the optimiser did not converge: {choice.found.message}", err=True)
    typer.echo(out / "report.md")


def _bar() -> Any:
    """A bar on a terminal, and nothing elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)
