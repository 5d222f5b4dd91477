"""Hidden Markov models: brute force over all paths, recorded values, all forms as one function, layouts, bad input."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

import dualform as df
from dualform.core.errors import ArgumentError
from dualform.discrete import (
    AutoregressiveEmission,
    CategoricalEmission,
    GaussianEmission,
    MixtureEmission,
    PoissonEmission,
    forward_backward,
    log_likelihood,
    viterbi,
)
from dualform.discrete.series import Series
from vectors import close, load

FORMS = list(itertools.product((None, False, True), (None, True, False)))
NAN = float("nan")


def chain(states=3, seed=0, zeros=False):
    """A random distribution of the first state, and a transition; from left to right with zeros."""
    g = torch.Generator().manual_seed(seed)
    start, A = (torch.rand(n, states, generator=g, dtype=torch.float64) + 0.05 for n in (1, states))
    A, start = (A.triu(), torch.eye(states, dtype=torch.float64)[:1]) if zeros else (A, start)
    return (start / start.sum())[0], A / A.sum(-1, keepdim=True)


def enumerate_paths(start: Tensor, A: Tensor, log_b: Tensor):
    """Log-likelihood, posteriors of states and pairs, and the best path, from all paths; A is (T - 1, K, K)."""
    length, states = log_b.shape
    paths = torch.tensor(list(itertools.product(range(states), repeat=length)))
    p = start[paths[:, 0]].log() + log_b[0, paths[:, 0]]
    for t in range(1, length):
        p = p + A[t - 1, paths[:, t - 1], paths[:, t]].log() + log_b[t, paths[:, t]]
    weight = p.softmax(0)
    one = torch.nn.functional.one_hot(paths, states).double()
    pairs = torch.einsum("n,nti,ntj->tij", weight, one[:, :-1], one[:, 1:])
    return p.logsumexp(0), torch.einsum("n,ntk->tk", weight, one), pairs, paths[p.argmax()], p.max()


@pytest.mark.parametrize(("parallel", "scaled"), FORMS)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_every_form_equals_the_sum_over_all_paths(parallel, scaled, zeros, varying, length):
    start, A = chain(zeros=zeros)
    g = torch.Generator().manual_seed(1)
    log_b = 2 * torch.randn(length, 3, generator=g, dtype=torch.float64)
    each = torch.stack([chain(seed=t, zeros=zeros)[1] for t in range(length - 1)]) if varying and length > 1 else None
    each = A.expand(length - 1, 3, 3) if each is None else each
    want, probs, pairs, path, best = enumerate_paths(start, each, log_b)
    given = each if varying else A
    found = forward_backward(start, given, log_b, parallel=parallel, scaled=scaled)
    close(found.loglik.sum(), want, 1e-12)
    close(found.probs, probs, 1e-12)
    torch.testing.assert_close(found.pairs, pairs, rtol=1e-10, atol=1e-12)
    close(log_likelihood(start, given, log_b, parallel=parallel, scaled=scaled), want, 1e-12)
    for t in range(length):
        close(found.filtered[t], enumerate_paths(start, each[:t], log_b[: t + 1])[1][-1], 1e-12)
    got_path, got_best = viterbi(start, given, log_b)
    assert torch.equal(got_path, path)
    close(got_best, best, 1e-12)


@pytest.mark.parametrize("name", ["categorical", "gaussian", "timevarying"])
@pytest.mark.parametrize(("parallel", "scaled"), FORMS)
def test_recorded_values_of_dynamax(name, parallel, scaled):
    g = load(f"hmm_{name}")
    start, A, log_b = g["initial_probs"], g["transition"], g["log_likelihoods"]
    found = forward_backward(start, A, log_b, parallel=parallel, scaled=scaled)
    close(found.loglik.sum()[None], g["loglik"], 1e-12)
    close(found.filtered, g["filtered_probs"], 1e-11)
    close(found.probs, g["smoothed_probs"], 1e-11)
    close(found.pairs, g["pair_probs"], 1e-11)
    moved = (found.filtered[:-1, None] @ (A if A.dim() == 3 else A[None])).squeeze(1)
    close(torch.cat([start[None], moved]), g["predicted_probs"], 1e-11)
    path, score = viterbi(start, A, log_b)
    assert torch.equal(path, g["viterbi"])
    close(score[None], g["viterbi_logprob"], 1e-12)


def recorded(name):
    g = load(f"hmm_{name}")
    emission = (
        GaussianEmission.of(g["means"], g["covs"])
        if name == "gaussian"
        else CategoricalEmission.of(g["emission_probs"])
    )
    return df.HiddenMarkov(emission, initial=g["initial_probs"], transition=g["transition"]), g


@pytest.mark.parametrize("name", ["categorical", "gaussian"])
def test_a_model_has_the_recorded_values(name):
    model, g = recorded(name)
    close(model.log_likelihood(g["y"])[None], g["loglik"], 1e-12)
    close(model.filter(g["y"]).probs, g["filtered_probs"], 1e-11)
    close(model.predict_proba(g["y"]), g["smoothed_probs"], 1e-11)
    close(model.smooth(g["y"]).pairs, g["pair_probs"], 1e-11)
    assert torch.equal(model.predict(g["y"]), g["viterbi"])
    float32 = recorded(name)[0].float()
    close(float32.predict_proba(g["y"]), g["smoothed_probs"], 1e-4)


@pytest.mark.parametrize("states", [1, 4])
@pytest.mark.parametrize("stay", [0.0, 20.0, 1e6])
def test_chunks_side_by_side_equal_the_loop(states, stay):
    """Also where the chain forgets so slowly that guesses fail and starts are computed."""
    g = torch.Generator().manual_seed(2)
    A = torch.rand(states, states, generator=g, dtype=torch.float64) + stay * torch.eye(states)
    A, start = A / A.sum(-1, keepdim=True), torch.full((3, states), 1 / states, dtype=torch.float64)
    log_b = (0.01 if stay > 100 else 1) * torch.randn(3, 1000, states, generator=g, dtype=torch.float64)
    want = forward_backward(start, A, log_b, parallel=False, scaled=True)
    for scaled in (True, False):
        for a, b in zip(forward_backward(start, A, log_b, scaled=scaled), want, strict=True):
            close(a, b, 1e-11 if scaled else 1e-9)
    path, score = viterbi(start, A, log_b)
    each = A.expand(3, 999, states, states)
    loop, best = viterbi(start, each, log_b)
    assert torch.equal(path, loop)
    close(score, best, 1e-13)


@pytest.mark.parametrize("stay", [0.0, 20.0, 1e6])
@pytest.mark.parametrize("lengths", [None, [700, 0, 650, 1]])
def test_posteriors_and_gradients_by_chunks_equal_those_of_the_loop(stay, lengths):
    g = torch.Generator().manual_seed(6)
    A = torch.rand(3, 3, generator=g, dtype=torch.float64) + stay * torch.eye(3)
    y = torch.randint(9, (4, 700, 1), generator=g).double()
    found, A = [], A / A.sum(-1, keepdim=True)
    for parallel, scaled in ((None, True), (None, False), (False, True)):
        model = df.HiddenMarkov(PoissonEmission.of([3.0, 4.0, 5.0]), transition=A, parallel=parallel, scaled=scaled)
        probs, weights = model.predict_proba(y, lengths), torch.tensor([1.0, 2.0, -1.0, 0.5], dtype=torch.float64)
        loss = (model.log_likelihood(y, lengths) * weights).sum()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        steps = model.fit(y, lengths, from_data=False, max_iterations=2)
        found.append((probs, loss, torch.tensor(steps.history), *gradients, *model.parameters()))
    for got in found[:2]:
        for a, b in zip(got, found[2], strict=True):
            close(a, b, 1e-8)


@pytest.mark.parametrize("stay", [0.0, 20.0])
def test_paths_of_padded_rows_by_chunks_equal_those_of_each_row_alone(stay):
    g = torch.Generator().manual_seed(8)
    A, lengths = torch.rand(3, 3, generator=g, dtype=torch.float64) + stay * torch.eye(3), [700, 0, 128, 1, 129, 300]
    model = df.HiddenMarkov(PoissonEmission.of([3.0, 4.0, 5.0]), transition=A / A.sum(-1, keepdim=True))
    y = torch.randint(9, (6, 700, 1), generator=g).double()
    scores, paths = model.decode(y, lengths)
    for row, n in enumerate(lengths):
        if n:
            score, path = model.decode(y[row, :n])
            assert torch.equal(paths[row, :n], path)
            close(scores[row], score, 1e-12)
    assert scores[1] == 0 and (paths[1] == -1).all()


def test_passes_leave_the_number_of_threads_as_it_was():
    model, y, _ = model_and_data("poisson", batch=1, length=300)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model.predict_proba(y), model.predict(y)
        with pytest.raises(ArgumentError):
            IMPOSSIBLE.predict_proba(torch.ones(300))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_chunks_are_not_guessed_where_the_chain_never_forgets():
    """A state that is never left: which one it is, only the first observation says."""
    A, start = torch.eye(3, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    log_b = torch.zeros(1000, 3, dtype=torch.float64)
    log_b[0] = torch.tensor([1.0, 0.0, 2.0])
    want = (start * log_b[0].exp()) / (start * log_b[0].exp()).sum()
    for scaled in (True, False):
        close(forward_backward(start, A, log_b, scaled=scaled).probs, want.expand(1000, 3), 1e-11)
    assert viterbi(start, A, log_b)[0].unique().tolist() == [2]


# The first step rules out, by e^-800, the state that the chain must have begun in; or the first steps rule out a state,
# and the last steps, less surely, the other, in a chain that stays where it is.
LOST = {
    "forward": ([[0.5, 0.5], [0.0, 1.0]], [[-800.0, 0.0], [0.0, -900.0], [0.0, -900.0]]),
    "both": ([[1.0, 0.0], [0.0, 1.0]], [[0.0, -500.0], [0.0, -500.0], [-400.0, 0.0], [-400.0, 0.0]]),
}


@pytest.mark.parametrize(("A", "log_b"), LOST.values(), ids=LOST)
@pytest.mark.parametrize("parallel", [None, False, True])
def test_what_probabilities_lose_logarithms_keep(A, log_b, parallel):
    start, A, log_b = (torch.tensor(m, dtype=torch.float64) for m in ([0.5, 0.5], A, log_b))
    want, probs, *_ = enumerate_paths(start, A.expand(len(log_b) - 1, 2, 2), log_b)
    for scaled in (None, False):
        found = forward_backward(start, A, log_b, parallel=parallel, scaled=scaled)
        close(found.loglik.sum(), want, 1e-12)
        close(found.probs, probs, 1e-11)
    with pytest.raises(ArgumentError, match=r"too small for a scaled form|has probability 0"):
        forward_backward(start, A, log_b, parallel=parallel, scaled=True)


def brute_gradients(parallel, scaled):
    def function(start, A, log_b):
        return log_likelihood(start.softmax(-1), A.softmax(-1), log_b, parallel=parallel, scaled=scaled)

    return function


@pytest.mark.parametrize(("parallel", "scaled"), FORMS)
@pytest.mark.parametrize("varying", [False, True])
def test_gradients_of_any_order(parallel, scaled, varying):
    g = torch.Generator().manual_seed(3)
    shapes = (2, 2), ((2, 2, 2, 2) if varying else (2, 2)), (2, 3, 2)
    args = [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]
    function = brute_gradients(parallel, scaled)
    assert torch.autograd.gradcheck(function, args)
    assert torch.autograd.gradgradcheck(function, args)


def test_third_derivatives():
    """Of a chain of two steps with one free number, whose likelihood has a closed form."""
    log_b = torch.tensor([[0.3, -1.0], [0.7, 0.1]], dtype=torch.float64)

    def ours(w):
        A = torch.stack([torch.stack([w, 1 - w]), torch.stack([1 - w, w])])
        return log_likelihood(torch.tensor([0.4, 0.6], dtype=torch.float64), A, log_b)

    def closed(w):
        b, c = log_b.exp()
        return (0.4 * b[0] * (w * c[0] + (1 - w) * c[1]) + 0.6 * b[1] * ((1 - w) * c[0] + w * c[1])).log()

    found = []
    for f in (ours, closed):
        w = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        value = f(w)
        for _ in range(3):
            (value,) = torch.autograd.grad(value, w, create_graph=True)
        found.append(value.detach())
    close(found[0], found[1], 1e-10)


def emissions():
    g = torch.Generator().manual_seed(5)
    means = torch.randn(3, 2, generator=g, dtype=torch.float64)
    root = torch.randn(3, 2, 2, generator=g, dtype=torch.float64)
    covs = root @ root.mT + torch.eye(2, dtype=torch.float64)
    table = torch.rand(3, 2, 4, generator=g, dtype=torch.float64)
    weights = 0.3 * torch.randn(3, 1, 2, 2, generator=g, dtype=torch.float64)
    return {
        "gaussian": GaussianEmission.of(means, covs),
        "diagonal": GaussianEmission.of(means, covs.diagonal(dim1=-2, dim2=-1)),
        "poisson": PoissonEmission.of((means + 3).abs()),
        "categorical": CategoricalEmission.of(table / table.sum(-1, keepdim=True)),
        "autoregressive": AutoregressiveEmission.of(weights, means, covs),
        "mixture": MixtureEmission.of(
            [[0.5, 0.5], [0.9, 0.1], [0.3, 0.7]], torch.stack([means, means + 2], 1), torch.stack([covs, covs / 2], 1)
        ),
    }


def model_and_data(name, batch=3, length=9, missing=0.0, **form):
    start, A = chain()
    model = df.HiddenMarkov(emissions()[name], initial=start, transition=A, **form)
    generator = torch.Generator().manual_seed(4)
    y, z = model.sample(length, batch, generator=generator)
    y = y.double()
    return model, y.masked_fill(torch.rand(y.shape, generator=generator) < missing, NAN), z


def log_density(name, emission, y, t, k):
    """``log p(y_t | z_t = k)`` of what is seen, by torch.distributions."""
    seen, value = ~y[t].isnan(), y[t]
    if not seen.any():
        return torch.zeros((), dtype=torch.float64)
    if name == "poisson":
        return torch.distributions.Poisson(emission.rates[k][seen]).log_prob(value[seen]).sum()
    if name == "categorical":
        return sum(emission.probs[k, m, int(value[m])].log() for m in range(2) if seen[m])
    if name == "mixture":
        covs = emission.covs[k][:, seen][:, :, seen]
        parts = torch.distributions.MultivariateNormal(emission.means[k][:, seen], covs)
        return torch.logsumexp(parts.log_prob(value[seen]) + emission.weights[k].log(), 0)
    mean, cov = (emission.bias if name == "autoregressive" else emission.means)[k], emission.covs[k]
    if name == "autoregressive":
        if t == 0:
            return torch.zeros((), dtype=torch.float64)
        mean = mean + emission.weights[k, 0] @ y[t - 1]
    normal = torch.distributions.MultivariateNormal(mean[seen], cov[seen][:, seen])
    return normal.log_prob(value[seen])


@pytest.mark.parametrize("name", emissions())
@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_emissions_have_their_densities_also_of_what_is_left(name, missing):
    if name == "autoregressive" and missing:
        pytest.skip("it refuses missing values")
    model, y, _ = model_and_data(name, missing=missing)
    state = model.init_state(len(y))
    found = model.emission.log_prob(y, state.lags, state.seen)
    for row, t, k in itertools.product(range(len(y)), range(y.shape[1]), range(3)):
        close(found[row, t, k], log_density(name, model.emission, y[row], t, k), 1e-11)


@pytest.mark.parametrize("name", emissions())
@pytest.mark.parametrize("lengths", [[4, 0, 9, 1], [9]])
def test_all_layouts_say_the_same(name, lengths):
    model, y, _ = model_and_data(name, batch=len(lengths))
    line = torch.cat([row[:n] for row, n in zip(y, lengths, strict=True)])
    borders = torch.tensor([0, *np.cumsum(lengths)])
    starts = borders[:-1].tolist()
    for what in ("predict_proba", "predict"):
        run = getattr(model, what)
        got = run(line, lengths)
        assert torch.equal(run(line[None], cu_seqlens=borders)[0], got)
        rows = run(y, lengths)
        for i, n in enumerate(lengths):
            assert torch.equal(rows[i, :n], got[starts[i] : starts[i] + n])
            assert (rows[i, n:] == (0 if what == "predict_proba" else -1)).all()
            if n:
                alone = run(y[i, :n])
                torch.testing.assert_close(got[starts[i] : starts[i] + n], alone, rtol=1e-10, atol=1e-12)
    each = model.log_likelihood(line, lengths)
    for i, n in enumerate(lengths):
        want = model.log_likelihood(y[i, :n]) if n else torch.zeros((), dtype=torch.float64)
        torch.testing.assert_close(each[i], want, rtol=1e-11, atol=1e-11)
    close(model.score(line, lengths), each.sum(), 1e-13)
    torch.testing.assert_close(model.filter(line, lengths).loglik.sum(), each.sum(), rtol=1e-11, atol=1e-11)


def test_pairs_of_padded_rows_are_those_of_each_row_alone():
    model, y, _ = model_and_data("poisson", batch=4)
    lengths = [9, 1, 0, 5]
    found = model.smooth(y, lengths)
    assert found.probs.shape == (4, 9, 3) and found.pairs.shape == (4, 8, 3, 3)
    for row, n in enumerate(lengths):
        assert (found.probs[row, n:] == 0).all() and (found.pairs[row, max(n - 1, 0) :] == 0).all()
        if n:
            alone = model.smooth(y[row, :n])
            torch.testing.assert_close(found.probs[row, :n], alone.probs)
            torch.testing.assert_close(found.pairs[row, : n - 1], alone.pairs)


def test_one_long_series_does_not_pad_the_short_ones():
    lengths = [5000, *[3] * 1000, *range(1, 40)]
    line = torch.zeros(sum(lengths), dtype=torch.float64)
    series = Series.of("test", df.HiddenMarkov(PoissonEmission(2)), line, lengths)
    assert sum(part.x.shape[:2].numel() for part in series.parts) < 1.5 * len(line)


@pytest.mark.parametrize("name", emissions())
def test_parameters_train_by_gradient(name):
    model, y, _ = model_and_data(name, batch=2, length=40)
    parameters = list(model.parameters())
    first = model.score(y).item()
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    for _ in range(15):
        optimizer.zero_grad()
        (-model.score(y)).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)
        optimizer.step()
    assert model.score(y).item() > first + 1
    torch.testing.assert_close(model.transition.sum(-1), torch.ones(3, dtype=torch.float64))


def test_gradients_of_a_model_with_missing_values_are_derivatives():
    model, y, _ = model_and_data("gaussian", batch=1, length=5, missing=0.3)
    names, values = zip(*model.named_parameters(), strict=True)

    def score(*values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (y,))[0].loglik.sum()

    assert torch.autograd.gradcheck(score, [v.detach().clone().requires_grad_() for v in values])


@pytest.mark.parametrize("covariance", ["full", "diagonal", "tied"])
def test_a_factorisation_for_each_step_says_the_same_of_missing_values(covariance):
    """What compiled programs run, whose shapes may not depend on values."""
    _, y, _ = model_and_data("gaussian", missing=0.4)
    emission = GaussianEmission(3, 2, covariance=covariance)
    with torch.no_grad():
        for parameter in emission.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    error = (y.unsqueeze(-2) - emission.means).flatten(0, 1)
    got = emission.covariance._each_step(error, ~error[:, 0].isnan())
    close(got, emission.covariance.log_normal(error), 1e-12)


def test_second_derivatives_of_a_model():
    model, y, _ = model_and_data("gaussian", batch=1, length=6)
    names, values = zip(*model.named_parameters(), strict=True)

    def score(*values):
        with torch.nn.utils.stateless._reparametrize_module(model, dict(zip(names, values, strict=True))):
            return model.score(y)

    assert torch.autograd.gradgradcheck(score, [v.detach().clone().requires_grad_() for v in values])


def test_probabilities_of_zero_have_finite_gradients():
    """A model from left to right, with a symbol that one state cannot emit."""
    emission = CategoricalEmission.of([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    model = df.HiddenMarkov(emission, initial=[1.0, 0.0], transition=[[0.7, 0.3], [0.0, 1.0]])
    for scaled in (True, False):
        model.form = model.form._replace(scaled=scaled)
        model.zero_grad()
        model.score([0, 1, 0, 2, 1]).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        assert model.transition_logits.grad[1].tolist() == [0.0, 0.0]


def test_samples_have_the_distributions_of_the_model():
    model, y, z = model_and_data("gaussian", batch=200, length=60)
    counts = torch.einsum("bti,btj->ij", *(torch.nn.functional.one_hot(m, 3).double() for m in (z[:, :-1], z[:, 1:])))
    assert (counts / counts.sum(-1, keepdim=True) - model.transition).abs().max() < 0.03
    for k in range(3):
        assert (y[z == k].mean(0) - model.emission.means[k]).abs().max() < 0.15
        assert (y[z == k].T.cov() - model.emission.covs[k]).abs().max() < 0.5
    again, _ = model.sample(60, 200, generator=torch.Generator().manual_seed(4))
    assert torch.equal(again, y)


def test_a_stationary_chain_starts_from_its_distribution():
    _, A = chain()
    model = df.HiddenMarkov(PoissonEmission.of([1.0, 5.0, 9.0]), transition=A, stationary=True)
    torch.testing.assert_close(model.initial @ A, model.initial)
    assert model.free_parameters() == 6 + 3
    with pytest.raises(ArgumentError, match="several stationary"):
        df.HiddenMarkov(PoissonEmission(2), transition=[[1.0, 0.0], [0.0, 1.0]], stationary=True).score([1, 2])


def test_numbers_of_free_parameters():
    sizes = {kind: GaussianEmission(3, 2, covariance=kind) for kind in ("full", "diagonal", "spherical", "tied")}
    assert {k: e.free_parameters() for k, e in sizes.items()} == {"full": 15, "diagonal": 12, "spherical": 9, "tied": 9}
    assert CategoricalEmission(3, 5).free_parameters() == 12
    assert AutoregressiveEmission(2, 2, 3).free_parameters() == 2 * (12 + 2 + 3)
    assert MixtureEmission(3, 2, 4).free_parameters() == 3 * (3 + 4 * (2 + 3))
    assert df.HiddenMarkov(PoissonEmission(3)).free_parameters() == 6 + 2 + 3


POISSON = df.HiddenMarkov(PoissonEmission.of([1.0, 4.0]))
IMPOSSIBLE = df.HiddenMarkov(CategoricalEmission.of([[1.0, 0.0], [1.0, 0.0]]))
BAD = {
    "row": (
        lambda: df.HiddenMarkov(PoissonEmission(2), transition=[[0.5, 0.5], [0.5, 0.6]]),
        "row 1 of transition sums",
    ),
    "negative": (lambda: df.HiddenMarkov(PoissonEmission(2), initial=[1.5, -0.5]), "initial has negative.*at 1"),
    "first": (lambda: df.HiddenMarkov(PoissonEmission(2), initial=[0.5, 0.6]), "initial sums to 1.1, expected 1"),
    "size": (lambda: df.HiddenMarkov(PoissonEmission(2), transition=torch.eye(3)), r"transition has shape \(3, 3\)"),
    "table": (lambda: CategoricalEmission.of([[0.5, 0.5], [0.5, 0.4]]), r"row \(1, 0\) of probs sums to 0.9"),
    "rates": (lambda: PoissonEmission.of([1.0, 0.0]), "rates has values that are not positive: 0 at"),
    "covs": (lambda: GaussianEmission.of([[0.0]], [[[-1.0]]]), "smallest eigenvalue of covs is not positive: -1"),
    "kind": (lambda: GaussianEmission(2, covariance="diag"), "covariance is 'diag', expected one of full"),
    "states": (lambda: PoissonEmission(0), "states is 0"),
    "emission": (lambda: df.HiddenMarkov("poisson"), "emission is str.*\n.*GaussianEmission"),
    "count": (lambda: POISSON.score([1, -2]), r"X has values that are no counts.*-2 at"),
    "whole": (lambda: POISSON.score([1, 2.5]), r"no counts.*2.5 at"),
    "infinite": (lambda: POISSON.score([1, math.inf]), "X has infinite values.*\n.*NaN stands for"),
    "symbol": (lambda: IMPOSSIBLE.score([0, 2]), "no symbols from 0 to 1: 2 at"),
    "width": (lambda: POISSON.score(torch.ones(4, 2)), r"X has shape \(4, 2\), expected \(B, T, 1\)"),
    "lengths": (lambda: POISSON.score([1, 2, 3], [1, 1]), "lengths sum to 2, but X has 3 rows"),
    "negative length": (lambda: POISSON.score([1, 2, 3], [4, -1]), "lengths is"),
    "long": (lambda: POISSON.score(torch.ones(2, 3, 1), [4, 1]), "2 lengths up to 4, but X has 2 rows of 3"),
    "ends": (lambda: POISSON.smooth([1, 2, 3], [1, 2]), "X has series end to end"),
    "no steps": (lambda: POISSON.predict(torch.ones(2, 0, 1)), "X has no steps"),
    "impossible": (lambda: IMPOSSIBLE.score([0, 1]), "row 0, time 1 has probability 0"),
    "no path": (lambda: IMPOSSIBLE.predict([0, 1]), "every path of series 0 has probability 0"),
    "missing": (
        lambda: df.HiddenMarkov(AutoregressiveEmission(2)).score([1.0, NAN]),
        "missing values, which an autoregressive",
    ),
    "state": (
        lambda: POISSON.forward(torch.ones(2, 3, 1), POISSON.init_state(1)),
        r"state: seen has shape \(1,\), expected \(2,\)",
    ),
    "nan state": (
        lambda: POISSON.forward(torch.ones(1, 3, 1), POISSON.init_state(1)._replace(probs=torch.full((1, 2), NAN))),
        "state.probs has values that are not finite",
    ),
    "log_b": (lambda: log_likelihood([1.0], [[1.0]], [[NAN]]), "log_b has values that are no log-likelihoods"),
    "keyword": (lambda: df.HiddenMarkov(PoissonEmission(2), start=[1.0]), "unknown keyword 'start'"),
}


@pytest.mark.parametrize(("call", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_explained(call, said):
    with pytest.raises(ArgumentError, match=said):
        call()
