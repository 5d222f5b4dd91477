"""Switching linear-Gaussian models against all paths of their regimes."""

import itertools
import re

import numpy as np
import pytest
import torch

import dualform as df
import gaussians
from dualform.core.errors import ArgumentError
from dualform.core.laws import LAWS, Trial
from dualform.core.linalg import matvec, symmetric_part
from dualform.gaussian import SwitchingLinearGaussian

PRIORS = ["before", "first"]


def equal(got, want, tolerance=1e-9):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, equal_nan=True)


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


MOVES, FIRST = rows([0.85, 0.1, 0.05], [0.3, 0.6, 0.1], [0.25, 0.25, 0.5]), rows(0.5, 0.2, 0.3)


def regimes(k=3, *, prior="before", seed=0, **changed):
    given = gaussians.terms(2, 2, inputs=1, batch=(k,), seed=seed) | changed
    return given, gaussians.build(given, prior=prior)


def on_paths(given, prior, transition, initial, y, u):
    """All paths of regimes, the logarithms of their joint densities with y, and the moments given y on each."""
    length = len(y)
    paths = torch.tensor([*itertools.product(range(len(initial)), repeat=length)])
    fixed = {name: value[paths[:, 0] if name in ("m0", "P0") else paths] for name, value in given.items()}
    model = gaussians.build(fixed, length, prior=prior)
    chance = initial[paths[:, 0]].log() + transition[paths[:, :-1], paths[:, 1:]].log().sum(-1)
    return paths, chance + model.log_likelihood(y, u=u), model.smooth(y, u=u)


def mixed(weights, means, covs):
    weights = (weights - weights.logsumexp(0)).exp()
    mean = (weights[:, None] * means).sum(0)
    away = means - mean
    return mean, (weights[:, None, None] * (covs + away[:, :, None] * away[:, None])).sum(0)


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("length", [1, 2])
def test_two_observations_are_filtered_exactly(prior, length):
    given, model = regimes(prior=prior)
    y, u = gaussians.observations(length, 2, missing=0.2, seed=4), gaussians.normal(length, 1, seed=3)
    switching = SwitchingLinearGaussian(model, MOVES, FIRST)
    found, smooth = switching.filter(y, u=u), switching.smooth(y, u=u)
    paths, weights, exact = on_paths(given, prior, MOVES, FIRST, y, u)
    equal(found.log_likelihood, weights.logsumexp(0))
    means, covs = exact.mean[:, -1], exact.cov[:, -1]
    mean, cov = mixed(weights, means, covs)
    chance = (weights - weights.logsumexp(0)).exp()
    for got in (found, smooth):
        equal(got.mean[-1], mean)
        equal(got.cov[-1], cov)
        for k in range(3):
            here = paths[:, -1] == k
            equal(got.probs[-1, k], chance[here].sum())
            mean_k, cov_k = mixed(weights[here], means[here], covs[here])
            equal(got.regime_mean[-1, k], mean_k)
            equal(got.regime_cov[-1, k], cov_k)


