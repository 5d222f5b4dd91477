"""Linear-Gaussian models, their filters and smoothers, and models of time series made of them."""

from dualform.gaussian.belief import Belief, Gaussian
from dualform.gaussian.components import (
    Autoregressive,
    Cycle,
    Irregular,
    Level,
    Regression,
    Seasonal,
    Trend,
    TrigonometricSeasonal,
)
from dualform.gaussian.continuous import ContinuousLinearGaussian
from dualform.gaussian.diagnostics import Diagnostics
from dualform.gaussian.ets import Ets, ets
from dualform.gaussian.ets_selection import select_ets
from dualform.gaussian.fitting import Fit, fit
from dualform.gaussian.forecasts import Forecast, SimulatedForecast
from dualform.gaussian.kalman import KalmanFilter
from dualform.gaussian.model import LinearGaussian
from dualform.gaussian.motion import constant_acceleration, constant_velocity, coordinated_turn
from dualform.gaussian.recurrent import Estimate, Innovation, Updated
from dualform.gaussian.sarimax import Sarimax, sarimax
from dualform.gaussian.sarimax_selection import select_sarimax
from dualform.gaussian.selection import Candidate, Selection
from dualform.gaussian.series import Filtered, Smoothed
from dualform.gaussian.structural import Component, Effect, Structural
from dualform.gaussian.vector import DynamicFactor, Var, dynamic_factor, var

__all__ = [
    "Autoregressive",
    "Belief",
    "Candidate",
    "Component",
    "ContinuousLinearGaussian",
    "Cycle",
    "Diagnostics",
    "DynamicFactor",
    "Effect",
    "Estimate",
    "Ets",
    "Filtered",
    "Fit",
    "Forecast",
    "Gaussian",
    "Innovation",
    "Irregular",
    "KalmanFilter",
    "Level",
    "LinearGaussian",
    "Regression",
    "Sarimax",
    "Seasonal",
    "Selection",
    "SimulatedForecast",
    "Smoothed",
    "Structural",
    "Trend",
    "TrigonometricSeasonal",
    "Updated",
    "Var",
    "constant_acceleration",
    "constant_velocity",
    "coordinated_turn",
    "dynamic_factor",
    "ets",
    "fit",
    "sarimax",
    "select_ets",
    "select_sarimax",
    "var",
]
