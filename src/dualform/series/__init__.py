"""Classifiers and regressors of sequences with the manners of scikit-learn; they need the extra ``series``."""

from typing import TYPE_CHECKING

from dualform.core.lazy import lazy

if TYPE_CHECKING:
    from dualform.series.estimators import DeepClassifier, DeepRegressor

__all__ = ["DeepClassifier", "DeepRegressor"]

_HOME = {"DeepClassifier": "estimators", "DeepRegressor": "estimators"}

__getattr__, __dir__ = lazy(__name__, _HOME)
