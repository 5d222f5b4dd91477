"""Gramians against SciPy and their meaning, and balanced truncation against its bound."""

import pytest
import scipy.linalg
import torch

import dualform as df
from dualform.core.errors import ArgumentError
from dualform.core.hippo import transition
from vectors import close


def system(n: int, dt: float | None, seed: int = 0, dtype=torch.float64, radius: float = 0.95) -> df.StateSpace:
    g = torch.Generator().manual_seed(seed)
    A, B, C, D = (torch.randn(*s, generator=g, dtype=dtype) for s in ((n, n), (n, 2), (3, n), (3, 2)))
    poles = torch.linalg.eigvals(A)
    A = A - (poles.real.max() + 1 - radius) * torch.eye(n) if dt is None else radius * A / poles.abs().max()
    return df.StateSpace(A, B, C, D, dt)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("radius", [0.5, 0.95, 0.9999])
@pytest.mark.parametrize("dt", [None, 0.5])
def test_gramians_equal_those_of_scipy(dt, radius, dtype):
    s = system(7, dt, dtype=dtype, radius=radius)
    A, dual, BB, CC = (m.resolve_conj().numpy() for m in (s.A, s.A.mH, s.B @ s.B.mH, s.C.mH @ s.C))
    if dt is None:
        want = scipy.linalg.solve_continuous_lyapunov(A, -BB), scipy.linalg.solve_continuous_lyapunov(dual, -CC)
    else:
        want = scipy.linalg.solve_discrete_lyapunov(A, BB), scipy.linalg.solve_discrete_lyapunov(dual, CC)
    close(s.controllability_gramian(), torch.from_numpy(want[0]), 1e-10)
    close(s.observability_gramian(), torch.from_numpy(want[1]), 1e-10)


def test_the_observability_gramian_is_the_energy_of_the_free_response():
    """From the state after an input, the output of the same time included."""
    s, h = system(4, 1.0, radius=0.8), torch.randn(4, dtype=torch.float64)
    _, x = s.simulate(torch.zeros(300, 2, dtype=torch.float64), h)
    energy = (torch.cat([h[None], x]) @ s.C.mT).square().sum()
    assert abs(energy - h @ s.observability_gramian() @ h) < 1e-10 * energy


def test_the_gramian_of_laguerre_is_known():
    """``A + A^T = -B B^T`` for lagt: its responses, Laguerre functions, are orthonormal."""
    A, B = transition("lagt", 12)
    close(df.StateSpace(A, B, B).controllability_gramian(), torch.eye(12, dtype=torch.float64), 1e-12)


def test_hankel_values_do_not_depend_on_coordinates():
    s = system(5, 0.5)
    T = torch.randn(5, 5, dtype=torch.float64)
    other = df.StateSpace(T @ s.A @ T.inverse(), T @ s.B, s.C @ T.inverse(), s.D, s.dt)
    values = s.hankel_singular_values()
    close(other.hankel_singular_values(), values, 1e-10)
    product = torch.linalg.eigvals(s.controllability_gramian() @ s.observability_gramian()).real.sort(descending=True)[
        0
    ]
    close(values.square(), product, 1e-9)
    assert (values.diff() <= 0).all()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dt", [None, 0.5])
def test_the_error_of_a_reduction_is_below_its_bound(dt, seed):
    """At every frequency, with every order, for slow and for fast systems."""
    n = 4 + seed
    s = system(n, dt, seed, radius=[0.6, 0.95, 0.999][seed % 3])
    top = 40.0 if dt is None else torch.pi / dt
    omega = torch.cat([torch.linspace(0, top, 300), torch.logspace(-4, 0, 100) * top]).double()
    whole = s.frequency_response(omega)
    gain = torch.linalg.matrix_norm(whole, 2).max()
    for order in range(1, n + 1):
        small, bound = s.reduce(order)
        assert small.A.shape == (order, order) and small.dt == dt and small.is_stable()
        error = torch.linalg.matrix_norm(whole - small.frequency_response(omega), 2).max()
        assert error <= bound + 1e-10 * gain
        if order == n - 1:
            assert error > 1e-3 * bound  # the bound is not an idle one


def test_one_dropped_state_reaches_the_bound():
    """For a relaxation system, symmetric, the error at frequency zero is the bound."""
    A = -torch.diag(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
    B = torch.tensor([1.0, 0.7, 0.3], dtype=torch.float64)
    s = df.StateSpace(A, B, B)
    small, bound = s.reduce(2)
    gap = (s.frequency_response([0.0]) - small.frequency_response([0.0])).abs().item()
    assert gap == pytest.approx(float(bound), rel=1e-6)


def test_states_that_do_not_matter_are_found():
    s = system(3, 0.5)
    idle = torch.block_diag(s.A, torch.diag(torch.tensor([0.5, 0.6], dtype=torch.float64)))
    padded = df.StateSpace(
        idle, torch.nn.functional.pad(s.B, (0, 0, 0, 2)), torch.nn.functional.pad(s.C, (0, 2)), s.D, 0.5
    )
    assert (padded.hankel_singular_values()[3:] < 1e-14).all()
    small, bound = padded.reduce(3)
    assert bound < 1e-12
    close(small.kernel(30), s.kernel(30), 1e-11)
    with pytest.raises(ArgumentError, match=r"order is 4, but only 3 states are both[\s\S]*reduce\(3\) loses nothing"):
        padded.reduce(4)


def test_gramians_are_differentiable():
    torch.manual_seed(4)
    s = system(3, 0.5, radius=0.6)

    def trace(A, B):
        return df.StateSpace(A, B, s.C, s.D, 0.5).controllability_gramian()

    assert torch.autograd.gradcheck(trace, (s.A.requires_grad_(), s.B.requires_grad_()))


def test_bad_input_is_explained():
    unstable = df.StateSpace([[1.5]], [1.0], [1.0], dt=1.0)
    for call, message in [
        (unstable.controllability_gramian, r"not stable: the pole 1\.5\+0j is not in the open unit disc"),
        (unstable.observability_gramian, "observability_gramian: the system is not stable"),
        (lambda: unstable.reduce(1), "reduce: the system is not stable"),
        (df.StateSpace([[0.0]], [1.0], [1.0]).hankel_singular_values, "not in the open left half plane"),
        (lambda: system(3, 0.5).reduce(4), "order is 4, expected 1 to 3"),
        (lambda: system(3, 0.5).reduce(0), "order is 0, expected 1 to 3"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            call()
