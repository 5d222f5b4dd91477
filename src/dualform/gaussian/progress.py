"""How far long work has come, shown on a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


@contextmanager
def shown(title: str, show: bool | None, total: int | None = None) -> Iterator[Callable[[str], None]]:
    """A line on the standard error that tells what is being done; it is gone afterwards.

    Args:
        title: its first words.
        show: True or False; None shows it on a terminal alone.
        total: of how many steps, where that is known.

    Yields:
        What is called at the beginning of each step, with its name.
    """
    terminal, show = True if show else None, sys.stderr.isatty() if show is None else show
    columns = TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[step]}")
    with Progress(
        *columns, console=Console(stderr=True, force_terminal=terminal), transient=True, disable=not show
    ) as bar:
        task = bar.add_task(title, total=total, step="", completed=-1)

        def begin(step: str) -> None:
            bar.update(task, advance=1, step=step)

        yield begin
