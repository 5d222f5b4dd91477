"""Nonlinear Gaussian models: golden vectors, the Kalman filter on linear functions, and the most probable path."""

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn

import dualform as df
import gaussians
import vectors
from dualform.core.errors import ArgumentError
from dualform.core.laws import LAWS, Trial
from dualform.core.linalg import matvec, symmetric_part
from dualform.gaussian import Cubature, Extended, Iterated, Unscented
from dualform.gaussian.belief import Belief, Gaussian

METHODS = {
    "ekf": "ekf",
    "iterated": "iterated",
    "ukf": "ukf",
    "spread": Unscented(alpha=0.5, beta=2.0, kappa=1.0),  # its first weight is negative
    "cubature": "cubature",
}
FEW = METHODS | {"iterated": Iterated(iterations=3)}  # the laws and derivatives hold for any number
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def equal(got, want, tolerance=1e-9):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, equal_nan=True)


def rows(size, *, times=1.0):
    return times * torch.eye(size, dtype=torch.float64)


def swing(x, dt=0.05, g=9.8):
    return torch.stack([x[0] + x[1] * dt, x[1] - g * torch.sin(x[0]) * dt])


def pendulum(method="ekf", **more):
    noise = {"Q": 0.5 * torch.tensor([[0.05**3 / 3, 0.05**2 / 2], [0.05**2 / 2, 0.05]]), "R": [[0.1]]}
    noise = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in noise.items()}
    return df.NonlinearGaussian(
        swing, lambda x: torch.sin(x[:1]), P0=0.2, m0=[1.0, 0.0], method=method, **noise, **more
    )


@pytest.mark.parametrize(
    "name, method",
    [
        ("ekf_pendulum", "ekf"),
        ("ukf_pendulum_0", Unscented(alpha=3**0.5, beta=2.0, kappa=1.0)),
        ("ukf_pendulum_1", Unscented(alpha=0.8, beta=2.0, kappa=1.0)),
    ],
)
def test_golden(name, method):
    g = vectors.load(name)
    model = df.NonlinearGaussian(
        swing, lambda x: torch.sin(x[:1]), g["Q"], g["R"], g["m0"], g["P0"], method=method, prior="first"
    )
    found, smooth = model.filter(g["y"]), model.smooth(g["y"])
    got = {
        "filtered_mean": found.mean,
        "filtered_cov": found.cov,
        "predicted_mean": found.predicted_mean[1:],
        "predicted_cov": found.predicted_cov[1:],
        "smoothed_mean": smooth.mean,
        "smoothed_cov": smooth.cov,
        "loglik": model.log_likelihood(g["y"])[None],
    }
    assert set(g) - {"y", "m0", "P0", "Q", "R"} == set(got)
    for key, value in got.items():
        vectors.close(value, g[key], 1e-6, f"{name}: {key}")


def test_all_golden_cases_are_here():
    assert vectors.names("ekf") == ["ekf_pendulum"]
    assert vectors.names("ukf") == ["ukf_pendulum_0", "ukf_pendulum_1"]


def twins(method, *, prior="before", inputs=2, steps=None, seed=0, **changed):
    """A linear model, and the same one as two functions."""
    given = gaussians.terms(3, 2, inputs=inputs, steps=steps, seed=seed) | changed
    linear = gaussians.build(given, steps, prior=prior)

    def at(name, t):
        return given[name] if steps is None else given[name][t.long()]

    def f(x, u, t):
        return matvec(at("A", t), x) + at("c", t) + matvec(at("B", t), u)

    def h(x, t, u):
        return matvec(at("C", t), x) + at("d", t) + matvec(at("D", t), u)

    if steps is None:  # noise that varies in time is not taken
        S = given["S"]
        noise = {"Q": S @ given["Q"] @ S.mT, "R": given["R"]}
        start = {"m0": given["m0"], "P0": given["P0"]}
        return linear, df.NonlinearGaussian(f, h, **noise, **start, method=method, prior=prior)
    return f, h


