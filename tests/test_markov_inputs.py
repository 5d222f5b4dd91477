"""Transitions that depend on inputs: brute force over all paths, the plain chain, layouts, fits, bad input."""

import copy
import itertools

import pytest
import torch

import dualform as df
from dualform.core.errors import ArgumentError
from dualform.discrete import GaussianEmission, PoissonEmission, select
from dualform.discrete.logit import multinomial_logit
from vectors import close

NAN = float("nan")


def driven(inputs=2, seed=0, **form):
    """A chain of three states whose transitions depend on inputs, with unequal weights."""
    g = torch.Generator().manual_seed(seed)
    A = torch.rand(3, 3, generator=g, dtype=torch.float64) + 0.1
    start = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    emission = GaussianEmission.of([[-1.0], [0.5], [2.0]], [[1.0], [0.5], [2.0]])
    A = A / A.sum(-1, keepdim=True)
    model = df.HiddenMarkov(emission, initial=start, transition=A, inputs=inputs, **form)
    with torch.no_grad():
        model.input_weights.copy_(torch.randn(inputs, 3, 3, generator=g, dtype=torch.float64))
    return model


def data(batch, length, inputs=2, seed=1):
    g = torch.Generator().manual_seed(seed)
    y = torch.randn(batch, length, 1, generator=g, dtype=torch.float64)
    return y, torch.randn(batch, length, inputs, generator=g, dtype=torch.float64)


def all_paths(model, y, u):
    """Log-likelihood, posteriors of states and pairs, and the best path, from the formula of the model."""
    length = len(y)
    paths = torch.tensor(list(itertools.product(range(3), repeat=length)))
    state = model.init_state(1)
    log_b = model.emission.log_prob(y[None], state.lags, state.seen)[0]
    p = model.initial[paths[:, 0]].log() + log_b[0, paths[:, 0]]
    for t in range(1, length):
        logits = model.transition_logits + sum(u[t - 1, k] * model.input_weights[k] for k in range(u.shape[-1]))
        p = p + logits.log_softmax(-1)[paths[:, t - 1], paths[:, t]] + log_b[t, paths[:, t]]
    one = torch.nn.functional.one_hot(paths, 3).double()
    weight = p.softmax(0)
    pairs = torch.einsum("n,nti,ntj->tij", weight, one[:, :-1], one[:, 1:])
    return p.logsumexp(0), torch.einsum("n,ntk->tk", weight, one), pairs, paths[p.argmax()], p.max()


@pytest.mark.parametrize("parallel", [None, True, False])
@pytest.mark.parametrize("scaled", [None, False])
@pytest.mark.parametrize("length", [1, 2, 6])
def test_everything_equals_the_sum_over_all_paths(parallel, scaled, length):
    model = driven(parallel=parallel, scaled=scaled)
    y, u = data(1, length)
    with torch.no_grad():
        want, probs, pairs, path, best = all_paths(model, y[0], u[0])
        close(model.log_likelihood(y[0], u=u[0]), want, 1e-12)
        close(model.predict_proba(y[0], u=u[0]), probs, 1e-12)
        smoothed = model.smooth(y[0], u=u[0])
        close(smoothed.probs, probs, 1e-12)
        torch.testing.assert_close(smoothed.pairs, pairs, rtol=1e-10, atol=1e-12)
        score, found = model.decode(y[0], u=u[0])
        assert torch.equal(found, path)
        close(score, best, 1e-12)
        for t in range(length):
            now = all_paths(model, y[0, : t + 1], u[0])[1][-1]
            close(model.filter(y[0], u=u[0]).probs[t], now, 1e-12)


def test_missing_values_are_summed_over_too():
    model = driven()
    y, u = data(1, 5)
    y[0, 2] = NAN
    with torch.no_grad():
        want, probs, *_ = all_paths(model, y[0], u[0])
        close(model.score(y, u=u), want, 1e-12)
        close(model.predict_proba(y, u=u)[0], probs, 1e-12)


