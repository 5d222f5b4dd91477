"""The Kalman filter and smoother, one step at a time and in parallel over time: the same function."""

from torch import nn

from dualform.core.calls import explained
from dualform.core.errors import ArgumentError
from dualform.gaussian.linear import Linear
from dualform.gaussian.model import LinearGaussian
from dualform.gaussian.parameters import Parameters

__all__ = ["KalmanFilter"]


@explained
class KalmanFilter(Linear, nn.Module):
    """The filter of a linear-Gaussian model, a :class:`~dualform.core.recurrence.Recurrence`.

    Observations ``(B, T, M)`` -> :class:`~dualform.gaussian.recurrent.Estimate`; the state is a
    :class:`~dualform.gaussian.belief.Belief`. A step is

        predict   m = A m + c + B u,           P = A P A^T + S Q S^T
        update    F = C P C^T + R,             K = P C^T F^-1
                  m = m + K (y - C m - d - D u),   P = (I - K C) P (I - K C)^T + K R K^T     (Joseph)

    **NaN means missing**, and so do the masked values of ``numpy.ma``, component by component: the observed components
    are filtered with their exact joint distribution. A step with nothing observed is a prediction, of log-likelihood
    0. Gradients reach the model's tensors, the observations and the initial state, and stay finite where data are
    missing.

    The parallel form finds the state before every step by an associative scan of depth ``O(log T)``, then makes
    all steps at once with the arithmetic of the sequential form, so that its error does not grow with T. It takes
    a singular Q; up to the last step where ``C Q C^T + R`` is singular, or where the observations nearly are the state,
    the loop runs in its place. It combines the prior with the data in information form, and loses digits where P0 is
    much greater than the covariance of the noise: with a vague prior, all that float32 has. Steps in which a start is
    still exactly diffuse are taken one after the other. The smoother is two scans.

    The sequential form of the filter is a compiled loop, which has a gradient, wherever ``torch.compile`` does not
    trace it: on a CPU for up to 128 states, where it is the faster form at all sizes; on a GPU with Triton for up to 16
    states and 8 observations, where few and long series are cut into spans of time, which run side by side, and are
    smoothed and differentiated by the scan.

    A :class:`~dualform.gaussian.model.LinearGaussian` has the same methods; this class is for the choice of the form.

    Args:
        model: the parameters; results have the widest dtype among theirs, the data's and the state's.
        parallel: the form that is taken for whole series. None takes the parallel form where it is expected to be
            faster, on a CPU for few and long series of small models whose gradients are wanted; the loop again where
            the scan would lose digits or cannot be. While a graph is compiled, the loop on a CPU and the scan
            elsewhere.

    Raises:
        ArgumentError: for a model of another kind.

    Example:
        >>> import dualform as df
        >>> level = df.LinearGaussian([[1.0]], [[1.0]], [[1469.1]], [[15099.0]], P0="diffuse")
        >>> kalman = df.KalmanFilter(level)
        >>> filtered = kalman.filter([1120.0, None, 963.0])

    References:
        Kalman (1960), "A new approach to linear filtering and prediction problems"; Sarkka and Garcia-Fernandez (2021),
        "Temporal parallelization of Bayesian smoothers", arXiv:1905.13002; Durbin and Koopman (2012), "Time series
        analysis by state space methods", chapters 4 and 5.
    """

    def __init__(self, model: LinearGaussian, *, parallel: bool | None = None):
        super().__init__()
        if not isinstance(model, LinearGaussian):
            hint = "model.at(times) is one" if isinstance(model, Parameters) else ""
            raise ArgumentError(f"KalmanFilter: model is {type(model).__name__}, expected a LinearGaussian", hint=hint)
        self.model, self.parallel = model, parallel

    @property
    def system(self) -> Parameters:
        """The model."""
        return self.model
