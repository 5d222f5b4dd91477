"""StateSpace: golden responses, simulation against the convolution and SciPy, control forms, and bad input."""

import math

import numpy as np
import pytest
import scipy.signal
import torch

import dualform as df
from dualform.core.discretize import discretize_dense
from dualform.core.errors import ArgumentError
from dualform.core.hippo import legs
from vectors import close, load

NAN = float("nan")


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
        close(continuous.discretize_recurrence(dt, method).kernel(23), g[f"impulse_{method}_{j}"], 1e-10)


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


@pytest.mark.parametrize("singular", [False, True])
def test_control_form_and_back(singular):
    """SciPy's matrices give SciPy's output; what cannot be inverted gets the delayed output as a state."""
    s, rng = system(), np.random.default_rng(1)
    if singular:
        s.A[:, 0] = 0
    form = s.to_control_form()
    assert len(form) == 5 and form[4] == 0.5
    u, x0 = rng.normal(size=(30, 2)), rng.normal(size=3)
    _, want, _ = scipy.signal.dlsim(form, u, x0=x0)
    close(s.simulate(u, x0)[0], torch.from_numpy(want), 1e-12)
    scipy_system = scipy.signal.StateSpace(*form[:4], dt=form[4])
    fields = scipy_system.A, scipy_system.B, scipy_system.C, scipy_system.D, scipy_system.dt
    back = df.StateSpace.from_control_form(*fields)
    assert back.A.shape == ((5, 5) if singular else (3, 3)) and back.dt == 0.5
    start = torch.nn.functional.pad(torch.from_numpy(x0), (0, 2)) if singular else x0
    close(back.simulate(u, start)[0], torch.from_numpy(want), 1e-12)
    if not singular:
        close(back.C, s.C, 1e-12)
        close(back.D, s.D, 1e-12)


def test_control_form_of_continuous_systems_is_the_system():
    s = system(dt=None)
    form = s.to_control_form()
    assert len(form) == 4 and all(np.array_equal(a, m) for a, m in zip(form, (s.A, s.B, s.C, s.D), strict=True))
    assert scipy.signal.StateSpace(*form).dt is None
    for dt in (None, 0):
        back = df.StateSpace.from_control_form(*form, dt)
        assert back.dt is None and torch.equal(back.C, s.C)
    assert df.StateSpace.from_control_form(*form, True).dt == 1.0


def test_a_pure_delay_arrives_in_two_states():
    delay = df.StateSpace.from_control_form([[0.0]], [1.0], [1.0], dt=1.0)
    y, _ = delay.simulate([3.0, 1.0, 4.0], [1.0, 0.0])
    assert y[:, 0].tolist() == [1.0, 3.0, 1.0]


@pytest.mark.parametrize("j", [0, 1, 2, 3])
@pytest.mark.parametrize("case", ["discretize_dense_0", "discretize_dense_1"])
def test_first_order_hold_has_the_golden_response(case, j):
    """The response of SciPy's matrices, whose C stays as it was."""
    g = load(case)
    dt = g["dt"][j].item()
    golden = (g[f"A_bar_foh_{j}"], g[f"B_bar_foh_{j}"], g["C"], g[f"D_d_foh_{j}"])
    held = df.StateSpace(g["A"], g["B"], g["C"], g["D"]).discretize(dt, "foh")
    u = torch.randn(25, g["B"].shape[1], dtype=torch.float64)
    _, want, _ = scipy.signal.dlsim((*(m.numpy() for m in golden), dt), u.numpy())
    close(held.simulate(u)[0], torch.from_numpy(want), 1e-10)


@pytest.mark.parametrize("rate", [2.0, 400.0])
def test_first_order_hold_follows_a_ramp_exactly(rate):
    """h' = -a h + t: h(t) = t / a - (1 - exp(-a t)) / a^2, at dt = 0.1; stiff, it takes a state more."""
    s = df.StateSpace([[-rate]], [1.0], torch.ones(1, dtype=torch.float64)).discretize(0.1, "foh")
    assert len(s.A) == (1 if rate == 2.0 else 2)
    t = 0.1 * torch.arange(50, dtype=torch.float64)
    close(s.simulate(t)[0][:, 0], t / rate - (1 - (-rate * t).exp()) / rate**2, 1e-12)


