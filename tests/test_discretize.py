"""Discretisation: golden values, the diagonal rules against the dense ones, and what happens at A = 0."""

import pytest
import torch

from dualform.core.discretize import RULES, discretize_dense, first_order_hold, generalized_bilinear, rule
from dualform.core.errors import ArgumentError
from dualform.core.linalg import matrix_exp
from vectors import close, load

GOLDEN_NAME = {"zoh": "zoh", "bilinear": "bilinear", "euler": "euler", "backward_euler": "backward_diff"}


@pytest.mark.parametrize("method", GOLDEN_NAME)
@pytest.mark.parametrize("case", ["discretize_dense_0", "discretize_dense_1"])
def test_dense_rules_equal_the_golden_values(case, method):
    g = load(case)
    for j, dt in enumerate(g["dt"].tolist()):
        Abar, Bbar = discretize_dense(g["A"], g["B"], dt, method)
        close(Abar, g[f"A_bar_{GOLDEN_NAME[method]}_{j}"], 1e-10, f"Abar {method} {dt}")
        close(Bbar, g[f"B_bar_{GOLDEN_NAME[method]}_{j}"], 1e-10, f"Bbar {method} {dt}")


@pytest.mark.parametrize("case", ["discretize_dense_0", "discretize_dense_1"])
def test_first_order_hold_equals_the_golden_values(case):
    g = load(case)
    for j, dt in enumerate(g["dt"].tolist()):
        Abar, Bbar, lead = first_order_hold(g["A"], g["B"], dt)
        close(Abar, g[f"A_bar_foh_{j}"], 1e-10)
        close(Bbar, g[f"B_bar_foh_{j}"], 1e-10)
        close(g["D"] + g["C"] @ lead, g[f"D_d_foh_{j}"], 1e-10)


@pytest.mark.parametrize("case", ["discretize_dense_0", "discretize_dense_1"])
def test_generalised_bilinear_equals_the_golden_values(case):
    g = load(case)
    for j, dt in enumerate(g["dt"].tolist()):
        Abar, Bbar = generalized_bilinear(g["A"], g["B"], dt, 0.3)
        close(Abar, g[f"A_bar_gbt_{j}"], 1e-10)
        close(Bbar, g[f"B_bar_gbt_{j}"], 1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_the_exponential_keeps_its_digits_at_every_size(dtype):
    """Against eigenvalues of a normal matrix, whose exponential is known; 0.05 is where PyTorch's loses digits."""
    for size in (0.0, 1e-5, 0.049, 0.3, 0.51, 2.0, 30.0):
        Q = torch.linalg.qr(torch.randn(4, 4, dtype=dtype))[0]
        values = size * torch.tensor([-1.0, -0.7, 0.1, 0.2], dtype=torch.float64).to(dtype)
        close(matrix_exp(Q @ torch.diag(values) @ Q.mH), Q @ torch.diag(values.exp()) @ Q.mH, 1e-13)
    both = torch.stack([torch.zeros(2, 2), torch.diag(torch.tensor([1.0, -2.0]))])
    want = torch.stack([torch.eye(2), torch.diag(torch.tensor([1.0, -2.0]).exp())])
    assert matrix_exp(both).dtype == torch.float32
    close(matrix_exp(both), want, 1e-7)


def test_zoh_of_a_singular_system():
    g = load("discretize_singular")
    for j, dt in enumerate(g["dt"].tolist()):
        Abar, Bbar = discretize_dense(g["A"], g["B"], dt)
        close(Abar, g[f"A_bar_zoh_{j}"], 1e-12)
        close(Bbar, g[f"B_bar_zoh_{j}"], 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("method", RULES)
def test_diagonal_rules_equal_the_dense_ones(method, dtype):
    torch.manual_seed(0)
    A = -torch.rand(3, 4, dtype=torch.float64).to(dtype)
    A = A + 1j * torch.randn(3, 4) if dtype.is_complex else A
    A[0, 0] = 0
    dt = torch.tensor([[0.01], [0.4], [1.7]], dtype=torch.float64)
    Abar, factor = RULES[method](A, dt)
    assert Abar.shape == factor.shape == A.shape
    eye = torch.eye(4, dtype=dtype).expand(3, 4, 4)
    dense_A, dense_B = discretize_dense(torch.diag_embed(A), eye, dt[:, 0], method)
    close(torch.diag_embed(Abar), dense_A, 1e-14)
    close(torch.diag_embed(factor), dense_B, 1e-14)


@pytest.mark.parametrize("method", RULES)
def test_rules_are_differentiable_everywhere_twice(method):
    points = [0.0, -1e-9, -1e-4, -0.4999, -0.5001, -3.0, 0.3]
    A = torch.tensor(points, dtype=torch.float64, requires_grad=True)
    dt = torch.full((7,), 0.9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(RULES[method], (A, dt))
    assert torch.autograd.gradgradcheck(RULES[method], (A, dt))
    complex_A = torch.tensor([0j, -1e-6 + 1e-6j, -0.3 + 0.2j, -0.5 + 40j], dtype=torch.complex128, requires_grad=True)
    assert torch.autograd.gradcheck(RULES[method], (complex_A, dt[:4]))


def test_zoh_keeps_its_digits_in_float32_around_zero():
    z = torch.cat([torch.zeros(1), -torch.logspace(-8, 1, 200), torch.logspace(-8, 0, 50)]).double()
    one = torch.ones((), dtype=torch.float64)
    results = []
    for dtype in (torch.float32, torch.float64):
        A = z.to(torch.float32).to(dtype).requires_grad_()
        factor = RULES["zoh"](A, one.to(dtype))[1]
        slope = torch.autograd.grad(factor.sum(), A)[0]
        results.append((factor.detach().double(), slope.double()))
    for got, want in zip(*results, strict=True):
        assert ((got - want) / want).abs().max() < 2e-6
    assert results[1][0][0] == 1 and results[1][1][0] == 0.5


def test_dense_rules_are_differentiable():
    torch.manual_seed(1)
    A = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    B = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    dt = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    for method in RULES:
        assert torch.autograd.gradcheck(lambda *a, m=method: discretize_dense(*a, m), (A, B, dt))
    assert torch.autograd.gradcheck(first_order_hold, (A, B, dt))


def test_an_unknown_method_lists_those_that_exist():
    with pytest.raises(ArgumentError, match=r"'tustin' is unknown[\s\S]*zoh, bilinear, euler, backward_euler"):
        rule("tustin")
    with pytest.raises(ArgumentError, match=r"'foh' is unknown[\s\S]*zoh"):
        discretize_dense(torch.zeros(1, 1), torch.zeros(1, 1), 0.1, "foh")
    with pytest.raises(ArgumentError, match=r"alpha is 1\.1, expected a weight from 0"):
        generalized_bilinear(torch.zeros(1, 1), torch.zeros(1, 1), 0.1, 1.1)
    assert rule("zoh") is RULES["zoh"]
