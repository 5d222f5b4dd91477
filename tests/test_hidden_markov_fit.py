"""Fits of hidden Markov models: recorded steps, published likelihoods, missing data, priors, starts, selection."""

import math

import pytest
import torch

import dualform as df
from dualform.core.errors import ArgumentError
from dualform.discrete import (
    AutoregressiveEmission,
    CategoricalEmission,
    GaussianEmission,
    MixtureEmission,
    PoissonEmission,
    select,
)
from vectors import close, load

NAN = float("nan")
# Earthquakes of magnitude 7 or more in each year from 1900 to 2006: Zucchini and MacDonald (2009), table 1.1.
EARTHQUAKES = [
    13, 14, 8, 10, 16, 26, 32, 27, 18, 32, 36, 24, 22, 23, 22, 18, 25, 21, 21, 14, 8, 11, 14, 23, 18, 17, 19, 20, 22,
    19, 13, 26, 13, 14, 22, 24, 21, 22, 26, 21, 23, 24, 27, 41, 31, 27, 35, 26, 28, 36, 39, 21, 17, 22, 17, 19, 15, 34,
    10, 15, 22, 18, 15, 20, 15, 22, 19, 16, 30, 27, 29, 23, 20, 16, 21, 21, 25, 16, 18, 15, 18, 14, 10, 15, 8, 15, 6,
    11, 8, 7, 18, 16, 13, 12, 13, 20, 15, 16, 12, 18, 15, 16, 13, 15, 16, 11, 11,
]  # fmt: skip


@pytest.mark.parametrize("name", ["categorical", "gaussian"])
def test_one_iteration_is_the_recorded_one_of_hmmlearn(name):
    g = load(f"hmm_{name}")
    if name == "gaussian":
        emission = GaussianEmission.of(g["means"], g["covs"])
    else:
        emission = CategoricalEmission.of(g["emission_probs"])
    model = df.HiddenMarkov(emission, initial=g["initial_probs"], transition=g["transition"])
    fit = model.fit(torch.cat([g["y"], g["y2"]]), [40, 17], max_iterations=1, from_data=False)
    assert abs(fit.history[0] - g["em_loglik_before"].item()) < 1e-10
    assert len(fit.history) == 2 and fit.iterations == 1 and not fit.converged and fit.observed == 57
    close(model.initial, g["em_initial_probs"], 1e-10)
    close(model.transition, g["em_transition"], 1e-10)
    if name == "gaussian":
        close(emission.means, g["em_means"], 1e-10)
        close(emission.covs, g["em_covs"], 1e-10)
    else:
        close(emission.probs[:, 0], g["em_emission_probs"], 1e-10)


# Zucchini and MacDonald, with a stationary start: -log L, AIC and BIC.
@pytest.mark.parametrize(
    ("states", "loss", "aic", "bic"), [(2, 342.3183, 692.64, 703.33), (3, 329.4603, 676.92, 700.98)]
)
def test_earthquakes_have_the_published_likelihood_from_data_alone(states, loss, aic, bic):
    found = select(EARTHQUAKES, emission=PoissonEmission, states=[states], stationary=True).best
    assert found.fit.converged
    assert abs(found.fit.log_likelihood + loss) < 1e-4
    assert abs(found.aic - aic) < 0.01 and abs(found.bic - bic) < 0.01
    assert abs(found.model.score(EARTHQUAKES).item() + loss) < 1e-4


def test_earthquakes_with_four_states():
    """The published maximum is one of several; from rates near it the fit goes there."""
    A = torch.full((4, 4), 0.05, dtype=torch.float64) + 0.8 * torch.eye(4, dtype=torch.float64)
    model = df.HiddenMarkov(PoissonEmission.of([11.0, 14.0, 20.0, 30.0]), transition=A, stationary=True)
    fit = model.fit(EARTHQUAKES, from_data=False)
    assert abs(fit.log_likelihood + 327.8316) < 2e-4
    close(model.emission.rates[:, 0], torch.tensor([11.283, 13.853, 19.695, 29.700]), 1e-3)
    model.fit(EARTHQUAKES, from_data=False, tolerance=1e-11)
    for gradient in torch.autograd.grad(model.score(EARTHQUAKES), list(model.parameters())):
        assert gradient.abs().max() < 1e-3  # by the transition, which decides the first state, too


