"""Continuous time: exact noise of an interval, observations at any times, models of motion."""

import math

import numpy as np
import pytest
import torch

import dualform as df
from dualform.core.discretize import discretize_noise
from dualform.core.errors import ArgumentError
from dualform.core.linalg import matrix_exp
from dualform.gaussian import ContinuousLinearGaussian, constant_acceleration, constant_velocity, coordinated_turn
from dualform.gaussian.continuous import Interval
from gaussians import NAN, normal, observations


def equal(got, want, tolerance=1e-9):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def model(n=3, m=1, inputs=0, **more):
    """A random stable model with singular noise."""
    A, s = normal(n, n, seed=1), normal(n, 1, seed=2)
    given = {"A": A - 3 * torch.eye(n, dtype=A.dtype), "C": normal(m, n, seed=3), "Q": [[0.7]], "S": s}
    given |= {"R": 0.2 * torch.eye(m, dtype=A.dtype), "c": normal(n, seed=4), "P0": torch.eye(n, dtype=A.dtype)}
    if inputs:
        given |= {"B": normal(n, inputs, seed=5), "D": normal(m, inputs, seed=6)}
    return ContinuousLinearGaussian(**{**given, **more})


TIMES = torch.tensor([0.0, 0.3, 0.3, 2.0, 2.1, 7.5], dtype=torch.float64)


