"""How many states? Models of several sizes, compared by what an information criterion says."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

from dualform.core.calls import explained
from dualform.core.errors import ArgumentError
from dualform.discrete.durations import Durations
from dualform.discrete.emission import Emission
from dualform.discrete.fit import Fit
from dualform.discrete.model import HiddenMarkov
from dualform.discrete.semi_markov import HiddenSemiMarkov


class Candidate(NamedTuple):
    """A fitted model and its criteria, of which less is better."""

    states: int
    model: HiddenMarkov
    fit: Fit
    aic: float  # -2 log L + 2 p, with p free parameters
    bic: float  # -2 log L + p log n, with n observed steps


class Selection(NamedTuple):
    """The candidate that a criterion prefers, and all of them."""

    best: Candidate
    candidates: tuple[Candidate, ...]


@explained
def select(
    X: Any,
    lengths: Any = None,
    *,
    emission: Callable[[int], Emission],
    states: Iterable[int] = range(1, 7),
    criterion: Literal["bic", "aic"] = "bic",
    durations: Callable[[int], Durations] | None = None,
    restarts: int = 6,
    seed: int = 0,
    **more: Any,
) -> Selection:
    """Fit a model for each number of states, and choose.

    Args:
        X: as :meth:`dualform.discrete.model.HiddenMarkov.fit`.
        lengths: as there.
        emission: makes the emission for a number of states, such as ``PoissonEmission``.
        states: the numbers that are tried.
        criterion: ``bic`` or ``aic``.
        durations: makes the durations for a number of states, such as ``lambda k: PoissonDurations(k, 20)``, and so
            models that are a :class:`~dualform.discrete.semi_markov.HiddenSemiMarkov`.
        restarts: starting points of each fit.
        seed: of these.
        more: ``stationary`` and ``inputs`` of the models, and ``u`` of the fits.

    Raises:
        ArgumentError: as ``fit``; for another criterion, no numbers, or durations beside inputs or a stationary start.

    References:
        Schwarz (1978), "Estimating the dimension of a model"; Akaike (1974), "A new look at the statistical model
        identification"; Zucchini, MacDonald and Langrock (2016), "Hidden Markov models for time series", section 6.1.

    Example:
        >>> from dualform.discrete import PoissonEmission, select
        >>> select([1, 0, 2, 1, 9, 8, 9, 7, 1, 0, 1, 2], emission=PoissonEmission, states=(1, 2)).best.states
        2
    """
    u = more.pop("u", None)
    if durations is not None and any(more.values()):
        raise ArgumentError("select: with durations there are no inputs, and no stationary start")
    if criterion not in ("bic", "aic"):
        raise ArgumentError(f"select: criterion is {criterion!r}, expected 'bic' or 'aic'")
    found: list[Candidate] = []
    for k in states:
        model = HiddenMarkov(emission(k), **more) if durations is None else HiddenSemiMarkov(emission(k), durations(k))
        fit = model.fit(X, lengths, u=u, restarts=restarts, seed=seed)
        p = model.free_parameters()
        aic, bic = 2 * p - 2 * fit.log_likelihood, p * math.log(fit.observed) - 2 * fit.log_likelihood
        found.append(Candidate(k, model, fit, aic, bic))
    if not found:
        raise ArgumentError("select: states is empty", hint="such as range(1, 7)")
    return Selection(min(found, key=lambda c: getattr(c, criterion)), tuple(found))
