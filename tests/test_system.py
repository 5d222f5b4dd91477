"""StateSpace: golden impulse responses, simulation against the convolution and SciPy, and bad input."""

import numpy as np
import pytest
import scipy.signal
import torch

import dualform as df
from dualform.core.errors import ArgumentError
from dualform.core.hippo import legs
from vectors import close, load


def system(n=3, inputs=2, outputs=2, dt: float | None = 0.5, dtype=torch.float64):
    g = torch.Generator().manual_seed(n)
    A, B, C, D = (
        torch.randn(*shape, generator=g, dtype=dtype)
        for shape in ((n, n), (n, inputs), (outputs, n), (outputs, inputs))
    )
    return df.StateSpace(0.8 * A / torch.linalg.matrix_norm(A, 2), B, C, D, dt=dt)


@pytest.mark.parametrize("method", ["zoh", "bilinear"])
@pytest.mark.parametrize("case", ["discretize_dense_0", "discretize_dense_1"])
def test_impulse_responses_equal_the_golden_values(case, method):
    g = load(case)
    continuous = df.StateSpace(g["A"], g["B"], g["C"], g["D"])
    for j, dt in enumerate(g["dt"].tolist()):
        close(continuous.discretize(dt, method).kernel(23), g[f"impulse_{method}_{j}"], 1e-10)


