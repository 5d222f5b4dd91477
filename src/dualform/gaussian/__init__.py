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
from dualform.gaussian.ensemble import EnsembleFilter
from dualform.gaussian.ets import Ets, ets
from dualform.gaussian.ets_selection import select_ets
from dualform.gaussian.fitting import Fit, fit
from dualform.gaussian.forecasts import Forecast, SimulatedForecast
from dualform.gaussian.kalman import KalmanFilter
from dualform.gaussian.kalman_net import KalmanNet
from dualform.gaussian.kim import SwitchingBelief
from dualform.gaussian.linearization import Cubature, Extended, Iterated, Unscented
from dualform.gaussian.model import LinearGaussian
from dualform.gaussian.motion import constant_acceleration, constant_velocity, coordinated_turn
from dualform.gaussian.nonlinear import NonlinearGaussian
from dualform.gaussian.particle import ParticleFilter
from dualform.gaussian.recurrent import Estimate, Innovation, Updated
from dualform.gaussian.results import Filtered, Smoothed
from dualform.gaussian.sampling import Particles, Sampled
from dualform.gaussian.sarimax import Sarimax, sarimax
from dualform.gaussian.sarimax_selection import select_sarimax
from dualform.gaussian.selection import Candidate, Selection
from dualform.gaussian.structural import Component, Effect, Structural
from dualform.gaussian.switching import (
    SwitchingEstimate,
    SwitchingFiltered,
    SwitchingLinearGaussian,
    SwitchingSmoothed,
)
from dualform.gaussian.vector import DynamicFactor, Var, dynamic_factor, var

__all__ = [
    "Autoregressive",
    "Belief",
    "Candidate",
    "Component",
    "ContinuousLinearGaussian",
    "Cubature",
    "Cycle",
    "Diagnostics",
    "DynamicFactor",
    "Effect",
    "EnsembleFilter",
    "Estimate",
    "Ets",
    "Extended",
    "Filtered",
    "Fit",
    "Forecast",
    "Gaussian",
    "Innovation",
    "Irregular",
    "Iterated",
    "KalmanFilter",
    "KalmanNet",
    "Level",
    "LinearGaussian",
    "NonlinearGaussian",
    "ParticleFilter",
    "Particles",
    "Regression",
    "Sampled",
    "Sarimax",
    "Seasonal",
    "Selection",
    "SimulatedForecast",
    "Smoothed",
    "Structural",
    "SwitchingBelief",
    "SwitchingEstimate",
    "SwitchingFiltered",
    "SwitchingLinearGaussian",
    "SwitchingSmoothed",
    "Trend",
    "TrigonometricSeasonal",
    "Unscented",
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