def test_weights_of_zero_are_the_plain_chain():
    model = driven()
    torch.nn.init.zeros_(model.input_weights)
    plain = df.HiddenMarkov(copy.deepcopy(model.emission), initial=model.initial, transition=model.transition)
    y, u = data(3, 40)
    lengths = [40, 7, 0]
    with torch.no_grad():
        close(model.log_likelihood(y, lengths, u=u), plain.log_likelihood(y, lengths), 1e-12)
        close(model.predict_proba(y, lengths, u=u), plain.predict_proba(y, lengths), 1e-12)
        close(model.smooth(y, lengths, u=u).pairs, plain.smooth(y, lengths).pairs, 1e-11)
        assert torch.equal(model.predict(y, lengths, u=u), plain.predict(y, lengths))
        draws = [
            m.sample(9, 2, generator=torch.Generator().manual_seed(0), **k)
            for m, k in ((model, {"u": u[:2, :9]}), (plain, {}))
        ]
        assert torch.equal(draws[0][1], draws[1][1])
    found = [m.fit(y, from_data=False, max_iterations=3, **k) for m, k in ((model, {"u": 0 * u}), (plain, {}))]
    close(torch.tensor(found[0].history), torch.tensor(found[1].history), 1e-9)
    close(model.transition, plain.transition, 1e-6)


@pytest.mark.parametrize("lengths", [[4, 0, 9, 1], [9]])
def test_all_layouts_say_the_same(lengths):
    model = driven()
    y, u = data(len(lengths), 9)
    line, of_line = (torch.cat([row[:n] for row, n in zip(m, lengths, strict=True)]) for m in (y, u))
    borders = torch.tensor([0, *itertools.accumulate(lengths)])
    with torch.no_grad():
        got = model.predict_proba(line, lengths, u=of_line)
        close(model.predict_proba(line[None], u=of_line[None], cu_seqlens=borders)[0], got, 1e-13)
        packed, ends = model(line[None], u=of_line[None], cu_seqlens=borders)
        for i, n in enumerate(lengths):
            if n:
                close(got[borders[i] : borders[i + 1]], model.predict_proba(y[i, :n], u=u[i, :n]), 1e-12)
                alone, end = model(y[i : i + 1, :n], u=u[i : i + 1, :n])
                close(packed.probs[0, borders[i] : borders[i + 1]], alone.probs[0], 1e-12)
                close(ends.probs[i], end.probs[0], 1e-12)
        state, steps = model.init_state(len(y)), []
        for t in range(9):
            out, state = model.step(y[:, t], state, u=u[:, t])
            steps.append(out.probs)
        whole, last = model(y, u=u)
        close(torch.stack(steps, 1), whole.probs, 1e-12)
        close(state.probs, last.probs, 1e-12)
        first, middle = model(y[:, :4], u=u[:, :4])
        rest, _ = model(y[:, 4:], middle, u=u[:, 4:])
        close(torch.cat([first.probs, rest.probs], 1), whole.probs, 1e-12)


def test_one_row_of_inputs_serves_all_rows_of_a_batch():
    model = driven(inputs=1)
    y, u = data(3, 7, inputs=1)
    close(model.score(y, u=u[0, :, 0]), model.score(y, u=u[:1].expand(3, -1, -1)), 1e-13)
    assert model.transitions(u[0, :1]).shape == (1, 3, 3)


def test_gradients_are_derivatives():
    model = driven(inputs=1)
    y, u = data(2, 4, inputs=1)
    names, values = zip(*model.named_parameters(), strict=True)

    def score(*values):
        with torch.nn.utils.stateless._reparametrize_module(model, dict(zip(names, values, strict=True))):
            return model.score(y, u=u)

    leaves = [v.detach().clone().requires_grad_() for v in values]
    assert torch.autograd.gradcheck(score, leaves)
    assert torch.autograd.gradgradcheck(score, leaves)


def regimes(length=4000):
    """A calm and a stormy state; a storm begins when the input is high, and ends regardless of it."""
    emission = PoissonEmission.of([2.0, 12.0])
    model = df.HiddenMarkov(emission, transition=[[0.9, 0.1], [0.2, 0.8]], inputs=1)
    with torch.no_grad():
        model.input_weights[0, 0, 1] = 1.5
    g = torch.Generator().manual_seed(2)
    u = torch.randn(length, 1, generator=g, dtype=torch.float64)
    y, z = model.sample(length, u=u, generator=g)
    return model, y[0], u, z[0]


