"""How a filter starts: stationary, approximately diffuse, exactly diffuse."""

import math

import pytest
import torch

import dualform as df
from dualform.core.errors import ArgumentError
from gaussians import FORMS, NAN, build, normal, observations, posterior, seasonal, terms
from vectors import close, load


def equal(got, want, tolerance=1e-8):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def local_level(irregular, level, **more):
    return df.LinearGaussian([[1.0]], [[1.0]], [[level]], [[irregular]], prior="first", **more)


@pytest.mark.parametrize("parallel", FORMS)
def test_nile_log_likelihoods(parallel):
    """Published values at (15099, 1469.1): Durbin and Koopman, KFAS, statsmodels."""
    y, got = load("nile_local_level")["y"], {}
    for start, more in {
        "known": {"P0": 1e7},
        "kfas": {"P0": "diffuse", "convention": "kfas"},
        "statsmodels": {"P0": "diffuse"},
    }.items():
        model = local_level(15099.0, 1469.1, **more)
        out = df.KalmanFilter(model, parallel=parallel).filter(y)
        got[start] = round(out.log_likelihood.item(), 4)
        assert out.convention == ("proper" if start == "known" else start)
    assert got == {"known": -641.5856, "kfas": -632.5456, "statsmodels": -633.4646}


@pytest.mark.parametrize("parallel", FORMS)
def test_nile_from_a_diffuse_start_equals_statsmodels(parallel):
    g = load("nile_local_level")
    exact = df.KalmanFilter(local_level(*g["mle_params_exact"].tolist(), P0="diffuse"), parallel=parallel)
    smooth, ahead = exact.smooth(g["y"]), exact.forecast(g["y"], 5)
    close(smooth.log_likelihood[None], g["mle_loglik_exact"], 1e-12)
    errors = exact.innovations(g["y"])  # that of the first observation does not exist
    assert errors.distance.isnan().tolist() == [True] + [False] * 99 and 80 < errors.distance[1:].sum() < 120
    close(smooth.mean[:, 0], g["smoothed_level_exact"], 1e-9)
    close(ahead.mean[:, 0], g["forecast_mean_exact"], 1e-9)
    close(ahead.cov[:, 0, 0], g["forecast_var_exact"], 1e-9)
    vague = df.KalmanFilter(local_level(*g["mle_params_approx"].tolist(), P0=1e6), parallel=parallel)
    close(vague.log_likelihood(g["y"], burn=1)[None], g["mle_loglik_approx"], 1e-9)
    close(vague.smooth(g["y"]).mean[:, 0], g["smoothed_level_approx"], 1e-8)


STRUCTURAL = {
    "uc_level_seasonal": {},
    "uc_trend_seasonal": {"trend": True},
    "uc_level_trigseasonal": {"harmonics": 2},
}


@pytest.mark.parametrize("name", STRUCTURAL)
def test_structural_models_equal_statsmodels(name):
    """Mauna Loa with missing months, from an exactly and from an approximately diffuse start."""
    g, kind = load(name), STRUCTURAL[name]
    exact = seasonal(g["params_given"].tolist(), 12, P0="diffuse", **kind)
    assert abs(exact.log_likelihood(g["y"]) - g["loglik_given_exact"]).item() < 1e-7
    vague = df.KalmanFilter(seasonal(g["params_given"].tolist(), 12, P0=1e6, **kind), parallel=False)
    assert abs(vague.log_likelihood(g["y"], burn=exact.d_state) - g["loglik_given_approx"]).item() < 1e-7
    best = seasonal(g["mle_params_exact"].tolist(), 12, P0="diffuse", **kind)
    ahead = best.forecast(g["y"], 5)
    close(ahead.mean[:, 0], g["forecast_mean_exact"], 1e-7)
    close(ahead.cov[:, 0, 0], g["forecast_var_exact"], 1e-7)


