"""Ensemble and particle filters: the Kalman filter on linear functions, and a filter on a grid on others."""

import math
import re

import numpy as np
import pytest
import torch

import dualform as df
import gaussians
from dualform.core.errors import ArgumentError
from dualform.core.linalg import matvec
from dualform.gaussian import EnsembleFilter, ParticleFilter
from dualform.gaussian.particle import systematic

FILTERS = {
    "perturbed": lambda model, size: EnsembleFilter(model, size),
    "square root": lambda model, size: EnsembleFilter(model, size, form="square_root"),
    "bootstrap": lambda model, size: ParticleFilter(model, size),
    "auxiliary": lambda model, size: ParticleFilter(model, size, proposal="auxiliary"),
}
every_filter = pytest.mark.parametrize("make", FILTERS.values(), ids=FILTERS)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def equal(got, want, tolerance=1e-9):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, equal_nan=True)


def twins(prior="before", **changed):
    """A linear model, and the same one as two functions."""
    eye = torch.eye(2, dtype=torch.float64)
    given = gaussians.terms(2, 2, inputs=1, seed=3) | {"S": eye, "Q": 0.3 * eye, "R": eye} | changed
    linear = gaussians.build(given, prior=prior)

    def f(x, u):
        return matvec(given["A"], x) + given["c"] + matvec(given["B"], u)

    def h(x, u):
        return matvec(given["C"], x) + given["d"] + matvec(given["D"], u)

    more = {name: given[name] for name in ("Q", "R", "m0", "P0")}
    return linear, df.NonlinearGaussian(f, h, **more, prior=prior)


def data(model, rows, length):
    u = gaussians.normal(rows, length, 1, seed=3)
    y, _ = model.sample(length, rows, u=u, generator=seeded(5))
    return y.masked_fill(torch.rand(y.shape, generator=seeded(6)) < 0.3, torch.nan), u


@every_filter
@pytest.mark.parametrize("prior", ["before", "first"])
def test_linear_functions_are_filtered_as_by_the_kalman_filter(make, prior):
    linear, model = twins(prior)
    y, u = data(model, 2, 6)
    lengths = torch.tensor([6, 4])
    y[1, 4:] = 1e6  # what follows the end of a series is not looked at
    want = linear.filter(y, u=u, lengths=lengths)
    size = 20000
    found = make(model, size).filter(y, u=u, lengths=lengths, generator=seeded())
    sd = want.cov.diagonal(dim1=-2, dim2=-1).sqrt()
    assert torch.equal(found.mean.isnan(), want.mean.isnan())
    assert ((found.mean - want.mean).abs() / sd).nan_to_num().max() < 8 / size**0.5
    assert ((found.cov - want.cov).abs() / (sd[..., None] * sd[..., None, :])).nan_to_num().max() < 0.08
    equal(found.log_likelihood, want.log_likelihood, 0.05)
    assert found.loglik.nan_to_num().sum(-1).equal(found.log_likelihood)


def test_the_square_root_filter_is_exact_for_its_own_moments():
    """Without noise in the transition nothing is drawn but the prior, the moments of which a Kalman filter takes."""
    linear, model = twins(Q=torch.zeros(2, 2, dtype=torch.float64))
    y, u = gaussians.observations(6, 2, missing=0.4), gaussians.normal(6, 1, seed=3)
    ensemble = EnsembleFilter(model, 7, form="square_root")
    start = ensemble.init_state(1, generator=seeded())
    x = start.x[0]
    want = linear.filter(y, df.gaussian.Gaussian(x.mean(0, keepdim=True), x.mT.cov()[None]), u=u)
    found = ensemble.filter(y, start, u=u)
    equal(found.mean, want.mean)
    equal(found.cov, want.cov)
    equal(found.loglik, want.loglik)
    assert found.effective.eq(7).all() or torch.allclose(found.effective, torch.full_like(found.effective, 7.0))


