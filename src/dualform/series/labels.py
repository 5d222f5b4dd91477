"""The labels of a classifier: numbered, named and weighed."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.options import joined
from dualform.series.panel import row_name


def one_class(where: str, classes: np.ndarray, rows: int) -> None:
    """Refuse labels that are all the same.

    Raises:
        ArgumentError: names the class.
    """
    if len(classes) < 2:
        only = repr(classes[0].item() if hasattr(classes[0], "item") else classes[0]) if len(classes) else "none"
        raise ArgumentError(
            f"{where}: y has one class only, {only}, in all {rows} rows, expected at least 2 classes",
            hint="add sequences of another class",
        )


def check_answers(where: str, y: Any, names: Sequence[Any] | None, *, numeric: bool) -> None:
    """Refuse an answer that is missing or infinite, or that is no number where numbers are expected.

    Raises:
        ArgumentError: names the row.
    """
    try:
        array = np.asarray(y)
    except ValueError:  # of rows of different lengths, which scikit-learn explains
        return
    if array.dtype.kind not in "fOUS" or array.ndim == 0:
        return
    for row, one in enumerate(array.reshape(len(array), -1)):
        for value in one:
            if not _is_answer(value, numeric):
                called = row_name(row, names) if names is None or row < len(names) else f"row {row}"
                expected = "a finite number" if numeric else "a label"
                shown = value.item() if isinstance(value, np.generic) else value
                raise ArgumentError(f"{where}: {called} of y is {shown!r}, expected {expected}")


def _is_answer(value: Any, numeric: bool) -> bool:
    try:
        if numeric or isinstance(value, float | np.floating):
            return bool(np.isfinite(float(value)))
        return value is not None and bool(value == value)
    except (TypeError, ValueError):  # of pandas.NA, and of words where numbers are expected
        return False


def numbered(where: str, labels: np.ndarray, classes: np.ndarray, names: Sequence[Any] | None = None) -> Tensor:
    """``(n,)``, int64, the places of the labels among the classes, which are sorted.

    Raises:
        ArgumentError: for a label that is none of them; names the row.
    """
    places = np.searchsorted(classes, labels).clip(max=len(classes) - 1)
    if len(wrong := np.flatnonzero(classes[places] != labels)):
        row = int(wrong[0])
        what = f"{row_name(row, names)} has the label {labels[row].item()!r}"
        raise ArgumentError(f"{where}: {what}, which is none of the classes: {joined(classes.tolist())}")
    return torch.from_numpy(places.astype(np.int64))


def class_names(classes: np.ndarray) -> list[str]:
    """The classes as texts, which are saved with a model."""
    return [str(label) for label in classes.tolist()]


def class_weights(given: Any, classes: np.ndarray, rows: Tensor) -> Tensor | None:
    """``(K,)``, what a sequence of each class counts; None where all count alike.

    ``"balanced"`` is ``n / (K n_k)``, with 1 for a class without sequences.

    Raises:
        ArgumentError: for another word, or a class that there is not.
    """
    if given is None:
        return None
    if isinstance(given, str) and given == "balanced":
        counts = rows.bincount(minlength=len(classes))
        return torch.where(counts > 0, len(rows) / (len(classes) * counts.clamp(min=1)), 1.0)
    if not isinstance(given, Mapping):
        raise ArgumentError(f"class_weight is {given!r}, expected 'balanced', a weight for each class, or None")
    known = classes.tolist()
    if strange := [label for label in given if label not in known]:
        raise ArgumentError(f"class_weight has {strange[0]!r}, which is none of the classes: {joined(known)}")
    return torch.tensor([float(given.get(label, 1.0)) for label in known])
