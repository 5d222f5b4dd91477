"""From a table to a model in a folder, and a report on sequences that it has not learned."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from dualform.core.errors import ArgumentError, CheckpointError
from dualform.core.json_file import to_json
from dualform.models.saving.folder import MODEL
from dualform.models.saving.incoming import incoming, remove_stale
from dualform.models.saving.model import save
from dualform.series.cost import cost
from dualform.series.estimators import DeepClassifier, DeepRegressor
from dualform.series.labels import numbered, one_class
from dualform.series.panel import Panel, row_name
from dualform.series.pictures import draw_calibration, draw_confusion, draw_hardest, draw_losses, draw_numbers
from dualform.series.plan import held_out_share
from dualform.series.report import REPORT_FILE, SCORES_FILE, written
from dualform.series.scores import of_classes, of_numbers
from dualform.series.split import held_out_rows
from dualform.series.tables import Table

TASKS = ("auto", "classes", "numbers")
_FEW = 20  # different whole numbers that are taken for classes
_HARDEST = 9


@dataclass(frozen=True)
class Fitting:
    """How a model is fitted to a table.

    Args:
        target: what the column is called.
        task: ``classes``, ``numbers``, or ``auto``: numbers where the target is of numbers, unless they are whole and
            at most 20 different ones.
        test: the share of the sequences that is not learned, for the report.
        steps: of training; None chooses.
        bidirectional: whether the blocks read in both directions: more accurate, and nothing for streams.
        seed: of all that is random.
        verbose: whether a bar shows how far training is.
    """

    target: str
    task: str = "auto"
    test: float = 0.2
    steps: int | None = None
    bidirectional: bool = False
    seed: int = 0
    verbose: bool = False


def fit(table: Table, out: Path, given: Fitting, tell: Callable[[str], None], *, again: bool = False) -> dict[str, Any]:
    """Fit a model, and write a folder: ``model/``, ``report.md`` with pictures, ``report.json``, ``predictions.csv``.

    It is written all at once.

    Args:
        table: the sequences and their targets.
        out: the folder, which is not there, or empty.
        given: how.
        tell: called with sentences about what is done.
        again: whether a folder that this wrote before is replaced.

    Returns:
        What ``report.json`` holds.

    Raises:
        CheckpointError: for a folder that holds something.
        ArgumentError: for targets or sequences that cannot be learned; names the row.
    """
    _check_free(out, again)
    target, classes = _targets(table, given)
    test, rows = _parts(target, classes, given)
    lengths, channels = _lengths(table.panel), len(table.channels)
    what = "numbers" if classes is None else f"{len(classes)} classes"
    tell(f"{len(target)} sequences of {lengths}, {channels} channels; {given.target!r}: {what}")
    tell(f"{len(rows)} to learn, {len(test)} for the report")
    for note in table.notes:
        tell(f"note: {note}")
    options: dict[str, Any] = {"causal": not given.bidirectional, "steps": given.steps, "random_state": given.seed}
    kind = DeepRegressor if classes is None else DeepClassifier
    learned = table.panel.take(rows)
    estimator = kind(**options, verbose=given.verbose)
    estimator.fit(_frame(learned), target[rows.numpy()], times=_times(learned))
    about: dict[str, Any] = {
        "target": given.target,
        "task": "numbers" if classes is None else "classes",
        "classes": None if classes is None else [str(label) for label in classes.tolist()],
        "channels": table.channels,
        "learned": len(rows),
        "test": len(test),
        "notes": table.notes,
        "step": None if learned.intervals is None else estimator.step_,
        "looks": [list(look) for look in estimator.history_[0]],
        "cost": cost(estimator.models_[0], int(table.panel.lengths.median())),
    }
    unseen, truth = table.panel.take(test), target[test.numpy()]
    if isinstance(estimator, DeepClassifier):
        pictures, predictions = _of_classes(estimator, unseen, truth, about)
    else:
        mean = float(target[rows.numpy()].mean())
        said = estimator.predict(_frame(unseen), times=_times(unseen))
        pictures, predictions = _of_numbers(said, truth, mean, unseen, about)
    _write(out, estimator, about, [*pictures, ("training", draw_losses(estimator.history_[0]))], predictions)
    return about


def _targets(table: Table, given: Fitting) -> tuple[np.ndarray, np.ndarray | None]:
    """The targets, and the classes; None where they are numbers."""
    if not _are_classes(table.target, given.task):
        return _numbers(table, given.target), None
    target = _labels(table.target)
    one_class("fit", classes := np.unique(target), len(target))
    return target, classes


def _parts(target: np.ndarray, classes: np.ndarray | None, given: Fitting) -> tuple[Tensor, Tensor]:
    """The rows that are kept for the report, and those that are learned."""
    share = held_out_share("fit", given.test, len(target))
    if share == 0:
        raise ArgumentError(f"fit: test is {given.test:g}, which leaves no sequences for the report", hint="--test 0.2")
    y = torch.from_numpy(target[:, None]) if classes is None else numbered("fit", target, classes)
    test = held_out_rows(y, share, given.seed)
    learned = torch.ones(len(target), dtype=torch.bool)
    learned[test] = False
    return test, learned.nonzero()[:, 0]


def _of_classes(
    estimator: DeepClassifier, unseen: Panel, truth: np.ndarray, about: dict[str, Any]
) -> tuple[list[tuple[str, Figure]], Any]:
    """Pictures, and a frame of what is said of each sequence; the scores are put into ``about``."""
    names, probabilities = about["classes"], estimator.predict_proba(_frame(unseen), times=_times(unseen))
    places = numbered("fit", truth, estimator.classes_).numpy()
    about["scores"] = of_classes(probabilities, places)
    said, true = probabilities.argmax(1), probabilities[np.arange(len(truth)), places]
    hardest = np.argsort(true)[:_HARDEST].tolist()
    titles = [
        f"{_name(unseen, i)}: {names[places[i]]}, said {names[said[i]]}\nprobability of the truth {true[i]:.2f}"
        for i in hardest
    ]
    columns = {f"p({name})": probabilities[:, i] for i, name in enumerate(names)}
    said_names, true_names = [names[i] for i in said], [names[i] for i in places]
    predictions = {"sequence": _names(unseen), "true": true_names, "said": said_names, **columns}
    return [
        ("confusion", draw_confusion(about["scores"]["confusion"], names)),
        ("calibration", draw_calibration(about["scores"]["calibration"])),
        ("hardest", draw_hardest(unseen, hardest, titles, about["channels"])),
    ], pd.DataFrame(predictions)


def _of_numbers(
    said: np.ndarray, truth: np.ndarray, mean: float, unseen: Panel, about: dict[str, Any]
) -> tuple[list[tuple[str, Figure]], Any]:
    """As :func:`_of_classes`."""
    about["scores"] = of_numbers(said, truth, mean)
    hardest = np.argsort(-np.abs(said - truth))[:_HARDEST].tolist()
    titles = [f"{_name(unseen, i)}: {truth[i]:.4g}, said {said[i]:.4g}" for i in hardest]
    predictions = {"sequence": _names(unseen), "true": truth, "said": said}
    return [
        ("numbers", draw_numbers(said, truth)),
        ("hardest", draw_hardest(unseen, hardest, titles, about["channels"])),
    ], pd.DataFrame(predictions)


def _write(out: Path, estimator: Any, about: dict[str, Any], pictures: list[tuple[str, Figure]], rows: Any) -> None:
    """The folder, whole: what is not complete has another name."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(out)
        with incoming(out) as new:
            new.mkdir()
            save(estimator.models_[0], new / MODEL)
            (new / SCORES_FILE).write_text(to_json(about), encoding="utf-8")
            (new / REPORT_FILE).write_text(written(about, [name for name, _ in pictures]), encoding="utf-8")
            rows.to_csv(new / "predictions.csv", index=False)
            for name, picture in pictures:
                picture.savefig(new / f"{name}.png", metadata={"Software": None})
            if out.exists():
                shutil.rmtree(out)
            os.replace(new, out)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written: {error.strerror or error}") from error