def by_the_letter(model, transition, initial, y):
    """The filter and the smoother of Kim (1994) in loops, for a model without inputs and with prior="first"."""
    K, T = len(initial), len(y)
    A, Q, c, C, R, d = (getattr(model, name).expand(K, *getattr(model, name).shape[1:]) for name in "AQcCRd")
    Q = [S @ q @ S.mT for S, q in zip(model.S, Q, strict=True)]
    means, covs, probs, total = [], [], [], 0.0
    for t in range(T):
        pair = {}
        for i in range(K):
            for j in range(K):
                if t:
                    m, P, p = (
                        A[j] @ means[-1][i] + c[j],
                        A[j] @ covs[-1][i] @ A[j].mT + Q[j],
                        probs[-1][i] * transition[i, j],
                    )
                else:
                    m, P, p = model.m0[i], model.P0[i], initial[i] * (i == j)
                F, v = C[j] @ P @ C[j].mT + R[j], y[t] - C[j] @ m - d[j]
                G = P @ C[j].mT @ torch.linalg.inv(F)
                density = (-(v @ torch.linalg.inv(F) @ v + torch.logdet(2 * torch.pi * F)) / 2).exp()
                pair[i, j] = m + G @ v, P - G @ C[j] @ P, p * density
        likelihood = sum(w for *_, w in pair.values())
        total = total + likelihood.log()
        chance = [sum(pair[i, j][2] for i in range(K)) / likelihood for j in range(K)]
        mean = [sum(pair[i, j][2] * pair[i, j][0] for i in range(K)) / likelihood / chance[j] for j in range(K)]
        cov = [
            sum(w * (P + torch.outer(mean[j] - m, mean[j] - m)) for m, P, w in (pair[i, j] for i in range(K)))
            / (likelihood * chance[j])
            for j in range(K)
        ]
        means, covs, probs = [*means, mean], [*covs, cov], [*probs, chance]
    smooth = [(means[-1], covs[-1], probs[-1])]
    for t in reversed(range(T - 1)):
        later_mean, later_cov, later_prob = smooth[0]
        mean, cov, prob = [], [], []
        for j in range(K):
            found = []
            for k in range(K):
                m, P = A[k] @ means[t][j] + c[k], A[k] @ covs[t][j] @ A[k].mT + Q[k]
                G = covs[t][j] @ A[k].mT @ torch.linalg.inv(P)
                reached = sum(probs[t][i] * transition[i, k] for i in range(K))
                w = later_prob[k] * probs[t][j] * transition[j, k] / reached
                found.append((means[t][j] + G @ (later_mean[k] - m), covs[t][j] + G @ (later_cov[k] - P) @ G.mT, w))
            p = sum(w for *_, w in found)
            m = sum(w * m for m, _, w in found) / p
            mean.append(m)
            cov.append(sum(w * (P + torch.outer(m - x, m - x)) for x, P, w in found) / p)
            prob.append(p)
        smooth.insert(0, (mean, cov, prob))
    return total, (means, covs, probs), tuple(zip(*smooth, strict=True))


def test_the_filter_and_the_smoother_of_the_paper():
    given = {name: value for name, value in gaussians.terms(2, 2, batch=(3,)).items()}
    model = gaussians.build(given, prior="first")
    y = gaussians.observations(8, 2, missing=0.0)
    switching = SwitchingLinearGaussian(model, MOVES, FIRST)
    total, filtered, smoothed = by_the_letter(model, MOVES, FIRST, y)
    found, smooth = switching.filter(y), switching.smooth(y)
    equal(found.log_likelihood, total)
    for got, want in ((found, filtered), (smooth, smoothed)):
        for value, parts in zip((got.regime_mean, got.regime_cov, got.probs), want, strict=True):
            equal(value, torch.stack([torch.stack(list(part)) for part in parts]))


@pytest.mark.parametrize("prior", PRIORS)
def test_longer_series_are_close_to_all_paths(prior):
    """Six observations, 729 paths, of three levels of noise: the log-likelihood within 0.01, probabilities and means,
    in standard deviations, within 0.1, and covariances within a quarter."""
    given = gaussians.terms(2, 2, inputs=1)
    given = {name: value.expand(3, *value.shape) for name, value in given.items()}
    given["Q"] = given["Q"] * rows(0.1, 1.0, 6.0)[:, None, None]
    model = gaussians.build(given, prior=prior)
    switching = SwitchingLinearGaussian(model, MOVES, FIRST)
    u = gaussians.normal(6, 1, seed=3)
    y, *_ = switching.sample(6, u=u, generator=torch.Generator().manual_seed(2))
    y = y[0].masked_fill(torch.rand(6, 2, generator=torch.Generator().manual_seed(3)) < 0.2, torch.nan)
    found, smooth = switching.filter(y, u=u), switching.smooth(y, u=u)
    paths, weights, exact = on_paths(given, prior, MOVES, FIRST, y, u)
    assert abs(found.log_likelihood - weights.logsumexp(0)) < 0.01
    chance = (weights - weights.logsumexp(0)).exp()
    for t in range(6):
        mean, cov = mixed(weights, exact.mean[:, t], exact.cov[:, t])
        probs = torch.stack([chance[paths[:, t] == k].sum() for k in range(3)])
        assert (smooth.probs[t] - probs).abs().max() < 0.1
        sd = cov.diagonal().sqrt()
        assert ((smooth.mean[t] - mean).abs() / sd).max() < 0.1
        assert ((smooth.cov[t] - cov).abs() / (sd[:, None] * sd)).max() < 0.25


