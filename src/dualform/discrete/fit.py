"""Expectation and maximisation: the parameters of a hidden Markov model from data."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.discrete.chain import stationary_distribution
from dualform.discrete.logit import multinomial_logit
from dualform.discrete.passes import safe_log
from dualform.discrete.series import Series
from dualform.discrete.smoothing import expect

_TRIAL = 15  # iterations of each starting point
_FIXED_POINTS = 100  # iterations of what has no closed form
_WHERE = "HiddenMarkov.fit"


class Fit(NamedTuple):
    """What became of a fit."""

    log_likelihood: float  # of the data, without priors
    converged: bool  # whether the last iteration gained less than the tolerance
    iterations: int
    history: tuple[
        float, ...
    ]  # the objective, the log-likelihood and priors, before the first iteration and after each
    observed: int  # steps of which something was observed
    restarts: tuple[float, ...]  # the objective of each starting point when the best was chosen


class Statistics(NamedTuple):
    """What a model thinks of the data."""

    log_likelihood: float
    objective: float
    weights: Tensor  # (N, K), of the steps of all series end to end
    counts: Tensor  # expected transitions of the chain (S, S); with inputs each one by itself, (n, S, S)
    first: Tensor  # (S,), of the first states
    u: Tensor | None  # (n, U), the inputs of those transitions


@torch.no_grad()
def baum_welch(model: Any, series: Series, restarts: int, max_iterations: int, tolerance: float, seed: int) -> Fit:
    """Fit a model in place; 0 restarts go on from its parameters."""
    steps = series.line
    observed = _check_enough(steps, model.states)
    model.emission.prepare(steps)
    gain = tolerance * observed
    if not restarts:
        last, history, converged = _climb(model, series, max_iterations, gain)
        return Fit(last.log_likelihood, converged, len(history) - 1, tuple(history), observed, ())
    generator, found = torch.Generator().manual_seed(seed), []
    for i in range(restarts):
        _begin(model, series, generator, i)
        tries = min(_TRIAL, max_iterations) if restarts > 1 else 0
        _, history, converged = _climb(model, series, tries, gain)
        found.append((history[-1], {k: v.clone() for k, v in model.state_dict().items()}, history, converged))
    _, parameters, history, converged = max(found, key=lambda f: f[0])
    model.load_state_dict(parameters)
    remaining = 0 if converged else max_iterations - (len(history) - 1)
    last, more, again = _climb(model, series, remaining, gain)
    history = [*history, *more[1:]]
    return Fit(
        last.log_likelihood, converged or again, len(history) - 1, tuple(history), observed, tuple(f[0] for f in found)
    )


def _check_enough(x: Tensor, states: int) -> int:
    seen = ~x.isnan() if x.is_floating_point() else torch.ones_like(x, dtype=torch.bool)
    observed = int(seen.any(-1).sum())
    if not observed:
        raise ArgumentError(f"{_WHERE}: X has no values" if not len(x) else f"{_WHERE}: all values of X are missing")
    empty = (~seen.any(0)).nonzero()
    if len(empty):
        raise ArgumentError(f"{_WHERE}: all values of component {int(empty[0])} of X are missing", hint="leave it out")
    if observed < states:
        raise ArgumentError(f"{_WHERE}: {states} states, but X has {observed} observations", hint="take fewer states")
    return observed


def _begin(model: Any, series: Series, generator: torch.Generator, attempt: int) -> None:
    """Parameters from a first guess of the states."""
    weights = model.emission.guess(series.line, generator, attempt).to(model.transition.dtype)
    model.emission.maximise(series.line, weights, series.place)
    model.begin_chain(series, weights)


def begin_chain(model: Any, series: Series, weights: Tensor) -> None:
    """Transitions and the first state as often as in a guess of the states ``(N, K)``; weights of inputs are 0."""
    later, begins = series.place[1:] > 0, series.place == 0
    counts = 1 + weights[:-1][later].mT @ weights[1:][later]
    model.transition_logits.copy_((counts / counts.sum(-1, keepdim=True)).log())
    if model.initial_logits is not None:
        first = weights[begins].sum(0) + 1
        model.initial_logits.copy_((first / first.sum()).log())
    if model.input_weights is not None:
        model.input_weights.zero_()


def _climb(model: Any, series: Series, iterations: int, gain: float) -> tuple[Statistics, list[float], bool]:
    """Iterations until one gains less: what the last parameters think, the history, and whether one has."""
    expected = _expect(model, series)
    history = [expected.objective]
    for _ in range(iterations):
        _maximise(model, series, expected)
        expected = _expect(model, series)
        history.append(expected.objective)
        if history[-1] - history[-2] < gain:
            return expected, history, True
    return expected, history, False


def _expect(model: Any, series: Series) -> Statistics:
    total, firsts, counts, each, inputs = 0.0, [], [], [], []
    for part in series.parts:
        start, A, log_b = model.chain(part)
        found = expect(_WHERE, start, A, log_b, model.form, part.keep)
        total += float(part.masked(found.log_c).sum())
        begun = start * found.by_start
        firsts.append((begun if part.keep is None else begun * part.keep[:, :1]).sum(0))
        counts.append((A * found.by_A).flatten(0, -3) if A.dim() > 2 else (A * found.by_A)[None])
        if part.u is not None:
            inputs.append(part.u[:, :-1].flatten(0, 1))
        each.append(model.fold(found.probs))
    together = torch.cat(counts) if inputs else torch.cat(counts).sum(0)
    objective = total + float(model.emission.log_prior())
    weights = series.on_line(each)
    first = torch.stack(firsts).sum(0)
    return Statistics(total, objective, weights, together, first, torch.cat(inputs) if inputs else None)


def _maximise(model: Any, series: Series, found: Statistics) -> None:
    model.emission.maximise(series.line, found.weights, series.place)
    model.take_chain(found)


def take_chain(model: Any, found: Statistics) -> None:
    """Move transitions and the first state to the maximum of what is expected of them."""
    if model.initial_logits is None:
        _maximise_stationary(model, found)
        return
    if found.u is None:
        model.transition_logits.copy_(likeliest(found.counts, model.transition_logits))
    else:
        logits, weights = multinomial_logit(model.transition_logits, model.input_weights, found.counts, found.u)
        model.transition_logits.copy_(logits)
        model.input_weights.copy_(weights)
    model.initial_logits.copy_(likeliest(found.first, model.initial_logits))


def likeliest(counts: Tensor, otherwise: Tensor) -> Tensor:
    """Logarithms of the distributions of greatest likelihood over the last axis; others where nothing was counted."""
    total = counts.sum(-1, keepdim=True)
    return torch.where(total > 0, safe_log(counts / torch.where(total > 0, total, 1)), otherwise)


def _maximise_stationary(model: Any, expected: Statistics) -> None:
    """Maximise ``sum_ij n_ij log A_ij + sum_i f_i log pi_i(A)``, of expected transitions n and first states f.

    With ``Z = (I - A + 1 pi)^-1``, the second term has the derivative ``g_ij = pi_i (Z (f / pi))_j``. A maximum has
    ``A_ij = (n_ij + A_ij (g_ij - sum_j A_ij g_ij)) / n_i``, which is iterated. Should that lose likelihood, a part of
    the way is taken.
    """
    n, first = expected.counts, expected.first
    total, before = n.sum(-1, keepdim=True), model.transition
    closed = torch.where(total > 0, n / torch.where(total > 0, total, 1), before)
    ones, A = torch.ones_like(n), closed
    for _ in range(_FIXED_POINTS):
        pi = stationary_distribution(A)
        ratio = torch.where(first > 0, first / pi.clamp_min(torch.finfo(pi.dtype).tiny), 0)
        g = pi[:, None] * torch.linalg.solve(torch.eye(len(A), dtype=A.dtype, device=A.device) - A + ones * pi, ratio)
        moved = n + A * (g - (A * g).sum(-1, keepdim=True))
        moved = torch.where(total > 0, moved.clamp_min(0), before)
        last, A = A, moved / moved.sum(-1, keepdim=True)
        if (A - last).abs().max() < 4 * torch.finfo(A.dtype).eps:
            break

    def value(A: Tensor) -> Tensor:
        log_pi = safe_log(stationary_distribution(A))
        return torch.where(n > 0, n * safe_log(A), 0).sum() + torch.where(first > 0, first * log_pi, 0).sum()

    least, share = value(before), 1.0
    while not value(before + share * (A - before)) >= least and share > 1e-6:
        share /= 4
    if share > 1e-6:
        model.transition_logits.copy_(safe_log(before + share * (A - before)))