def test_bic_chooses_three_states_for_earthquakes_and_none_where_there_are_none():
    found = select(EARTHQUAKES, emission=PoissonEmission, states=range(1, 5), stationary=True, restarts=2)
    assert [c.states for c in found.candidates] == [1, 2, 3, 4] and found.best.states == 3
    noise = torch.poisson(torch.full((200,), 5.0), generator=torch.Generator().manual_seed(0))
    assert select(noise, emission=PoissonEmission, states=(1, 2)).best.states == 1
    one = found.candidates[0]  # a plain Poisson distribution
    counts = torch.tensor(EARTHQUAKES, dtype=torch.float64)
    assert abs(one.fit.log_likelihood - torch.distributions.Poisson(counts.mean()).log_prob(counts).sum()) < 1e-9
    assert abs(one.bic - (math.log(107) - 2 * one.fit.log_likelihood)) < 1e-9


def truth(kind):
    """A model with states far from each other, and data of it."""
    A = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
    emission = {
        "gaussian": lambda: GaussianEmission.of(
            [[0.0, 0.0], [3.0, -2.0]], [[[1.0, 0.5], [0.5, 2.0]], [[0.5, 0], [0, 1]]]
        ),
        "poisson": lambda: PoissonEmission.of([[2.0, 8.0], [9.0, 1.0]]),
        "categorical": lambda: CategoricalEmission.of([[0.8, 0.1, 0.1], [0.1, 0.2, 0.7]]),
        "autoregressive": lambda: AutoregressiveEmission.of(
            [[[[0.9]]], [[[-0.6]]]], [[0.0], [2.0]], [[[0.1]], [[0.3]]]
        ),
    }[kind]()
    model = df.HiddenMarkov(emission, transition=A)
    return model, *model.sample(1000, 2, generator=torch.Generator().manual_seed(7))


FRESH = {
    "gaussian": lambda **k: GaussianEmission(2, 2, **k),
    "poisson": lambda **k: PoissonEmission(2, 2, **k),
    "categorical": lambda **k: CategoricalEmission(2, 3, **k),
    "autoregressive": lambda **k: AutoregressiveEmission(2, **k),
}
MIXED = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
MIXED[::3, 0] = MIXED[5:9] = NAN


@pytest.mark.parametrize("kind", FRESH)
def test_a_fit_finds_the_states_that_made_the_data(kind):
    model, y, z = truth(kind)
    fitted = df.HiddenMarkov(FRESH[kind]())
    fit = fitted.fit(y, [1000, 700])
    assert fit.converged and len(fit.restarts) == 6
    assert fit.log_likelihood >= model.log_likelihood(y, [1000, 700]).sum() - 1e-6  # it is the maximum
    assert all(b >= a - 1e-8 for a, b in zip(fit.history[:-1], fit.history[1:], strict=True))
    path = fitted.predict(y)
    agree = (path == z).double().mean()
    assert max(agree, 1 - agree) > {"categorical": 0.75, "autoregressive": 0.85}.get(kind, 0.95)
    order = [0, 1] if agree > 0.5 else [1, 0]
    assert (fitted.transition[order][:, order] - model.transition).abs().max() < 0.06


@pytest.mark.parametrize("covariance", ["full", "diagonal", "spherical", "tied"])
@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_iterations_never_lose_likelihood(covariance, missing):
    """What the theory of the algorithm promises, of every kind, with priors and missing components."""
    _, y, _ = truth("gaussian")
    g = torch.Generator().manual_seed(0)
    y = y[:, :80].masked_fill(torch.rand(2, 80, 2, generator=g) < missing, NAN)
    model = df.HiddenMarkov(GaussianEmission(3, 2, covariance=covariance, prior=(2.0, 0.5)))
    fit = model.fit(y, max_iterations=30, restarts=1)
    assert all(b >= a - 1e-9 for a, b in zip(fit.history[:-1], fit.history[1:], strict=True))
    gradient = torch.autograd.grad(model.score(y) + model.emission.log_prior(), list(model.emission.parameters()))
    start = df.HiddenMarkov(GaussianEmission(3, 2, covariance=covariance))
    initial = torch.autograd.grad(start.score(y), list(start.emission.parameters()))
    assert sum(g.abs().sum() for g in gradient) < 0.1 * sum(g.abs().sum() for g in initial)


@pytest.mark.parametrize("kind", FRESH)
def test_a_fit_that_has_converged_is_a_stationary_point(kind):
    _, y, _ = truth(kind)
    model = df.HiddenMarkov(FRESH[kind]())
    model.fit(y[:, :300], tolerance=1e-13, max_iterations=3000, restarts=2)
    for p in torch.autograd.grad(model.score(y[:, :300]) + model.emission.log_prior(), list(model.parameters())):
        assert p.abs().max() < 1e-3