def test_inflation_widens_what_is_expected():
    _, model = twins(Q=torch.zeros(2, 2, dtype=torch.float64))
    ensemble = EnsembleFilter(model, 5, form="square_root", inflation=1.5)
    start = ensemble.init_state(1, generator=seeded())
    nothing, u = torch.full((1, 2), torch.nan, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    wide = ensemble.filter(nothing, start, u=u)
    plain = EnsembleFilter(model, 5, form="square_root").filter(nothing, start, u=u)
    equal(wide.mean, plain.mean)
    equal(wide.cov, 1.5**2 * plain.cov)


def growth(x, t):
    return x / 2 + 25 * x / (1 + x**2) + 8 * torch.cos(1.2 * t)


def on_a_grid(y, density, Q, start, width=40.0, count=2001):
    """The filter of one state on a grid: log-likelihoods and means of every step."""
    x = torch.linspace(-width, width, count, dtype=torch.float64)
    p = torch.exp(-(x**2) / 2 / start)
    p, terms, means = p / p.sum(), [], []
    for t in range(len(y)):
        ahead = growth(x, torch.tensor(float(t), dtype=torch.float64))
        move = torch.exp(-((x[:, None] - ahead) ** 2) / 2 / Q) / math.sqrt(2 * math.pi * Q) * (x[1] - x[0])
        p = move @ p
        if not y[t].isnan():
            p = p * density(y[t], x).exp()
        terms.append(p.sum().log())
        p = p / p.sum()
        means.append((p * x).sum())
    return torch.stack(terms), torch.stack(means)


@pytest.mark.parametrize("proposal, Q", [("bootstrap", 10.0), ("auxiliary", 1.0)])
def test_particles_follow_the_exact_filter_of_a_growth_model(proposal, Q):
    """Two modes, the sign of which the observation does not tell: the model of Gordon, Salmond and Smith (1993)."""
    model = df.NonlinearGaussian(growth, lambda x: x**2 / 20, [[Q]], [[1.0]], P0=5.0)
    y, _ = model.sample(12, generator=seeded(3))
    y = y[0, :, 0].masked_fill(torch.arange(12) == 5, torch.nan)
    terms, means = on_a_grid(y, lambda y, x: -((y - x**2 / 20) ** 2) / 2 - math.log(2 * math.pi) / 2, Q, 5.0)
    found = ParticleFilter(model, 40000, proposal=proposal).filter(y, generator=seeded())
    equal(found.loglik, terms, 0.03)
    assert (found.mean[:, 0] - means).abs().max() < 0.15
    ekf = model.filter(y)
    assert (ekf.mean[:, 0] - means).abs().max() > 1  # what particles are for


def test_a_density_of_counts():
    def counts(y, h):
        return y * h.log() - h - torch.lgamma(y + 1)

    model = df.NonlinearGaussian(growth, lambda x: torch.exp(x / 10), [[10.0]], [[1.0]], P0=5.0)
    y = torch.tensor([2.0, 1.0, torch.nan, 3.0, 0.0, 1.0], dtype=torch.float64)
    terms, means = on_a_grid(y, lambda y, x: counts(y, torch.exp(x / 10)), 10.0, 5.0)
    made = ParticleFilter(model, 20000, log_density=lambda y, h: counts(y, h).sum(), proposal="auxiliary")
    found = made.filter(y, generator=seeded())
    equal(found.loglik, terms, 0.03)
    assert (found.mean[:, 0] - means).abs().max() < 0.2


@pytest.mark.parametrize("proposal", ["bootstrap", "auxiliary"])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_the_likelihood_is_estimated_without_bias(proposal, threshold):
    """The mean of 2000 estimates by 30 states each, against the Kalman filter."""
    linear, model = twins()
    y, u = (z[0] for z in data(model, 1, 5))
    made = ParticleFilter(model, 30, proposal=proposal, threshold=threshold)
    many = made.log_likelihood(y.expand(2000, -1, -1), u=u.expand(2000, -1, -1), generator=seeded())
    ratio = (many - linear.log_likelihood(y, u=u)).exp()
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / 2000**0.5 < 0.2
    assert many.mean() < linear.log_likelihood(y, u=u)


def test_systematic_resampling():
    chances = torch.rand(500, 9, generator=seeded(), dtype=torch.float64) ** 3
    chances[:, 4] = 0
    chances = chances / chances.sum(-1, keepdim=True)
    found = systematic(chances, seeded(1))
    times = torch.nn.functional.one_hot(found, 9).sum(1)
    assert (times >= (9 * chances - 1e-9).floor()).all() and (times <= (9 * chances + 1e-9).ceil()).all()
    same = systematic(chances[:1].expand(20000, -1), seeded(2))
    often = torch.nn.functional.one_hot(same, 9).double().sum(1).mean(0)
    assert (often - 9 * chances[0]).abs().max() < 0.02


@every_filter
def test_a_series_in_steps_is_the_same(make):
    _, model = twins("first")
    y, u = gaussians.observations(3, 5, 2), gaussians.normal(3, 5, 1, seed=3)
    filtered = make(model, 20)
    generator = seeded()
    whole = filtered.filter(y, u=u, generator=generator)
    generator = seeded()
    state = filtered.init_state(3, generator=generator)
    first = filtered.filter(y[:, :2], state, u=u[:, :2], generator=generator)
    state = first.state
    for t in range(2, 5):
        now, state = filtered.step(y[:, t], state, u=u[:, t], generator=generator)
        for part in ("mean", "cov", "loglik"):
            equal(getattr(now, part), getattr(whole, part)[:, t])
    equal(state.x, whole.state.x)
    assert state.steps.tolist() == [5, 5, 5]
    assert not torch.equal(filtered.filter(y, u=u, generator=seeded(1)).mean, whole.mean)


@pytest.mark.parametrize("form", ["perturbed", "square_root"])
def test_the_ensemble_has_gradients(form):
    y = gaussians.observations(4, 2)

    def loss(w, q, r, p):
        def f(x):
            return torch.tanh(w @ x)

        model = df.NonlinearGaussian(f, lambda x: torch.stack([x[0] ** 2, x[1]]), q @ q.mT, r @ r.mT, P0=p @ p.mT)
        found = EnsembleFilter(model, 4, form=form).filter(y, generator=seeded())
        return found.log_likelihood, found.mean

    eye = torch.eye(2, dtype=torch.float64)
    inputs = [(gaussians.normal(2, 2, seed=i) * 0.3 + eye).requires_grad_() for i in range(4)]
    assert torch.autograd.gradcheck(loss, inputs)


def test_arrays_and_empty_series():
    _, model = twins()
    y, u = np.zeros((3, 2)), np.zeros((3, 1))
    found = ParticleFilter(model, 10).filter(y, u=u, generator=seeded())
    assert isinstance(found.mean, np.ndarray) and found.effective.shape == (3,)
    assert ParticleFilter(model, 10).log_likelihood(y, u=u, generator=seeded()) == found.log_likelihood
    for made in (ParticleFilter(model, 10), EnsembleFilter(model, 10)):
        empty = made.filter(y[:0], u=u[:0])
        assert empty.cov.shape == (0, 2, 2) and empty.log_likelihood == 0 and empty.state.x.shape == (1, 10, 2)


def plain(**more):
    eye = torch.eye(1, dtype=torch.float64)
    return df.NonlinearGaussian(lambda x: x, lambda x: x, **({"Q": eye, "R": eye, "P0": 1.0} | more))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: EnsembleFilter(twins()[0], 10), "model is LinearGaussian, expected a NonlinearGaussian"),
        (lambda: ParticleFilter(plain(), 1), "size is 1, expected 2 states or more"),
        (lambda: EnsembleFilter(plain(), form="root"), "form is 'root'"),
        (lambda: EnsembleFilter(plain(), inflation=0.9), "inflation is 0.9, expected 1 or more"),
        (lambda: ParticleFilter(plain(), proposal="guided"), "proposal is 'guided'"),
        (lambda: ParticleFilter(plain(), threshold=1.5), "threshold is 1.5, expected 0 to 1"),
        (lambda: ParticleFilter(plain(), log_density=1.0), "log_density is 1"),
        (lambda: ParticleFilter(plain(R=[[0.0]])).filter([0.1]), "R is not positive definite"),
        (
            lambda: EnsembleFilter(plain(R=[[0.0]], P0=0.0, Q=[[0.0]])).filter([0.1]),
            "not positive definite at row 0, time 0",
        ),
        (
            lambda: ParticleFilter(plain(), log_density=lambda y, h: 0 * h[0] - torch.inf).filter([0.0, 1.0]),
            "no state explains the observation at row 0, time",
        ),
        (
            lambda: ParticleFilter(plain(), log_density=lambda y, h: (-1 - h[0].abs()).log()).filter([0.0]),
            "the density of a state is NaN at row 0, time 0",
        ),
        (
            lambda: ParticleFilter(plain(), log_density=lambda y, h: h).filter([0.0]),
            r"log_density returns the shape \(1,\)",
        ),
        (lambda: ParticleFilter(plain()).filter([torch.inf]), "y has infinite values"),
        (
            lambda: EnsembleFilter(plain(), 5).filter([0.0], ParticleFilter(plain(), 6).init_state(1)),
            "state.x has shape",
        ),
    ],
)
def test_what_is_wrong_is_explained(call, message):
    with pytest.raises(ArgumentError) as error:
        call()
    assert re.search(message, str(error.value)), str(error.value)