def _check_free(out: Path, again: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (again and (out / SCORES_FILE).is_file() and (out / MODEL).is_dir()):
        raise CheckpointError(f"{out}: there is something already", hint="another folder: --out FOLDER")


def _are_classes(target: np.ndarray, task: str) -> bool:
    if task not in TASKS:
        raise ArgumentError(f"fit: task is {task!r}, expected one of {', '.join(TASKS)}")
    if task != "auto":
        return task == "classes"
    if target.dtype.kind not in "iuf":
        return True
    return bool((target == np.round(target)).all()) and len(np.unique(target)) <= _FEW


def _labels(target: np.ndarray) -> np.ndarray:
    """Texts where they are of several types; whole numbers without a decimal point."""
    if target.dtype.kind == "f" and (target == np.round(target)).all():
        return target.astype(np.int64)
    return target.astype(str) if target.dtype.kind == "O" else target


def _numbers(table: Table, name: str) -> np.ndarray:
    target: Any = pd.to_numeric(pd.Series(table.target), errors="coerce")
    found: np.ndarray = target.to_numpy(dtype=np.float64)
    if len(wrong := np.flatnonzero(~np.isfinite(found))):
        row = int(wrong[0])
        where = f"{row_name(row, table.panel.names)}: {name!r} is {table.target[row]!r}"
        raise ArgumentError(f"fit: {where}, expected a finite number", hint="--task classes, if it is a class")
    return found


def _frame(given: Panel) -> Any:
    """Sequences as an estimator takes them, with their names."""
    arrays = [x[:length].numpy() for x, length in zip(given.x, given.lengths.tolist(), strict=True)]
    return pd.Series(arrays, index=given.names)


def _times(given: Panel) -> list[np.ndarray] | None:
    """When their samples were taken, since the first one of each."""
    if given.intervals is None:
        return None
    times = given.intervals.nan_to_num(nan=0.0).cumsum(1)
    return [one[:length].numpy() for one, length in zip(times, given.lengths.tolist(), strict=True)]


def _lengths(given: Panel) -> str:
    low, high = int(given.lengths.min()), int(given.lengths.max())
    return f"{low} steps" if low == high else f"{low} to {high} steps"


def _names(given: Panel) -> list[Any]:
    return list(range(len(given.lengths)) if given.names is None else given.names)


def _name(given: Panel, row: int) -> Any:
    return _names(given)[row]
