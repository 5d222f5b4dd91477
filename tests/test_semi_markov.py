"""Hidden semi-Markov models: brute force over segmentations, the chain that geometric durations make, fits."""

import itertools
import math

import pytest
import torch

import dualform as df
from dualform.core.errors import ArgumentError
from dualform.discrete import (
    FreeDurations,
    HiddenSemiMarkov,
    NegativeBinomialDurations,
    PoissonDurations,
    PoissonEmission,
    select,
)
from vectors import close

NAN = float("nan")
START, A = [0.5, 0.2, 0.3], [[0.0, 0.3, 0.7], [0.6, 0.0, 0.4], [0.5, 0.5, 0.0]]
PROBS = [[0.1, 0.4, 0.3, 0.2], [0.0, 0.5, 0.0, 0.5], [0.7, 0.1, 0.1, 0.1]]


def model_of(**form):
    emission = PoissonEmission.of([1.0, 4.0, 9.0])
    return HiddenSemiMarkov(emission, FreeDurations.of(PROBS), initial=START, transition=A, **form)


def segmentations(length):
    """All sequences of (state, duration) that fill the steps, the last one to its end or beyond."""

    def go(at, before):
        for k in range(3):
            if k != before:
                for d in range(1, 5):
                    if at + d >= length:
                        yield [(k, d)]
                    else:
                        for rest in go(at + d, k):
                            yield [(k, d), *rest]

    return list(go(0, None))


def brute_force(y):
    """Log-likelihood, posteriors of states and pairs, and the best segmentation's states and score."""
    length, probs, pairs, weights = len(y), torch.zeros(len(y), 3).double(), torch.zeros(len(y) - 1, 3, 3).double(), []
    emission = PoissonEmission.of([1.0, 4.0, 9.0])
    log_b = torch.stack(
        [
            torch.distributions.Poisson(emission.rates[:, 0].detach()).log_prob(v)
            if v == v
            else torch.zeros(3).double()
            for v in y
        ]
    )
    for segments in segmentations(length):
        states = [k for k, d in segments for _ in range(d)][:length]
        p = START[segments[0][0]] * math.prod(PROBS[k][d - 1] for k, d in segments)
        p *= math.prod(A[i][j] for (i, _), (j, _) in itertools.pairwise(segments))
        p *= math.exp(sum(log_b[t, k] for t, k in enumerate(states)))
        weights.append((p, states))
    total = sum(p for p, _ in weights)
    for p, states in weights:
        for t, k in enumerate(states):
            probs[t, k] += p / total
            if t:
                pairs[t - 1, states[t - 1], k] += p / total
    best, states = max(weights)
    return math.log(total), probs, pairs, torch.tensor(states), math.log(best)


@pytest.mark.parametrize("form", [{}, {"scaled": False}, {"parallel": True}])
@pytest.mark.parametrize("y", [[3.0], [0.0, 5.0, 4.0, 10.0, 8.0, 1.0], [0.0, NAN, NAN, 10.0, 8.0]])
def test_everything_equals_the_sum_over_all_segmentations(y, form):
    model, y = model_of(**form), torch.tensor(y, dtype=torch.float64)
    want, probs, pairs, states, best = brute_force(y)
    with torch.no_grad():
        assert abs(model.score(y).item() - want) < 1e-12
        close(model.predict_proba(y), probs, 1e-12)
        torch.testing.assert_close(model.smooth(y).pairs, pairs, rtol=1e-10, atol=1e-12)
        for t in range(len(y)):
            close(model.filter(y).probs[t], brute_force(y[: t + 1])[1][-1], 1e-12)
        score, path = model.decode(y)
        assert abs(score.item() - best) < 1e-12 and torch.equal(path, states)


