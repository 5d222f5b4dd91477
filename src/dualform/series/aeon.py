"""The estimators under the interface of aeon: for its pipelines, its benchmarks, and comparisons beside its own."""

from typing import Any

import numpy as np

from dualform.core.errors import DualformError

try:
    from aeon.classification import BaseClassifier  # pyright: ignore[reportMissingImports]
    from aeon.regression import BaseRegressor  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise DualformError(
        "dualform.series.aeon needs aeon, which is not installed", hint='pip install "dualform[aeon]"'
    ) from error

from dualform.layers.s4d import S4DConfig
from dualform.models.config import ModelConfig
from dualform.series.estimators import DeepClassifier, DeepRegressor

_TAGS = {
    "algorithm_type": "deeplearning",
    "capability:missing_values": True,
    "capability:multithreading": True,
    "capability:multivariate": True,
    "capability:unequal_length": True,
    "X_inner_type": ["np-list", "numpy3D"],
}


class _Wrapped:
    """What both have in common: an estimator of :mod:`dualform.series` that is made and fitted in ``fit``."""

    estimator_: Any
    _kind: Any  # its class

    def _fit(self, X: Any, y: np.ndarray) -> "_Wrapped":
        given: dict[str, Any] = self.get_params()  # pyright: ignore[reportAttributeAccessIssue]
        self.estimator_ = self._kind(**given, channels_first=True).fit(X, y)
        return self

    def _predict(self, X: Any) -> np.ndarray:
        return self.estimator_.predict(X)

    @classmethod
    def _get_test_params(cls, parameter_set: str = "default") -> dict[str, Any]:
        """A model that is fitted in a moment, for aeon's checks."""
        return {"model": ModelConfig(0, 8, {"S": (S4DConfig(d_state=2, bidirectional=True),)}, "S"), "steps": 2}


class DualformClassifier(_Wrapped, BaseClassifier):
    """A :class:`~dualform.series.DeepClassifier` that is a classifier of aeon.

    It takes the collections of aeon: ``(n, C, T)``, ``(n, T)``, and lists of ``(C, T)`` of unequal lengths. NaN is a
    missing value, and at the end of a series padding.

    Args:
        model: this and all that follow are those of :class:`~dualform.series.DeepClassifier`.
        members: how many models.
        causal: whether the blocks read the past alone.
        steps: of training; None chooses.
        lr: the peak learning rate; None for 4e-3.
        validation: the share of the series that each member holds out.
        class_weight: what a class counts in the loss.
        n_jobs: members that are trained at once.
        random_state: of all that is random.
        verbose: whether a bar shows how far training is.

    Attributes:
        estimator_: the fitted :class:`~dualform.series.DeepClassifier`, whose ``models_`` can be saved.

    Raises:
        ArgumentError: for series that cannot be learned; names the row.
    """

    _tags, _kind = _TAGS, DeepClassifier

    def __init__(
        self,
        model: ModelConfig | None = None,
        members: int = 1,
        causal: bool = False,
        steps: int | None = None,
        lr: float | None = None,
        validation: float | str | None = "auto",
        class_weight: Any = None,
        n_jobs: int = 1,
        random_state: Any = None,
        verbose: bool = False,
    ):
        self.model, self.members, self.causal = model, members, causal
        self.steps, self.lr, self.validation, self.class_weight = steps, lr, validation, class_weight
        self.n_jobs, self.random_state, self.verbose = n_jobs, random_state, verbose
        super().__init__()

    def _predict_proba(self, X: Any) -> np.ndarray:
        return self.estimator_.predict_proba(X)


class DualformRegressor(_Wrapped, BaseRegressor):
    """A :class:`~dualform.series.DeepRegressor` that is a regressor of aeon; series as :class:`DualformClassifier`.

    Args:
        model: this and all that follow are those of :class:`~dualform.series.DeepRegressor`.
        members: how many models.
        causal: whether the blocks read the past alone.
        steps: of training; None chooses.
        lr: the peak learning rate; None for 4e-3.
        validation: the share of the series that each member holds out.
        n_jobs: members that are trained at once.
        random_state: of all that is random.
        verbose: whether a bar shows how far training is.

    Attributes:
        estimator_: the fitted :class:`~dualform.series.DeepRegressor`.

    Raises:
        ArgumentError: for series that cannot be learned; names the row.
    """

    _tags, _kind = _TAGS, DeepRegressor

    def __init__(
        self,
        model: ModelConfig | None = None,
        members: int = 1,
        causal: bool = False,
        steps: int | None = None,
        lr: float | None = None,
        validation: float | str | None = "auto",
        n_jobs: int = 1,
        random_state: Any = None,
        verbose: bool = False,
    ):
        self.model, self.members, self.causal = model, members, causal
        self.steps, self.lr, self.validation = steps, lr, validation
        self.n_jobs, self.random_state, self.verbose = n_jobs, random_state, verbose
        super().__init__()
