"""HiPPO's online projection: exact solutions, what it keeps of a signal, and that cuts do not matter."""

import math

import numpy as np
import pytest
import torch

from dualform.core.errors import ArgumentError
from dualform.core.hippo import legs, transition
from dualform.core.linalg import matrix_exp
from dualform.core.memory import Memory, snapshots
from vectors import close

WINDOWS = {
    "legs": None,
    "legt": 40.0,
    "lmu": 40.0,
    "fout": 40.0,
    "fourier2": 40.0,
    "lagt": 3.0,
    "tlagt": 3.0,
    "glagt": 3.0,
}


def memory(measure: str, order: int = 8, dt: float = 0.5) -> Memory:
    return Memory(measure, order, window=WINDOWS[measure], dt=dt)


def smooth(length: int, cycles: float) -> torch.Tensor:
    """Twelve sinusoids of at most so many cycles over the whole."""
    t = torch.arange(length, dtype=torch.float64) / length
    waves = torch.rand(12, 3, dtype=torch.float64)
    return (waves[:, :1] * torch.sin(2 * math.pi * (cycles * waves[:, 1:2] * t + waves[:, 2:]))).sum(0)


def test_legs_keeps_a_long_band_limited_signal():
    """10^5 samples with up to 12 cycles in 64 numbers: below 2 per cent, in fact far below."""
    u = smooth(100_000, 12)
    kept = Memory("legs", 64, dt=0.01)
    kept.extend(u)
    assert kept.coefficients.shape == (64,)
    assert kept.error(u) < 1e-4
    times = (torch.arange(0, 100_000, 997, dtype=torch.float64) + 0.5) * 0.01
    close(kept.reconstruct(times), u[::997], 1e-3)
    few = Memory("legs", 16, dt=0.01)
    few.extend(u)
    assert few.error(u) > 0.1  # 16 polynomials cannot carry 12 cycles


def test_legs_is_the_orthogonal_projection():
    """Of a polynomial, up to the steps of the hold; against the best fit to the held signal, exactly."""
    T, order = 50, 6
    u = torch.randn(T, dtype=torch.float64)
    kept = Memory("legs", order)
    kept.extend(u)
    fine = (torch.arange(200 * T, dtype=torch.float64) + 0.5) / 200
    design = torch.stack([(fine / T) ** k for k in range(order)], 1)
    fit = design @ torch.linalg.lstsq(design, u.repeat_interleave(200)[:, None]).solution[:, 0]
    close(kept.reconstruct(fine[::100]), fit[::100], 1e-4)


@pytest.mark.parametrize("order", [1, 2, 9])
def test_legs_solves_its_differential_equation(order):
    """``t c' = A c + B u`` is linear in log t: over a step with u held, ``c - u e_0`` turns by ``exp(A log(...))``."""
    A, B = legs(order)
    u = torch.randn(120, dtype=torch.float64)
    constant = torch.linalg.solve(A, -B)  # what a signal held for ever tends to
    kept, c = Memory("legs", order), torch.zeros(order, dtype=torch.float64)
    for k, u_k in enumerate(u):
        turn = matrix_exp(A * math.log((k + 1) / k)) if k else torch.zeros_like(A)
        c = u_k * constant + turn @ (c - u_k * constant)
        close(kept.update(u_k), c, 1e-10)


@pytest.mark.parametrize("measure", ["legt", "lmu", "fout", "fourier2", "lagt", "tlagt", "glagt"])
def test_sliding_memories_integrate_their_responses(measure):
    """``c(t) = int exp(A s) B u(t - s) ds`` in the time scale of the window, for a signal of three steps."""
    A, B = transition(measure, 8)
    rate = (2.0 if measure in ("legt", "fout") else 1.0) / WINDOWS[measure]
    kept = memory(measure)
    kept.extend([1.0, -2.0, 3.0])
    held = torch.zeros(9, 9, dtype=torch.float64)
    held[:8, :8], held[:8, 8] = rate * A, rate * B
    integral = [matrix_exp(held * 0.5 * k)[:8, 8] for k in range(4)]
    want = 3 * integral[1] - 2 * (integral[2] - integral[1]) + (integral[3] - integral[2])
    close(kept.coefficients, want, 1e-12)


@pytest.mark.parametrize("measure", WINDOWS)
def test_it_does_not_matter_how_a_signal_is_cut(measure):
    u = torch.randn(1300, 2, dtype=torch.float64)
    whole, cut, stepped = memory(measure), memory(measure), memory(measure)
    whole.extend(u)
    for piece in u.split([1, 0, 7, 1100, 192]):
        cut.extend(piece)
    stepped.extend(u[:20])
    for u_t in u[20:130]:
        stepped.update(u_t)
    stepped.extend(u[130:])
    assert whole.coefficients.shape == (2, 8)
    assert whole.samples == cut.samples == stepped.samples == 1300
    close(cut.coefficients, whole.coefficients, 1e-10)
    close(stepped.coefficients, whole.coefficients, 1e-10)
    alone = memory(measure)
    alone.extend(u[:, 1])
    close(alone.coefficients, whole.coefficients[1], 1e-12)
    times = torch.linspace(whole.start, 650, 5, dtype=torch.float64)
    close(alone.reconstruct(times), whole.reconstruct(times)[:, 1], 1e-12)


