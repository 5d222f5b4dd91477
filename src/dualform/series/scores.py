"""How good a classifier or regressor is on sequences that it has not seen, in numbers."""

from typing import Any

import numpy as np

BINS = 10  # of the probability, in a calibration curve


def of_classes(probabilities: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """Scores of a classifier.

    Args:
        probabilities: ``(n, K)``.
        truth: ``(n,)``, the numbers of the true classes.

    Returns:
        ``accuracy``; ``balanced_accuracy``, the mean over classes; ``log_loss`` in nats; ``most_frequent``, the
        accuracy of always saying the class that is most frequent here; ``confusion``, of each true class how many were
        said to be each; ``calibration``, for each tenth of the highest probability ``[mean probability, accuracy,
        number]``; and ``calibration_error``, the mean distance of the two, weighed by the numbers.
    """
    classes = probabilities.shape[1]
    said, surest = probabilities.argmax(1), probabilities.max(1)
    confusion = np.zeros((classes, classes), dtype=int)
    np.add.at(confusion, (truth, said), 1)
    counts = confusion.sum(1)
    recalls = confusion.diagonal()[counts > 0] / counts[counts > 0]
    bins, curve = np.minimum((surest * BINS).astype(int), BINS - 1), []
    for i in np.unique(bins):
        inside = bins == i
        curve.append([float(surest[inside].mean()), float((said == truth)[inside].mean()), int(inside.sum())])
    true = probabilities[np.arange(len(truth)), truth]
    return {
        "accuracy": float((said == truth).mean()),
        "balanced_accuracy": float(recalls.mean()),
        "log_loss": float(-np.log(true.clip(min=1e-300)).mean()),
        "most_frequent": float(counts.max() / len(truth)),
        "confusion": confusion.tolist(),
        "calibration": curve,
        "calibration_error": float(sum(n * abs(p - a) for p, a, n in curve) / len(truth)),
    }


def of_numbers(said: np.ndarray, truth: np.ndarray, mean: float) -> dict[str, Any]:
    """Scores of a regressor.

    Args:
        said: ``(n,)``.
        truth: ``(n,)``.
        mean: of the targets that were learned.

    Returns:
        ``rmse`` and ``mae``, the root of the mean squared and the mean absolute error; ``rmse_of_mean``, that of always
        saying ``mean``; ``r2``, 1 minus the ratio of the squared errors to those of the mean of ``truth``, None where
        that has no variance; and ``band``, between which errors ``truth - said`` nine of ten times are.
    """
    errors, variance = truth - said, float(truth.var())
    return {
        "rmse": float(np.sqrt(np.square(errors).mean())),
        "mae": float(np.abs(errors).mean()),
        "rmse_of_mean": float(np.sqrt(np.square(truth - mean).mean())),
        "r2": 1 - float(np.square(errors).mean()) / variance if variance > 0 else None,
        "band": [float(edge) for edge in np.quantile(errors, [0.05, 0.95])],
    }
