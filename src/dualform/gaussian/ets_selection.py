"""Choosing a class of exponential smoothing."""

import itertools
from typing import Any

import torch

from dualform.core.calls import explained
from dualform.core.errors import ArgumentError
from dualform.gaussian.constraints import places
from dualform.gaussian.ets import Ets
from dualform.gaussian.progress import shown
from dualform.gaussian.selection import Candidate, Selection, candidate, series_of


@explained
def select_ets(y: Any, period: int | None = None, *, lengths: Any = None, progress: bool | None = None) -> Any:
    """Fit the classes of exponential smoothing to a series, and choose the one with the least AICc.

    Tried are all classes of :func:`~dualform.gaussian.ets.ets` but an additive error with a multiplicative season,
    whose forecasts have no finite variance. A series with a value of 0 or less has the classes that only add. Seasons
    need two periods of the series. Series of a batch are fitted together, class by class.

    Args:
        y: a series ``(T,)`` or ``(T, 1)``, or a batch ``(B, T, 1)``; NaN is missing.
        period: the steps of a season; None or 1 for none.
        lengths: how many steps each series of a batch has.
        progress: whether to show what is being tried; None shows it on a terminal.

    Returns:
        A :class:`~dualform.gaussian.selection.Selection`, or a list of them for a batch.

    Raises:
        ArgumentError: for a period that is not a whole number above 0, fewer than 3 steps, and a series that does not
            change.

    References:
        Hyndman, Koehler, Snyder and Grose (2002), "A state space framework for automatic forecasting using exponential
        smoothing methods".
    """
    if period is not None and (isinstance(period, bool) or not isinstance(period, int) or period < 1):
        raise ArgumentError(f"select_ets: period is {period!r}, expected a whole number, 1 or more steps")
    x, many, ends = series_of("select_ets", y, lengths)
    positive = ~(x <= 0).flatten(1).any(1)
    counts = (~x.isnan()).flatten(1).sum(1).tolist()
    seasons = ["none", "additive", "multiplicative"] if (period or 1) > 1 else ["none"]
    errors, trends = ("additive", "multiplicative"), ("none", "additive", "damped")
    classes = [c for c in itertools.product(errors, trends, seasons) if c[::2] != ("additive", "multiplicative")]
    tried: list[list[tuple[Candidate, Ets]]] = [[] for _ in counts]
    with shown("select_ets", progress, len(classes)) as begin:
        for error, trend, season in classes:
            enough = torch.tensor([n >= (2 * (period or 1) if season != "none" else 3) for n in ends])
            fits = enough if "multiplicative" not in (error, season) else enough & positive.cpu()
            rows = fits.nonzero()[:, 0].tolist()
            model = Ets(error, trend, season, period if season != "none" else None)
            begin(model.title)
            if not rows:
                continue
            models = model.expand(len(rows))
            models.begin(x[rows])
            with torch.no_grad():
                likely = models.log_likelihood(x[rows]).tolist()
            size = sum(place.free[0].numel() for place in places(models)) + 1
            for index, row in enumerate(rows):
                tried[row].append((candidate(model.title, likely[index], size, counts[row]), models.row(index)))
    for row, n in enumerate(ends):
        if not tried[row]:
            raise ArgumentError(f"select_ets: row {row} of y has {n} steps, expected 3 or more")
    found = []
    for row, options in enumerate(tried):
        options.sort(key=lambda each: (each[0].aicc, each[0].parameters, -each[0].log_likelihood))
        best = options[0][1]
        fit = best.fit(x[row, : ends[row]], start="current")
        found.append(Selection(fit, [each for each, _ in options]))
    return found if many else found[0]
