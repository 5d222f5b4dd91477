"""What classifiers and regressors are trained towards: classes, several of them at once, numbers and quantiles."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.shapes import check_finite, check_floating, check_indices, check_tensors, known, wide
from dualform.models.linear_loss import IGNORED, mean_cross_entropy


def class_loss(where: str, logits: Tensor, labels: Tensor, weights: Tensor | None, smoothing: float) -> Tensor:
    """Cross-entropy in nats, ``sum_i w_y(i) l_i / sum_i w_y(i)``, over the labels that count; 0 where none does.

    Args:
        where: the model, first word of every error.
        logits: ``(M, C)``.
        labels: ``(M,)``, from 0; -100 does not count.
        weights: ``(C,)``, w; None is 1.
        smoothing: s; the target is 1 - s of the label and s / C of every class.
    """
    check_indices(where, "labels", labels, logits.shape[1], IGNORED, "classes are numbered from 0")
    weights = _weights(where, weights, logits)
    _check_smoothing(where, smoothing)
    return mean_cross_entropy(logits, labels.long(), weights, smoothing)


def several_loss(
    where: str, logits: Tensor, labels: Tensor, weights: Tensor | None, smoothing: float, keep: Tensor | None
) -> Tensor:
    """Binary cross-entropy in nats of each class by itself, the mean over rows and classes.

    Args:
        where: the model, first word of every error.
        logits: ``(M, C)``.
        labels: ``(M, C)``, bool, or numbers from 0 to 1.
        weights: ``(C,)``, what the classes count; None is 1.
        smoothing: s; a target t becomes ``(1 - s) t + s / 2``.
        keep: ``(M,)``, which rows count; None for all.
    """
    weights = _weights(where, weights, logits)
    _check_smoothing(where, smoothing)
    dtype = wide(logits)
    labels = labels.to(dtype)
    if known(labels) and not bool(((labels >= 0) & (labels <= 1)).all()):
        wrong = labels[~((labels >= 0) & (labels <= 1))][0].item()
        raise ArgumentError(f"{where}: labels holds {wrong:g}, expected 0 to 1, whether each class is there")
    labels = (1 - smoothing) * labels + smoothing / 2
    losses = F.binary_cross_entropy_with_logits(logits.to(dtype), labels, reduction="none")
    weights = losses.new_ones(losses.shape[1]) if weights is None else weights
    return mean_of(losses * weights, keep) * losses.shape[1] / weights.sum()


def number_loss(
    where: str, y: Tensor, targets: Tensor, quantiles: Sequence[float] | None, keep: Tensor | None
) -> Tensor:
    """The mean squared error; with quantiles q the mean of ``max(q e, (q - 1) e)``, where ``e = target - y_q``.

    Args:
        where: the model, first word of every error.
        y: ``(M, K)``, or ``(M, K, Q)`` with quantiles.
        targets: ``(M, K)``, floating and finite.
        quantiles: the Q of them; None for the squared error.
        keep: ``(M,)``, which rows count; None for all.

    References:
        Koenker & Bassett (1978), Econometrica 46(1), equation 3.1, for the quantiles.
    """
    check_floating(where, targets=targets)
    check_finite(where, targets=targets if keep is None else targets.masked_fill(~keep[:, None], 0))
    dtype = wide(y)
    y, targets = y.to(dtype), targets.to(dtype)
    if quantiles is None:
        return mean_of((y - targets).square(), keep)
    q, error = torch.tensor(list(quantiles), dtype=dtype, device=y.device), targets[..., None] - y
    return mean_of(torch.maximum(q * error, (q - 1) * error), keep)


def mean_of(losses: Tensor, keep: Tensor | None) -> Tensor:
    """The mean of losses ``(M, ...)`` over the rows that count; 0 where none does."""
    if keep is None:
        return losses.sum() / max(losses.numel(), 1)
    kept = losses.masked_fill(~keep.view(-1, *[1] * (losses.dim() - 1)), 0)
    return kept.sum() / (keep.sum() * losses[:1].numel()).clamp(min=1)


def _weights(where: str, weights: Tensor | None, logits: Tensor) -> Tensor | None:
    if weights is None:
        return None
    weights = torch.as_tensor(weights, dtype=wide(logits), device=logits.device)
    check_tensors(where, class_weights=(weights, str(logits.shape[1])))
    if known(weights) and not bool((weights.isfinite() & (weights >= 0)).all() and weights.any()):
        raise ArgumentError(f"{where}: class_weights is {weights.tolist()}, expected numbers from 0, not all 0")
    return weights


def _check_smoothing(where: str, smoothing: float) -> None:
    if not 0 <= smoothing < 1:
        raise ArgumentError(f"{where}: label_smoothing is {smoothing}, expected at least 0 and less than 1")
