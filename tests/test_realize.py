"""Other coordinates for one system: the Markov parameters and the frequency response stay."""

import pytest
import torch

import dualform as df
from dualform.core.errors import ArgumentError
from dualform.core.hippo import transition
from dualform.core.realize import to_companion, to_diagonal, to_dplr
from vectors import close

OMEGA = torch.linspace(0.05, 7, 31, dtype=torch.float64)


def system(n: int, inputs: int = 2, dt: float | None = 0.5, dtype=torch.float64) -> df.StateSpace:
    g = torch.Generator().manual_seed(n)
    A, B, C, D = (torch.randn(*s, generator=g, dtype=dtype) for s in ((n, n), (n, inputs), (3, n), (3, inputs)))
    A = A - 4 * torch.eye(n) if dt is None else 0.9 * A / torch.linalg.eigvals(A).abs().max()
    return df.StateSpace(A, B, C, D, dt)


def same(got: df.StateSpace, want: df.StateSpace, tolerance: float = 1e-11) -> None:
    assert got.dt == want.dt and got.A.dtype == want.A.dtype and got.A.shape == want.A.shape
    close(got.frequency_response(OMEGA), want.frequency_response(OMEGA), tolerance)
    if want.dt is not None:
        close(got.kernel(40), want.kernel(40), tolerance)
    close(got.D, want.D, 0)


@pytest.mark.parametrize("dt", [None, 0.5])
@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_diagonal_form(n, dt):
    want = system(n, dt=dt)
    form = to_diagonal(want)
    assert (form.Lambda.imag >= 0).all() and (form.Lambda.imag.diff() >= 0).all()
    pairs = int((form.Lambda.imag > 0).sum())
    assert len(form.Lambda) + pairs == n
    same(form.dense(), want)


def test_diagonal_form_is_what_it_says():
    """``y = 2 Re(C h) + D u`` of the modes, each by itself, is the output; real poles and pairs are both there."""
    want, u = system(5), torch.randn(30, 2, dtype=torch.float64)
    form = to_diagonal(want)
    assert (form.Lambda.imag == 0).any() and (form.Lambda.imag > 0).any()
    h, y = torch.zeros_like(form.Lambda), []
    for u_t in u:
        h = form.Lambda * h + form.B @ u_t.to(h.dtype)
        y.append(2 * (form.C @ h).real + form.D @ u_t)
    close(torch.stack(y), want.simulate(u)[0], 1e-12)


@pytest.mark.parametrize("dt", [None, 0.5])
@pytest.mark.parametrize("n", [2, 6])
def test_diagonal_plus_low_rank_form_of_any_system(n, dt):
    want = system(n, dt=dt)
    same(to_dplr(want).dense(), want)


@pytest.mark.parametrize(("measure", "rank"), [("legs", 1), ("legt", 2), ("lagt", 1), ("fout", 1), ("foud", 0)])
def test_diagonal_plus_low_rank_finds_the_rank_of_hippo(measure, rank):
    A, B = transition(measure, 16)
    want = df.StateSpace(A, B, torch.randn(2, 16, dtype=torch.float64))
    form = to_dplr(want)
    assert form.P.shape == (rank, 8) and form.Lambda.shape == (8,)
    same(form.dense(), want, 1e-12)


def test_diagonal_plus_low_rank_form_is_what_it_says():
    """One derivative of the whole state, in both halves of each pair."""
    want = system(6, dt=None)
    form = to_dplr(want)
    Lambda, P, B = (torch.cat([half, half.conj()], axis) for half, axis in ((form.Lambda, 0), (form.P, 1), (form.B, 0)))
    A = torch.diag(Lambda) - P.mT @ P.conj()
    C = torch.cat([form.C, form.C.conj()], 1)
    same(df.StateSpace(A, B, C, form.D.to(A.dtype)), df.StateSpace(*(m + 0j for m in (want.A, want.B, want.C, want.D))))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("dt", [None, 0.5])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_companion_form(n, dt, dtype):
    want = system(n, inputs=1, dt=dt, dtype=dtype)
    form = to_companion(want)
    same(form, want, 1e-9)
    assert torch.equal(form.A[:, :-1], torch.eye(n, dtype=dtype)[:, 1:]) if n > 1 else True
    assert torch.equal(form.B[:, 0], torch.eye(n, dtype=dtype)[0])


def test_companion_form_needs_no_controllability():
    A = torch.diag(torch.tensor([0.5, 0.5, -0.3], dtype=torch.float64))
    want = df.StateSpace(A, [1.0, 1.0, 0.0], [1.0, 2.0, 3.0], dt=1.0)
    same(to_companion(want), want)


def test_float32_systems_keep_their_dtype():
    want = system(4, inputs=1, dtype=torch.float32)
    for got in (to_diagonal(want).dense(), to_dplr(want).dense(), to_companion(want)):
        same(got, want, 1e-4)


def test_bad_input_is_explained():
    A, B = transition("legs", 24)
    for call, message in [
        (lambda: to_diagonal(df.StateSpace(A, B, B)), r"not diagonalisable[\s\S]*to_dplr"),
        (lambda: to_diagonal(df.StateSpace([[1.0, 1.0], [0.0, 1.0]], [0.0, 1.0], [1.0, 0.0])), "not diagonalisable"),
        (lambda: to_diagonal(system(4, dtype=torch.complex128)), "the system is complex"),
        (lambda: to_dplr(system(4, dtype=torch.complex128)), "the system is complex"),
        (lambda: to_dplr(system(5)), "state size is 5, expected an even number"),
        (lambda: to_companion(system(4)), r"has 2 inputs, expected 1[\s\S]*one input at a time"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            call()