SCIPY = {
    "zoh": "zoh",
    "foh": "foh",
    "euler": "euler",
    "forward_diff": "euler",
    "bilinear": "bilinear",
    "tustin": "bilinear",
    "backward_euler": "backward_diff",
    "backward_diff": "backward_diff",
}


def same_system(got, want, u):
    """The same frequency response, and the same output from rest."""
    omega = torch.linspace(-0.99, 0.99, 9, dtype=torch.float64) * torch.pi / want.dt
    close(got.frequency_response(omega), want.frequency_response(omega), 1e-12)
    close(got.simulate(u)[0], want.simulate(u)[0], 1e-12)


@pytest.mark.parametrize("rates", [(0.5, 1.0, 2.0), (1.0, 40.0, 300.0)])  # of the second some are over after a step
@pytest.mark.parametrize("method", [*SCIPY, 0.0, 0.3, 0.5, 1.0])
def test_discretisation_is_that_of_scipy(method, rates):
    """All four matrices are SciPy's; where Abar is nearly singular the output arrives through further states."""
    g = torch.Generator().manual_seed(0)
    T, B, C, D, u = (
        torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((3, 3), (3, 2), (2, 3), (2, 2), (60, 2))
    )
    A = T @ torch.diag(-torch.tensor(rates, dtype=torch.float64)) @ T.inverse()
    for dt in (0.1, 0.01, 0.7) if rates[2] == 2.0 else (0.1,):
        if isinstance(method, str):
            named, alpha = SCIPY[method], None
            got = df.StateSpace(A, B, C, D).discretize(dt, method)
        else:
            named, alpha = "gbt", method
            got = df.StateSpace(A, B, C, D).discretize(dt, "gbt", method)
        want = scipy.signal.cont2discrete((A.numpy(), B.numpy(), C.numpy(), D.numpy()), dt, named, alpha)
        if not (rates[2] == 300.0 and (named == "euler" or alpha in (0.0, 0.3))):  # which are unstable there
            _, y, _ = scipy.signal.dlsim(want, u.numpy())
            close(got.simulate(u)[0], torch.from_numpy(y), 1e-12)
        same_system(got, df.StateSpace.from_control_form(*want), u[:4])


def test_sampling_a_singular_transition_takes_more_states():
    """``I + z`` of Euler at ``dt = 1`` and ``exp(-300)``: the output is delayed in the state."""
    for rate, method in ((1.0, "euler"), (300.0, "zoh"), (2.0, "bilinear")):
        s = df.StateSpace([[-rate]], [1.0], [2.0], 0.5)
        got = s.discretize(1.0, method)
        assert got.A.shape == (2, 2)
        matrices = tuple(np.array([[number]]) for number in (-rate, 1.0, 2.0, 0.5))
        want = scipy.signal.cont2discrete(matrices, 1.0, method)
        same_system(got, df.StateSpace.from_control_form(*want), torch.randn(20, dtype=torch.float64))


def test_tustin_bends_the_frequency_axis_and_nothing_else():
    s, dt = system(dt=None), 0.3
    omega = torch.linspace(-10, 10, 21, dtype=torch.float64)
    bent = 2 / dt * (omega * dt / 2).tan()
    close(s.discretize(dt, "tustin").frequency_response(omega), s.frequency_response(bent), 1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 0.5, 1.0])
