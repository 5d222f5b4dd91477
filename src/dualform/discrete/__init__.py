"""Hidden Markov models."""

from dualform.discrete.autoregressive import AutoregressiveEmission
from dualform.discrete.categorical import CategoricalEmission
from dualform.discrete.emission import Emission
from dualform.discrete.fit import Fit
from dualform.discrete.mixture import MixtureEmission
from dualform.discrete.model import Filtered, HiddenMarkov, HiddenState, Smoothed
from dualform.discrete.normal import GaussianEmission
from dualform.discrete.poisson import PoissonEmission
from dualform.discrete.posterior import Posterior, forward_backward, log_likelihood, viterbi
from dualform.discrete.selection import Candidate, Selection, select

__all__ = [
    "AutoregressiveEmission",
    "Candidate",
    "CategoricalEmission",
    "Emission",
    "Filtered",
    "Fit",
    "GaussianEmission",
    "HiddenMarkov",
    "HiddenState",
    "MixtureEmission",
    "PoissonEmission",
    "Posterior",
    "Selection",
    "Smoothed",
    "forward_backward",
    "log_likelihood",
    "select",
    "viterbi",
]
