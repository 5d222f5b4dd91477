"""Linear-Gaussian models, their filters and smoothers."""

from dualform.gaussian.belief import Belief, Gaussian
from dualform.gaussian.kalman import KalmanFilter
from dualform.gaussian.model import LinearGaussian
from dualform.gaussian.recurrent import Estimate, Innovation, Updated
from dualform.gaussian.series import Filtered, Forecast, Smoothed

__all__ = [
    "Belief",
    "Estimate",
    "Filtered",
    "Forecast",
    "Gaussian",
    "Innovation",
    "KalmanFilter",
    "LinearGaussian",
    "Smoothed",
    "Updated",
]
