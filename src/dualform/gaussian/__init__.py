"""Linear-Gaussian models and their filters."""

from dualform.gaussian.kalman import Filtered, KalmanFilter
from dualform.gaussian.model import Gaussian, LinearGaussian

__all__ = ["Filtered", "Gaussian", "KalmanFilter", "LinearGaussian"]
