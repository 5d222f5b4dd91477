"""Forecasts: a state space model is chosen for a series, and says how sure it is."""

from dualform.forecast.base import BaseForecaster, Prediction
from dualform.forecast.choose import Choice
from dualform.forecast.deep.state_space import DeepStateSpace
from dualform.forecast.evaluation import Evaluation, evaluate
from dualform.forecast.families import AUTO, FAMILIES, Candidate
from dualform.forecast.forecaster import Forecaster, SeasonalNaive
from dualform.forecast.metrics import coverage, crps, mase

__all__ = [
    "AUTO",
    "FAMILIES",
    "BaseForecaster",
    "Candidate",
    "Choice",
    "DeepStateSpace",
    "Evaluation",
    "Forecaster",
    "Prediction",
    "SeasonalNaive",
    "coverage",
    "crps",
    "evaluate",
    "mase",
]
