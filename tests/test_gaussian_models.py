"""Linear-Gaussian models: the joint distribution, recorded numbers, batches, matrices that vary in time, inputs."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import dualform as df
from dualform.core.errors import ArgumentError
from dualform.core.laws import LAWS, Trial
from dualform.core.tree import concat, take
from dualform.gaussian import Gaussian
from gaussians import FORMS, NAN, build, joint, normal, observations, posterior, terms
from vectors import close, load


def equal(got, want, tolerance=1e-9):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("parallel", FORMS)
@pytest.mark.parametrize("prior", ["before", "first"])
@pytest.mark.parametrize("steps", [None, 7])
@pytest.mark.parametrize("rank", [1, 3])
def test_everything_equals_the_joint_gaussian(rank, steps, prior, parallel):
    model = build(terms(3, 2, rank, inputs=2, steps=steps), steps, prior=prior)
    kalman = df.KalmanFilter(model, parallel=parallel)
    y, u = observations(7, 2), normal(7, 2, seed=20)
    y[3] = NAN
    out, smooth = kalman.filter(y, u=u), kalman.smooth(y, u=u)
    for t in range(7):
        mean, cov, _ = posterior(model, y, u, upto=t)
        equal(out.predicted_mean[t], mean[t + 1])
        equal(out.predicted_cov[t], cov[t + 1, t + 1])
        mean, cov, _ = posterior(model, y, u, upto=t + 1)
        equal(out.mean[t], mean[t + 1])
        equal(out.cov[t], cov[t + 1, t + 1])
    mean, cov, total = posterior(model, y, u)
    equal(smooth.mean, mean[1:])
    equal(smooth.cov, torch.stack([cov[t, t] for t in range(1, 8)]))
    equal(smooth.lag_one_cov, torch.stack([cov[t, t - 1] for t in range(1, 8)]))
    equal(smooth.initial_mean, mean[0])
    equal(smooth.initial_cov, cov[0, 0])
    for got in (out.log_likelihood, smooth.log_likelihood, out.loglik.sum(), kalman.log_likelihood(y, u=u)):
        equal(got, total)
    assert out.convention == smooth.convention == "proper"


@pytest.mark.parametrize("seed", range(24))
def test_sequential_parallel_and_stepped_are_one_function(seed):
    """Random sizes, ranks, priors, inputs, missing values and diffuse directions."""
    g = torch.Generator().manual_seed(seed)
    n, m, k, batch, length = (int(torch.randint(low, high, (), generator=g)) for low, high in
                              ((1, 6), (1, 4), (0, 6), (1, 4), (1, 40)))  # fmt: skip
    steps, inputs = (None, length + 1)[seed % 2], seed % 3
    given = terms(n, m, min(n, k), inputs=inputs, steps=steps, seed=1000 + seed)
    model = build(
        given,
        steps,
        prior=("before", "first")[seed // 2 % 2],
        diffuse=None if seed % 4 else [True] * (n // 2) + [False] * (n - n // 2),
    )
    y = observations(batch, length, m, missing=0.1 * (seed % 8), seed=seed)
    u = normal(batch, length, inputs, seed=seed) if inputs else None
    loop, scan = (df.KalmanFilter(model, parallel=parallel) for parallel in FORMS)
    want, last = loop.forward(y, u=u)
    got, end = scan.forward(y, u=u)
    equal(got, want)
    equal(end[:2], last[:2])
    belief = loop.init_state(batch)
    for t in range(length):
        out, belief = loop.step(y[:, t], belief, u=None if u is None else u[:, t])
        equal(out.mean, want.mean[:, t])
        equal(out.cov, want.cov[:, t])
        equal(out.loglik, want.loglik[:, t])
    if not last.diffuse.any():
        for a, b in zip(scan.smooth(y, u=u)[:6], loop.smooth(y, u=u)[:6], strict=True):
            equal(a, b)


@pytest.mark.parametrize("parallel", FORMS)
@pytest.mark.parametrize("name", ["missing", "timevarying"])
def test_values_of_statsmodels(name, parallel):
    g = load(f"kalman_lgssm_{name}")
    given = {"A": "Tm", "C": "Z", "Q": "Q", "R": "H", "c": "c", "d": "d", "S": "R"}
    given = {ours: g[theirs] for ours, theirs in given.items()}
    varying = ()
    if name == "timevarying":  # their transition leads out of a step, ours into it
        varying = tuple(given)
        given = {k: v.movedim(-1, 0) for k, v in given.items()}
        given = {k: torch.cat([v[:1], v]) if k in "AQcS" else v for k, v in given.items()}
    model = df.LinearGaussian(**given, m0=g["a1"], P0=g["P1"], prior="first", time_varying=varying)
    kalman = df.KalmanFilter(model, parallel=parallel)
    out, smooth = kalman.filter(g["y"]), kalman.smooth(g["y"])
    for what in ("predicted_mean", "predicted_cov"):
        close(getattr(out, what), g[what], 1e-9, what)
    close(out.mean, g["filtered_mean"], 1e-9)
    close(out.cov, g["filtered_cov"], 1e-9)
    close(out.loglik, g["loglik_obs"], 1e-9)
    close(smooth.mean, g["smoothed_mean"], 1e-9)
    close(smooth.cov, g["smoothed_cov"], 1e-9)
    close(smooth.lag_one_cov[1:], g["smoothed_lag1_cov"], 1e-9)
    close(smooth.log_likelihood[None], g["loglik"], 1e-9)
    ahead, gone = kalman.innovations(g["y"]), g["y"].isnan()
    assert torch.equal(ahead.innovation.isnan(), gone)
    close(ahead.innovation.nan_to_num(), g["innovations"].masked_fill(gone, 0.0), 1e-9)
    equal(ahead.loglik, out.loglik)
    whole = ~gone.any(-1)
    C = (model.C if model.C.dim() == 3 else model.C.expand(30, -1, -1))[whole]
    equal(ahead.cov[whole], C @ out.predicted_cov[:-1][whole] @ C.mT + (model.R.expand(30, -1, -1))[whole])
    if name == "missing":
        ahead = kalman.forecast(g["y"], 5)
        close(ahead.mean, g["forecast_mean"], 1e-9)
        close(ahead.cov, g["forecast_cov"], 1e-9)


@pytest.mark.parametrize("name", ["kalman_dynamax", "kalman_dynamax_inputs"])
def test_values_of_dynamax(name):
    """It adds 1e-9 to the diagonals of what it inverts."""
    g = load(name)
    more = {"B": g["Bu"], "D": g["Du"]} if "U" in g else {}
    model = df.LinearGaussian(
        g["F"], g["Hm"], g["Q"], g["R"], g["m0"], g["P0"], prior="first", c=g["b"], d=g["d"], **more
    )
    out, smooth = model.filter(g["y"], u=g.get("U")), model.smooth(g["y"], u=g.get("U"))
    for got, what in ((out.mean, "filtered_mean"), (out.cov, "filtered_cov"), (smooth.mean, "smoothed_mean")):
        close(got, g[what], 1e-8, what)
    close(smooth.cov, g["smoothed_cov"], 1e-8)
    close(smooth.lag_one_cov[1:], g["smoothed_lag1_cov"], 1e-8)
    close(out.log_likelihood[None], g["loglik"], 1e-8)
    assert out.predicted_mean[-1].isnan().all() == ("U" in g)  # the input of the step after the last is not known


@pytest.mark.parametrize("law", [law for law in LAWS if law != "fresh"])
@pytest.mark.parametrize("prior", ["before", "first"])
def test_matrices_that_vary_in_time_obey_the_laws(prior, law):
    given = {name: value.requires_grad_() for name, value in terms(2, 1, 1, steps=14, seed=3).items()}
    model = build(given, 14, prior=prior)
    trial = Trial(
        df.KalmanFilter(model, parallel=False),
        observations(4, 14, 1),
        warmup=5,
        parameters=given,
        tangent=lambda g: g._replace(cov=(g.cov + g.cov.mT) / 2),
    )
    worst = LAWS[law](trial)
    assert worst is None or worst.error < 1e-10, worst


def test_a_belief_counts_the_steps_of_its_row():
    model = build(terms(2, 1, steps=6), 6)
    y = observations(1, 6, 1, missing=0.0)
    whole, _ = model.forward(y)
    _, three = model.forward(y[:, :3])
    both = concat([model.init_state(1), three])
    assert both.steps.tolist() == [0, 3]
    out, last = model.forward(torch.cat([y[:, :2], y[:, 3:5]]), both)
    equal(out.mean, torch.cat([whole.mean[:, :2], whole.mean[:, 3:5]]))
    assert last.steps.tolist() == [2, 5]
    with pytest.raises(ArgumentError, match=r"forward: A varies in time and has 6 steps, but step 7 is needed"):
        model.forward(y[:, :2].expand(2, -1, -1), last)


@pytest.mark.parametrize("parallel", FORMS)
def test_batches_of_models_and_data_broadcast(parallel):
    given = terms(2, 2, batch=(3,))
    given["C"], given["P0"] = given["C"][0], given["P0"][1]
    model, y = build(given), observations(4, 3, 6, 2)
    kalman = df.KalmanFilter(model, parallel=parallel)
    out, smooth, ahead = kalman.filter(y), kalman.smooth(y), kalman.forecast(y, 2)
    assert out.mean.shape == (4, 3, 6, 2) and ahead.cov.shape == (4, 3, 2, 2, 2) and model.batch == (3,)
    total = kalman.log_likelihood(y)
    one = kalman.filter(y[1, 2])  # one series, with each of three models
    assert one.mean.shape == (3, 6, 2)
    equal(one.cov[2], out.cov[1, 2])
    for i in range(3):
        alone = build({k: v[i] if v.dim() > (1 if k in ("m0", "c", "d") else 2) else v for k, v in given.items()})
        single = df.KalmanFilter(alone, parallel=parallel)
        equal(single.filter(y[:, i]).predicted_cov, out.predicted_cov[:, i])
        equal(single.smooth(y[:, i]).lag_one_cov, smooth.lag_one_cov[:, i])
        equal(single.log_likelihood(y[:, i]), total[:, i])
        equal(single.forecast(y[:, i], 2).mean, ahead.mean[:, i])
    rows = y[0]
    equal(kalman.forward(rows)[0].mean, out.mean[0])
    equal(kalman.step(rows[:, 0], kalman.init_state(3))[0].mean, out.mean[0, :, 0])


@pytest.mark.parametrize("parallel", FORMS)
def test_ragged_batches_equal_each_series_alone(parallel):
    model = build(terms(3, 2, 2, inputs=1))
    kalman = df.KalmanFilter(model, parallel=parallel)
    y, u, lengths = observations(4, 7, 2), normal(4, 9, 1, seed=9), [7, 0, 1, 4]
    out = kalman.filter(y, u=u, lengths=lengths)
    smooth, ahead = kalman.smooth(y, u=u, lengths=lengths), kalman.forecast(y, 2, u=u, lengths=torch.tensor(lengths))
    draws = kalman.simulate_posterior(y, 2, u=u, lengths=lengths)
    for i, n in enumerate(lengths):
        alone, back = kalman.filter(y[i, :n], u=u[i]), kalman.smooth(y[i, :n], u=u[i, :n])
        for got, want in zip(out[:4], alone[:4], strict=True):
            equal(got[i, : len(want)], want)
            assert got[i, len(want) :].isnan().all()
        equal(out.log_likelihood[i], alone.log_likelihood)
        for got, want in zip(smooth[:3], back[:3], strict=True):
            equal(got[i, :n], want)
            assert got[i, n:].isnan().all()
        equal(smooth.initial_cov[i], back.initial_cov)
        equal(ahead.mean[i], kalman.forecast(y[i, :n], 2, u=u[i]).mean)
        equal(ahead.cov[i], kalman.forecast(y[i, :n], 2, u=u[i]).cov)
        assert draws[:, i, :n].isfinite().all() and draws[:, i, n:].isnan().all()


def test_a_forecast_is_the_distribution_of_what_follows():
    model = build(terms(2, 2, inputs=1, steps=9), 9)
    y, u = observations(6, 2), normal(9, 1, seed=4)
    ahead = model.forecast(y, 3, u=u)
    whole = torch.cat([y, torch.full((3, 2), NAN, dtype=torch.float64)])
    mean, cov, _ = posterior(model, whole, u)
    for i in range(3):
        C, R = model.C[6 + i], model.R[6 + i]
        equal(ahead.mean[i], C @ mean[7 + i] + model.d[6 + i] + model.D[6 + i] @ u[6 + i])
        equal(ahead.cov[i], C @ cov[7 + i, 7 + i] @ C.mT + R)


def test_draws_have_the_moments_of_the_posterior():
    model = build(terms(2, 1, 1))
    y = observations(4, 1, missing=0.4, seed=5)
    paths = model.simulate_posterior(y, 40_000, generator=torch.Generator().manual_seed(0)).flatten(1)
    mean, cov, _ = posterior(model, y)
    cov = cov[1:, 1:].transpose(1, 2).reshape(8, 8)
    bound = 5 * cov.diagonal().max().item() / 200
    torch.testing.assert_close(paths.mean(0), mean[1:].flatten(), rtol=0, atol=bound)
    torch.testing.assert_close(paths.mT.cov(), cov, rtol=0, atol=2 * bound)


def test_samples_have_the_moments_of_the_joint_gaussian():
    model = build(terms(2, 1, 1, inputs=1, steps=3), 3, prior="first")
    u = normal(3, 1, seed=2)
    y, h = model.sample(3, 40_000, u=u, generator=torch.Generator().manual_seed(1))
    states, P, H, level, R, _ = joint(model, 3, u)
    bound = 5 * max(P.diagonal().max(), (H @ P @ H.mT + R).diagonal().max()).item() / 200
    torch.testing.assert_close(h.flatten(1).mean(0), states[2:], rtol=0, atol=bound)
    torch.testing.assert_close(y.flatten(1).mean(0), H @ states + level, rtol=0, atol=bound)
    torch.testing.assert_close(y.flatten(1).mT.cov(), H @ P @ H.mT + R, rtol=0, atol=2 * bound)
    assert build(terms(2, 1, batch=(3,))).sample(5, 2)[0].shape == (2, 3, 5, 1)


def test_two_sensors_in_turn_equal_one_with_both():
    given = terms(3, 2)
    given["R"] = torch.diag(given["R"].diagonal())
    model, y = build(given), observations(4, 2, missing=0.0)
    before = model.predict(model.init_state(4))
    both, belief, total = model.update(before, y), before, 0.0
    for i in range(2):
        one = model.update(
            belief, y[:, i : i + 1], C=model.C[i : i + 1], R=model.R[i : i + 1, i : i + 1], d=model.d[i : i + 1]
        )
        belief, total = one.belief, total + one.loglik
    equal(belief.mean, both.belief.mean)
    equal(belief.cov, both.belief.cov)
    equal(total, both.loglik)
    assert belief.steps.tolist() == [1] * 4
    v = y - model.d - before.mean @ model.C.mT
    S = model.C @ before.cov @ model.C.mT + model.R
    equal(both.innovation, v)
    equal(both.innovation_cov, S)
    equal(both.distance, (v[:, None] @ torch.linalg.inv(S) @ v[..., None])[:, 0, 0])


def test_every_observation_is_weighed_against_every_track():
    model = build(terms(3, 2))
    tracks, y = model.predict(model.init_state(3)), observations(5, 2, missing=0.0)
    y[1, 0] = NAN
    found = model.innovation(tracks, y[:, None].expand(-1, 3, -1))
    assert found.distance.shape == (5, 3) and found.cov.shape == (5, 3, 2, 2)
    for i in range(5):
        one = model.update(tracks, y[i].expand(3, -1))
        equal(found.distance[i], one.distance)
        equal(found.loglik[i], one.loglik)
    rows = take(tracks, [2, 0])
    equal(model.innovation(rows, y[:2]).distance, torch.stack([found.distance[0, 2], found.distance[1, 0]]))


def test_one_transition_may_have_its_own_matrices():
    model = build(terms(2, 1))
    belief = model.init_state(2)
    A, Q = normal(2, 2, 2, seed=1), torch.eye(2, dtype=torch.float64)
    got = model.predict(belief, A=A, Q=Q, c=[0.0, 1.0])
    equal(got.mean, (A @ belief.mean[..., None])[..., 0] + torch.tensor([0.0, 1.0], dtype=torch.float64))
    equal(got.cov, A @ belief.cov @ A.mT + Q)
    plain = model.predict(Gaussian(belief.mean, belief.cov))
    equal(plain.mean, model.predict(belief).mean)


def test_a_first_prior_is_not_moved_before_the_first_observation():
    model = build(terms(2, 1), prior="first")
    start, y = model.init_state(1), observations(1, 3, 1, missing=0.0)
    out, last = model.forward(y)
    belief = model.update(start, y[:, 0]).belief  # with or without the transition that is none
    equal(belief.mean, out.mean[:, 0])
    equal(model.update(model.predict(start), y[:, 0]).belief.mean, out.mean[:, 0])
    for t in (1, 2):
        belief = model.update(model.predict(belief), y[:, t]).belief
    equal(belief.cov, last.cov)
    assert belief.steps.tolist() == last.steps.tolist() == [3]
    after = model.forward(y[:, 1:], Gaussian(out.mean[:, 0], out.cov[:, 0]))[0]
    equal(after.mean, out.mean[:, 1:])


def test_a_model_is_a_module_whose_parameters_train():
    log_q = nn.Parameter(torch.zeros(1, 1, dtype=torch.float64))
    model = df.LinearGaussian(
        [[1.0]], nn.Parameter(torch.ones(1, 1, dtype=torch.float64)), log_q.exp(), [[1.0]], P0=1.0
    )
    assert [name for name, _ in model.named_parameters()] == ["C"]
    model.log_likelihood([1.0, 2.0, None, 1.5]).backward()
    assert log_q.grad.isfinite().all() and model.C.grad.isfinite().all()
    kalman = df.KalmanFilter(model)
    assert dict(kalman.named_parameters()).keys() == {"model.C"} and set(model.state_dict()) >= {"A", "C", "Q", "R"}
    with pytest.raises(ArgumentError, match=r"the parameter A is torch\.float32, but others are torch\.float64"):
        df.LinearGaussian(nn.Parameter(torch.ones(1, 1)), [[1.0]], torch.ones(1, 1).double(), [[1.0]], P0=1.0)


class Variance(nn.Module):
    def forward(self, x):
        return x.exp()

    def right_inverse(self, x):
        return x.log()


def test_constraints_are_parametrisations():
    model = df.LinearGaussian([[1.0]], [[1.0]], nn.Parameter(torch.full((1, 1), 2.0)), torch.ones(1, 1), P0=1.0)
    nn.utils.parametrize.register_parametrization(model, "Q", Variance())
    torch.testing.assert_close(model.Q, torch.full((1, 1), 2.0))
    model.log_likelihood(torch.tensor([1.0, 3.0, 2.0])).backward()
    assert model.parametrizations.Q.original.grad.item() != 0


def test_gradients_of_first_and_second_order_with_missing_data():
    y = observations(4, 2, missing=0.0)
    y[1, 0] = y[2] = NAN

    def run(parallel, A, C, q, r, p, c):
        eye = torch.eye(2, dtype=torch.float64)
        model = df.LinearGaussian(A, C, q @ q.mT, r @ r.mT + eye, P0=p @ p.mT + eye, c=c)
        return df.KalmanFilter(model, parallel=parallel).log_likelihood(y)

    args = [normal(*s, seed=i).requires_grad_() for i, s in enumerate([(2, 2), (2, 2), (2, 1), (2, 2), (2, 1), (2,)])]
    for parallel in FORMS:
        assert torch.autograd.gradcheck(lambda *a, p=parallel: run(p, *a), args)
        assert torch.autograd.gradgradcheck(lambda *a, p=parallel: run(p, *a), args)


def test_gradients_of_the_smoother_with_singular_noise():
    y = observations(3, 1, missing=0.0)
    y[1] = NAN

    def run(A, q, p):
        eye = torch.eye(2, dtype=torch.float64)
        S = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
        model = df.LinearGaussian(A, eye[:1], q @ q.mT, eye[:1, :1], P0=p @ p.mT + eye, S=S)
        return model.smooth(y)[:3]

    args = [normal(*s, seed=i).requires_grad_() for i, s in enumerate([(2, 2), (1, 1), (2, 2)])]
    assert torch.autograd.gradcheck(run, args)


@pytest.mark.parametrize("parallel", FORMS)
def test_covariances_of_the_smoother_are_symmetric_and_positive_in_float32(parallel):
    model = build({k: v.float() for k, v in terms(4, 1, 1).items()})
    y = observations(400, 1, missing=0.1).float()
    smooth = df.KalmanFilter(model, parallel=parallel).smooth(y)
    assert smooth.cov.dtype == torch.float32 and torch.equal(smooth.cov, smooth.cov.mT)
    assert torch.linalg.eigvalsh(smooth.cov.double()).min() > -1e-6 * smooth.cov.max()
    want = build(terms(4, 1, 1)).smooth(y.double())
    close(smooth.cov, want.cov, 1e-4)
    close(smooth.mean, want.mean, 1e-4)


def test_the_smoother_keeps_its_digits_with_very_sharp_observations():
    """An integrated random walk that is seen nearly exactly; without any noise, its positions are the data."""
    one = torch.eye(2, dtype=torch.float64)
    y = observations(12, 1, missing=0.2, seed=4)
    means = []
    for noise in (1e-11, 0.0):
        model = df.LinearGaussian(
            [[1.0, 1.0], [0.0, 1.0]], one[:1], [[1.0]], [[noise]], P0=10 * one, S=[[0.0], [1.0]], prior="first"
        )
        means.append(df.KalmanFilter(model, parallel=False).smooth(y))
    equal(means[0].mean, means[1].mean)
    equal(means[0].cov, means[1].cov)
    seen = ~y[:, 0].isnan()
    equal(means[1].mean[seen, 0], y[seen, 0], 1e-12)
    assert means[1].cov[seen, 0, 0].abs().max() < 1e-12


def test_a_program_is_compiled_whole():
    kalman, y = df.KalmanFilter(build(terms(2, 1, 1), prior="first"), parallel=True), observations(2, 2, 1)
    run = torch.compile(lambda y: kalman.smooth(y).mean, fullgraph=True, backend="eager")
    equal(run(y), kalman.smooth(y).mean)


def test_a_belief_is_saved_as_data(tmp_path):
    model = build(terms(2, 1, 1), diffuse=[True, False])
    _, belief = model.forward(observations(2, 1, 1, missing=0.0))
    torch.save(belief, tmp_path / "belief.pt")
    equal(torch.load(tmp_path / "belief.pt", weights_only=True), belief)


def test_units_do_not_choose_the_form():
    """A level in millimetres and a slope in kilometres: the scan runs, and its results are those of other units."""
    scale = torch.diag(torch.tensor([1e6, 1e-6], dtype=torch.float64))
    A, eye = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    y = observations(80, 1)
    plain = df.LinearGaussian(A, eye[:1], 0.1 * eye, [[1.0]], P0=eye)
    other = df.LinearGaussian(
        scale @ A @ scale.inverse(), eye[:1] @ scale.inverse(), 0.1 * scale**2, [[1.0]], P0=scale**2
    )
    for parallel in FORMS:
        got, want = (df.KalmanFilter(model, parallel=parallel).smooth(y) for model in (other, plain))
        assert got.form == ("parallel" if parallel else "sequential")
        equal(scale.inverse() @ got.cov @ scale.inverse(), want.cov)


@pytest.mark.parametrize("parallel", FORMS)
@pytest.mark.parametrize("ma", [0.5, 3.0])
def test_the_smoother_is_stable_where_all_noise_is_observed(ma, parallel):
    """A moving average that is not invertible: given a state and the data, errors of the later states would grow."""
    S, start = torch.tensor([[1.0], [ma]], dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    S.requires_grad_()
    model = df.LinearGaussian([[0.0, 1.0], [0.0, 0.0]], [[1.0, 0.0]], [[1.0]], [[0.0]], P0=start, S=S)
    y, _ = model.sample(60, generator=torch.Generator().manual_seed(0))
    y[0, 30:33] = NAN
    smooth = df.KalmanFilter(model, parallel=parallel).smooth(y[0])
    mean, cov, _ = posterior(model, y[0])
    equal(smooth.mean, mean[1:])
    equal(smooth.cov, torch.stack([cov[t, t] for t in range(1, 61)]))
    equal(smooth.lag_one_cov, torch.stack([cov[t, t - 1] for t in range(1, 61)]))
    gradients = [torch.autograd.grad(z.sin().sum(), S, retain_graph=True)[0] for z in (smooth.mean, mean[1:])]
    equal(*gradients, 1e-6)
    paths = model.simulate_posterior(y[0], 4000, generator=torch.Generator().manual_seed(1))
    scale = smooth.cov.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    assert ((paths.mean(0) - smooth.mean).abs() < 5 * scale / 60 + 1e-6).all()
    assert ((paths.std(0) - scale).abs() < 0.07 * scale + 1e-6).all()


def test_what_comes_out_fits_what_went_in():
    model, y = build(terms(2, 1)), observations(6, 1)
    want = model.smooth(y)
    out = model.smooth(y.numpy())
    assert all(isinstance(value, np.ndarray) for value in out[:3]) and isinstance(out.log_likelihood, float)
    np.testing.assert_array_equal(out.mean, want.mean)
    ahead = model.forecast(np.ma.masked_invalid(y.numpy()), 3)
    np.testing.assert_allclose(ahead.mean, model.forecast(y, 3).mean)
    assert isinstance(model.simulate_posterior(y.numpy(), 2), np.ndarray)
    trained = build({k: v.requires_grad_() for k, v in terms(2, 1).items()})
    assert trained.smooth(y.numpy()).mean.requires_grad and model.log_likelihood(y.numpy()).requires_grad is False


def test_tables_of_pandas_keep_their_index():
    pd = pytest.importorskip("pandas")
    model, y = build(terms(2, 2)), observations(6, 2)
    index = pd.date_range("2024-01-01", periods=6, freq="MS")
    out = model.filter(pd.DataFrame(y.numpy(), index=index))
    assert out.mean.index.equals(index) and out.mean.shape == (6, 2) and out.cov.shape == (6, 2, 2)
    np.testing.assert_array_equal(out.mean.to_numpy(), model.filter(y).mean)
    assert isinstance(model.forecast(pd.DataFrame(y.numpy(), index=index), 6).mean, np.ndarray)  # of other times
    line = build(terms(2, 1))
    series = pd.Series([1, None, 3], dtype="Int64")
    got = line.smooth(series)
    np.testing.assert_allclose(got.mean.to_numpy(), line.smooth([1.0, NAN, 3.0]).mean)
    with pytest.raises(ArgumentError, match="y is not a numeric table"):
        line.smooth(pd.Series(["a", "b"]))


def wrong(**more):
    return df.LinearGaussian(**{**terms(2, 1), **more})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wrong(seasonal=3), r"LinearGaussian: unknown keyword 'seasonal'\n.*known: A, C, Q"),
        (lambda: wrong(prior="last"), r"prior is 'last'\n.*known: before, first"),
        (lambda: wrong(P0="vague"), r"P0 is 'vague'\n.*stationary, diffuse"),
        (lambda: wrong(P0=None), "P0 is None, expected a covariance, a number, 'stationary' or 'diffuse'"),
        (lambda: wrong(time_varying=["P0"]), r"time_varying names 'P0'"),
        (lambda: wrong(time_varying=["A"]), r"A has shape \(2, 2\), expected \(T, N, N\)"),
        (lambda: wrong(c=[1.0, 2.0, 3.0]), r"c has shape \(3,\), expected \(N,\).*N is 3, not 2 as in A"),
        (lambda: wrong(C=normal(3, 1, 2), R=torch.eye(1).expand(4, 1, 1)), "batch axes that do not fit.*\n.*time_vary"),
        (lambda: wrong(S=normal(2, 3)), r"S has shape \(2, 3\), expected \(N, K\).*K is 3, not 2 as in Q"),
        (lambda: wrong(P0=-1.0), "P0 is not a covariance: it has the negative eigenvalue -1"),
        (lambda: wrong(diffuse=[True]), r"diffuse has shape \(1,\), expected True or False for each of 2 states"),
        (lambda: wrong(convention="jags"), "convention is 'jags'"),
        (lambda: build(terms(2, 1)).forecast([1.0], 0), "forecast: horizon is 0, expected 1 or more steps"),
        (lambda: build(terms(2, 1)).log_likelihood([1.0], burn=-1), "burn is -1"),
        (lambda: build(terms(2, 1)).filter([1.0], u=[[1.0]]), "filter: inputs u, but the model has no B and no D"),
        (lambda: build(terms(2, 1, inputs=1)).filter([1.0]), "filter: no inputs u, but the model has B or D"),
        (
            lambda: build(terms(2, 1, inputs=1)).filter([1.0, 2.0], u=[[1.0]]),
            r"u has shape \(1, 1\), expected .*2 or more",
        ),
        (
            lambda: build(terms(2, 1, inputs=1)).forecast([1.0], 2, u=[[1.0], [1.0]]),
            "forecast: u has 2 steps, expected 3: of 1 observations and 2 to come",
        ),
        (lambda: build(terms(2, 1, inputs=1)).filter([1.0], u=[[NAN]]), "u has values that are not finite"),
        (
            lambda: build(terms(2, 1, steps=2), 2).forecast([1.0], 2),
            "forecast: A varies in time and has 2 steps, but step 3 is needed",
        ),
        (
            lambda: build(terms(2, 1)).filter(observations(2, 3, 1), lengths=[3]),
            r"lengths are .* \(1,\), expected .*\(2,\)",
        ),
        (
            lambda: build(terms(2, 1)).filter(observations(2, 3, 1), lengths=[3, 4]),
            r"lengths\[1\] is 4, expected 0 to 3",
        ),
        (
            lambda: build(terms(2, 1, batch=(3,))).filter(observations(2, 5, 1)),
            r"y has shape \(2, 5, 1\), with.*\(3,\)",
        ),
        (lambda: build(terms(2, 1, batch=(3,))).forward(observations(2, 5, 1)), r"2 rows of a model with.*\(3,\)"),
        (lambda: build(terms(2, 1)).predict(build(terms(2, 1)).init_state(1), H=1), "predict: unknown keyword 'H'"),
        (
            lambda: build(terms(2, 1)).update(build(terms(2, 1)).init_state(1), [[1.0, 2.0]]),
            r"update: y has shape \(1, 2\), expected \(1, 1\)",
        ),
        (
            lambda: build(terms(2, 1)).update(torch.zeros(1, 1), build(terms(2, 1)).init_state(1)),
            r"update: belief is Tensor, expected a Belief or a Gaussian\n.*belief, y",
        ),
    ],
)
def test_bad_input_is_explained(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()


def test_an_exact_observation_of_a_known_state_is_refused_at_its_time():
    one = [[1.0]]
    model = df.LinearGaussian(one, one, [[0.0]], [[0.0]], P0=1.0)
    with pytest.raises(ArgumentError, match="not positive definite at row 0, time 1"):
        df.KalmanFilter(model, parallel=False).filter([1.0, 1.0])
    assert math.isfinite(df.KalmanFilter(model, parallel=False).log_likelihood([1.0, None]))