@pytest.mark.parametrize("dt", [1e-3, 0.4, 3.0])
def test_the_noise_of_an_interval_is_its_integral(dt):
    A, s = normal(3, 3, seed=1), normal(3, 2, seed=2)
    Q = s @ s.mT
    pieces = 2_000
    at = (torch.arange(pieces, dtype=torch.float64) + 0.5)[:, None, None] * dt / pieces
    offsets = torch.tensor([-1, 1], dtype=torch.float64)[:, None, None, None] * dt / pieces / (2 * math.sqrt(3))
    moved = matrix_exp(A * (at + offsets).flatten(0, 1))  # Gauss's rule of two points on each piece
    want = (moved @ Q @ moved.mT).sum(0) * dt / pieces / 2
    Abar, Qbar = discretize_noise(A, Q, torch.tensor(dt, dtype=torch.float64))
    torch.testing.assert_close(Abar, matrix_exp(A * dt), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(Qbar, want, rtol=1e-11, atol=1e-14)
    assert torch.equal(Qbar, Qbar.mT)


def test_long_and_empty_intervals_are_exact():
    """A Van Loan block of a long interval overflows; the noise is that of the stationary state there."""
    rate, dt = torch.tensor([[-2.0]], dtype=torch.float64), torch.tensor([0.0, 1e-9, 0.1, 1e4], dtype=torch.float64)
    Abar, Qbar = discretize_noise(rate, torch.tensor([[3.0]], dtype=torch.float64), dt)
    torch.testing.assert_close(Abar[:, 0, 0], (-2 * dt).exp(), rtol=1e-13, atol=0)
    torch.testing.assert_close(Qbar[:, 0, 0], -3 / 4 * torch.expm1(-4 * dt), rtol=1e-12, atol=0)


def test_gradients_of_the_noise_of_an_interval():
    args = [normal(2, 2, seed=1), normal(2, 1, seed=2), torch.tensor([0.3, 2.0], dtype=torch.float64)]
    args = [value.requires_grad_() for value in args]
    assert torch.autograd.gradcheck(lambda A, s, dt: discretize_noise(A, s @ s.mT, dt), args)
    assert torch.autograd.gradgradcheck(lambda A, s, dt: discretize_noise(A, s @ s.mT, dt), args)


@pytest.mark.parametrize("prior", ["first", "before"])
def test_a_state_between_observations_changes_nothing(prior):
    """Times at which nothing is observed split intervals; the states in between are interpolated."""
    continuous, y, u = model(inputs=2, prior=prior), observations(6, 1, missing=0.2), normal(6, 2, seed=9)
    start = None if prior == "first" else -0.5
    want = continuous.smooth(y, TIMES, u=u, start=start)
    between = (TIMES[1:] + TIMES[:-1]) / 2
    order = torch.cat([TIMES, between]).argsort(stable=True)
    times = torch.cat([TIMES, between])[order]
    more = torch.cat([y, y.new_full((5, 1), NAN)])[order]
    held = torch.cat([u, u[1:]])[order]
    got = continuous.smooth(more, times, u=held, start=start)
    kept = order < 6
    equal(got.mean[kept], want.mean)
    equal(got.cov[kept], want.cov)
    equal(got.log_likelihood, want.log_likelihood)


def test_regular_times_are_a_discrete_model():
    continuous, y = model(), observations(5, 1)
    step = continuous.over(0.25)
    assert isinstance(step, Interval)
    discrete = df.LinearGaussian(step.A, continuous.C, step.Q, continuous.R, P0=continuous.P0, c=step.c, prior="first")
    times = 3 + 0.25 * torch.arange(5, dtype=torch.float64)
    equal(continuous.filter(y, times).cov, discrete.filter(y).cov)
    equal(continuous.log_likelihood(y, times.tolist()), discrete.log_likelihood(y))
    ahead = continuous.forecast(y, times, times[-1] + torch.tensor([0.25, 0.5], dtype=torch.float64))
    equal(ahead.mean, discrete.forecast(y, 2).mean)
    equal(ahead.cov, discrete.forecast(y, 2).cov)


def test_one_observation_after_the_other_equals_the_whole():
    continuous, y, u = model(inputs=1), observations(2, 6, 1, missing=0.2), normal(2, 6, 1, seed=7)
    times = torch.stack([TIMES, 2 * TIMES])
    out, belief = continuous.filter(y, times, u=u), continuous.init_state(2)
    for t in range(6):
        if t:
            belief = continuous.predict(belief, times[:, t] - times[:, t - 1], u=u[:, t])
        found = continuous.update(belief, y[:, t], u=u[:, t])
        equal(continuous.innovation(belief, y[:, t], u=u[:, t]).distance, found.distance)
        belief = found.belief
        equal(belief.mean, out.mean[:, t])
        equal(belief.cov, out.cov[:, t])
        equal(found.loglik, out.loglik[:, t])


def test_what_is_seen_may_differ_from_time_to_time():
    C, y = normal(6, 1, 3, seed=8), observations(6, 1)
    continuous = model(C=C, time_varying=["C"])
    out, belief = continuous.filter(y, TIMES), continuous.init_state(1)
    plain = model()
    for t in range(6):
        belief = belief if t == 0 else plain.predict(belief, TIMES[t] - TIMES[t - 1])
        belief = plain.update(belief, y[t : t + 1], C=C[t]).belief
        equal(belief.cov[0], out.cov[t])


def test_ragged_series_have_their_own_times():
    continuous, y = model(), observations(2, 6, 1)
    times = torch.stack([TIMES, TIMES + 1])
    times[1, 4:] = NAN
    out = continuous.smooth(y, times, lengths=[6, 4])
    equal(out.mean[0], continuous.smooth(y[0], TIMES).mean)
    equal(out.cov[1, :4], continuous.smooth(y[1, :4], TIMES[:4]).cov)
    draws = continuous.simulate_posterior(y, times, 3, lengths=[6, 4], generator=torch.Generator().manual_seed(0))
    assert draws.shape == (3, 2, 6, 3) and draws[:, 1, 4:].isnan().all() and draws[:, 1, :4].isfinite().all()


def test_a_stationary_start_in_continuous_time():
    """Ornstein and Uhlenbeck's process has the variance q / (2 rate) at every time."""
    process = ContinuousLinearGaussian([[-0.4]], [[1.0]], [[2.0]], [[0.1]], P0="stationary", c=[0.8])
    out = process.filter([None, None, None], [0.0, 0.1, 50.0])
    equal(out.cov.flatten(), torch.full((3,), 2.5, dtype=torch.float64))
    equal(out.mean.flatten(), torch.full((3,), 2.0, dtype=torch.float64))
    y, h = process.sample([0.0, 0.1, 50.0], 20_000, generator=torch.Generator().manual_seed(0))
    assert y.shape == h.shape == (20_000, 3, 1)
    assert abs(torch.corrcoef(h[..., 0].mT)[0, 1] - math.exp(-0.04)) < 0.01


def test_gradients_by_times_and_rates():
    y = observations(3, 1, missing=0.0)

    def run(rate, times):
        process = ContinuousLinearGaussian(-rate.exp(), [[1.0]], [[2.0]], [[0.1]], P0="stationary")
        return process.log_likelihood(y, times.cumsum(0))

    args = [torch.tensor(value, dtype=torch.float64).requires_grad_() for value in ([[-0.5]], [0.0, 0.5, 1.0])]
    assert torch.autograd.gradcheck(run, args)


def test_motion_has_its_textbook_matrices():
    q, dt = 0.7, 1.5
    step = constant_velocity(q, 1.0, dims=1).over(dt)
    equal(step.A, torch.tensor([[1.0, dt], [0.0, 1.0]], dtype=torch.float64))
    equal(step.Q, q * torch.tensor([[dt**3 / 3, dt**2 / 2], [dt**2 / 2, dt]], dtype=torch.float64))
    step = constant_acceleration(q, 1.0, dims=1).over(dt)
    want = [[dt**5 / 20, dt**4 / 8, dt**3 / 6], [dt**4 / 8, dt**3 / 3, dt**2 / 2], [dt**3 / 6, dt**2 / 2, dt]]
    equal(step.Q, q * torch.tensor(want, dtype=torch.float64))
    plane = constant_velocity(q, 1.0)
    equal(plane.over(dt).Q[0::2, 0::2], constant_velocity(q, 1.0, dims=1).over(dt).Q)
    assert plane.C.tolist() == [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]
    w = 0.6
    s, c = math.sin(w * dt), math.cos(w * dt)
    turn = [[1, 0, s / w, -(1 - c) / w], [0, 1, (1 - c) / w, s / w], [0, 0, c, -s], [0, 0, s, c]]
    equal(coordinated_turn(w, q, 1.0).over(dt).A, torch.tensor(turn, dtype=torch.float64))
    equal(coordinated_turn(0.0, q, 1.0).over(dt).Q, plane.over(dt).Q)


def test_tracks_of_several_turns_are_one_batch():
    rates = torch.tensor([-0.5, 0.0, 0.5], dtype=torch.float64)
    turns = coordinated_turn(rates, 0.01, 0.01)
    angle = 0.5 * torch.arange(30, dtype=torch.float64) / 5
    path = torch.stack([angle.sin(), 1 - angle.cos()], -1)  # a turn to the left, of unit speed
    likely = turns.log_likelihood(path, torch.arange(30) / 5)
    assert likely.shape == (3,) and likely.argmax() == 2
    belief = turns.init_state(3)
    belief = turns.update(belief, path[:1].expand(3, -1)).belief
    equal(belief.mean[:, :2], path[:1].expand(3, -1))  # an unknown start is where it is first seen
    belief = turns.update(turns.predict(belief, 0.2), path[1:2].expand(3, -1)).belief
    assert not belief.diffuse.any() and belief.mean.isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: model().filter([1.0, 2.0], [1.0, 0.5]), r"filter: times\[1\] is 0\.5, earlier than the one before, 1"),
        (lambda: model().filter([1.0, 2.0], [0.0, NAN]), r"times has values that are not finite: nan at 1"),
        (lambda: model(prior="before").filter([1.0], [1.0]), "start is None, expected the time of the prior"),
        (lambda: model(prior="before").filter([1.0], [1.0], start=2), r"times\[0\] is 1, earlier than the start, 2"),
        (lambda: model().filter([1.0], [1.0], start=0.0), "start is 0.0, expected none with prior='first'"),
        (lambda: model().filter([1.0], 1.0), "times is one number"),
        (lambda: model().filter([1.0], np.array(["2020-01-01"], "M8[D]")), r"times are dates.*\n.*timedelta64"),
        (lambda: model().filter([1.0, 2.0, 3.0], [1.0, 2.0]), "filter: there are 2 times, but 3 observations"),
        (lambda: model().over(-1.0), "over: dt is -1, expected 0 or more"),
        (
            lambda: model(time_varying="A", A=torch.zeros(4, 3, 3).double()),
            "A varies in time, expected only C, R, d and D",
        ),
        (
            lambda: df.KalmanFilter(model()),
            r"model is ContinuousLinearGaussian, expected a LinearGaussian\n.*at\(times\)",
        ),
        (lambda: model().predict(model().init_state(1), 0.1, u=torch.ones(1, 1)), "inputs u and B travel together"),
        (lambda: constant_velocity(1.0, 1.0, dims=0), "constant_velocity: dims is 0"),
        (lambda: constant_velocity(-1.0, 1.0), "Q is not a covariance"),
        (
            lambda: ContinuousLinearGaussian([[0.1]], [[1.0]], [[2.0]], [[0.1]], P0="stationary").init_state(1),
            r"is not stationary: exp\(A dt\) has an eigenvalue of absolute value 2\.7",
        ),
    ],
)
def test_bad_input_is_explained(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()