def test_a_state_of_several_components_is_one_state():
    """A state that is on either side of another one; a single component gives what a normal emission does."""
    means, covs = [[[-5.0], [5.0]], [[0.0], [0.0]]], torch.full((2, 2, 1, 1), 0.5, dtype=torch.float64)
    truth = MixtureEmission.of([[0.5, 0.5], [0.5, 0.5]], means, covs)
    model = df.HiddenMarkov(truth, transition=[[0.95, 0.05], [0.05, 0.95]])
    y, z = model.sample(400, generator=torch.Generator().manual_seed(3))
    A = [[0.9, 0.1], [0.1, 0.9]]
    near = df.HiddenMarkov(MixtureEmission.of([[0.5, 0.5]] * 2, [[[-3.0], [2.0]], [[-1.0], [1.0]]], covs), transition=A)
    fit = near.fit(y, from_data=False, max_iterations=40)
    assert all(b >= a - 1e-9 for a, b in zip(fit.history[:-1], fit.history[1:], strict=True))
    assert (near.predict(y) == z).double().mean() > 0.98
    assert (near.emission.means[0].flatten() - torch.tensor([-5.0, 5.0])).abs().max() < 0.2
    one, plain = (df.HiddenMarkov(e) for e in (MixtureEmission(2, 1, 1), GaussianEmission(2)))
    assert abs(one.fit(y, restarts=1).log_likelihood - plain.fit(y, restarts=1).log_likelihood) < 1e-6


def test_what_is_missing_is_integrated_out():
    """A fit to data with holes finds the truth; one that took the holes for zeros would not."""
    model, y, _ = truth("gaussian")
    lost = torch.rand(y.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    fitted = df.HiddenMarkov(GaussianEmission(2, 2))
    fitted.fit(y.masked_fill(lost, NAN))
    order = fitted.emission.means[:, 0].argsort()
    assert (fitted.emission.means[order] - model.emission.means).abs().max() < 0.15
    assert (fitted.emission.covs[order] - model.emission.covs).abs().max() < 0.25


def test_a_state_does_not_shrink_to_one_point():
    y = torch.randn(60, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y[20:23] = 9.0
    model = df.HiddenMarkov(GaussianEmission(2, floor=0.01))
    fit = model.fit(y)
    assert math.isfinite(fit.log_likelihood)
    least = 0.01 * (y - y.mean()).square().mean()
    torch.testing.assert_close(model.emission.covs.min(), least)
    strong = df.HiddenMarkov(GaussianEmission(2, prior=(1e6, 4.0)))
    strong.fit(y)
    close(strong.emission.covs.flatten(), torch.full((2,), 4.0, dtype=torch.float64), 1e-3)


def test_priors_keep_probabilities_above_zero_and_rates_in_reach():
    model = df.HiddenMarkov(CategoricalEmission(2, 4, prior=0.5))
    model.fit([0, 1, 0, 1, 2, 2, 0])
    assert model.emission.probs.min() > 0.01
    rates = df.HiddenMarkov(PoissonEmission(1, prior=(3.0, 2.0)))
    rates.fit([4, 6, 5])
    close(rates.emission.rates, torch.tensor([[(15 + 2) / (3 + 2)]], dtype=torch.float64), 1e-12)


def test_a_seed_decides_everything():
    fits = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(fits))  # the model's own first parameters do not matter
        model = df.HiddenMarkov(CategoricalEmission(3, 4))
        _, y, _ = truth("categorical")
        fits.append((model.fit(y[:, :80], max_iterations=20, seed=seed).history, model.transition.detach()))
    assert fits[0][0] == fits[1][0] and torch.equal(fits[0][1], fits[1][1])
    assert fits[0][0] != fits[2][0]


@pytest.mark.parametrize("emission", [MixtureEmission(2, 2, 3), MixtureEmission(2, 2, 2, covariance="diagonal")])
def test_a_mixture_starts_from_data_alone_also_with_holes(emission):
    fit = df.HiddenMarkov(emission).fit(MIXED, max_iterations=30)
    assert all(b >= a - 1e-9 for a, b in zip(fit.history[:-1], fit.history[1:], strict=True))


BAD = {
    "few": (lambda m: m.fit([1.0, 2.0]), "3 states, but X has 2 observations.*\n.*fewer states"),
    "nothing": (lambda m: m.fit([NAN] * 5), "all values of X are missing"),
    "component": (
        lambda m: df.HiddenMarkov(GaussianEmission(2, 2)).fit([[1.0, NAN], [2.0, NAN], [4.0, NAN]]),
        "all values of component 1 of X are missing",
    ),
    "restarts": (lambda m: m.fit([1.0] * 5, restarts=0), "restarts 0"),
    "criterion": (lambda m: select([1, 2], emission=PoissonEmission, criterion="dic"), "criterion is 'dic'"),
    "states": (lambda m: select([1, 2], emission=PoissonEmission, states=[]), "states is empty"),
}


@pytest.mark.parametrize(("call", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_explained(call, said):
    with pytest.raises(ArgumentError, match=said):
        call(df.HiddenMarkov(GaussianEmission(3)))