@every_method
@pytest.mark.parametrize("prior", ["before", "first"])
def test_linear_functions_are_filtered_by_the_kalman_filter(method, prior):
    linear, model = twins(method, prior=prior)
    y, u = gaussians.observations(2, 2, 7, 2), gaussians.normal(2, 2, 9, 2, seed=3)
    lengths = torch.tensor([[7, 4], [0, 6]])
    for options in ({}, {"lengths": lengths}):
        for name in ("filter", "smooth", "innovations"):
            want = getattr(linear, name)(y, u=u, **options)
            for part, value in getattr(model, name)(y, u=u, **options)._asdict().items():
                if part == "diffuse" or part == "predicted_diffuse":
                    assert value.shape[-1] == 0
                elif isinstance(value, torch.Tensor):
                    equal(value, getattr(want, part))
        equal(model.log_likelihood(y, u=u, **options), linear.log_likelihood(y, u=u, **options))
        for got, want in zip(model.forecast(y, 2, u=u, **options), linear.forecast(y, 2, u=u, **options), strict=True):
            equal(got, want)
    assert model.filter(y, u=u).convention == "proper"


@every_method
def test_a_step_in_halves(method):
    """Transitions, observations with the model's noise, another noise, and another sensor."""
    linear, model = twins(method)
    y, u = gaussians.observations(3, 4, 2), gaussians.normal(3, 4, 2, seed=3)
    now, other = linear.init_state(3), model.init_state(3)
    C, R, Q = gaussians.normal(1, 3, seed=5), rows(1, times=0.3), rows(3, times=0.2)
    for t in range(4):
        extra = {"Q": Q} if t == 2 else {}
        now, other = linear.predict(now, u=u[:, t], **extra), model.predict(other, u=u[:, t], **extra)
        equal(other.cov, now.cov)
        gate, want = (z.innovation(b, y[:, t], u=u[:, t]) for z, b in ((model, other), (linear, now)))
        equal(gate.distance, want.distance)
        more = {"R": rows(2, times=0.7)} if t == 1 else {}
        a, b = linear.update(now, y[:, t], u=u[:, t], **more), model.update(other, y[:, t], u=u[:, t], **more)
        for got, want in zip(b, a, strict=True):
            for x, z in zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]:
                equal(x, z)
        now = linear.update(a.belief, y[:, t, :1], C=C, R=R).belief
        other = model.update(b.belief, y[:, t, :1], C=C, R=R).belief
        equal(other.mean, now.mean)
    assert torch.equal(now.steps, other.steps)


@every_method
def test_time_reaches_the_functions(method):
    f, h = twins(method, steps=6)
    given = gaussians.terms(3, 2, inputs=2, steps=6)
    noise = {"Q": rows(3), "R": rows(2), "m0": given["m0"], "P0": given["P0"]}
    varying = {name: given[name] for name in ("A", "C", "c", "d", "B", "D")}
    linear = df.LinearGaussian(**noise, **varying, time_varying=tuple(varying))
    model = df.NonlinearGaussian(f, h, **noise, method=method)
    y, u = gaussians.observations(5, 2), gaussians.normal(6, 2, seed=3)
    equal(model.smooth(y, u=u).mean, linear.smooth(y, u=u).mean)
    equal(model.filter(y, u=u).predicted_mean, linear.filter(y, u=u).predicted_mean)
    equal(model.forecast(y, 1, u=u).cov, linear.forecast(y, 1, u=u).cov)


@every_method
def test_states_that_are_known(method):
    """Singular P0 and Q: a direction without a width has no points apart from the mean."""
    root = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.5, 1.0]], dtype=torch.float64)
    P0 = root[:, :1] @ root[:, :1].mT
    linear, model = twins(method, P0=P0, Q=torch.zeros(3, 3, dtype=torch.float64))
    y, u = gaussians.observations(8, 2), gaussians.normal(8, 2, seed=3)
    equal(model.filter(y, u=u).cov, linear.filter(y, u=u).cov, 1e-8)
    equal(model.smooth(y, u=u).mean, linear.smooth(y, u=u).mean, 1e-8)
    equal(model.log_likelihood(y, u=u), linear.log_likelihood(y, u=u), 1e-8)


