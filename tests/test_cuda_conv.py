"""The CUDA kernels of the short convolution, run thread by thread on the CPU and compared with the definition."""

import pytest
import torch

from containment import check_contained
from dualform.ops.causal_conv1d import CausalConv1d, causal_conv1d_op
from dualform.ops.cuda import causal_conv1d as kernels
from emulation import close, definition, gradients, normal, packing

bfloat16, float16, float32 = torch.bfloat16, torch.float16, torch.float32
TOLERANCE = {float32: 2e-5, bfloat16: 1e-2, float16: 2e-3}


def arguments(batch, length, width, taps, dtype=float32, bias=True, silu=True, borders=None, like=float32, apart=8):
    """As the operator takes them; x lies inside a projection that is ``apart`` channels wider."""
    rows = batch if borders is None else len(borders) - 1
    x = normal(batch, length, width + apart, dtype=dtype)[..., apart:]
    weight, bias = normal(width, taps, dtype=like), normal(width, dtype=like) if bias else None
    return CausalConv1d(x, weight, bias, silu, normal(rows, width, taps - 1), packing(borders))


def run(a):
    """Outputs and gradients, for weights of both outputs."""
    y, final = kernels._forward(a)
    weights = [normal(*y.shape, dtype=y.dtype), normal(*final.shape)]
    return weights, [y, final, *gradients(causal_conv1d_op, a, kernels._backward(weights, [], a))]


def reference(a, weights):
    return definition(causal_conv1d_op, a, weights)


SHORT = [0, 2, 3, 5, 5, 12, 46, 47, 47]  # some empty, the last one too; some shorter than a window
CASES = {
    "one": dict(batch=1, length=1, width=1, taps=4),
    "odd": dict(batch=2, length=65, width=17, taps=4, apart=3),
    "short": dict(batch=3, length=2, width=5, taps=4),
    "width 1": dict(batch=2, length=40, width=21, taps=1),
    "width 2, plain": dict(batch=2, length=63, width=36, taps=2, silu=False, bias=False),
    "width 3": dict(batch=2, length=80, width=132, taps=3, bias=False),
    "width 8": dict(batch=1, length=35, width=12, taps=8),
    "bfloat16": dict(batch=2, length=130, width=264, taps=4, dtype=bfloat16),
    "bfloat16 by fours": dict(batch=1, length=64, width=132, taps=4, dtype=bfloat16, like=bfloat16, apart=4),
    "bfloat16 odd": dict(batch=1, length=33, width=9, taps=4, dtype=bfloat16, like=bfloat16),
    "float16": dict(batch=1, length=50, width=40, taps=6, dtype=float16, like=float16, silu=False),
    "packed": dict(batch=1, length=47, width=24, taps=4, borders=SHORT),
    "packed width 6": dict(batch=1, length=130, width=20, taps=6, borders=[0, 0, 3, 100, 130], dtype=bfloat16),
}
PLANS = [kernels.Plan(8, 4, 2, 16), kernels.Plan(4, 8, 3, 64)]


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_convolution_is_the_definition(case, plan, emulated, poison, monkeypatch):
    monkeypatch.setattr(kernels, "plan_forward", lambda *a: plan)
    monkeypatch.setattr(kernels, "plan_backward", lambda *a: plan)
    a = arguments(**CASES[case])
    weights, found = run(a)
    close(found, reference(a, weights), TOLERANCE[a.x.dtype])


@pytest.mark.parametrize("case", ["odd", "packed", "bfloat16"])
def test_what_is_not_finite_stays_in_its_sequence(case, emulated, poison, monkeypatch):
    monkeypatch.setattr(kernels, "plan_forward", lambda *a: PLANS[0])
    monkeypatch.setattr(kernels, "plan_backward", lambda *a: PLANS[0])
    a = arguments(**CASES[case])
    check_contained(causal_conv1d_op, a, kernels._forward, kernels._backward, channels=True)


@pytest.mark.parametrize("rows, length", [(1, 300), (70, 9)])
def test_plans_follow_the_shape(rows, length, emulated, poison):
    a = arguments(rows, length, 40, 4)
    weights, found = run(a)
    close(found, reference(a, weights), 2e-5)


@pytest.mark.parametrize("borders", [None, [0, 0, 0]])
def test_nothing_to_convolve(borders, emulated, poison):
    a = arguments(1 if borders else 2, 0, 5, 4, borders=borders)
    weights, found = run(a)
    close(found, reference(a, weights), 0)
    assert torch.equal(found[-1], weights[1])


def test_weights_anywhere_in_memory(emulated):
    """A transposed weight, and one that begins where four cannot be read at once."""
    a = arguments(1, 20, 16, 4)
    shifted = torch.cat([a.bias[:1], a.weight.flatten()])[1:].view(16, 4)
    for weight in (a.weight.T.contiguous().T, shifted):
        moved = a._replace(weight=weight)
        weights, found = run(moved)
        close(found, reference(moved, weights), 2e-5)


def test_the_same_twice(emulated):
    """Sums over time have one order."""
    a = arguments(2, 150, 36, 4, dtype=bfloat16)
    torch.manual_seed(1)
    _, first = run(a)
    torch.manual_seed(1)
    _, second = run(a)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_it_refuses():
    a = arguments(1, 2, 3, 4)
    assert "the state is torch.float64" in kernels._refuses(a._replace(h0=a.h0.double()))
    assert "x is torch.float64" in kernels._refuses(a._replace(x=a.x.double()))
    assert "a width of 9" in kernels._refuses(arguments(1, 2, 3, 9))
    assert kernels._refuses(a) is None
