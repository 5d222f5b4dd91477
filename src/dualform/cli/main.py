"""The ``dualform`` command. Command bodies import what they need, so that ``--help`` never loads torch."""

import os
import sys
from typing import Annotated

import typer

from dualform import __version__
from dualform.cli.check import check
from dualform.cli.compare import compare
from dualform.cli.convert import convert
from dualform.cli.demo import demo
from dualform.cli.doctor import doctor
from dualform.cli.errors import sentence
from dualform.cli.evaluate import evaluate
from dualform.cli.fit import fit
from dualform.cli.forecast import forecast
from dualform.cli.generate import generate
from dualform.cli.info import info
from dualform.cli.inspect import inspect
from dualform.cli.keys import TrainCommand
from dualform.cli.text import encodable, printable
from dualform.cli.train import train
from dualform.cli.verify import verify
from dualform.cli.watch import watch

app = typer.Typer(
    name="dualform",
    help="State space models, from Kalman to Mamba-2: one contract, any device.",
    epilog="Start with [bold]dualform demo[/bold]: it trains a small model here, in minutes, and downloads nothing.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dualform {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


COMMANDS = (
    demo,
    train,
    generate,
    evaluate,
    compare,
    fit,
    forecast,
    info,
    convert,
    inspect,
    watch,
    verify,
    check,
    doctor,
)
for command in COMMANDS:
    name = "eval" if command is evaluate else None  # not the name of a function of Python
    kind = TrainCommand if command is train else None
    app.command(name, epilog=sys.modules[command.__module__].EPILOG, cls=kind)(command)


def main() -> None:
    """Run a command. What is wrong with its arguments or files, or too large for memory, is said with exit code 2.

    Waiting threads of GNU's OpenMP are told to sleep soon, unless the environment says otherwise: where processes share
    cores, a thread that spins can keep the one that it waits for from running. OpenMP reads this when torch is loaded.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "5000"  # turns, of 300,000 by default
    encodable()
    try:
        app()
    except Exception as error:
        if not (message := sentence(error)):
            raise
        typer.secho("error: ", fg="red", bold=True, nl=False, err=True)
        typer.echo(printable(message), err=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