@pytest.mark.parametrize("parallel", FORMS)
@pytest.mark.parametrize("prior", ["before", "first"])
@pytest.mark.parametrize("directions", [[[True, False, True]], [[1.0, 0.5], [0.0, 1.0], [2.0, 0.0]]])
def test_a_diffuse_start_equals_generalised_least_squares(directions, prior, parallel):
    """One diffuse direction after another is determined, with components and whole steps missing."""
    Z = directions[0] if len(directions) == 1 else torch.tensor(directions, dtype=torch.float64)
    model = build(terms(3, 2, 1), prior=prior, diffuse=Z, convention="kfas")
    y = observations(8, 2, seed=3)
    y[0], y[1, 0], y[2] = NAN, NAN, NAN
    kalman = df.KalmanFilter(model, parallel=parallel)
    out, smooth = kalman.filter(y), kalman.smooth(y)
    mean, cov, total = posterior(model, y, diffuse=model.diffuse)
    equal(smooth.mean, mean[1:])
    equal(smooth.cov, torch.stack([cov[t, t] for t in range(1, 9)]))
    equal(smooth.lag_one_cov, torch.stack([cov[t, t - 1] for t in range(1, 9)]))
    equal(smooth.initial_cov, cov[0, 0])
    equal(out.log_likelihood, total)
    left = (out.diffuse != 0).any(-2).sum(-1).tolist()
    assert left[0] == 2 and left[-1] == 0 and left == sorted(left, reverse=True)
    for t in range(left.index(0), 8):
        mean, cov, _ = posterior(model, y, upto=t + 1, diffuse=model.diffuse)
        equal(out.mean[t], mean[t + 1])
        equal(out.cov[t], cov[t + 1, t + 1])


@pytest.mark.parametrize("parallel", FORMS)
def test_a_vague_start_leaves_covariances_positive(parallel):
    """A slope and a season with a variance of 1e7: predictions of the first months are of 1e9."""
    params = [1.0, 0.05, 1e-6, 1e-3]
    y, _ = seasonal(params, 12, trend=True, P0=1.0).sample(120, generator=torch.Generator().manual_seed(0))
    vague = df.KalmanFilter(seasonal(params, 12, trend=True, P0=1e7), parallel=parallel).smooth(y[0])
    exact = seasonal(params, 12, trend=True, P0="diffuse").smooth(y[0])
    close(vague.mean, exact.mean, 1e-6)
    close(vague.cov, exact.cov, 1e-6)
    assert torch.linalg.eigvalsh(vague.cov).min() > 0


def test_exactly_diffuse_is_the_limit_of_a_growing_variance():
    given = terms(3, 1, 2)
    del given["P0"]
    y = observations(12, 1, seed=8)
    exact = build(given, P0="diffuse", prior="first")
    smooth, covs, likelihoods = exact.smooth(y), [], []
    for kappa in (1e6, 1e8):
        vague = df.KalmanFilter(build(given, P0=kappa, prior="first"), parallel=False)
        covs.append((vague.smooth(y).cov - smooth.cov).abs().max().item())
        limit = vague.log_likelihood(y) + 3 * math.log(kappa) / 2
        likelihoods.append(abs(limit - exact.log_likelihood(y)).item())
    assert covs[1] < covs[0] / 50 and likelihoods[1] < likelihoods[0] / 50 and likelihoods[1] < 1e-3


def test_diffuse_starts_in_a_batch_that_end_at_different_times():
    model = build(terms(3, 2, 1), diffuse=[True, True, False], prior="first")
    y = observations(5, 9, 2, seed=2)
    y[0, :4], y[1, :2, 0] = NAN, NAN
    out, smooth = model.filter(y), model.smooth(y)
    draws = model.simulate_posterior(y, 20_000, generator=torch.Generator().manual_seed(3))
    for i in range(5):
        equal(out.log_likelihood[i], model.log_likelihood(y[i]))
        equal(smooth.cov[i], model.smooth(y[i]).cov)
        scale = smooth.cov[i].diagonal(dim1=-2, dim2=-1).sqrt()
        assert ((draws[:, i].mean(0) - smooth.mean[i]).abs() < 5 * scale / 140 + 1e-6).all()
        assert ((draws[:, i].std(0) / scale - 1).abs() < 0.03).all()


def test_gradients_of_a_diffuse_start():
    y = observations(6, 2, missing=0.0)
    y[0, 1] = y[2] = NAN

    def run(A, C, q, r):
        eye = torch.eye(3, dtype=torch.float64)
        R = r @ r.mT + eye[:2, :2]
        model = df.LinearGaussian(A, C, q @ q.mT, R, P0=eye, diffuse=[True, False, True], prior="first")
        return model.log_likelihood(y)

    args = [normal(*s, seed=i).requires_grad_() for i, s in enumerate([(3, 3), (2, 3), (3, 1), (2, 2)])]
    assert torch.autograd.gradcheck(run, args)
    assert torch.autograd.gradgradcheck(run, args)