@pytest.mark.parametrize(
    ("measure", "window", "order", "allowed"),
    [
        ("legt", 200.0, 32, 1e-4),
        ("lmu", 200.0, 32, 1e-4),
        ("fout", 200.0, 64, 0.06),  # a window that does not start where it ends: Gibbs
        ("fourier2", 200.0, 64, 0.06),
        ("lagt", 10.0, 64, 0.02),
        ("tlagt", 20.0, 32, 1e-3),
        ("glagt", 10.0, 64, 0.02),
    ],
)
def test_sliding_memories_keep_the_recent_past(measure, window, order, allowed):
    u = smooth(4000, 12)
    fading = measure in ("lagt", "glagt")
    if fading:  # what is older than the functions reach has to be small
        u = u * torch.exp(-((torch.arange(4000) - 3700) / 80.0).double().square())
    kept = Memory(measure, order, window=window, dt=0.5)
    kept.extend(u)
    assert kept.error(u) < allowed
    assert kept.start == (1800.0 if allowed in (1e-4, 0.06) else 0.0)
    assert kept.error(torch.zeros_like(u)) > 1e6


def test_the_error_weighs_samples_as_the_measure_does():
    kept = Memory("tlagt", 4, window=2.0)
    u = torch.randn(30, dtype=torch.float64)
    kept.extend(u)
    times = torch.arange(30, dtype=torch.float64) + 0.5
    weight = torch.exp(-(30 - times) / 2)
    want = ((u - kept.reconstruct(times)).square() @ weight / (u.square() @ weight)).sqrt()
    assert abs(kept.error(u) - want) < 1e-12
    legt = Memory("legt", 4, window=10.0)
    legt.extend(u)
    want = (u[20:] - legt.reconstruct(times[20:])).norm() / u[20:].norm()
    assert abs(legt.error(u) - want) < 1e-12 and abs(legt.error(u[15:]) - want) < 1e-12


def test_memories_are_differentiable():
    u = torch.randn(12, dtype=torch.float64, requires_grad=True)

    def run(u):
        kept = Memory("legs", 3)
        kept.extend(u[:7])
        for u_t in u[7:]:
            kept.update(u_t)
        return kept.reconstruct([0.5, 6.0])

    assert torch.autograd.gradcheck(run, (u,))


@pytest.mark.parametrize("measure", ["legs", "legt"])
def test_snapshots_show_the_memory_as_time_passes(measure):
    u = smooth(600, 5)
    window = None if measure == "legs" else 20.0
    shots = snapshots(Memory(measure, 24, window=window, dt=0.1), u, [220, 300, 600], points=40)
    assert [shot.time for shot in shots] == pytest.approx([22.0, 30.0, 60.0])
    for shot in shots:
        assert shot.times.shape == shot.signal.shape == shot.reconstruction.shape == (40,)
        assert shot.error < 0.02
        close(shot.reconstruction, shot.signal, 0.1)
        fresh = Memory(measure, 24, window=window, dt=0.1)
        fresh.extend(u[: round(shot.time / 0.1)])
        close(shot.reconstruction, fresh.reconstruct(shot.times), 1e-9)
    assert shots[2].times[0] == pytest.approx(0.05 if measure == "legs" else 40.05)
    assert shots[2].times[-1] == pytest.approx(59.95)


def test_numbers_are_not_rounded_to_float32():
    kept = Memory("legs", 1)
    kept.update(0.1)
    kept.extend([0.3])
    assert abs(kept.coefficients.item() - 0.2) < 1e-15


def test_bad_input_is_explained():
    kept = Memory("legs", 8)
    kept.extend(torch.ones(5, 2))
    for call, message in [
        (lambda: Memory("legsd", 8), r"'legsd' is unknown[\s\S]*legs, legt, lmu, fout, fourier2, lagt, tlagt, glagt"),
        (lambda: Memory("legs", 0), "state size is 0"),
        (lambda: Memory("fout", 7, window=1.0), "state size is 7, expected an even number"),
        (lambda: Memory("legs", 8, window=1.0), "'legs' takes no window"),
        (lambda: Memory("legt", 8), "'legt' needs a window"),
        (lambda: Memory("legt", 8, window=-1.0), "window is -1, expected a positive time"),
        (lambda: Memory("legs", 8, dt=0.0), "dt is 0, expected a positive time"),
        (lambda: kept.reconstruct([1.0]), "5 samples, fewer than the 8 coefficients"),
        (lambda: kept.update(1.0), r"samples have shape \(\), those before had \(2,\)"),
        (lambda: kept.extend(torch.ones(3, 1)), r"samples have shape \(1,\), those before had \(2,\)"),
        (lambda: kept.extend(1.0), "the signal is a number"),
        (lambda: kept.update([1.0, math.inf]), r"Memory\.update: u_t has values that are not finite: inf at 1"),
        (lambda: kept.extend(np.ma.masked_equal([[1, 2], [7, 4]], 7)), r"Memory\.extend: u has .*: nan at \(1, 0\)"),
        (lambda: kept.error(torch.ones(6, 2)), r"u has shape \(6, 2\), expected at most 5 samples of shape \(2,\)"),
        (lambda: snapshots(kept, torch.ones(9, 2), [9]), "has seen 5 samples"),
        (lambda: snapshots(Memory("legs", 8), torch.ones(9), [4, 9]), r"at is \[4, 9\].*from 8.*to 9"),
        (lambda: snapshots(Memory("legs", 8), torch.ones(9), [9, 8]), r"at is \[9, 8\], expected ascending"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            call()
    sliding = Memory("legt", 4, window=10.0)
    sliding.extend(torch.ones(30))
    with pytest.raises(ArgumentError, match="times from 19 to 25, but the memory reaches from 20 to 30"):
        sliding.reconstruct([25.0, 19.0])
    with pytest.raises(ArgumentError, match=r"times from 21 to 30\.5"):
        sliding.reconstruct([21.0, 30.5])