@pytest.mark.parametrize("length", [0, 1, 2, 3, 63, 65, 300])
def test_kernel_equals_one_matrix_power_after_another(length):
    s = system()
    power, want = s.B, []
    for _ in range(length):
        want.append(s.C @ power)
        power = s.A @ power
    want = torch.stack(want) if want else torch.zeros(0, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(s.kernel(length), want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_simulation_is_convolution_plus_free_response(dtype):
    torch.manual_seed(0)
    s, length = system(dtype=dtype), 17
    u, x0 = torch.randn(4, length, 2, dtype=dtype), torch.randn(4, 3, dtype=dtype)
    y, x = s.simulate(u, x0)
    k = s.kernel(length)
    for t in range(length):
        driven = sum(u[:, t - i] @ k[i].mT for i in range(t + 1))
        free = x0 @ torch.linalg.matrix_power(s.A, t + 1).mT @ s.C.mT
        torch.testing.assert_close(y[:, t], driven + free + u[:, t] @ s.D.mT)
    torch.testing.assert_close(y, x @ s.C.mT + u @ s.D.mT)
    for row in range(4):
        torch.testing.assert_close(s.simulate(u[row], x0[row])[0], y[row])
    torch.testing.assert_close(s.simulate(u, x0[0])[0][0], y[0])


def test_simulation_equals_scipy_after_the_conversion():
    s, rng = system(), np.random.default_rng(0)
    u, x0 = rng.normal(size=(50, 2)), rng.normal(size=3)
    A, B, C, D = (m.numpy() for m in (s.A, s.B, s.C, s.D))
    _, want_y, want_before = scipy.signal.dlsim((A, B, C @ A, C @ B + D, 0.5), u, x0=x0)
    y, x = s.simulate(u, x0)
    close(y, torch.from_numpy(want_y), 1e-12)
    close(x[:-1], torch.from_numpy(want_before[1:]), 1e-12)


def test_zoh_follows_a_held_input_exactly():
    """h' = -2 h + u with u held at 1: h(t) = (1 - exp(-2 t)) / 2, in float32 to float32's digits."""
    y, _ = df.StateSpace([[-2.0]], [1.0], [1.0]).discretize(0.25).simulate(torch.ones(40))
    assert y.dtype == torch.float32
    t = 0.25 * torch.arange(1, 41, dtype=torch.float64)
    close(y[:, 0], (1 - (-2 * t).exp()) / 2, 3e-7)


def test_a_simulation_continues_from_its_last_state():
    s, u = system(), torch.randn(1, 11, 2, dtype=torch.float64)
    y, _ = s.simulate(u)
    first, x = s.simulate(u[:, :4])
    second, _ = s.simulate(u[:, 4:], x[:, -1])
    torch.testing.assert_close(torch.cat([first, second], 1), y)


def test_everything_is_differentiable():
    torch.manual_seed(2)
    shapes = (3, 3), (3, 2), (1, 3), (1, 2), (), (2, 4, 2), (2, 3)
    args = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    args[4] = torch.tensor(0.3, dtype=torch.float64)

    def run(A, B, C, D, dt, u, x0):
        discrete = df.StateSpace(A, B, C, D).discretize(dt)
        return *discrete.simulate(u, x0), discrete.kernel(5)

    assert torch.autograd.gradcheck(run, [a.requires_grad_() for a in args])


def test_stability_and_poles():
    oscillator = df.StateSpace([[0.0, 1.0], [-4.0, -0.4]], [0.0, 1.0], [1.0, 0.0])
    want = torch.tensor([-0.2 + 3.96**0.5 * 1j, -0.2 - 3.96**0.5 * 1j], dtype=torch.complex64)
    poles = oscillator.poles()
    close(poles[poles.imag.argsort(descending=True)], want, 1e-6)
    assert oscillator.is_stable() and oscillator.discretize(0.1).is_stable()
    assert oscillator.discretize(0.1, "bilinear").is_stable()
    assert not oscillator.discretize(0.5, "euler").is_stable()
    assert not df.StateSpace([[0.0]], [1.0], [1.0]).is_stable()
    assert not df.StateSpace([[1.0]], [1.0], [1.0], dt=1.0).is_stable()


def test_vectors_numbers_and_lists_are_taken_without_losing_digits():
    A, B = legs(4)
    s = df.StateSpace(A, B, [0.1, 0.2, 0.3, 0.4], 0.7)
    assert s.A.dtype == s.C.dtype == s.D.dtype == torch.float64 and s.C[0, 0].item() == 0.1
    assert s.B.shape == (4, 1) and s.C.shape == (1, 4) and s.D.shape == (1, 1) and s.dt is None
    assert df.StateSpace([[0, 1], [0, 0]], [0, 1], [1, 0]).A.dtype == torch.float32
    assert df.StateSpace(A.numpy(), B.half(), [1, 0, 0, 0]).B.dtype == torch.float64
    assert repr(s) == "StateSpace(N=4, inputs=1, outputs=1, continuous)"
    assert repr(s.discretize(0.5)) == "StateSpace(N=4, inputs=1, outputs=1, dt=0.5)"
    y, x = s.discretize(0.1).simulate(torch.zeros(0))
    assert y.shape == (0, 1) and x.shape == (0, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: df.StateSpace(torch.eye(3), torch.ones(2), torch.ones(3)), r"B has shape \(2, 1\).*\(N, inputs\)"),
        (lambda: df.StateSpace(torch.ones(2, 3), torch.ones(2), torch.ones(3)), r"A has shape \(2, 3\)"),
        (lambda: df.StateSpace(torch.eye(2), torch.ones(2), torch.ones(2), torch.ones(2, 2)), "D has shape"),
        (lambda: df.StateSpace(torch.eye(2), torch.ones(2), torch.ones(2), dt=0.0), "dt is 0, expected a positive"),
        (lambda: df.StateSpace("no", [1.0], [1.0]), "A is not a numeric array"),
        (lambda: system(dt=None).discretize(-0.1), r"discretize: dt is -0\.1"),
        (lambda: system(dt=None).discretize(float("nan")), "discretize: dt is nan"),
        (lambda: system(dt=None).discretize(torch.ones(2)), r"dt has shape \(2,\), expected a number"),
        (lambda: system(dt=None).discretize(0.1, "spline"), r"'spline' is unknown[\s\S]*zoh[\s\S]*gbt, foh"),
        (lambda: system().discretize(0.1), "discrete already, with dt=0.5"),
        (lambda: system(dt=None).simulate(torch.zeros(3, 2)), r"continuous[\s\S]*system\.discretize"),
        (lambda: system(dt=None).kernel(3), r"continuous[\s\S]*system\.discretize"),
        (lambda: system().kernel(-1), "length is -1"),
        (lambda: system().simulate(torch.zeros(5, 3)), r"u has shape \(5, 3\).*\(T, 2\)"),
        (lambda: system().simulate(torch.zeros(4, 5, 3)), r"u has shape \(4, 5, 3\).*\(B, T, 2\)"),
        (lambda: system().simulate(torch.zeros(5, 2), torch.zeros(2, 3)), r"x0 has shape \(2, 3\)"),
        (lambda: system().simulate(torch.zeros(4, 5, 2), torch.zeros(3, 3)), r"x0 has shape \(3, 3\).*\(4, 3\)"),
    ],
)
def test_bad_input_is_explained(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()