def test_a_generalised_bilinear_simulation_starts_where_it_is_told(alpha):
    """Against the implicit step itself, solved for the new state, from the initial state of the docstring."""
    s, dt = system(dt=None), 0.3
    u, h = torch.randn(9, 2, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    x0 = h - alpha * dt * (s.A @ h + s.B @ u[0])
    y, _ = s.discretize(dt, "gbt", alpha).simulate(u, x0)
    for k in range(9):
        close(y[k], s.C @ h + s.D @ u[k], 1e-12)
        old = h + (1 - alpha) * dt * (s.A @ h + s.B @ u[k])
        if k < 8:
            h = torch.linalg.solve(torch.eye(3, dtype=h.dtype) - alpha * dt * s.A, old + alpha * dt * s.B @ u[k + 1])


@pytest.mark.parametrize("method", ["zoh", "bilinear", "euler", "backward_euler"])
def test_the_recurrence_keeps_c_and_d(method):
    s = system(dt=None)
    got = s.discretize_recurrence(0.1, method)
    assert torch.equal(got.C, s.C) and torch.equal(got.D, s.D) and got.dt == 0.1
    Abar, Bbar = discretize_dense(s.A, s.B, 0.1, method)
    assert torch.equal(got.A, Abar) and torch.equal(got.B, Bbar)


@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e9])
def test_units_of_input_and_states_cost_no_digits(unit):
    """A lag whose input comes in other units, and an oscillator with place and speed in units far apart."""
    lag = df.StateSpace([[-1.0]], [[unit]], [[1.0]])
    for method in ("zoh", "foh"):
        assert abs(lag.discretize(1.0, method).A.item() * math.e - 1) < 4e-16
    close(lag.discretize_recurrence(1.0).B, torch.tensor([[unit * (1 - 1 / math.e)]], dtype=torch.float64), 4e-16)
    swing = df.StateSpace([[0.0, unit], [-1 / unit, 0.0]], [0.0, 1.0], [1.0, 0.0])
    turn = swing.discretize_recurrence(2.0).A * torch.tensor([[1.0, 1 / unit], [unit, 1.0]], dtype=torch.float64)
    want = torch.tensor([[math.cos(2), math.sin(2)], [-math.sin(2), math.cos(2)]], dtype=torch.float64)
    close(turn, want, 1e-15)
    assert swing.discretize(2.0).A.shape == (2, 2)  # a choice of units does not make Abar singular