def recurrence(method):
    root = nn.Parameter(torch.tensor([[0.4, 0.0], [0.3, 0.2]], dtype=torch.float64))
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    return df.NonlinearGaussian(
        net,
        lambda x: torch.stack([x[0] * x[1], torch.sin(x[0]), x.sum()]),
        Q=root.detach() @ root.detach().mT,
        R=nn.Parameter(rows(3, times=0.5)),
        m0=nn.Parameter(torch.tensor([0.5, -0.2], dtype=torch.float64)),
        P0=nn.Parameter(rows(2)),
        method=method,
        prior="first",
    )


@pytest.mark.parametrize("method", FEW.values(), ids=FEW)
def test_the_laws_of_a_recurrence(method):
    torch.manual_seed(0)
    model = recurrence(method)
    x = gaussians.observations(3, 7, 3, missing=0.2)

    def symmetric(gradient: Belief) -> Belief:
        return gradient._replace(cov=symmetric_part(gradient.cov))

    trial = Trial(model, x, warmup=2, seed=0, tangent=symmetric)
    found = {name: law(trial) for name, law in LAWS.items()}
    broken = {name: worst for name, worst in found.items() if worst is not None and not worst.error <= 1e-9}
    assert not broken


@pytest.mark.parametrize("method", FEW.values(), ids=FEW)
def test_the_likelihood_has_gradients(method):
    y = gaussians.observations(1, 3, 2, missing=0.2)

    def loss(w, q, r, m0, p):
        def f(x):
            return torch.tanh(w @ x) + 0.1 * x

        model = df.NonlinearGaussian(
            f, lambda x: torch.stack([x[0] ** 2, x[1]]), q @ q.mT, r @ r.mT, m0, p @ p.mT, method=method
        )
        return model.log_likelihood(y), model.smooth(y[0]).mean

    inputs = [gaussians.normal(2, 2, seed=i) * 0.3 + rows(2) for i in range(3)]
    inputs += [gaussians.normal(2, seed=4), rows(2, times=0.8)]
    assert torch.autograd.gradcheck(loss, [z.requires_grad_() for z in inputs])


def cost(model, y, path):
    """Minus the log-density of a path of states ``(T + 1, N)`` and what is seen of it, but for constants."""

    def square(v, cov):
        return v @ torch.linalg.solve(cov, v) / 2

    total = square(path[0] - model.m0, model.P0)
    for t in range(len(y)):
        total = total + square(path[t + 1] - model.f(path[t]), model.Q)
        seen = ~y[t].isnan()
        v, R = (y[t] - model.h(path[t + 1]))[seen], model.R[seen][:, seen]
        total = total + square(v, R)
    return total


def test_the_iterated_update_finds_the_most_probable_state():
    model = pendulum(Iterated(iterations=50, tolerance=1e-9))
    before = model.predict(model.init_state(1))
    y = torch.tensor([[0.2]], dtype=torch.float64)
    found = model.update(before, y).belief

    def density(x):
        v, e = x - before.mean[0], y[0] - model.h(x)
        return v @ torch.linalg.solve(before.cov[0], v) / 2 + (e**2).sum() / model.R[0, 0] / 2

    slope = torch.func.grad(density)(found.mean[0])
    assert slope.abs().max() < 1e-7 < torch.func.grad(density)(before.mean[0]).abs().max()
    assert torch.func.grad(density)(pendulum("ekf").update(before, y).belief.mean[0]).abs().max() > 1e-3


def test_the_iterated_smoother_finds_the_most_probable_path():
    model, closely = pendulum("iterated"), Iterated(iterations=50, tolerance=1e-9)
    y, _ = model.sample(12, generator=torch.Generator().manual_seed(1))
    y = y[0].masked_fill(torch.arange(12)[:, None] % 5 == 3, torch.nan)

    def slope(method):
        model.method = method
        found = model.smooth(y)
        path = torch.cat([found.initial_mean[None], found.mean])
        return torch.func.grad(lambda path: cost(model, y, path))(path).abs().max()

    assert slope(closely) < 1e-6
    assert slope("iterated") < 1e-3
    assert slope(Extended()) > 1e-2
    assert model.method == Extended()


