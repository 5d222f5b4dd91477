"""HiPPO matrices and their forms: golden values, and what they were derived to satisfy."""

import math

import pytest
import torch
from scipy.special import eval_genlaguerre, gamma

from dualform.core.errors import ArgumentError
from dualform.core.hippo import MEASURES, glagt, lagt, legs, legs_diagonal, tlagt, transition
from dualform.core.linalg import matrix_exp
from dualform.core.nplr import DIAGONALS, LOW_RANK, diagonal, low_rank, nplr, skew_pairs
from vectors import close, load, names


@pytest.mark.parametrize("n", [8, 16, 64])
@pytest.mark.parametrize("measure", MEASURES)
def test_transitions_equal_the_golden_values(measure, n):
    g = load(f"hippo_{measure}")
    A, B = transition(measure, n)
    assert A.dtype == B.dtype == torch.float64
    close(A, g[f"A_{n}"], 1e-12)
    close(B, g[f"B_{n}"], 1e-12)


def test_all_golden_measures_are_here():
    cases = {name.removeprefix("hippo_") for name in names("hippo_")}
    assert cases - {"s4d_inits"} - {name for name in cases if name.startswith("nplr")} == set(MEASURES)


def test_legs_tracks_the_legendre_coefficients_of_a_line():
    """The coefficients of f(s) = s on [0, t] are t v, so that t c' = A c + B f requires v = A v + B."""
    A, B = legs(7)
    v = torch.tensor([1 / 2, 1 / (2 * 3**0.5), 0, 0, 0, 0, 0], dtype=torch.float64)
    close(A @ v + B, v, 1e-14)


@pytest.mark.parametrize("n", [8, 16, 64])
def test_legs_diagonal_equals_the_golden_poles(n):
    want = torch.view_as_complex(load("hippo_nplr_legs")[f"W_{n}"]).conj()
    close(legs_diagonal(n), want[want.imag.argsort()], 1e-9)


def test_the_laguerre_family_is_one_family():
    """The generalised measure with alpha = 0 is the tilted one, and the tilt 0 is lagt, up to the scale of B."""
    for beta in (0.01, 1.0):
        (A, B), (want_A, want_B) = glagt(9, beta=beta), tlagt(9, beta)
        close(A, want_A, 1e-14)
        close(B * beta**0.5, want_B, 1e-14)
    close(lagt(9, 0.3)[0], tlagt(9, 0.0)[0], 0)
    close(lagt(9, 0.3)[1], torch.full((9,), 0.3, dtype=torch.float64), 1e-15)


@pytest.mark.parametrize("alpha", [-0.4, 0.3, 0.7])
def test_generalised_laguerre_responses_are_the_polynomials_it_names(alpha):
    """``exp(A s) B`` is ``L_n^(alpha)(s) exp(-(1 + beta) s / 2)``, up to the norms; the binomial sum for L is exact."""
    n, beta = 6, 0.2
    A, B = glagt(n, alpha, beta)
    orders = torch.arange(n, dtype=torch.float64)
    norms = torch.tensor([(gamma(k + alpha + 1) / gamma(k + 1)) ** 0.5 for k in range(n)], dtype=torch.float64)
    for s in (0.0, 0.4, 3.0):
        want = torch.tensor([eval_genlaguerre(int(k), alpha, s) for k in orders], dtype=torch.float64) / norms
        want = want * math.exp(-(1 + beta) * s / 2) * beta ** ((1 - alpha) / 2) / gamma(1 - alpha) ** 0.5
        close(matrix_exp(A * s) @ B, want, 1e-12)


def whole(half: torch.Tensor) -> torch.Tensor:
    """Both halves of each conjugate pair."""
    return torch.cat([half, half.conj()], -1)


@pytest.mark.parametrize("n", [8, 16, 64])
@pytest.mark.parametrize("measure", LOW_RANK)
def test_normal_plus_low_rank_is_the_matrix_itself(measure, n):
    A, B = transition(measure, n)
    form = nplr(measure, n)
    V, P = whole(form.V), whole(form.P)
    close(V.mH @ V, torch.eye(n, dtype=V.dtype), 1e-12)
    close(V @ (torch.diag(whole(form.Lambda)) - P.mT @ P.conj()) @ V.mH, A.to(V.dtype), 1e-9)
    close(V @ whole(form.B), B.to(V.dtype), 1e-9)
    assert (form.Lambda.imag >= 0).all() and (form.Lambda.imag.diff() > 0).all()
    assert (form.B.real >= 0).all() and (form.B.imag == 0).all()


