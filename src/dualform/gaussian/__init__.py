"""Linear-Gaussian models, their filters and smoothers."""

from dualform.gaussian.belief import Belief, Gaussian
from dualform.gaussian.continuous import ContinuousLinearGaussian
from dualform.gaussian.kalman import KalmanFilter
from dualform.gaussian.model import LinearGaussian
from dualform.gaussian.motion import constant_acceleration, constant_velocity, coordinated_turn
from dualform.gaussian.recurrent import Estimate, Innovation, Updated
from dualform.gaussian.series import Filtered, Forecast, Smoothed

__all__ = [
    "Belief",
    "ContinuousLinearGaussian",
    "Estimate",
    "Filtered",
    "Forecast",
    "Gaussian",
    "Innovation",
    "KalmanFilter",
    "LinearGaussian",
    "Smoothed",
    "Updated",
    "constant_acceleration",
    "constant_velocity",
    "coordinated_turn",
]
