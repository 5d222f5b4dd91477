"""The estimation of candidates, many series in one batch, and what they say of the steps to come."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.forecast.distribution import Moments, Table
from dualform.forecast.families import Candidate
from dualform.forecast.shape import Shape
from dualform.gaussian.constraints import places
from dualform.gaussian.fitting import Fit


@dataclass(frozen=True)
class Estimated:
    """A candidate with the parameters of one series.

    Parameters are kept as plain tensors, the unconstrained ones in the order of the model, so that this can be pickled.
    ``X`` are the covariates of the steps of ``y``. ``shared`` is a model that all series of a fit have in common, which
    then has no parameters of one series.
    """

    candidate: Candidate
    shape: Shape
    y: Tensor  # (T,), as observed
    X: Tensor | None  # (T, K)
    free: list[Tensor] = field(repr=False)
    names: list[str]
    values: Tensor  # (P,)
    errors: Tensor  # (P,), standard errors
    log_likelihood: float
    converged: bool
    message: str
    shared: Any = field(default=None, repr=False)

    def model(self, X: Tensor | None = None) -> Any:
        """The model with its parameters.

        Args:
            X: covariates of the steps to come ``(h, K)``, where it has some.
        """
        if self.shared is not None:
            return self.shared
        made = self.candidate.make(_joined(self.X, X))
        for place, value in zip(places(made), self.free, strict=True):
            place.free.data.copy_(value)
        return made

    def again(self, y: Tensor, X: Tensor | None) -> "Estimated":
        """The same parameters after other observations."""
        return replace(self, y=y, X=X)


def estimate(
    candidate: Candidate,
    series: list[Tensor],
    shapes: list[Shape],
    X: Tensor | None = None,
    max_iter: int = 200,
) -> list[Estimated | ArgumentError]:
    """Fit a candidate to series, all in one batch; where the batch fails, in halves, down to the series that cannot be.

    Args:
        candidate: what is fitted.
        series: of each its observations ``(T,)``, as they are.
        shapes: how each is transformed before.
        X: covariates of all ``(T, K)``.
        max_iter: of the optimiser.

    Returns:
        For each series what was found, or why it could not be fitted.
    """
    made = [shape.forth(y) for shape, y in zip(shapes, series, strict=True)]
    try:
        fits = _fit(candidate, made, X, max_iter)
    except ArgumentError as error:
        if len(series) == 1:
            return [error]
        half = len(series) // 2
        parts = slice(half), slice(half, None)
        return [one for part in parts for one in estimate(candidate, series[part], shapes[part], X, max_iter)]
    found = []
    for fit, y, shape in zip(fits, series, shapes, strict=True):
        shared = fit.model if getattr(fit.model, "shared", False) else None
        free = [] if shared else [place.free.detach().clone() for place in places(fit.model)]
        found.append(
            Estimated(
                candidate, shape, y, X, free, fit.names, fit.values, fit.standard_errors, fit.log_likelihood,
                fit.converged, fit.message, shared,
            )
        )  # fmt: skip
    return _determined(found, X)


def _determined(found: list[Estimated], X: Tensor | None) -> list[Estimated | ArgumentError]:
    """The same, with an error in place of each whose observations leave the state undetermined: it has no forecast."""
    try:
        ahead(found, 1, None if X is None else X[:1])
    except ArgumentError as error:
        half = len(found) // 2
        return [*_determined(found[:half], X), *_determined(found[half:], X)] if half else [error]
    return [*found]


def _fit(candidate: Candidate, series: list[Tensor], X: Tensor | None, max_iter: int) -> list[Fit]:
    model = candidate.make(X)
    if len(series) == 1:
        return [model.fit(series[0], max_iter=max_iter)]
    many, options = _stacked(series)
    return model.expand(len(series)).fit(many, max_iter=max_iter, **options)


@torch.no_grad()
def ahead(found: list[Estimated], horizon: int, X: Tensor | None = None) -> list[Moments]:
    """The distributions of the steps to come.

    Args:
        found: those of the same candidate are forecast in one batch.
        horizon: h.
        X: covariates of these steps ``(h, K)``.
    """
    result: dict[int, Moments] = {}
    groups: dict[Any, list[int]] = {}
    for at, one in enumerate(found):
        groups.setdefault((one.candidate.label, id(one.shared)), []).append(at)
    for group in groups.values():
        ones = [found[at] for at in group]
        series = [one.shape.forth(one.y) for one in ones]
        model = ones[0].model(X)
        if len(ones) == 1:
            seen = model.forecast(series[0], horizon)
        else:
            many, options = _stacked(series)
            seen = _together(model, ones).forecast(many, horizon, **options)
        for row, (at, one) in enumerate(zip(group, ones, strict=True)):
            result[at] = _moments(seen, row, one, horizon)
    return [result[at] for at in range(len(found))]


def _moments(seen: Any, row: int, one: Estimated, horizon: int) -> Moments:
    """Those of a series, from a forecast of normal moments, of one series or of several, or of quantiles."""
    effect = one.shape.effect(len(one.y), horizon)
    if isinstance(seen, Table):
        return Moments.of_table(Table(seen.quantiles[row] + effect[:, None], seen.levels), one.shape)
    mean, cov = (seen.mean, seen.cov) if seen.mean.dim() == 2 else (seen.mean[row], seen.cov[row])
    return Moments(mean[:, 0] + effect, cov[:, 0, 0].clamp_min(0).sqrt(), one.shape)


def parts_of(one: Estimated, horizon: int, X: Tensor | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and standard deviation ``(T + h,)`` of the components, by name; empty for a model that has none.

    They are of the logarithm where one was taken. Beyond the observations they are forecasts.

    Args:
        one: of which series.
        horizon: h.
        X: covariates of the steps to come ``(h, K)``.
    """
    model: Any = one.model(X)
    found = {}
    if hasattr(model, "components"):
        y = one.shape.forth(one.y)
        longer = torch.cat([y, torch.full((horizon,), torch.nan, dtype=y.dtype)])
        found = {name: (part.mean, part.var.clamp_min(0).sqrt()) for name, part in model.components(longer).items()}
    if one.shape.beta is not None:
        effect = one.shape.effect(0, len(one.y) + horizon)
        found["season"] = effect, torch.zeros_like(effect)
    return found


def _together(model: Any, ones: list[Estimated]) -> Any:
    """One model with the parameters of each in a row."""
    made = model.expand(len(ones))
    if ones[0].shared is not None:
        return made
    for place, *rows in zip(places(made), *(one.free for one in ones), strict=True):
        place.free.data.copy_(torch.stack(rows))
    return made


def _stacked(series: list[Tensor]) -> tuple[Tensor, dict[str, Any]]:
    """Series as ``(S, T, 1)``, and their lengths where they differ."""
    lengths = [len(y) for y in series]
    if len(set(lengths)) == 1:
        return torch.stack(series).unsqueeze(-1), {}
    padded = torch.nn.utils.rnn.pad_sequence(series, batch_first=True, padding_value=torch.nan)
    return padded.unsqueeze(-1), {"lengths": lengths}


def _joined(X: Tensor | None, more: Tensor | None) -> Tensor | None:
    return X if X is None or more is None else torch.cat([X, more])