def test_geometric_durations_are_a_plain_chain():
    """But for what is cut off after the longest one."""
    stay = torch.tensor([0.5, 0.3, 0.6], dtype=torch.float64)
    moves = torch.tensor(A, dtype=torch.float64)
    emission, longest = PoissonEmission.of([1.0, 4.0, 9.0]), 80
    semi = HiddenSemiMarkov(
        emission, NegativeBinomialDurations.of([1.0] * 3, 1 - stay, longest), initial=START, transition=A
    )
    chain = df.HiddenMarkov(emission, initial=START, transition=torch.diag(stay) + (1 - stay)[:, None] * moves)
    y = torch.randint(12, (2, 60, 1), generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        close(semi.log_likelihood(y, [60, 31]), chain.log_likelihood(y, [60, 31]), 1e-12)
        close(semi.predict_proba(y, [60, 31]), chain.predict_proba(y, [60, 31]), 1e-10)
        close(semi.smooth(y).pairs, chain.smooth(y).pairs, 1e-9)


def test_step_and_pieces_equal_the_whole():
    model, y = model_of(), torch.randint(12, (2, 9, 1), generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        whole, end = model(y)
        state, found = model.init_state(2), []
        for t in range(9):
            out, state = model.step(y[:, t], state)
            found.append(out.probs)
        close(torch.stack(found, 1), whole.probs, 1e-12)
        close(state.probs, end.probs, 1e-12)
        first, middle = model(y[:, :4])
        close(torch.cat([first.probs, model(y[:, 4:], middle)[0].probs], 1), whole.probs, 1e-12)


@pytest.mark.parametrize(
    ("durations", "by"),
    [
        (
            PoissonDurations.of([3.0, 0.5], 12),
            lambda n: torch.distributions.Poisson(torch.tensor([3.0, 0.5]).double()).log_prob(n),
        ),
        (
            NegativeBinomialDurations.of([2.5, 0.7], [0.4, 0.2], 12),
            lambda n: torch.distributions.NegativeBinomial(
                torch.tensor([2.5, 0.7], dtype=torch.float64), torch.tensor([0.6, 0.8], dtype=torch.float64)
            ).log_prob(n),
        ),
    ],
    ids=["poisson", "negative binomial"],
)
def test_durations_have_their_distributions_cut_off(durations, by):
    want = by(torch.arange(12).double()[:, None]).mT.log_softmax(-1)
    close(durations.log_probs(), want, 1e-12)
    close(durations.means, want.exp() @ torch.arange(1, 13).double(), 1e-12)


@pytest.mark.parametrize("kind", [FreeDurations, PoissonDurations, NegativeBinomialDurations])
def test_durations_go_to_their_maximum(kind):
    counts = torch.tensor([[9.0, 3.0, 2.0, 1.5, 1.0, 0.8], [8.0, 4.0, 2.0, 1.0, 0.5, 0.2]], dtype=torch.float64)
    durations = kind(2, 6)
    durations.maximise(counts)
    if kind is FreeDurations:
        close(durations.probs, counts / counts.sum(-1, keepdim=True), 1e-12)
    value = (counts * durations.log_probs()).sum()
    for gradient in torch.autograd.grad(value, list(durations.parameters())):
        assert gradient.abs().max() < 1e-4


def regular(length=1500):
    """Two kinds of work: one that lasts about 10 steps, one about 4."""
    emission = PoissonEmission.of([3.0, 9.0])
    model = HiddenSemiMarkov(emission, PoissonDurations.of([9.0, 3.0], 20))
    y, z = model.sample(length, generator=torch.Generator().manual_seed(4))
    return model, y[0], z[0]


@pytest.mark.parametrize("kind", [FreeDurations, PoissonDurations, NegativeBinomialDurations])
def test_a_fit_finds_how_long_states_last(kind):
    truth, y, z = regular()
    model = HiddenSemiMarkov(PoissonEmission(2), kind(2, 20))
    fit = model.fit(y, restarts=2, max_iterations=60)
    assert all(b >= a - 1e-7 for a, b in zip(fit.history[:-1], fit.history[1:], strict=True))
    order = model.emission.rates[:, 0].argsort()
    assert (model.durations.means[order] - truth.durations.means).abs().max() < 0.8
    assert (model.predict(y) == order[z]).double().mean() > 0.93
    chain = df.HiddenMarkov(PoissonEmission(2))
    assert fit.log_likelihood > chain.fit(y, restarts=2).log_likelihood + 20


def test_runs_of_a_sample_have_the_durations():
    model, _, z = regular(20000)
    change = (z[1:] != z[:-1]).nonzero()[:, 0]
    runs, of = change.diff(), z[change[1:]]
    for k in range(2):
        assert abs(runs[of == k].double().mean() - model.durations.means[k]) < 0.25


def test_parameters_train_by_gradient():
    _, y, _ = regular(60)
    model = HiddenSemiMarkov(PoissonEmission.of([2.0, 7.0]), PoissonDurations(2, 20))
    before = model.score(y)
    gradients = torch.autograd.grad(before, list(model.parameters()), allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in gradients)
    with torch.no_grad():
        model.durations.log_rates += (
            0.01 * gradients[[n for n, _ in model.named_parameters()].index("durations.log_rates")].sign()
        )
    assert model.score(y) > before


def test_the_number_of_states_is_chosen_with_durations():
    _, y, _ = regular(200)
    found = select(y, emission=PoissonEmission, durations=lambda k: PoissonDurations(k, 20), states=(2, 3), restarts=1)
    assert found.best.states == 2 and isinstance(found.best.model, HiddenSemiMarkov)


BAD = {
    "one": (lambda: HiddenSemiMarkov(PoissonEmission(1), PoissonDurations(1, 5)), "1 states"),
    "other": (lambda: HiddenSemiMarkov(PoissonEmission(3), PoissonDurations(2, 5)), "durations of 2"),
    "itself": (
        lambda: HiddenSemiMarkov(PoissonEmission(2), PoissonDurations(2, 5), transition=[[0.5, 0.5], [1.0, 0.0]]),
        "from a state to itself",
    ),
    "kind": (lambda: HiddenSemiMarkov(PoissonEmission(2), 5), "durations is int"),
    "longest": (lambda: PoissonDurations(2, 0), "longest is 0"),
    "rates": (lambda: PoissonDurations.of([0.0], 5), "rates has values that are not positive"),
    "stops": (lambda: NegativeBinomialDurations.of([1.0], [1.0], 5), "stops has values"),
    "probs": (lambda: FreeDurations.of([[0.5, 0.4]]), "probs sums to 0.9"),
}


@pytest.mark.parametrize(("call", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_explained(call, said):
    with pytest.raises(ArgumentError, match=said):
        call()
