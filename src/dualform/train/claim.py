"""A run's folder, held by one process from before its tokens are made until the run ends.

The lock is one of the operating system, which releases it when the process dies, however it dies. A file beside it
says which process holds the folder; it is for people, and means nothing once the lock is free.
"""

import os
import shlex
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from dualform.core.errors import CheckpointError, DataError, DualformError
from dualform.core.json_file import read_table, to_json
from dualform.models.chat import ChatTemplate
from dualform.models.saving.folder import CHECKPOINTS, RECIPE_FILE, checkpoints
from dualform.models.saving.incoming import lives
from dualform.models.tokenizer import Tokenizer
from dualform.train.commands import elsewhere, resuming
from dualform.train.data import prepare
from dualform.train.prepared import clear
from dualform.train.recipe import Recipe

DATA, SUMMARY_FILE = "data", "summary.json"  # in a run's folder
_LOCK_FILE, _HOLDER_FILE = ".running.lock", ".running.json"
_TRIES, _PAUSE = 20, 0.05  # how often, each after how many seconds, a holder's file is read


@contextmanager
def claimed(recipe: Recipe, tokenizer: Tokenizer, resume: bool, template: ChatTemplate | None = None) -> Iterator[None]:
    """Hold the run's folder: a new one with its tokens, or, resuming, one with a run.

    A run that ends before its recipe is in the folder leaves nothing of its own there.

    Raises:
        CheckpointError: for a folder that lies in that of the text, that another process holds, with a run that is not
            to be resumed, without one that is, or that cannot be written.
        DataError: for data that cannot be trained on.
    """
    out, text = Path(recipe.out), Path(recipe.data.path)
    if not resume and text.is_dir() and out.resolve().is_relative_to(text.resolve()):
        raise CheckpointError(
            f"out {recipe.out!r} lies in data.path {recipe.data.path!r}: the next run would train on what this one "
            "writes",
            hint=f"choose a folder elsewhere: --out {shlex.quote(str(text.resolve().parent / 'runs' / out.name))}",
        )
    if resume and not _holds_a_run(out):
        raise CheckpointError(
            f"{out}: no run to resume", hint="check the folder, or begin a run there: the same command without --resume"
        )
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    with ExitStack() as stack:
        stack.callback(_remove_empty, missing)
        try:
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(holding(out))
            exists = _holds_a_run(out)
            if exists and not resume:
                hint = f"go on with it: {resuming(out)}; or begin another run: {elsewhere(out)}"
                raise CheckpointError(f"{out}: a run is there already", hint=hint)
            if not exists:
                stack.callback(_remove_unused, out)
                prepare(recipe.data, tokenizer, out / DATA, template)
        except OSError as error:
            reason, hint = error.strerror or str(error), f"choose another folder: {elsewhere(out)}"
            raise CheckpointError(f"{out}: cannot be written: {reason}", hint=hint) from error
        yield


@contextmanager
def holding(out: Path) -> Iterator[None]:
    """Hold a folder that exists, alone among processes and threads.

    Raises:
        CheckpointError: when another process holds it; names the process.
    """
    lock, holder = FileLock(out / _LOCK_FILE), out / _HOLDER_FILE
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise CheckpointError(
            f"{out}: {_described(holder)} is training here",
            hint=f"wait until it ends, or end it; a run of its own needs another folder: {elsewhere(out)}",
        ) from None
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        about = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
        holder.write_text(to_json(about), encoding="utf-8")
        yield
    finally:
        for path in (holder, out / _LOCK_FILE):
            with suppress(OSError):  # Windows keeps an open file, and another run may use it
                path.unlink()
        lock.release()


def _described(holder: Path) -> str:
    """``process 4711 on host, since ...,``, once it has written its file; that of one that died says nothing."""
    for _ in range(_TRIES):
        time.sleep(_PAUSE)  # first: what a dead one left may name a process that lives, until the holder has written
        with suppress(DualformError, KeyError):
            about = read_table(holder)
            pid, host = about["pid"], about["host"]
            if host != socket.gethostname() or lives(pid):
                return f"process {pid} on {host}, since {about['since']},"
    return "another process"


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):  # one that is not empty stays, and so do those around it
        for folder in folders:
            folder.rmdir()


def _remove_unused(out: Path) -> None:
    """The tokens of a run that never was, and nothing else."""
    if not _holds_a_run(out):
        with suppress(DataError, OSError):
            clear(out / DATA)


def _holds_a_run(out: Path) -> bool:
    return (out / RECIPE_FILE).is_file() or bool(checkpoints(out / CHECKPOINTS))