def test_a_fit_finds_what_the_inputs_do():
    truth, y, u, z = regimes()
    model = df.HiddenMarkov(PoissonEmission(2), inputs=1)
    fit = model.fit(y, u=u, restarts=2)
    assert fit.converged and fit.log_likelihood >= truth.score(y, u=u).item()
    assert all(b >= a - 1e-7 for a, b in zip(fit.history[:-1], fit.history[1:], strict=True))
    calm = int(model.emission.rates[:, 0].argmin())
    order = [calm, 1 - calm]
    weights = model.input_weights[0][order][:, order]
    assert (weights - truth.input_weights[0]).abs().max() < 0.4
    assert (weights.diagonal() == 0).all()
    assert (model.transition[order][:, order] - truth.transition).abs().max() < 0.05
    blind = df.HiddenMarkov(PoissonEmission(2))
    plain = blind.fit(y, restarts=2)
    assert fit.log_likelihood > plain.log_likelihood + 20
    assert model.free_parameters() == blind.free_parameters() + 2
    assert (model.predict(y, u=u) == torch.tensor(order)[z]).double().mean() > 0.95


def test_a_fit_ends_where_the_gradient_is_zero():
    _, y, u, _ = regimes(300)
    model = df.HiddenMarkov(PoissonEmission(2), inputs=1)
    model.fit([*y[:200], *y[200:]], [200, 100], u=u, restarts=1, tolerance=1e-13)
    score = model.score(y, [200, 100], u=u)
    for gradient in torch.autograd.grad(score, list(model.parameters())):
        assert gradient.abs().max() < 1e-3


def test_multinomial_logit_is_the_maximum():
    """Against a general optimiser, with counts that are fractions."""
    g = torch.Generator().manual_seed(3)
    u, counts = torch.randn(50, 2, generator=g, dtype=torch.float64), torch.rand(50, 3, 3, generator=g).double()
    zeros = torch.zeros(3, 3, dtype=torch.float64), torch.zeros(2, 3, 3, dtype=torch.float64)
    logits, weights = (m.requires_grad_() for m in multinomial_logit(*zeros, counts, u))
    value = (counts * (logits + torch.einsum("nk,kij->nij", u, weights)).log_softmax(-1)).sum()
    for gradient in torch.autograd.grad(value, [logits, weights]):
        assert gradient.abs().max() < 1e-6


def test_the_number_of_states_is_chosen_with_inputs():
    _, y, u, _ = regimes(400)
    found = select(y, emission=PoissonEmission, states=(1, 2), inputs=1, u=u, restarts=1)
    assert found.best.states == 2 and found.best.model.inputs == 1


PLAIN = df.HiddenMarkov(PoissonEmission(2))
DRIVEN = df.HiddenMarkov(PoissonEmission(2), inputs=2)
BAD = {
    "none": (lambda: DRIVEN.score([1, 2]), "no inputs u, but the model has 2"),
    "some": (lambda: PLAIN.score([1, 2], u=[[1.0], [2.0]]), "inputs u, but the model has none"),
    "shape": (lambda: DRIVEN.score([1, 2], u=[[1.0], [2.0]]), r"u has shape \(2, 1\), expected \(2, 2\)"),
    "missing": (lambda: DRIVEN.score([1, 2], u=[[1.0, NAN], [2.0, 0.0]]), "u has.*\n.*cannot be missing"),
    "stationary": (lambda: df.HiddenMarkov(PoissonEmission(2), stationary=True, inputs=1), "no stationary"),
    "number": (lambda: df.HiddenMarkov(PoissonEmission(2), inputs=-1), "inputs is -1"),
    "step": (lambda: DRIVEN.step(torch.ones(1, 1), DRIVEN.init_state(1)), "no inputs u"),
}


@pytest.mark.parametrize(("call", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_explained(call, said):
    with pytest.raises(ArgumentError, match=said):
        call()
