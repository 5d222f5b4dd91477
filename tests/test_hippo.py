"""HiPPO-LegS: golden values, and the projections it was derived to track."""

import pytest
import torch

from dualform.core.errors import ArgumentError
from dualform.core.hippo import legs, legs_diagonal
from vectors import close, load


@pytest.mark.parametrize("n", [8, 16, 64])
def test_legs_equals_the_golden_values(n):
    g = load("hippo_legs")
    A, B = legs(n)
    assert A.dtype == B.dtype == torch.float64
    close(A, g[f"A_{n}"], 1e-12)
    close(B, g[f"B_{n}"], 1e-12)


def test_legs_tracks_the_legendre_coefficients_of_a_line():
    """The coefficients of f(s) = s on [0, t] are t v, so that t c' = A c + B f requires v = A v + B."""
    A, B = legs(7)
    v = torch.tensor([1 / 2, 1 / (2 * 3**0.5), 0, 0, 0, 0, 0], dtype=torch.float64)
    close(A @ v + B, v, 1e-14)


@pytest.mark.parametrize("n", [8, 16, 64])
def test_legs_diagonal_equals_the_golden_poles(n):
    want = torch.view_as_complex(load("hippo_nplr_legs")[f"W_{n}"]).conj()
    close(legs_diagonal(n), want[want.imag.argsort()], 1e-9)


def test_bad_sizes_are_refused():
    with pytest.raises(ArgumentError, match="state size is 0"):
        legs(0)
    with pytest.raises(ArgumentError, match="state size is 7, expected an even number"):
        legs_diagonal(7)