@pytest.mark.parametrize("prior", PRIORS)
def test_a_chain_without_a_choice_is_a_model_that_varies_in_time(prior):
    given, model = regimes(prior=prior)
    turn = torch.eye(3, dtype=torch.float64).roll(1, 1)
    y, u = gaussians.observations(7, 2), gaussians.normal(7, 1, seed=3)
    index = (torch.arange(7) + 1) % 3
    fixed = {name: value[1] if name in ("m0", "P0") else value[index] for name, value in given.items()}
    want = gaussians.build(fixed, 7, prior=prior).smooth(y, u=u)
    switching = SwitchingLinearGaussian(model, turn, [0.0, 1.0, 0.0])
    found = switching.smooth(y, u=u)
    equal(found.mean, want.mean)
    equal(found.cov, want.cov)
    equal(found.log_likelihood, want.log_likelihood)
    equal(found.probs, torch.nn.functional.one_hot(index, 3).double())


def test_equal_regimes_are_one():
    given = gaussians.terms(2, 2, inputs=1)
    linear = gaussians.build(given)
    model = gaussians.build(given | {"A": given["A"].expand(3, 2, 2)})
    y, u = gaussians.observations(2, 7, 2), gaussians.normal(2, 7, 1, seed=3)
    lengths = torch.tensor([7, 3])
    found, want = (
        SwitchingLinearGaussian(model, MOVES, FIRST).smooth(y, u=u, lengths=lengths),
        linear.smooth(y, u=u, lengths=lengths),
    )
    for part in ("mean", "cov", "log_likelihood"):
        equal(getattr(found, part), getattr(want, part))
    chance = FIRST
    for t in range(7):
        equal(found.probs[0, t], chance)
        chance = chance @ MOVES


def test_the_laws_of_a_recurrence():
    given = {name: value.requires_grad_() for name, value in gaussians.terms(2, 2, batch=(3,)).items()}
    given["Q"], given["R"], given["P0"] = (symmetric_part(given[name].detach()) for name in ("Q", "R", "P0"))
    moves, first = MOVES.clone().requires_grad_(), FIRST.clone().requires_grad_()
    switching = SwitchingLinearGaussian(gaussians.build(given), moves, first)
    tensors = {name: value for name, value in given.items() if value.requires_grad} | {"moves": moves, "first": first}
    x = gaussians.observations(3, 9, 2)
    trial = Trial(switching, x, warmup=2, parameters=tensors, tangent=lambda g: g._replace(cov=symmetric_part(g.cov)))
    found = {name: law(trial) for name, law in LAWS.items()}
    assert not {name: worst for name, worst in found.items() if worst is not None and not worst.error <= 1e-9}


def test_gradients():
    y = gaussians.observations(4, 2)
    zero = torch.zeros(2, 2, dtype=torch.float64)

    def loss(logits, A, r, p):
        model = df.LinearGaussian(A, [[1.0, 0.0], [0.5, 1.0]], torch.eye(2, dtype=torch.float64), r @ r.mT, P0=p @ p.mT)
        impossible = torch.where(torch.eye(2, dtype=torch.bool), logits, torch.tensor([[0.0, -torch.inf], [0.0, 0.0]]))
        switching = SwitchingLinearGaussian(model, impossible.softmax(-1), logits[0].softmax(-1))
        return switching.log_likelihood(y), switching.smooth(y).mean

    inputs = [zero + gaussians.normal(2, 2, seed=1), gaussians.normal(2, 2, 2, seed=2) / 2]
    inputs += [torch.eye(2, dtype=torch.float64) + gaussians.normal(2, 2, seed=i) / 4 for i in (3, 4)]
    assert torch.autograd.gradcheck(loss, [z.requires_grad_() for z in inputs])