@pytest.mark.parametrize("parallel", FORMS)
def test_gradients_of_the_smoother_from_a_diffuse_start(parallel):
    y = observations(4, 1, missing=0.0)
    y[1] = NAN

    def run(A, q, r):
        model = df.LinearGaussian(A, [[1.0, 0.5]], q @ q.mT, r @ r.mT, P0="diffuse", prior="first")
        return df.KalmanFilter(model, parallel=parallel).smooth(y)[:6]

    args = [normal(*s, seed=i).requires_grad_() for i, s in enumerate([(2, 2), (2, 1), (1, 1)])]
    assert torch.autograd.gradcheck(run, args)


def test_a_diffuse_start_stays_positive_in_float32():
    model = seasonal([0.1, 0.5, 0.01, 0.2], 4, trend=True, P0="diffuse")
    y, _ = seasonal([0.1, 0.5, 0.01, 0.2], 4, trend=True, P0=1.0).sample(60, generator=torch.Generator().manual_seed(0))
    want = model.smooth(y[0])
    got = model.to(torch.float32).smooth(y[0].float())
    assert torch.equal(got.cov, got.cov.mT)
    assert torch.linalg.eigvalsh(got.cov.double()).min() > -1e-6 * got.cov.max()
    close(got.mean, want.mean, 1e-4)
    close(got.cov, want.cov, 1e-3)


def test_an_observation_without_noise_may_determine_a_direction():
    """R = 0 and Q = 0: a line through two points."""
    model = df.LinearGaussian(
        [[1.0, 1.0], [0.0, 1.0]], [[1.0, 0.0]], torch.zeros(2, 2).double(), [[0.0]], P0="diffuse", prior="first"
    )
    smooth = model.smooth([2.0, None, 6.0, None])
    equal(smooth.mean[:, 0], torch.tensor([2.0, 4.0, 6.0, 8.0], dtype=torch.float64))
    equal(smooth.cov, torch.zeros(4, 2, 2, dtype=torch.float64))


def test_a_stationary_start_is_left_as_it_is_by_a_transition():
    given = terms(3, 1, 2, batch=(2,))
    del given["m0"], given["P0"]
    model = build(given, P0="stationary")
    start = model.init_state(2)
    after = model.predict(start)
    equal(after.mean, start.mean, 1e-12)
    equal(after.cov, start.cov, 1e-12)
    ar = df.LinearGaussian([[0.9]], [[1.0]], [[2.0]], [[0.0]], P0="stationary", prior="first")
    equal(ar.init_state(1).cov, torch.tensor([[[2.0 / (1 - 0.81)]]], dtype=torch.float64), 1e-12)
    near = df.LinearGaussian([[1 - 1e-7]], [[1.0]], [[1.0]], [[1.0]], P0="stationary")
    equal(near.init_state(1).cov.flatten(), torch.tensor([1 / (1 - (1 - 1e-7) ** 2)], dtype=torch.float64), 1e-7)


def test_gradients_of_a_stationary_start():
    y = observations(4, 1, missing=0.2)

    def run(A, q, c):
        model = df.LinearGaussian(A / 4, [[1.0, 0.0]], q @ q.mT, [[1.0]], P0="stationary", c=c)
        return model.log_likelihood(y)

    args = [normal(*s, seed=i).requires_grad_() for i, s in enumerate([(2, 2), (2, 2), (2,)])]
    assert torch.autograd.gradcheck(run, args)
    assert torch.autograd.gradgradcheck(run, args)


@pytest.mark.parametrize("parallel", FORMS)
def test_an_autoregression_without_observation_noise_equals_statsmodels(parallel):
    """ARMA(2, 1) of the Nile's differences: the first observation has no noise given the state before it."""
    g = load("nile_arima_211")
    ar1, ar2, ma1, variance = g["params_given"].tolist()
    model = df.LinearGaussian(
        [[ar1, 1.0], [ar2, 0.0]], [[1.0, 0.0]], [[variance]], [[0.0]], P0="stationary", prior="first", S=[[1.0], [ma1]]
    )
    kalman, y = df.KalmanFilter(model, parallel=parallel), g["y"].diff()
    close(kalman.log_likelihood(y)[None], g["loglik_simple_diff"], 1e-12)
    assert kalman.filter(y).form == ("parallel" if parallel else "sequential")
    y[40:43] = NAN
    smooth = kalman.smooth(y)
    start = model.init_state(1).cov[0]
    nearly = df.LinearGaussian(model.A, model.C, model.Q, [[1e-9 * variance]], P0=start, prior="first", S=model.S)
    mean, cov, _ = posterior(nearly, y[:, None])
    close(smooth.mean, mean[1:], 1e-7)
    close(smooth.cov, torch.stack([cov[t, t] for t in range(1, len(y) + 1)]), 1e-7)
    assert smooth.cov[0, 0, 0] == 0 and smooth.cov[41, 0, 0] > 0.5 * variance


