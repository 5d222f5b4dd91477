"""What every model does whose linear-Gaussian form is made of its parameters."""

from typing import Any

import torch
from torch import Tensor

from dualform.gaussian.estimated import Estimated
from dualform.gaussian.forecasts import Forecast
from dualform.gaussian.model import LinearGaussian
from dualform.gaussian.recurrent import Innovation
from dualform.gaussian.results import Filtered, Smoothed


class Built(Estimated):
    """A model whose linear-Gaussian form is made of its parameters, with their gradients: ``build()``.

    Its log-likelihood has gradients. What else is asked of it has none, so that it can be shown and is of the kind of
    the series; the same methods of ``build()`` have them.
    """

    def build(self) -> LinearGaussian:
        """The linear-Gaussian model of the values that the parameters have now.

        Raises:
            ArgumentError: where they have none, such as a stationary start of an autoregression at its bound.
        """
        raise NotImplementedError

    def prepared(self, y: Any) -> Any:
        """The series as it is filtered: y itself, unless a model transforms it."""
        return y

    def log_likelihood(self, y: Any, **options: Any) -> Tensor:
        """:meth:`~dualform.gaussian.series.Series.log_likelihood` of the model, with gradients to its parameters."""
        return self.build().log_likelihood(self.prepared(y), **options)

    @torch.no_grad()
    def filter(self, y: Any, **options: Any) -> Filtered:
        """:meth:`~dualform.gaussian.series.Series.filter` of the model."""
        return self.build().filter(self.prepared(y), **options)

    @torch.no_grad()
    def smooth(self, y: Any, **options: Any) -> Smoothed:
        """:meth:`~dualform.gaussian.series.Series.smooth` of the model."""
        return self.build().smooth(self.prepared(y), **options)

    @torch.no_grad()
    def innovations(self, y: Any, **options: Any) -> Innovation:
        """:meth:`~dualform.gaussian.series.Series.innovations` of the model."""
        return self.build().innovations(self.prepared(y), **options)

    @torch.no_grad()
    def forecast(self, y: Any, horizon: int, **options: Any) -> Forecast:
        """:meth:`~dualform.gaussian.series.Series.forecast` of the model."""
        return self.build().forecast(self.prepared(y), horizon, **options)

    @torch.no_grad()
    def simulate_posterior(self, y: Any, draws: int = 1, **options: Any) -> Any:
        """:meth:`~dualform.gaussian.series.Series.simulate_posterior` of the model."""
        return self.build().simulate_posterior(self.prepared(y), draws, **options)

    def sample(self, length: int, batch: int = 1, **options: Any) -> tuple[Tensor, Tensor]:
        """:meth:`~dualform.gaussian.model.LinearGaussian.sample` of the model."""
        return self.build().sample(length, batch, **options)