@pytest.mark.parametrize("n", [8, 16, 64])
@pytest.mark.parametrize("measure", ["legs", "legt", "lagt", "fout"])
def test_normal_plus_low_rank_equals_the_golden_values(measure, n):
    """Order and phase of the eigenvectors are free: values, sizes and the real rows can be compared."""
    g = load(f"hippo_nplr_{measure}")
    form = nplr(measure, n)
    close(form.Lambda, torch.view_as_complex(g[f"W_{n}"]).conj().flip(0), 1e-9)
    close(form.P.abs(), g[f"abs_P_{n}"].flip(-1), 1e-9)
    close(form.B.abs(), g[f"abs_B_{n}"].flip(-1), 1e-9)
    close(low_rank(measure, n), g[f"P_real_{n}"], 1e-12)


@pytest.mark.parametrize("n", [8, 20])
def test_the_normal_part_of_legs_equals_that_of_s5(n):
    g = load("s5_hippo_init")
    form = nplr("legs", n)
    want = torch.view_as_complex(g[f"Lambda_{n}"])
    close(form.Lambda, want[n // 2 :], 1e-10)
    close(form.P[0].abs(), g[f"absP_{n}"][n // 2 :], 1e-10)
    close(form.B.abs(), g[f"absB_{n}"][n // 2 :], 1e-10)


@pytest.mark.parametrize("n", [32, 64])
@pytest.mark.parametrize("init", DIAGONALS)
def test_diagonal_inits_equal_the_golden_values(init, n):
    want = torch.view_as_complex(load("hippo_s4d_inits")[f"A_{init}_{n}"]).conj()
    if init == "legs":  # computed in float32 by the reference: every stored value is a float32 number
        assert torch.equal(want, want.to(torch.complex64).to(want.dtype))
        want = want[want.imag.argsort()]
    close(diagonal(init, n), want, 1e-7 if init == "legs" else 1e-10)


@pytest.mark.parametrize("n", [32, 64])
def test_the_input_of_s4d_legs_equals_the_golden_sizes(n):
    """The reference clips imaginary parts at 2; the phases, and so what is clipped, are arbitrary."""
    want = torch.view_as_complex(load("hippo_s4d_inits")[f"B_legs_{n}"]).flip(0)
    kept = want.imag.abs() < 2
    assert kept.sum() > 3
    close(nplr("legs", n).B.abs()[kept], want.abs()[kept].double(), 1e-5)


def test_bad_sizes_are_refused():
    with pytest.raises(ArgumentError, match="state size is 0"):
        legs(0)
    with pytest.raises(ArgumentError, match="state size is 7, expected an even number"):
        legs_diagonal(7)
    for measure in ("fout", "fourier2", "fourier_decay", "foud"):
        with pytest.raises(ArgumentError, match=f"{measure}: the state size is 5, expected an even number"):
            transition(measure, 5)
    for measure in set(MEASURES) - {"fout", "fourier2", "fourier_decay", "foud"}:
        with pytest.raises(ArgumentError, match="state size is 0, expected at least 1"):
            transition(measure, 0)
    with pytest.raises(ArgumentError, match="state size is 7, expected an even number"):
        diagonal("lin", 7)
    with pytest.raises(ArgumentError, match="state size is 7, expected an even number"):
        nplr("legs", 7)
    with pytest.raises(ArgumentError, match="expected an even number"):
        skew_pairs(torch.zeros(3, 3))


def test_unknown_names_list_those_that_exist():
    with pytest.raises(ArgumentError, match=r"'legz' is unknown[\s\S]*legs, legsd, legt, lmu.*foud"):
        transition("legz", 4)
    with pytest.raises(ArgumentError, match=r"'cubic' is unknown[\s\S]*legs, lin, inv, inv2, quad, real"):
        diagonal("cubic", 4)
    with pytest.raises(ArgumentError, match=r"'lmu' has no normal-plus-low-rank form[\s\S]*legs.*fout"):
        nplr("lmu", 4)
    with pytest.raises(ArgumentError, match="alpha is 1"):
        glagt(4, alpha=1.0)
    with pytest.raises(ArgumentError, match="beta is 0"):
        glagt(4, beta=0.0)
