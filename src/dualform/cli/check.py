"""``dualform check``: the contract, verified on this machine, device, dtype and length."""

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from dualform.check.defaults import DEVICE, DTYPE, LENGTH
from dualform.cli.text import print_json

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console
    from rich.table import Table

    from dualform.check.run import Check, Result

EPILOG = """[bold]Examples[/bold]
  dualform check                               everything, on the CPU
  dualform check mamba2 --device cuda          one kind of mixer, on the GPU
  dualform check ssd --dtype bfloat16          one operator: backends, reference
  dualform check mamba --length 5000           a length of your own
  dualform check ssd --json | jq .ok           for programs"""

_TITLES = {
    "laws": "Laws: the greatest relative difference between two forms of one recurrence",
    "backends": "Backends: the greatest relative difference from the float64 reference",
    "exact": "Exact generation: the greatest relative difference between a request alone and in company",
    "long": "More than 2^31 elements: the greatest relative difference between one call and two over its pieces",
}


def check(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MIXER]...", help="Mixers, operators, kalman, hmm or lm; all of them by default."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = DEVICE,
    dtype: Annotated[str, typer.Option(help="float64, float32, bfloat16 or float16.")] = DTYPE,
    length: Annotated[int, typer.Option(help="Length of the sequences.")] = LENGTH,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document: what was asked for, ok, and every check.")
    ] = False,
) -> None:
    """Check that all forms of every layer are one function, here: on this device, dtype and length.

    Whole = split = stepped = packed = padded, forward and backward; every backend = its reference.
    Exit code 1 if anything fails, or nothing could be run.
    """
    from rich.console import Console

    from dualform.check.run import holds, plan

    checks = plan(names or None, device=device, dtype=dtype, length=length)
    if as_json:
        found = _run(checks)
        asked = {"device": device, "dtype": dtype, "length": length}
        print_json({**asked, "ok": holds(found), "checks": [asdict(result) for result in found]})
        raise typer.Exit(0 if holds(found) else 1)
    console = Console(highlight=False, soft_wrap=True)
    results: list[Result] = []
    for kind, title in _TITLES.items():  # each table as soon as it is there
        if found := _run([check for check in checks if check.table == kind]):
            console.print(f"\n[bold]{title}[/bold] ({device}, {dtype}, length {length})")
            _print_table(console, found)
            refused = [result for result in found if result.error is None and result.message]
            for why in _in_order(f"{result.case}: {result.message.splitlines()[0]}" for result in refused):
                console.print(f"not run, {why}", style="dim", markup=False)
            results += found
    for line in _failures(result for result in results if not result.ok):
        console.print("failed: ", style="bold red", end="")
        console.print(line, markup=False)
    console.print(f"{_verdict(results)}, in {sum(result.seconds for result in results):.0f} s")
    if not holds(results):
        raise typer.Exit(1)


def _failures(results: "Iterable[Result]") -> list[str]:
    """A line for each failure; one for all that ended in the same exception, or in numbers that are not finite."""
    lines, broken = list[str](), dict[str, dict[str, list[str]]]()
    for result in results:
        if result.error is not None and math.isfinite(result.error):
            where = f"{result.case}, {result.law}: {_number(result.error)}, allowed {result.tolerance:g}"
            lines.append(f"{where}; {result.message}")
        else:
            broken.setdefault(result.message, {}).setdefault(result.case, []).append(result.law)
    for message, cases in broken.items():
        where = "; ".join(f"{case}, {', '.join(laws)}" for case, laws in cases.items())
        lines.append(f"{where}: broken; {message}")
    return lines


def _verdict(results: "list[Result]") -> str:
    """What ran, of all that was asked for; a law that does not apply to a case was not."""
    ran = [result for result in results if result.error is not None]
    refused = sum(result.error is None and bool(result.message) for result in results)
    if not ran:
        return f"0 of {refused} checks ran"
    failed = sum(not result.ok for result in ran)
    verdict = f"{failed} of {len(ran)} checks failed" if failed else f"all {len(ran)} checks passed"
    return f"{verdict}, {refused} not run" if refused else verdict


def _run(checks: "list[Check]") -> "list[Result]":
    """Every check, with a bar on a terminal."""
    from rich.console import Console
    from rich.progress import Progress, TextColumn

    results = []
    text = TextColumn("{task.completed}/{task.total} {task.description}", markup=False)
    columns = (*Progress.get_default_columns()[1:], text)
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not _on_terminal()) as progress:
        task = progress.add_task("", total=len(checks))
        for one in checks:
            progress.update(task, description=f"{one.case}, {one.law}")
            results.append(one.run())
            progress.advance(task)
    return results


def _on_terminal() -> bool:
    import sys

    return sys.stderr.isatty()


def _print_table(console: "Console", results: "list[Result]") -> None:
    """Cases by laws; on a terminal too narrow for that, the worst law of each case."""
    from rich.console import Console

    full = _table(results)
    needed = Console(width=10_000).measure(full).maximum
    if not console.is_terminal:
        console.width = max(console.width, needed)
    console.print(full if needed <= console.width else _short_table(results))


def _table(results: "list[Result]") -> "Table":
    from rich.markup import escape

    laws = [
        law for law in _in_order(r.law for r in results) if any(r.law == law and r.error is not None for r in results)
    ]
    table = _empty_table("", *(law.replace(" ", "\n") for law in laws))
    cells = {(result.case, result.law): _cell(result) for result in results}
    for case in _in_order(result.case for result in results):
        table.add_row(escape(case), *(cells.get((case, law), "") for law in laws))
    return table


def _short_table(results: "list[Result]") -> "Table":
    from rich.markup import escape

    table = _empty_table("", "worst", "law")
    for case in _in_order(result.case for result in results):
        measured = [result for result in results if result.case == case and result.error is not None]
        if measured:
            worst = max(measured, key=lambda result: (not result.ok, result.error))
            table.add_row(escape(case), _cell(worst), worst.law)
    return table


def _empty_table(first: str, *others: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", vertical="bottom", no_wrap=True)
    return table


def _in_order(words: "Iterable[str]") -> list[str]:
    return list(dict.fromkeys(words))


def _cell(result: "Result") -> str:
    if result.error is None:
        return "[dim]-[/dim]"
    return _number(result.error) if result.ok else f"[bold red]{_number(result.error)}[/bold red]"


def _number(error: float | None) -> str:
    if error is None:
        return "-"
    return "broken" if not math.isfinite(error) else f"{error:.0e}" if error else "0"
