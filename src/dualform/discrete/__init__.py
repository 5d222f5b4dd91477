"""Hidden Markov models."""

from dualform.discrete.autoregressive import AutoregressiveEmission
from dualform.discrete.categorical import CategoricalEmission
from dualform.discrete.durations import Durations, FreeDurations, NegativeBinomialDurations, PoissonDurations
from dualform.discrete.emission import Emission
from dualform.discrete.filtering import Filtered, HiddenState
from dualform.discrete.fit import Fit
from dualform.discrete.mixture import MixtureEmission
from dualform.discrete.model import HiddenMarkov, Smoothed
from dualform.discrete.normal import GaussianEmission
from dualform.discrete.poisson import PoissonEmission
from dualform.discrete.posterior import Posterior, forward_backward, log_likelihood, viterbi
from dualform.discrete.selection import Candidate, Selection, select
from dualform.discrete.semi_markov import HiddenSemiMarkov

__all__ = [
    "AutoregressiveEmission",
    "Candidate",
    "CategoricalEmission",
    "Durations",
    "Emission",
    "Filtered",
    "Fit",
    "FreeDurations",
    "GaussianEmission",
    "HiddenMarkov",
    "HiddenSemiMarkov",
    "HiddenState",
    "MixtureEmission",
    "NegativeBinomialDurations",
    "PoissonDurations",
    "PoissonEmission",
    "Posterior",
    "Selection",
    "Smoothed",
    "forward_backward",
    "log_likelihood",
    "select",
    "viterbi",
]
