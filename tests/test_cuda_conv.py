"""The CUDA kernels of the short convolution, run thread by thread on the CPU and compared with the definition."""

import pytest
import torch
from torch import Tensor

from dualform.ops import backend, causal_conv1d, step
from dualform.ops.cuda import causal_conv1d as kernels
from emulation import close, differentiable, double, leaf, normal

bfloat16, float16, float32 = torch.bfloat16, torch.float16, torch.float32
TOLERANCE = {float32: 2e-5, bfloat16: 1e-2, float16: 2e-3}


def arguments(batch, length, width, taps, dtype=float32, bias=True, silu=True, borders=None, like=float32, apart=8):
    """As the operator takes them; x lies inside a projection that is ``apart`` channels wider."""
    rows = batch if borders is None else len(borders) - 1
    x = normal(batch, length, width + apart, dtype=dtype)[..., apart:]
    return [
        x,
        normal(width, taps, dtype=like),
        normal(width, dtype=like) if bias else None,
        silu,
        normal(rows, width, taps - 1),
        None if borders is None else torch.tensor(borders, dtype=torch.int32),
    ]


def run(args):
    """Outputs and gradients, for weights of both outputs."""
    y, final = kernels._forward(*args)
    weights = [normal(*y.shape, dtype=y.dtype), normal(*final.shape)]
    return weights, [y, final, *kernels._backward(weights, [], *args)]


def reference(args, weights):
    leaves = [leaf(a) for a in args]
    x, weight, bias, silu, state, cu_seqlens = leaves
    with backend("reference"):
        out = causal_conv1d(
            x, weight, bias, activation="silu" if silu else None, initial_state=state, cu_seqlens=cu_seqlens
        )
    wanted = [a for a in leaves if differentiable(a)]
    grads = torch.autograd.grad(out, wanted, [double(w) for w in weights], materialize_grads=True)
    return [*(y.detach() for y in out), *grads]


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
    args = arguments(**CASES[case])
    weights, found = run(args)
    assert [a.dtype for a in found] == [
        a.dtype for a in (args[0], args[4], *args[:3], args[4]) if isinstance(a, Tensor)
    ]
    close(found, reference(args, weights), TOLERANCE[args[0].dtype])


@pytest.mark.parametrize("rows, length", [(1, 300), (70, 9)])
def test_plans_follow_the_shape(rows, length, emulated, poison):
    args = arguments(rows, length, 40, 4)
    weights, found = run(args)
    close(found, reference(args, weights), 2e-5)


@pytest.mark.parametrize("borders", [None, [0, 0, 0]])
def test_nothing_to_convolve(borders, emulated, poison):
    args = arguments(1 if borders else 2, 0, 5, 4, borders=borders)
    weights, found = run(args)
    close(found, reference(args, weights), 0)
    assert torch.equal(found[-1], weights[1])


def test_weights_anywhere_in_memory(emulated):
    """A transposed weight, and one that begins where four cannot be read at once."""
    x, weight, bias, *rest = arguments(1, 20, 16, 4)
    for w, c in ((weight.T.contiguous().T, bias), (torch.cat([bias[:1], weight.flatten()])[1:].view(16, 4), bias)):
        weights, found = run([x, w, c, *rest])
        close(found, reference([x, w, c, *rest], weights), 2e-5)


def test_the_same_twice(emulated):
    """Sums over time have one order."""
    args = arguments(2, 150, 36, 4, dtype=bfloat16)
    torch.manual_seed(1)
    _, first = run(args)
    torch.manual_seed(1)
    _, second = run(args)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype, taps", [(float32, 4), (bfloat16, 3), (float16, 1)])
def test_one_step(dtype, taps, emulated, poison, monkeypatch):
    monkeypatch.setattr(kernels, "_on_gpu", lambda *a: True)
    monkeypatch.setattr(kernels.compiler, "missing", lambda: "")
    x, weight, bias, silu, state, _ = arguments(3, 1, 20, taps, dtype=dtype)
    found = kernels.causal_conv1d_update(x[:, 0], state, weight, bias, silu)
    want = reference([x, weight, bias, silu, state, None], [normal(3, 1, 20), normal(3, 20, taps - 1)])[:2]
    close(list(found), [want[0][:, 0], want[1]], TOLERANCE[dtype])


def test_a_step_on_another_device_is_left_to_others():
    x, weight, bias, silu, state, _ = arguments(3, 1, 20, 4)
    assert kernels.causal_conv1d_update(x[:, 0], state, weight, bias, silu) is None


def test_a_step_is_offered_to_one_backend_after_another(monkeypatch):
    x, weight, bias, silu, state, _ = arguments(3, 1, 20, 4)
    given = (x[:, 0], state, weight, bias, silu)
    asked = []

    def answer(name, found):
        return name, lambda *args: asked.append(name) or found

    steps = [answer("native", None), answer("cuda", (x, state)), answer("other", (state, x))]
    monkeypatch.setitem(step._STEPS, "causal_conv1d_update", steps)
    found = step.fast_step("causal_conv1d_update", *given)
    assert found is not None
    assert found[0] is x
    assert asked == ["native", "cuda"]
    with backend("native"):
        assert step.fast_step("causal_conv1d_update", *given) is None
    assert asked == ["native", "cuda", "native"]


def test_what_it_refuses(monkeypatch):
    monkeypatch.setattr(kernels.compiler, "missing", lambda: "no compiler")
    assert kernels._refuses(*arguments(1, 2, 3, 4)) == "no compiler"
    assert "float64" in kernels._refuses(*(double(a) for a in arguments(1, 2, 3, 4)))
    assert "a width of 9" in kernels._refuses(*arguments(1, 2, 3, 9))
