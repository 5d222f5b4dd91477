"""The choice of a model for each of many series, by forecasts from origins that are held back."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.forecast.distribution import Moments
from dualform.forecast.estimate import Estimated, ahead, estimate
from dualform.forecast.families import Candidate, Family, called, candidates_of
from dualform.forecast.metrics import crps, midpoints
from dualform.forecast.shape import Shape, shape_of

ORIGINS = 8
"""From how many origins candidates forecast."""
_FEW = 10  # steps that have to be held back for a choice
_QUICK = 40  # directions of the optimiser, for candidates
_CLOSE = 1.02  # what is no worse than the best by this factor counts as equally good
_LEVELS = midpoints(40)


class Trial(NamedTuple):
    """How a candidate did on a series: its mean CRPS, NaN where it could not be fitted, and its parameters."""

    score: float
    parameters: int


class Choice(NamedTuple):
    """What was chosen for a series, and beside what.

    ``trials`` are those of all candidates by their labels; empty where there was no choice. ``why`` is a sentence.
    """

    found: Estimated
    trials: dict[str, Trial]
    why: str


def held_back(length: int, horizon: int, season: int, count: int = ORIGINS) -> tuple[list[int], int]:
    """Origins, as numbers of steps before them, from which a series is forecast as a trial; and how far.

    The horizon is at most a fifth of the series. Origins are half of it apart, the last one as far from the end as it
    reaches. The first leaves two seasons, where there are as many, and half of the series, and 10 steps at least.

    Args:
        length: steps of the series.
        horizon: steps.
        season: steps, 1 for none.
        count: the most origins.
    """
    reach = min(horizon, max(1, length // 5))
    seasons = 2 * season + 1 if 2 * season + 1 + reach <= length else 0
    least = max(10, length // 2, seasons)
    apart = (reach + 1) // 2
    origins = [at for k in range(count) if (at := length - reach - k * apart) >= least]
    return origins[::-1], reach


def choose(
    series: dict[str, Tensor],
    names: tuple[str | Family, ...],
    season: int,
    horizon: int,
    *,
    log: bool | None = None,
    X: Tensor | None = None,
    tell: Callable[[int, int], None] = lambda done, whole: None,
) -> list[Choice]:
    """Choose and fit a model for each series.

    Each candidate is fitted to what precedes the first of the held-back origins, and forecasts from all of them with
    these parameters. The best has the least mean CRPS, in the unit of the series. Of it and those within 2 % of it, the
    one with the fewest parameters is fitted to all of the series. Candidates that several series have are fitted to
    them in one batch.

    Where fewer than 10 steps lie between the first origin and the end, errors on them say little of a candidate. Then
    there is no choice, and the default is a damped trend, which has a level and a straight trend as its limits.

    Args:
        series: by name, each ``(T,)``.
        names: of the families, or families themselves.
        season: steps, 1 for none.
        horizon: how far the choice looks.
        log: whether logarithms are taken; None decides for each series.
        X: covariates of all ``(T, K)``.
        tell: is called with how many fits are done, of how many.

    Raises:
        ArgumentError: for a series of which no candidate can be fitted, with its name.

    References:
        Gardner and McKenzie (2011), "Why the damped trend works".
    """
    every = list(series.values())
    folds = [held_back(len(y), horizon, season) for y in every]
    options = [
        _candidates(name, y, names, season, fold) for (name, y), (fold, _) in zip(series.items(), folds, strict=True)
    ]
    scored = [len(options[row]) > 1 and _held(*folds[row]) >= _FEW for row in range(len(every))]
    groups: dict[str, list[int]] = {}
    for row in range(len(every)):
        for candidate in options[row] if scored[row] else []:
            groups.setdefault(candidate.label, []).append(row)
    whole = len(groups) + 1
    trials: list[dict[str, Trial]] = [{} for _ in every]
    for done, (label, rows) in enumerate(groups.items()):
        tell(done, whole)
        candidate = next(one for one in options[rows[0]] if one.label == label)
        found = _trial(candidate, [every[row] for row in rows], [folds[row] for row in rows], season, log, X)
        for row, trial in zip(rows, found, strict=True):
            trials[row][label] = trial
    tell(len(groups), whole)
    chosen = _final(series, names, options, trials, season, log, X)
    tell(whole, whole)
    return chosen


def _held(origins: list[int], reach: int) -> int:
    """How many steps are forecast from some origin."""
    return origins[-1] + reach - origins[0] if origins else 0


def _candidates(
    name: str, y: Tensor, names: tuple[str | Family, ...], season: int, origins: list[int]
) -> list[Candidate]:
    """Those with a season where there are two of them before the first origin, or where there is no origin."""
    left = Shape(season=season).left
    if origins and origins[0] < 2 * left:
        left = 1
    found = candidates_of(names, y, left) or candidates_of(names, y, 1)
    if not found:
        count = int((~y.isnan()).sum())
        raise ArgumentError(
            f"Forecaster: {name} has {count} observations, too few for {' or '.join(map(called, names))}"
        )
    return found


def _trial(
    candidate: Candidate,
    series: list[Tensor],
    folds: list[tuple[list[int], int]],
    season: int,
    log: bool | None,
    X: Tensor | None,
) -> list[Trial]:
    """The mean CRPS of a candidate over the origins of each series."""
    recent = max(240, 8 * season)
    first = [max(0, origins[0] - recent) for origins, _ in folds]
    if X is not None:  # which all series share
        first = [0] * len(series)
    cut = [y[at : origins[0]] for y, at, (origins, _) in zip(series, first, folds, strict=True)]
    shapes = [shape_of(y, season, log) for y in cut]
    seen = None if X is None else X[: max(map(len, cut))]
    fitted = estimate(candidate, cut, shapes, seen, _QUICK)
    total: list[list[float]] = [[] for _ in series]
    good = [row for row, one in enumerate(fitted) if isinstance(one, Estimated)]
    for k in range(ORIGINS):
        rows = [row for row in good if k < len(folds[row][0])]
        for reach in {folds[row][1] for row in rows}:
            some = [row for row in rows if folds[row][1] == reach]
            now = [_until(fitted[row], series[row][first[row] : folds[row][0][k]], X) for row in some]
            for row, moments in zip(some, _moments(now, reach, X), strict=True):
                at = folds[row][0][k]
                total[row].append(crps(series[row][at : at + reach], moments.quantiles(_LEVELS)).item())
    means = [torch.tensor(values or [torch.nan], dtype=torch.float64).nanmean().item() for values in total]
    sizes = [len(one.names) if isinstance(one, Estimated) else 0 for one in fitted]
    return [Trial(*pair) for pair in zip(means, sizes, strict=True)]


def _until(one: Estimated | ArgumentError, y: Tensor, X: Tensor | None) -> Estimated:
    assert isinstance(one, Estimated)
    return one.again(y, None if X is None else X[: len(y)])


def _moments(now: list[Estimated], reach: int, X: Tensor | None) -> list[Moments]:
    if not now:
        return []
    future = None if X is None else X[len(now[0].y) : len(now[0].y) + reach]
    return ahead(now, reach, future)


def _final(
    given: dict[str, Tensor],
    names: tuple[str | Family, ...],
    options: list[list[Candidate]],
    trials: list[dict[str, Trial]],
    season: int,
    log: bool | None,
    X: Tensor | None,
) -> list[Choice]:
    """Fit the best candidate of each series to all of it; where that fails the next best, at last one of no season."""
    series = list(given.values())
    shapes = [shape_of(y, season, log) for y in series]
    left: dict[int, list[Candidate]] = {}
    for row, y in enumerate(series):
        last = [one for one in candidates_of(names, y, 1) if one.label not in {option.label for option in options[row]}]
        left[row] = [*_ranked(options[row], trials[row]), *last]
    chosen: dict[int, Choice] = {}
    while left:
        groups: dict[str, list[int]] = {}
        for row, ranked in left.items():
            groups.setdefault(ranked[0].label, []).append(row)
        for rows in groups.values():
            candidate = left[rows[0]][0]
            found = estimate(candidate, [series[row] for row in rows], [shapes[row] for row in rows], X)
            for row, one in zip(rows, found, strict=True):
                if isinstance(one, Estimated):
                    chosen[row] = Choice(one, trials[row], _why(one, options[row], trials[row]))
                    del left[row]
                elif len(left[row]) == 1:
                    raise ArgumentError(f"Forecaster: {[*given][row]}: no model can be fitted; the last one: {one}")
                else:
                    left[row] = left[row][1:]
    return [chosen[row] for row in range(len(series))]


def _ranked(options: list[Candidate], trials: dict[str, Trial]) -> list[Candidate]:
    """The best first, and before it those that are as good with fewer parameters; one without a score last.

    Without scores, the default is first.
    """
    if not trials:
        return sorted(options, key=lambda one: not one.default)
    best = _best(trials)

    def key(one: Candidate) -> tuple[int, int, float]:
        trial = trials.get(one.label, Trial(0.0, 0))
        if math.isnan(trial.score):
            return 2, 0, 0.0
        good = trial.score <= _CLOSE * best
        return (0, trial.parameters, trial.score) if good else (1, 0, trial.score)

    return sorted(options, key=key)


def _best(trials: dict[str, Trial]) -> float:
    return min((trial.score for trial in trials.values() if not math.isnan(trial.score)), default=0.0)


def _why(one: Estimated, options: list[Candidate], trials: dict[str, Trial]) -> str:
    if one.candidate.label not in {option.label for option in options}:
        return "No candidate with a season could be fitted."
    if len(options) == 1:
        return "It was the only candidate."
    if not trials:
        return f"Fewer than {_FEW} steps can be held back, too few for a choice: it is the default."
    best, mine = _best(trials), trials[one.candidate.label].score
    if not mine <= _CLOSE * best:
        return "The candidates with smaller errors could not be fitted to all of the series."
    if mine == best:
        return f"Of {len(trials)} candidates it had the smallest mean CRPS, {best:.4g}, on origins that were held back."
    return (
        f"Of {len(trials)} candidates, those with a mean CRPS within 2 % of the smallest, {best:.4g}, on origins that "
        "were held back, were taken to be equally good; it has the fewest parameters of them."
    )
