"""Classifiers and regressors, of whole sequences and of each of their elements."""

from collections.abc import Sequence

from dualform.core.calls import explained
from dualform.models.backbone import ELSEWHERE
from dualform.models.config import ModelConfig
from dualform.models.pooled import PooledModel, PooledState
from dualform.models.pooling import POOLINGS
from dualform.models.readout import Classes, Numbers, Readout
from dualform.models.stepwise import StepwiseModel

__all__ = [
    "HEADS",
    "POOLINGS",
    "PooledModel",
    "PooledState",
    "Readout",
    "SequenceClassifier",
    "SequenceRegressor",
    "StepClassifier",
    "StepRegressor",
    "StepwiseModel",
]


@explained(elsewhere=ELSEWHERE)
class SequenceClassifier(Classes, PooledModel):
    """A sequence of tokens or of features -> logits of its classes, ``(B, classes)``; see :class:`PooledModel`.

    Args:
        config: the blocks.
        classes: number of classes, at least 2, or their names, which are saved with the model.
        inputs: width of the features ``(B, T, inputs)``; None reads tokens ``(B, T)``.
        pooling: ``mean``, ``last``, ``max`` or ``attention`` over time; for streams also ``window`` or ``forgetting``.
        window: of these two, in elements.
        standardise: whether features are scaled inside the model, see :meth:`fit_inputs`; with ``"differences"`` it
            reads those in time beside them, scaled, too.
        missing: what NaN means in features: ``refused``, ``passed``, ``marked`` or ``carried``; see
            :class:`~dualform.models.entrance.Entrance`.
        multi_label: whether a sequence may be of several classes at once, or of none: logits are then of each class by
            itself, for ``torch.sigmoid``.

    Raises:
        ConfigError: for an unknown pooling, listing those that exist, or a size that is out of range.

    Example:
        >>> import torch, dualform as df
        >>> config = df.ModelConfig(0, 32, {"S": (df.layers.S4DConfig(bidirectional=True),)}, "SS")
        >>> logits, _ = df.SequenceClassifier(config, 10, inputs=1)(torch.randn(4, 64, 1))
    """

    def __init__(
        self,
        config: ModelConfig,
        classes: int | Sequence[str],
        *,
        inputs: int | None = None,
        pooling: str = "mean",
        window: int | None = None,
        standardise: bool | str = False,
        missing: str = "refused",
        multi_label: bool = False,
    ):
        count = self._set_classes(classes, multi_label)
        scaled = {"standardise": standardise, "missing": missing}
        super().__init__(config, count, inputs=inputs, pooling=pooling, window=window, **scaled)


@explained(elsewhere=ELSEWHERE)
class SequenceRegressor(Numbers, PooledModel):
    """A sequence of tokens or of features -> some numbers, ``(B, targets)``; see :class:`PooledModel`.

    Args:
        config: the blocks.
        targets: how many numbers.
        inputs: width of the features ``(B, T, inputs)``; None reads tokens ``(B, T)``.
        pooling: ``mean``, ``last``, ``max`` or ``attention`` over time; for streams also ``window`` or ``forgetting``.
        window: of these two, in elements.
        standardise: whether features are scaled inside the model, see :meth:`fit_inputs`; with ``"differences"`` it
            reads those in time beside them, scaled, too.
        missing: what NaN means in features; see :class:`~dualform.models.entrance.Entrance`.
        quantiles: numbers between 0 and 1, such as ``(0.1, 0.5, 0.9)``: outputs are then those quantiles of each
            target, ``(B, targets, Q)``.

    Raises:
        ConfigError: for an unknown pooling, listing those that exist, or a size that is out of range.
    """

    def __init__(
        self,
        config: ModelConfig,
        targets: int,
        *,
        inputs: int | None = None,
        pooling: str = "mean",
        window: int | None = None,
        standardise: bool | str = False,
        missing: str = "refused",
        quantiles: Sequence[float] | None = None,
    ):
        self._set_quantiles(quantiles)
        scaled = {"standardise": standardise, "missing": missing}
        super().__init__(config, targets, inputs=inputs, pooling=pooling, window=window, **scaled)


@explained(elsewhere=ELSEWHERE)
class StepClassifier(Classes, StepwiseModel):
    """A sequence -> logits of the classes of each element, ``(B, T, classes)``; see :class:`StepwiseModel`.

    Args:
        config: the blocks.
        classes: number of classes, at least 2, or their names, which are saved with the model.
        inputs: width of the features ``(B, T, inputs)``; None reads tokens ``(B, T)``.
        standardise: whether features are scaled inside the model, see :meth:`fit_inputs`; with ``"differences"`` it
            reads those in time beside them, scaled, too.
        missing: what NaN means in features; see :class:`~dualform.models.entrance.Entrance`.
        multi_label: whether an element may be of several classes at once, or of none.

    Raises:
        ConfigError: for a size that is out of range.
    """

    def __init__(
        self,
        config: ModelConfig,
        classes: int | Sequence[str],
        *,
        inputs: int | None = None,
        standardise: bool | str = False,
        missing: str = "refused",
        multi_label: bool = False,
    ):
        count = self._set_classes(classes, multi_label)
        super().__init__(config, count, inputs=inputs, standardise=standardise, missing=missing)


@explained(elsewhere=ELSEWHERE)
class StepRegressor(Numbers, StepwiseModel):
    """A sequence -> some numbers for each element, ``(B, T, targets)``; see :class:`StepwiseModel`.

    Args:
        config: the blocks.
        targets: how many numbers.
        inputs: width of the features ``(B, T, inputs)``; None reads tokens ``(B, T)``.
        standardise: whether features are scaled inside the model, see :meth:`fit_inputs`; with ``"differences"`` it
            reads those in time beside them, scaled, too.
        missing: what NaN means in features; see :class:`~dualform.models.entrance.Entrance`.
        quantiles: numbers between 0 and 1: outputs are then those quantiles of each target, ``(B, T, targets, Q)``.

    Raises:
        ConfigError: for a size that is out of range.
    """

    def __init__(
        self,
        config: ModelConfig,
        targets: int,
        *,
        inputs: int | None = None,
        standardise: bool | str = False,
        missing: str = "refused",
        quantiles: Sequence[float] | None = None,
    ):
        self._set_quantiles(quantiles)
        super().__init__(config, targets, inputs=inputs, standardise=standardise, missing=missing)


HEADS: dict[str, type[Readout]] = {
    kind.__name__: kind for kind in (SequenceClassifier, SequenceRegressor, StepClassifier, StepRegressor)
}
"""The models with a head, by the names that files have."""
