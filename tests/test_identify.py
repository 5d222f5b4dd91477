"""Systems recovered from their inputs and outputs."""

import numpy as np
import pytest
import torch

import dualform as df
from dualform.core.errors import ArgumentError
from dualform.core.identify import identify


def system(seed: int, inputs: int = 1, outputs: int = 1, radius: float = 0.9, n: int = 4) -> df.StateSpace:
    g = torch.Generator().manual_seed(seed)
    shapes = (n, n), (n, inputs), (outputs, n), (outputs, inputs)
    A, B, C, D = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes)
    return df.StateSpace(radius * A / torch.linalg.eigvals(A).abs().max(), B, C, D, dt=0.1)


def markov(s: df.StateSpace, count: int = 50) -> torch.Tensor:
    """The response to a unit impulse: ``D + C B``, then ``C A^k B``."""
    kernel = s.kernel(count)
    return torch.cat([(kernel[0] + s.D)[None], kernel[1:]])


def gap(got: df.StateSpace, want: df.StateSpace) -> float:
    return float((markov(got) - markov(want)).abs().max() / markov(want).abs().max())


@pytest.mark.parametrize("radius", [0.3, 0.9, 0.99])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (2, 1), (1, 3), (2, 2)])
def test_a_random_stable_system_is_recovered(inputs, outputs, radius):
    """Order 4, without noise, from any initial state: 50 Markov parameters to 1e-6, in fact far closer."""
    for seed in range(4):
        s = system(seed, inputs, outputs, radius)
        u = torch.randn(400, inputs, dtype=torch.float64)
        y, _ = s.simulate(u, torch.randn(4, dtype=torch.float64))
        found = identify(u, y, 4, dt=0.1)
        assert gap(found, s) < 1e-9
        assert found.A.shape == (4, 4) and found.A.dtype == torch.float64 and found.dt == 0.1


def test_units_do_not_matter():
    s = system(3, 2, 2)
    u = torch.randn(300, 2, dtype=torch.float64)
    y, _ = s.simulate(u)
    unit_u, unit_y = (torch.tensor(unit, dtype=torch.float64) for unit in ([1e6, 1e-5], [1e-4, 1e3]))
    found = identify(u * unit_u, y * unit_y, 4)
    scaled = df.StateSpace(s.A, s.B / unit_u, unit_y[:, None] * s.C, unit_y[:, None] * s.D / unit_u, 1.0)
    ratio = markov(found) / markov(scaled)
    assert float((ratio - 1).abs().median()) < 1e-9


def test_noise_is_averaged_out():
    s = system(1)
    u = torch.randn(4000, dtype=torch.float64)
    y, _ = s.simulate(u)
    errors = [gap(identify(u[:T], (y + 0.05 * y.std() * torch.randn_like(y))[:T], 4), s) for T in (250, 4000)]
    assert errors[1] < 0.02 and errors[1] < errors[0]


def test_a_pure_delay_is_found():
    u = torch.randn(200, dtype=torch.float64)
    found = identify(u, torch.cat([torch.zeros(1, dtype=torch.float64), u[:-1]]), 1)
    want = torch.zeros(50, dtype=torch.float64)
    want[1] = 1
    torch.testing.assert_close(markov(found)[:, 0, 0], want, rtol=0, atol=1e-12)


def gap_at(signal, k):
    signal = signal.clone()
    signal[k] = torch.nan
    return signal


def test_bad_input_is_explained():
    s, u = system(0), torch.randn(300, dtype=torch.float64)
    y, _ = s.simulate(u)
    t = torch.arange(300, dtype=torch.float64)
    for call, message in [
        (lambda: identify(u[:20], y[:20], 4), "20 samples are too few for order 4, expected at least 35"),
        (lambda: identify(u[:3], y[:3], 4), "3 samples are too few for order 4"),
        (lambda: identify(u, y, 0), "order is 0, expected at least 1"),
        (lambda: identify(u, y, 6), r"order is 6, but the record shows only 4 states[\s\S]*order=4"),
        (lambda: identify(u, torch.zeros(300), 2), "shows only 0 states"),
        (lambda: identify(t.sin(), s.simulate(t.sin())[0], 4), r"does not excite the system enough[\s\S]*white noise"),
        (lambda: identify(0 * u, y, 4), "does not excite the system enough"),
        (
            lambda: identify(u, gap_at(y, 17), 2),
            r"identify: y has values that are not finite: nan at \(17, 0\)\n.*without",
        ),
        (lambda: identify(gap_at(u, 3), y, 2), r"identify: u has values that are not finite: nan at \(3, 0\)"),
        (lambda: identify(u, np.ma.masked_less(y.numpy(), 0), 2), r"identify: y has .*: nan at \(\d+, 0\)"),
        (lambda: identify(u, y[:200], 4), r"y has shape \(200, 1\).*axis 0 is 200, not 300"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            call()
    assert gap(identify(u[:35], y[:35], 4), s) < 1e-6  # the least that the error names is enough
