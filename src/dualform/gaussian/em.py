"""Expectation and maximisation: maximum likelihood by moments of the smoothed states, without a gradient."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.linalg import matvec, symmetric_part
from dualform.gaussian.constraints import Place, kind
from dualform.gaussian.parameters import Parameters

_MATRICES = ("A", "C", "Q", "R", "m0", "P0")


class Maximum(NamedTuple):
    """Where EM has ended: the log-likelihood before every iteration ``(iterations + 1, rows)``."""

    log_likelihood: Tensor
    converged: Tensor  # (rows,), bool: the last iteration raised it by less than the tolerance


class _Pattern(NamedTuple):
    """A variance of a model that is a sum of parts: ``Q`` or ``R`` contains it times a projection."""

    place: Place
    entry: int | None  # of a vector of variances
    letter: str
    inverse: Tensor  # the pseudo-inverse of dQ / dvariance, divided by its rank


def maximize_by_em(
    model: Any, y: Tensor, free: list[Place], options: dict[str, Any], max_iter: int, tolerance: float = 1e-9
) -> Maximum:
    """Raise the likelihood of series ``(T, M)``, or ``(R, T, M)`` of an expanded model, until it rises no more.

    Each iteration smooths the series at the present parameters, and sets the parameters to where the expectation of the
    likelihood of states and observations is highest. Missing components of an observation are estimated like states.
    Never does the likelihood fall.

    Args:
        model: a ``LinearGaussian`` of which A, C, Q, R, m0 or P0 are ``nn.Parameter``; or a model that is built of its
            parameters, of which those to be estimated are variances in Q and R.
        y: NaN is missing.
        free: the parameters to be estimated.
        options: of ``log_likelihood``; only ``lengths`` can be taken.
        max_iter: how many iterations.
        tolerance: where the likelihood has risen by less, in nats, an iteration was the last.

    Raises:
        ArgumentError: for a parameter for which there is no closed form, by its name, and for inputs.

    References:
        Shumway and Stoffer (1982), "An approach to time series smoothing and forecasting using the EM algorithm";
        Holmes (2013), "Derivation of the EM algorithm for constrained and unconstrained multivariate autoregressive
        state-space models", arXiv:1302.3919, for missing components; Koopman (1993), "Disturbance smoother for state
        space models", for sums of components.
    """
    if unknown := sorted(set(options) - {"lengths"}):
        raise ArgumentError(f"fit: method 'em' does not take {unknown[0]}", hint="method='lbfgs' does")
    patterns = _patterns(model, free) if hasattr(model, "build") else None
    if patterns is None:
        _check(model, free)
    series = model.prepared(y) if hasattr(model, "prepared") else y
    values: list[Tensor] = []
    for _ in range(max_iter + 1):
        system = model.build() if patterns is not None else model
        smooth = system.smooth(series)
        values.append(torch.as_tensor(smooth.log_likelihood).detach().reshape(-1).clone())
        done = len(values) > 1 and bool((values[-1] - values[-2] < tolerance).all())
        if done or len(values) > max_iter:
            break
        moments = _Moments(system, series, smooth)
        if patterns is None:
            _set_matrices(model, moments, free)
        else:
            for pattern in patterns:
                expected = moments.Q() if pattern.letter == "Q" else moments.R(system.C)
                value = (pattern.inverse * expected).sum((-2, -1)).clamp_min(0)
                old = pattern.place.value.detach().clone()
                if pattern.entry is None:
                    old = value.reshape(old.shape)
                else:
                    old[..., pattern.entry] = value
                pattern.place.assign(old)
    rise = values[-1] - values[-2] if len(values) > 1 else torch.full_like(values[-1], torch.inf)
    return Maximum(torch.stack(values), rise < tolerance)


class _Moments:
    """Expectations given the series, of what the likelihood of states and observations depends on."""

    def __init__(self, system: Parameters, y: Tensor, smooth: Any):
        h, P, self.system = smooth.mean, smooth.cov, system
        self.start, first = (smooth.initial_mean, smooth.initial_cov), system.prior == "first"
        before = torch.cat([smooth.initial_mean.unsqueeze(-2), h[..., :-1, :]], -2)
        spread = torch.cat([smooth.initial_cov.unsqueeze(-3), P[..., :-1, :, :]], -3)
        steps = slice(1 if first else 0, None)
        self.count = h.shape[-2] - int(first)
        c = torch.zeros_like(h[..., 0, :]) if system.c is None else system.c
        to = (h - c.unsqueeze(-2))[..., steps, :]
        h0, P0, lag = before[..., steps, :], spread[..., steps, :, :], smooth.lag_one_cov[..., steps, :, :]
        self.S00 = _outer(h0, h0) + P0.sum(-3)
        self.S10 = _outer(to, h0) + lag.sum(-3)
        self.S11 = _outer(to, to) + P[..., steps, :, :].sum(-3)
        self._observe(system, y, h, P)

    def _observe(self, system: Parameters, y: Tensor, h: Tensor, P: Tensor) -> None:
        """Sums over the steps with an observation, of products of y (less d) and h."""
        seen = ~y.isnan()
        there = seen.any(-1)
        self.seen_steps = there.sum(-1)
        length, C, R = y.shape[-2], system.C, system.R
        C = C[..., :length, :, :] if "C" in system.time_varying else C.unsqueeze(-3)
        y = torch.where(seen, y, 0)
        if system.d is not None:
            y = y - (system.d[..., :length, :] if "d" in system.time_varying else system.d.unsqueeze(-2))
        mask = seen.to(h)
        R = R.unsqueeze(-3)
        gain = torch.diag_embed(mask)  # of the noise by what is seen of it
        if (there & ~seen.all(-1)).any():
            inverse = torch.linalg.pinv(R * mask[..., None] * mask[..., None, :], hermitian=True)
            rest = (1 - mask)[..., None] * (R * mask[..., None, :]) @ inverse
            gain = gain + rest
        Ehh = h.unsqueeze(-1) * h.unsqueeze(-2) + P
        e = mask * (y - matvec(C, h))
        Eeh = gain @ (e.unsqueeze(-1) * h.unsqueeze(-2) - mask[..., None] * (C @ P))
        E = e.unsqueeze(-1) * e.unsqueeze(-2) + mask[..., None] * (C @ P @ C.mT) * mask[..., None, :]
        Eee = gain @ E @ gain.mT + R - gain @ (R * mask[..., None])
        some = there[..., None, None]
        self.noise = torch.where(some, Eee, 0).sum(-3)
        self.Shh = torch.where(some, Ehh, 0).sum(-3)
        self.Syh = torch.where(some, C @ Ehh + Eeh, 0).sum(-3)
        self.Syy = torch.where(some, C @ Ehh @ C.mT + C @ Eeh.mT + Eeh @ C.mT + Eee, 0).sum(-3)

    def Q(self, A: Tensor | None = None) -> Tensor:
        """The covariance of the process noise, in the coordinates of S."""
        A = self.system.A if A is None else A
        moved = symmetric_part(self.S11 - A @ self.S10.mT - self.S10 @ A.mT + A @ self.S00 @ A.mT) / self.count
        if self.system.S is None:
            return moved
        back = torch.linalg.pinv(self.system.S)
        return symmetric_part(back @ moved @ back.mT)

    def R(self, C: Tensor) -> Tensor:
        """The covariance of the observation noise; of a new C where that is constant."""
        n = self.seen_steps.reshape(*self.seen_steps.shape, 1, 1)
        if C is self.system.C:
            return symmetric_part(self.noise) / n
        return symmetric_part(self.Syy - C @ self.Syh.mT - self.Syh @ C.mT + C @ self.Shh @ C.mT) / n


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a.mT @ b


def _set_matrices(model: Any, moments: _Moments, free: list[Place]) -> None:
    """The maximisation of a model whose matrices are parameters."""
    names = {place.key: place for place in free}
    A, C = model.A.detach(), model.C
    new: dict[str, Tensor] = {}
    if "A" in names:
        new["A"] = A = torch.linalg.solve(moments.S00, moments.S10.mT).mT
    if "C" in names:
        new["C"] = C = torch.linalg.solve(moments.Shh, moments.Syh.mT).mT
    if "Q" in names:
        new["Q"] = moments.Q(A)
    if "R" in names:
        new["R"] = moments.R(C)
    mean, cov = moments.start
    if "m0" in names:
        new["m0"] = mean
    if "P0" in names:
        away = mean - new.get("m0", model.m0.detach())
        new["P0"] = symmetric_part(cov + away.unsqueeze(-1) * away.unsqueeze(-2))
    for key, value in new.items():
        names[key].assign(value)


def _check(model: Any, free: list[Place]) -> None:
    """Refuse what has no closed form, by its name."""
    if not isinstance(model, Parameters):
        raise ArgumentError(f"fit: method 'em' cannot fit {kind(model)}", hint="method='lbfgs' fits any likelihood")

    def refuse(name: str, why: str) -> ArgumentError:
        return ArgumentError(f"fit: method 'em' has no closed form for {name!r}: {why}", hint="fixed=[...] or 'lbfgs'")

    varying = set(model.time_varying)
    for place in free:
        if place.key not in _MATRICES or "." in place.name:
            raise refuse(place.name, f"it estimates {', '.join(_MATRICES)}")
        if place.constraint is not None and place.value.numel() > 1:
            raise refuse(place.name, "it is parametrised")
        if place.key in varying:
            raise refuse(place.name, "it varies in time")
        needs = {"A": "cSQ", "Q": "AcS", "C": "d"}.get(place.key, "")
        if moving := [letter for letter in needs if letter in varying]:
            raise refuse(place.name, f"{moving[0]} varies in time")
        if place.key == "A" and model.S is not None:
            raise refuse(place.name, "S says which states the noise reaches")
        if model.stationary and place.key in "AQ":
            raise refuse(place.name, "P0='stationary' depends on it")
        if place.key in ("m0", "P0") and (model.stationary or model.diffuse is not None):
            raise refuse(place.name, "the start is diffuse or stationary")
    if model.B is not None or model.D is not None:
        raise ArgumentError("fit: method 'em' does not take inputs (B, D)", hint="method='lbfgs' does")


def _patterns(model: Any, free: list[Place]) -> list[_Pattern]:
    """What each variance of a model is multiplied by, found by a change of it."""
    rows = model.rows
    now, made = model.build(), []
    for place in free:
        value = place.value.detach().clone()
        count = value.shape[-1] if value.dim() > (1 if rows else 0) else None
        for index in range(count or 1):
            at = (..., index) if count is not None else ...
            built = []
            for number in (0.0, 1.0, 2.0):
                moved = value.clone()
                moved[at] = number
                built.append(_built(model, place, moved))
            place.assign(value)
            letters = _is_variance(now, built, value[at])
            if letters is None:
                raise ArgumentError(
                    f"fit: method 'em' has no closed form for {place.name!r}: it estimates variances that no other "
                    "noise is added to, of states that do not start from their stationary distribution",
                    hint=f"fixed={{{place.name!r}: ...}} or method='lbfgs'",
                )
            (letter,) = letters
            one = letters[letter][0] if rows else letters[letter]
            rank = torch.linalg.matrix_rank(one)
            made.append(_Pattern(place, index if count is not None else None, letter, torch.linalg.pinv(one) / rank))
    return made


def _built(model: Any, place: Place, value: Tensor) -> Any:
    """The matrices of a model with a value of a parameter; None where it cannot have that."""
    try:
        place.assign(value)
        return model.build()
    except ArgumentError:
        return None


def _changed(old: Parameters, new: Parameters) -> dict[str, Tensor]:
    """By how much matrices differ, those that do."""
    found = {}
    for letter in ("A", "C", "Q", "R", "c", "d", "m0", "P0"):
        a, b = getattr(old, letter), getattr(new, letter)
        if a is not None and b is not None and not torch.equal(a, b):
            found[letter] = (b - a).detach()
    return found


def _is_variance(now: Parameters, built: list[Any], value: Tensor) -> dict[str, Tensor] | None:
    """What Q or R changes by with a parameter, if that is all, in proportion, and where nothing else is; else None."""
    if any(model is None for model in built):
        return None
    once, twice = (_changed(built[0], model) for model in built[1:])
    if set(once) != set(twice) or set(once) not in ({"Q"}, {"R"}):
        return None
    (letter,) = once
    pattern, whole = once[letter], getattr(now, letter).detach()
    others = whole - value.reshape(*value.shape, 1, 1) * pattern
    if not torch.allclose(twice[letter], 2 * pattern, rtol=1e-9, atol=1e-12):
        return None
    if (pattern @ others).abs().max() > 1e-9 * whole.abs().max():
        return None
    if letter == "Q" and now.stationary:
        known = torch.ones_like(pattern[..., 0]) if now.diffuse is None else (now.diffuse == 0).all(-1)
        if (pattern.diagonal(dim1=-2, dim2=-1) * known).any():
            return None
    return once
