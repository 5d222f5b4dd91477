"""The CUDA kernels of the short convolution, run thread by thread on the CPU and compared with the definition."""

import pytest
import torch

from containment import check_contained, check_contained_in_runs
from dualform.ops.causal_conv1d import CausalConv1d, causal_conv1d, causal_conv1d_op
from dualform.ops.cuda import causal_conv1d as kernels
from dualform.ops.layout import time_last
from emulation import close, definition, gradients, normal, packing

bfloat16, float16, float32 = torch.bfloat16, torch.float16, torch.float32
TOLERANCE = {float32: 2e-5, bfloat16: 1e-2, float16: 2e-3}


def arguments(
    batch, length, width, taps, dtype=float32, bias=True, silu=True, borders=None, like=float32, apart=8, last=False,
    ids=None,
):  # fmt: skip
    """As the operator takes them; x lies inside a projection that is ``apart`` channels wider.

    With ``last`` time is innermost; ``ids`` is how long runs of equal ids are, about.
    """
    rows = batch if borders is None else len(borders) - 1
    x = normal(batch, length, width + apart, dtype=dtype)
    x = (x.mT.contiguous().mT if last else x)[..., apart:]
    weight, bias = normal(width, taps, dtype=like), normal(width, dtype=like) if bias else None
    h0 = normal(rows, width, taps - 1)
    return CausalConv1d(x, weight, bias, silu, h0, packing(borders), runs(batch, length, ids) if ids else None)


def runs(batch, length, about):
    """Ids of sequences that are now longer, now shorter, with padding between them, and before those of one row."""
    ids = (torch.rand(batch, length) * about < 1).cumsum(1, dtype=torch.int32) % 4 - 1
    ids[-1, : length // 3] = -1
    return ids


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
RUNS = {
    "runs": dict(batch=3, length=65, width=17, taps=4, ids=6),
    "runs, time last": dict(batch=3, length=65, width=17, taps=4, ids=6, last=True),
    "short runs, time last": dict(batch=3, length=2, width=5, taps=4, ids=2, last=True),
    "runs width 8, time last": dict(batch=2, length=72, width=9, taps=8, ids=9, silu=False, dtype=bfloat16, last=True),
}
LAST = {
    "odd, time last": dict(batch=2, length=65, width=17, taps=4, last=True),
    "width 3, time last": dict(batch=2, length=260, width=7, taps=3, bias=False, last=True),
    "bfloat16, time last": dict(batch=1, length=520, width=3, taps=4, dtype=bfloat16, like=bfloat16, last=True),
    "packed, time last": dict(batch=1, length=47, width=24, taps=4, borders=SHORT, last=True),
}
CALLS = [(case, plan) for case in CASES for plan in (0, 1)] + [(case, 0) for case in (*RUNS, *LAST)]
CASES |= RUNS | LAST
PLANS = [kernels.Plan(8, 4, 2, 16), kernels.Plan(4, 8, 3, 64)]


@pytest.mark.parametrize("case, plan", CALLS, ids=str)
def test_the_convolution_is_the_definition(case, plan, emulated, poison, monkeypatch):
    monkeypatch.setattr(kernels, "plan_forward", lambda *a: PLANS[plan])
    monkeypatch.setattr(kernels, "plan_backward", lambda *a: PLANS[plan])
    a = arguments(**CASES[case])
    weights, found = run(a)
    close(found, reference(a, weights), TOLERANCE[a.x.dtype])
    assert time_last(found[0]) == time_last(a.x)


@pytest.mark.parametrize("case", ["odd", "packed", "bfloat16", "odd, time last"])
def test_what_is_not_finite_stays_in_its_sequence(case, emulated, poison, monkeypatch):
    monkeypatch.setattr(kernels, "plan_forward", lambda *a: PLANS[0])
    monkeypatch.setattr(kernels, "plan_backward", lambda *a: PLANS[0])
    a = arguments(**CASES[case])
    check_contained(causal_conv1d_op, a, kernels._forward, kernels._backward, channels=True)


@pytest.mark.parametrize("case", ["runs", "runs, time last"])
def test_what_is_not_finite_stays_in_its_run(case, emulated, poison, monkeypatch):
    monkeypatch.setattr(kernels, "plan_forward", lambda *a: PLANS[0])
    monkeypatch.setattr(kernels, "plan_backward", lambda *a: PLANS[0])
    check_contained_in_runs(arguments(**CASES[case]), kernels._forward, kernels._backward)


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


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 197, 1000, 2048])
@pytest.mark.parametrize("dtype", [float32, bfloat16], ids=str)
def test_time_last_on_a_gpu(dtype, length):
    """Aligned for reads of several steps, and not; the numbers are those of the other layout."""
    torch.manual_seed(0)
    a = arguments(3, length, 40, 4, dtype=dtype, last=True, ids=30)
    a = CausalConv1d(*(m.cuda() if isinstance(m, torch.Tensor) else m for m in a))
    weights = [torch.randn_like(a.x), torch.randn_like(a.h0)]
    for ids in (None, a.ids):
        found = []
        for x in (a.x, a.x.contiguous()):
            given = a._replace(x=x, ids=ids)
            results = kernels._forward(given)
            found.append([*results, *gradients(causal_conv1d_op, given, kernels._backward(weights, [], given))])
        close(found[0], [m.double() for m in found[1]], 1e-5 if dtype == float32 else 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("last", [False, True])
def test_runs_take_no_synchronisation(last):
    a = arguments(2, 64, 16, 4, last=last, ids=9)
    x, weight, bias, ids = (m.cuda() for m in (a.x, a.weight, a.bias, a.ids))
    x.requires_grad_()

    def run():
        causal_conv1d(x, weight, bias, activation="silu", seq_idx=ids)[0].mean().backward()

    run()  # compiles
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