def test_an_integrated_autoregression_equals_statsmodels():
    """ARIMA(2, 1, 1) of the Nile: the level that is differenced is diffuse, the rest stationary."""
    g = load("nile_arima_211")
    ar1, ar2, ma1, variance = g["params_given"].tolist()
    A, S = [[1.0, 1.0, 0.0], [0.0, ar1, 1.0], [0.0, ar2, 0.0]], [[0.0], [1.0], [ma1]]
    given = {"C": [[1.0, 1.0, 0.0]], "Q": [[variance]], "R": [[0.0]], "S": S, "prior": "first", "P0": "stationary"}
    model = df.LinearGaussian(A, **given, diffuse=[True, False, False])
    close(model.log_likelihood(g["y"])[None], g["loglik_exact"], 1e-12)
    vague = model.init_state(1).cov[0]
    vague[0, 0] = 1e6
    approximate = df.LinearGaussian(A, **{**given, "P0": vague})
    close(approximate.log_likelihood(g["y"], burn=1)[None], g["loglik_default"], 1e-9)
    ahead = approximate.forecast(g["y"], 5)
    close(ahead.mean[:, 0], g["forecast_mean"], 1e-6)
    close(ahead.cov[:, 0, 0], g["forecast_var"], 1e-6)


def test_a_stationary_start_beside_a_diffuse_one():
    """A random walk, and an autoregression: what statsmodels starts a model of both with."""
    A, eye = torch.diag(torch.tensor([1.0, 0.5], dtype=torch.float64)), torch.eye(2, dtype=torch.float64)
    model = df.LinearGaussian(A, [[1.0, 1.0]], eye, [[0.0]], P0="stationary", diffuse=[True, False], prior="first")
    start = model.init_state(1)
    equal(start.cov[0], torch.diag(torch.tensor([0.0, 4 / 3], dtype=torch.float64)), 1e-12)
    assert start.diffuse[0].tolist() == [[1.0], [0.0]]
    assert model.log_likelihood([1.0, 2.0, 1.5]).isfinite()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: df.LinearGaussian([[1.0]], [[1.0]], [[1.0]], [[1.0]], P0="stationary").filter([1.0]),
            r"filter: P0='stationary', but the model is not stationary: A has an eigenvalue of absolute value 1, exp",
        ),
        (
            lambda: df.LinearGaussian([[[0.5]], [[1.1]]], [[1.0]], [[1.0]], [[1.0]], P0="stationary").init_state(2),
            r"the model of row 1 is not stationary.* 1\.1, expected less than 1",
        ),
        (
            lambda: df.LinearGaussian(
                [[0.5, 1.0], [0.0, 1.0]], [[1.0, 0.0]], torch.eye(2), [[1.0]], P0="stationary", diffuse=[False, True]
            ).init_state(1),
            "P0='stationary' with diffuse states that move the others",
        ),
        (
            lambda: df.LinearGaussian(
                torch.ones(4, 1, 1), [[1.0]], [[1.0]], [[1.0]], P0="stationary", time_varying="A"
            ),
            "P0='stationary' with A, Q, S or c that vary in time",
        ),
        (
            lambda: seasonal([1.0, 1.0, 1.0], 4, P0="diffuse").smooth([1.0, None, 2.0, 3.0]),
            "smooth: the observations of row 0 leave 1 diffuse directions of the state undetermined",
        ),
        (
            lambda: seasonal([1.0, 1.0, 1.0], 4, P0="diffuse").forecast([1.0, 2.0, 3.0], 2),
            "forecast: the observations of row 0 leave 1 diffuse",
        ),
    ],
)
def test_bad_starts_are_explained(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()
