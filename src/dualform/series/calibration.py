"""Probabilities that are as high as they are right."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.models.heads import SequenceClassifier

LEAST, MOST = 0.1, 10.0


def calibrate(model: SequenceClassifier, logits: Tensor, y: Tensor) -> float:
    """Multiply the logits of a model by the factor with which examples that it has not learned are most probable.

    The factor b minimises the cross-entropy of ``softmax(b logits)``, which is convex in b, with the targets
    ``(1 - s) y + s / K`` and ``s = 1 / (n + 2)``: of a few examples that are all right no certainty follows.

    Args:
        model: its head is changed.
        logits: ``(n, K)``, its outputs.
        y: ``(n,)``, the true classes.

    Returns:
        The factor, from 0.1 to 10.

    References:
        Guo et al. (2017), arXiv:1706.04599, section 4.2, where 1 / b is the temperature; Platt (1999), section 2.2,
        for s.
    """
    low, high, smoothing = math.log(LEAST), math.log(MOST), 1 / (len(y) + 2)
    logits = logits.double()

    def loss(log_factor: float) -> float:
        return float(F.cross_entropy(math.exp(log_factor) * logits, y, label_smoothing=smoothing))

    for _ in range(50):  # thirds of the interval: along a curve that falls and then rises
        first, second = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, second) if loss(first) < loss(second) else (first, high)
    factor = math.exp((low + high) / 2)
    with torch.no_grad():
        model.head.weight.mul_(factor)
        model.head.bias.mul_(factor)
    return factor