def test_samples_are_of_the_model():
    given, model = regimes()
    switching = SwitchingLinearGaussian(model, MOVES, FIRST)
    u = gaussians.normal(4, 1, seed=3)
    y, h, s = switching.sample(4, 30000, u=u, generator=torch.Generator().manual_seed(0))
    often = torch.nn.functional.one_hot(s, 3).double()
    assert (often[:, 0].mean(0) - FIRST).abs().max() < 0.01
    moved = (often[:, :-1, :, None] * often[:, 1:, None]).sum((0, 1))
    assert (moved / moved.sum(-1, keepdim=True) - MOVES).abs().max() < 0.02

    def check(error, cov):
        equal(error.mT.cov(), cov, 0.1)
        assert error.mean(0).abs().max() < 0.1

    for k in range(3):
        level = given["d"][k] + matvec(given["D"][k], u)
        check((y - matvec(given["C"][k], h) - level)[s == k], given["R"][k])
        ahead = matvec(given["A"][k], h[:, :-1]) + given["c"][k] + matvec(given["B"][k], u[1:])
        S = given["S"][k]
        check((h[:, 1:] - ahead)[s[:, 1:] == k], S @ given["Q"][k] @ S.mT)


def test_the_regimes_of_a_series_are_found():
    """A level that rests, or jumps: nine of ten steps are told apart after the fact."""
    level = df.LinearGaussian([[1.0]], [[1.0]], [[[0.01]], [[25.0]]], [[0.1]], P0=10.0)
    switching = SwitchingLinearGaussian(level, [[0.9, 0.1], [0.5, 0.5]])
    y, h, s = switching.sample(400, generator=torch.Generator().manual_seed(0))
    found = switching.smooth(y[0, :, 0].numpy())
    assert isinstance(found.probs, np.ndarray)
    assert ((found.probs[:, 1] > 0.5) == s[0].numpy()).mean() > 0.9
    z = (found.mean[:, 0] - h[0, :, 0].numpy()) / found.cov[:, 0, 0] ** 0.5
    assert 0.8 < (z**2).mean() < 1.2
    assert switching.filter(y[0, :0]).probs.shape == (0, 2) and switching.smooth(y[0, :0]).probs.shape == (0, 2)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: SwitchingLinearGaussian(3, MOVES), "model is int, expected a LinearGaussian"),
        (lambda: SwitchingLinearGaussian(gaussians.build(gaussians.terms()), MOVES), r"model has the batch axes \(\)"),
        (
            lambda: SwitchingLinearGaussian(
                df.LinearGaussian([[[1.0]]] * 3, [[1.0]], [[1.0]], [[1.0]], P0="diffuse"), MOVES
            ),
            "exactly diffuse start",
        ),
        (lambda: SwitchingLinearGaussian(regimes()[1], MOVES[:2]), "transition has shape"),
        (lambda: SwitchingLinearGaussian(regimes()[1], MOVES.mT), "the sum of transition is not 1: 1.4 at 0"),
        (
            lambda: SwitchingLinearGaussian(regimes()[1], MOVES, [1.5, -0.5, 0.0]),
            "initial has a negative probability: -0.5 at 1",
        ),
        (
            lambda: SwitchingLinearGaussian(regimes()[1], MOVES).filter(gaussians.observations(3, 2)),
            "no inputs u, but the model has B or D",
        ),
        (lambda: simple().filter([0.0, torch.inf]), "y has infinite values"),
        (lambda: simple().step(rows([0.0, 1.0]), simple().init_state(1)), "x has shape"),
        (lambda: simple().step(rows([0.0]), simple().init_state(2)), "state.mean has shape"),
        (lambda: simple().filter([0.0], lengths=[1]), "lengths are"),
        (lambda: simple(R=[[0.0]], Q=[[[0.0]], [[0.0]]], P0=0.0).filter([0.0]), "not positive definite at row 0"),
    ],
)
def test_what_is_wrong_is_explained(call, message):
    with pytest.raises(ArgumentError) as error:
        call()
    assert re.search(message, str(error.value)), str(error.value)


def simple(**changed):
    given = {"A": [[1.0]], "C": [[1.0]], "Q": [[[0.1]], [[4.0]]], "R": [[1.0]], "P0": 1.0} | changed
    return SwitchingLinearGaussian(df.LinearGaussian(**given), [[0.9, 0.1], [0.2, 0.8]])