def test_generalised_bilinear_passes_through_its_neighbours():
    s = system(dt=None)
    for alpha, method in ((0.0, "euler"), (0.5, "bilinear"), (1.0, "backward_euler")):
        close(s.discretize(0.1, "gbt", alpha=alpha).A, s.discretize(0.1, method).A, 1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_frequency_response_is_the_transform_of_the_impulse_response(dtype):
    s = system(dtype=dtype)
    omega = torch.linspace(-6, 6, 11, dtype=torch.float64)
    phase = torch.exp(-1j * omega[:, None] * torch.arange(300) * 0.5)
    want = torch.einsum("fk,kom->fom", phase, s.kernel(300).to(phase.dtype)) + s.D
    close(s.frequency_response(omega), want, 1e-12)


def test_frequency_response_of_a_lag_and_of_an_integrator():
    lag = df.StateSpace([[-2.0]], [1.0], [3.0], 0.5)
    want = 3 / (1j * torch.tensor([0.0, 2.0], dtype=torch.float64) + 2) + 0.5
    close(lag.frequency_response([0.0, 2.0])[:, 0, 0], want, 1e-6)
    with pytest.raises(ArgumentError, match="response at 0 is infinite: the system has a pole there"):
        df.StateSpace([[0.0]], [1.0], [1.0]).frequency_response([1.0, 0.0])


def test_zoh_follows_a_held_input_exactly():
    """h' = -2 h + u with u held at 1: h(t) = (1 - exp(-2 t)) / 2, in float32 to float32's digits."""
    one = torch.ones(1)
    continuous = df.StateSpace(-2 * one[None], one, one)
    for discrete, first in ((continuous.discretize(0.25), 0), (continuous.discretize_recurrence(0.25), 1)):
        y, _ = discrete.simulate(torch.ones(40))
        assert y.dtype == torch.float32
        t = 0.25 * torch.arange(first, first + 40, dtype=torch.float64)
        close(y[:, 0], (1 - (-2 * t).exp()) / 2, 4e-7)


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
    assert df.StateSpace([[0, 1], [0, 0]], [0, 1], [1, 0]).A.dtype == torch.float64
    assert df.StateSpace([[1]], [0.1], [2]).B.item() == 0.1
    assert df.StateSpace([[1j]], [1], [1]).B.dtype == torch.complex128
    assert df.StateSpace(np.eye(2, dtype=int), [0.1, 0], np.ones(2, dtype=int)).B[0].item() == 0.1
    assert df.StateSpace(torch.eye(2), [0.1, 0], [1, 0], 2).D.dtype == torch.float32
    assert df.StateSpace(np.eye(2, dtype=np.float32), [0.1, 0], [1j, 0]).A.dtype == torch.complex64
    assert df.StateSpace(torch.eye(2), np.ones(2), [1, 0]).A.dtype == torch.float64
    assert df.StateSpace(A.numpy(), B.half(), [1, 0, 0, 0]).B.dtype == torch.float64
    assert repr(s) == "StateSpace(N=4, inputs=1, outputs=1, continuous)"
    assert repr(s.discretize(0.5)) == "StateSpace(N=4, inputs=1, outputs=1, dt=0.5)"
    y, x = s.discretize(0.1).simulate(torch.zeros(0))
    assert y.shape == (0, 1) and x.shape == (0, 4)


def test_masked_inputs_are_unknown():
    """From a masked input on, outputs are NaN; the number under the mask plays no part."""
    lag = df.StateSpace([[0.5]], [1.0], [1.0], dt=1.0)
    u = np.ma.masked_equal([1.0, 2.0, -9999.0, 2.5], -9999.0)
    for given in (u, list(u), u[:, None], [[value] for value in u], np.ma.masked_equal([1, 2, -9999, 2], -9999)):
        y = lag.simulate(given)[0].flatten()
        assert y.dtype == torch.float64 and y[:2].tolist() == [1.0, 2.5] and y[2:].isnan().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: df.StateSpace(torch.eye(3), torch.ones(2), torch.ones(3)), r"B has shape \(2, 1\).*\(N, inputs\)"),
        (lambda: df.StateSpace(torch.ones(2, 3), torch.ones(2), torch.ones(3)), r"A has shape \(2, 3\)"),
        (lambda: df.StateSpace(torch.eye(2), torch.ones(2), torch.ones(2), torch.ones(2, 2)), "D has shape"),
        (lambda: df.StateSpace(torch.eye(2), torch.ones(2), torch.ones(2), dt=0.0), "dt is 0, expected a positive"),
        (lambda: df.StateSpace("no", [1.0], [1.0]), "A is not a numeric array"),
        (
            lambda: df.StateSpace([[0.0, NAN], [0.0, 0.0]], [1, 1], [1, 1]),
            r"StateSpace: A has values.*: nan at \(0, 1\)",
        ),
        (
            lambda: df.StateSpace([[0.0]], np.ma.masked_equal([7], 7), [1]),
            r"B has values.*: nan at \(0, 0\)",
        ),
        (lambda: system(dt=None).discretize(-0.1), r"discretize: dt is -0\.1"),
        (lambda: system(dt=None).discretize(float("nan")), "discretize: dt is nan"),
        (lambda: system(dt=None).discretize(torch.ones(2)), r"dt has shape \(2,\), expected a number"),
        (lambda: system(dt=None).discretize(0.1, "spline"), r"'spline' is unknown[\s\S]*zoh[\s\S]*gbt, foh"),
        (lambda: system(dt=None).discretize(0.1, "gbt"), "alpha is None with method 'gbt'"),
        (lambda: system(dt=None).discretize(0.1, "zoh", 0.3), r"alpha is 0\.3 with method 'zoh'"),
        (lambda: system(dt=None).discretize(0.1, "gbt", 1.5), r"alpha is 1\.5, expected a weight from 0"),
        (lambda: system().discretize(0.1), "discretize: the system is discrete already, with dt=0.5"),
        (lambda: system().discretize_recurrence(0.1), "discretize_recurrence: .*discrete already, with dt=0.5"),
        (lambda: system(dt=None).discretize_recurrence(0.1, "foh"), r"'foh' is unknown[\s\S]*use discretize"),
        (lambda: system(dt=None).simulate(torch.zeros(3, 2)), r"continuous[\s\S]*system\.discretize"),
        (lambda: system(dt=None).kernel(3), r"continuous[\s\S]*system\.discretize"),
        (lambda: system().kernel(-1), "length is -1"),
        (lambda: system().frequency_response([1.0, NAN]), "omega has values that are not finite: nan at 1"),
        (lambda: system().simulate(torch.zeros(5, 3)), r"u has shape \(5, 3\).*\(T, 2\)"),
        (lambda: system().simulate(torch.zeros(4, 5, 3)), r"u has shape \(4, 5, 3\).*\(B, T, 2\)"),
        (lambda: system().simulate(torch.zeros(5, 2), torch.zeros(2, 3)), r"x0 has shape \(2, 3\)"),
        (lambda: system().simulate(torch.zeros(4, 5, 2), torch.zeros(3, 3)), r"x0 has shape \(3, 3\).*\(4, 3\)"),
    ],
)
def test_bad_input_is_explained(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()