def test_a_step_that_would_overshoot_is_shortened():
    """Newton's method on the arc tangent leaves the root where it begins far from it; the update comes to the mode."""
    model = df.NonlinearGaussian(lambda x: x, lambda x: torch.atan(4 * x), [[0.0]], [[0.01]], [3.0], 10.0)
    model.method = Iterated(iterations=60, tolerance=1e-9)
    y = torch.tensor([[0.2], [1.2]], dtype=torch.float64)
    found = model.update(model.init_state(2), y).belief.mean

    def density(x, y):
        return ((y - model.h(x)) ** 2 / 0.02 + (x - 3.0) ** 2 / 20).sum()

    slopes = torch.func.vmap(torch.func.grad(density))(found, y)
    assert slopes.abs().max() < 1e-5
    grid = torch.linspace(-5, 5, 4001, dtype=torch.float64)[:, None]
    for x, seen in zip(found, y, strict=True):
        least = torch.func.vmap(lambda x, seen=seen: density(x, seen))(grid).min()
        assert density(x, seen) < least + 1e-3


def test_a_batch_is_smoothed_as_its_series():
    """Each takes as many steps as it needs; with a singular Q none is shortened."""
    model = pendulum("iterated")
    model.Q[0] = model.Q[:, 0] = 0
    y, _ = model.sample(8, 3, generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([8, 3, 5])
    found = model.smooth(y, lengths=lengths)
    for i, length in enumerate(lengths):
        one = model.smooth(y[i, :length])
        equal(found.mean[i, :length], one.mean)
        equal(found.cov[i, :length], one.cov)


def test_one_iteration_is_the_extended_filter():
    y, _ = pendulum().sample(5, generator=torch.Generator().manual_seed(1))
    once, plain = pendulum(Iterated(iterations=1)), pendulum("ekf")
    assert torch.equal(once.filter(y).cov, plain.filter(y).cov)
    assert torch.equal(once.smooth(y).mean, plain.smooth(y).mean)
    assert not torch.equal(pendulum("iterated").filter(y).mean, plain.filter(y).mean)


@pytest.mark.parametrize("method", [Unscented(), Unscented(alpha=0.7), Cubature()], ids=str)
def test_points_have_the_moments_of_polynomials(method):
    """The mean of a cubic is exact for all; and with beta = 2, the variance of the square of one state."""
    m, P = 0.3, 0.7
    f = df.NonlinearGaussian(lambda x: x**3 - 2 * x**2, lambda x: x**2, [[0.5]], [[0.2]], [m], P, method=method)
    belief = f.predict(f.init_state(1))
    equal(belief.mean, torch.tensor([[m**3 + 3 * m * P - 2 * (m**2 + P)]], dtype=torch.float64))
    start = Gaussian(torch.tensor([[m]], dtype=torch.float64), torch.tensor([[[P]]], dtype=torch.float64))
    seen = f.innovation(start, torch.zeros(1, 1, dtype=torch.float64))
    equal(-seen.innovation, torch.tensor([[m**2 + P]], dtype=torch.float64))
    if isinstance(method, Unscented):
        equal(seen.cov, torch.tensor([[[4 * m**2 * P + 2 * P**2 + 0.2]]], dtype=torch.float64))


def test_what_the_functions_hold_is_fitted():
    class Decay(nn.Module):
        def __init__(self, rate):
            super().__init__()
            self.rate = nn.Parameter(torch.tensor(rate, dtype=torch.float64))

        def forward(self, x):
            return self.rate * torch.sin(x)

    def model(rate):
        return df.NonlinearGaussian(Decay(rate), lambda x: x + x**3 / 10, [[0.2]], [[0.1]], P0=1.0, method="cubature")

    y, _ = model(0.8).sample(40, generator=torch.Generator().manual_seed(0))
    found = df.gaussian.fit(model(0.5), y[0])
    assert found.converged
    (row,) = re.findall(r"f\.rate +(\S+) +(\S+) +(\S+) +(\S+)", found.summary())
    _, _, low, high = map(float, row)
    assert low < 0.8 < high < low + 1


def test_samples_are_of_the_model():
    _, model = twins("ekf")
    u = gaussians.normal(3, 2, seed=3)
    y, h = model.sample(3, 20000, u=u, generator=torch.Generator().manual_seed(0))
    ahead = model.forecast(torch.zeros(0, 2, dtype=torch.float64), 3, u=u)
    spread = ahead.cov.diagonal(dim1=-2, dim2=-1).sqrt()
    assert ((y.mean(0) - ahead.mean).abs() < 5 * spread / 20000**0.5).all()
    assert torch.allclose(y.std(0), spread, rtol=0.03)
    assert h.shape == (20000, 3, 3)


def test_arrays_and_copies():
    model = pendulum("ukf")
    y, _ = model.sample(5, generator=torch.Generator().manual_seed(1))
    found = model.filter(y[0, :, 0].numpy())
    assert isinstance(found.mean, np.ndarray) and found.mean.shape == (5, 2)
    other = copy.deepcopy(recurrence("ukf"))
    assert {"f.0.weight", "Q", "R", "m0", "P0"} <= set(other.state_dict())
    assert "N=2, M=1, float64, cpu, method=Unscented(" in repr(model)
    assert model.filter(y[:, :0]).predicted_mean.shape == (1, 1, 2)
    assert model.float().filter(y.float()).mean.dtype == torch.float32


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: df.NonlinearGaussian(3, swing, rows(2), rows(2), P0=1.0), "f is 3, expected a function of the state"),
        (lambda: df.NonlinearGaussian(lambda x, z: x, swing, rows(2), rows(2), P0=1.0), r"f takes \(x, z\)"),
        (lambda: df.NonlinearGaussian(swing, swing, rows(2), rows(2)), "P0 is None, expected a covariance or a number"),
        (lambda: df.NonlinearGaussian(swing, swing, rows(2), rows(2), P0="diffuse"), "P0 is 'diffuse'"),
        (lambda: df.NonlinearGaussian(swing, swing, -rows(2), rows(2), P0=1.0), "Q is not a covariance"),
        (lambda: df.NonlinearGaussian(swing, swing, rows(2), rows(2), [0.0], 1.0), "m0 has shape"),
        (lambda: pendulum("euf"), r"method is 'euf'\n  hint: .*ekf"),
        (lambda: pendulum(Unscented(kappa=-2.0)).log_likelihood([0.1]), "kappa is -2 for 2 states"),
        (lambda: Unscented(alpha=0.0), "alpha is 0"),
        (lambda: Iterated(iterations=0), "iterations is 0"),
        (lambda: pendulum(prior="last"), "prior is 'last'"),
        (
            lambda: df.NonlinearGaussian(lambda x: x[:1], swing, rows(2), rows(2), P0=1.0).filter([[0.1, 0.2]]),
            r"f returns the shape \(1,\) for one state \(2,\), expected \(2,\)",
        ),
        (
            lambda: df.NonlinearGaussian(lambda x: x.float(), swing, rows(2), rows(2), P0=1.0).filter([[0.1, 0.2]]),
            "f returns torch.float32 for a state in torch.float64",
        ),
        (
            lambda: df.NonlinearGaussian(lambda x: 1.0, swing, rows(2), rows(2), P0=1.0).filter([[0.1, 0.2]]),
            "f returns float, expected a tensor",
        ),
        (lambda: pendulum().filter([0.1, 0.2], u=[[1.0], [2.0]]), "inputs u, but the model has no function of u"),
        (
            lambda: df.NonlinearGaussian(lambda x, u: x + u, swing, rows(2), rows(2), P0=1.0).filter([[0.1, 0.2]]),
            "no inputs u, but the model has a function of u",
        ),
        (lambda: pendulum().filter([0.1, float("inf")]), "y has infinite values"),
        (lambda: pendulum().forecast([0.1], 0), "horizon is 0"),
        (lambda: pendulum().update(pendulum().init_state(1), [[0.1]], d=[0.1]), "d is given without C"),
        (lambda: pendulum().predict(pendulum().init_state(1), A=rows(2)), "unknown keyword 'A'"),
    ],
)
def test_what_is_wrong_is_explained(call, message):
    with pytest.raises(ArgumentError) as error:
        call()
    assert re.search(message, str(error.value)), str(error.value)


def test_an_overflow_names_its_time():
    model = df.NonlinearGaussian(lambda x: x**3, lambda x: x, [[1.0]], [[1.0]], [3.0], 1.0)
    with pytest.raises(ArgumentError, match="the prediction overflows at row 0, time"):
        model.filter([torch.nan] * 12)
