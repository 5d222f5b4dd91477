"""The CUDA kernels of the diagonal state space model, run thread by thread and compared with the definition."""

import shutil
import subprocess

import pytest
import torch

from dualform.ops.cuda import compiler
from dualform.ops.cuda import diagonal_ssm as kernels
from dualform.ops.diagonal_ssm import diagonal_ssm_op
from emulation import HERE, SOURCES, close, normal

CASES = {
    "one": dict(batch=1, length=1, width=1, modes=1),
    "odd": dict(batch=2, length=65, width=17, modes=5),
    "three": dict(batch=3, length=63, width=3, modes=3),
    "spans": dict(batch=2, length=333, width=36, modes=32),
    "bfloat16": dict(batch=1, length=130, width=64, modes=16, dtype=torch.bfloat16),
    "float16": dict(batch=1, length=66, width=20, modes=33, dtype=torch.float16),
    "packed": dict(batch=1, length=400, width=24, modes=7, borders=[0, 0, 1, 40, 40, 195, 259, 400, 400]),
}
PLANS = {"whole": (4, 2, 512), "spans of 64": (4, 1, 64), "eight lanes": (8, 3, 128)}  # lanes, warps, steps of a span


def arguments(batch, length, width, modes, dtype=torch.float32, borders=None):
    """As the kernels take them; u is half of a projection, as it may come from a layer."""
    rows = batch if borders is None else len(borders) - 1
    u = normal(batch, length, 2 * width, dtype=dtype).chunk(2, -1)[1]
    Abar = torch.exp(torch.complex(-0.2 * torch.rand(width, modes), 2 * normal(width, modes)))
    CB, h0 = (torch.randn(*shape, width, modes, dtype=torch.complex64) for shape in ((), (rows,)))
    return [u, Abar, CB, h0, None if borders is None else torch.tensor(borders, dtype=torch.int32)]


def double(x):
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def reference(args, weights):
    leaves = [double(x).requires_grad_() for x in args[:4]]
    out = diagonal_ssm_op.reference(*leaves, args[4])
    return [*(y.detach() for y in out), *torch.autograd.grad(out, leaves, [double(w) for w in weights])]


def close_complex(got, want, tolerance):
    close(*([torch.view_as_real(x) if x.is_complex() else x for x in xs] for xs in (got, want)), tolerance)


@pytest.mark.parametrize("last", ["both states", "no gradient of the last state"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("case", CASES)
def test_the_kernels_are_the_definition(case, plan, last, emulated, poison, monkeypatch):
    args = arguments(**CASES[case])
    (lanes, warps, span), modes = PLANS[plan], CASES[case]["modes"]
    lanes = 8 if modes > 32 else lanes
    plan = kernels.Plan(lanes, kernels._at_least(modes, lanes), warps, 1, span)
    monkeypatch.setattr(kernels, "plan_forward", lambda *a: plan)
    monkeypatch.setattr(kernels, "plan_backward", lambda *a: plan)
    y, final = kernels._forward(*args)
    weights = [normal(*y.shape, dtype=y.dtype), torch.randn_like(final)]
    if last != "both states":
        weights[1].zero_()
    found = kernels._backward(weights, [], *args)
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[y.dtype]
    close_complex([y, final, *found], reference(args, weights), tolerance)


def test_slow_poles_over_many_steps(emulated):
    """Decays of e in up to 10^5 steps: rounding must not grow with the number of steps."""
    u, _, CB, h0, _ = arguments(1, 20000, 4, 8)
    rates = -torch.logspace(-5, -1, 8, dtype=torch.float64).expand(4, 8)
    Abar = torch.exp(torch.complex(rates, rates[:, :1] * 100 * torch.arange(8))).to(torch.complex64)
    args = [u, Abar, CB, h0, None]
    weights = [normal(*u.shape), torch.randn_like(h0)]
    wide = [double(x) for x in args[:4]]
    torch_backend = next(b for b in diagonal_ssm_op.backends if b.name == "torch")
    want = [*torch_backend.forward(*wide, None), *torch_backend.backward([double(w) for w in weights], [], *wide, None)]
    found = kernels._forward(*args)
    found += kernels._backward(weights, [], *args)
    close_complex(found, want, 5e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("lanes", [4, 8])
def test_shared_memory_holds_what_the_kernels_keep_there(lanes, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(compiler, "launch", lambda *a: asked.append(a[5]))
    inputs, plan = kernels.Inputs(*arguments(1, 100, 8, 8)), kernels.Plan(lanes, 2, 3, 1, 64)
    call = kernels._Call("", inputs, plan)
    call.over_spans("", 1, 0, ())
    call.over_spans("", 0, 1, ())
    text = f'#include "{HERE / "cuda_emulator.h"}"\n#include "{SOURCES / "diagonal_ssm.cuh"}"\n'
    text += 'int main() { return printf("%zu %zu", WARPS * sizeof(Tile), WARPS * sizeof(Sums)) < 0; }\n'
    flags = [f"-D{name}={compiler._macro(value)}" for name, value in call.macros.items()]
    (tmp_path / "sizes.cpp").write_text(text)
    compile_ = ["g++", *flags, "-std=c++20", "-w", "-include", "stdio.h", "sizes.cpp", "-o", "sizes"]
    subprocess.run(compile_, cwd=tmp_path, check=True)
    sizes = subprocess.run([tmp_path / "sizes"], capture_output=True, text=True, check=True).stdout
    assert asked == [int(size) for size in sizes.split()]


@pytest.mark.parametrize("modes", [1, 4, 5, 8, 9, 16, 17, 32, 33, 64])
def test_plans_have_room_for_all_modes(modes):
    for plan in (kernels.plan_forward, kernels.plan_backward):
        for batch, length, width in ((1, 1, 1), (8, 16384, 1024), (1, 131072, 1024)):
            p = plan(modes, batch, length, width)
            assert p.lanes * p.modes >= modes
            assert p.span == length or p.span % 64 == 0


def test_refusals_say_why():
    u, Abar, CB, h0, _ = arguments(1, 2, 3, 65)
    refuses = kernels._refuses
    assert refuses(u, Abar, CB, double(h0), None) == "the state is torch.complex128, not complex64"
    assert refuses(double(u), Abar, CB, h0, None) == "u is torch.float64, not float32, bfloat16 or float16"
    assert refuses(u, Abar, CB, h0, None) == "65 modes, more than 64"


def test_empty_calls_write_nothing(poison):
    for shape in ((2, 0, 3, 2), (0, 4, 3, 2), (2, 4, 3, 0)):
        args = arguments(*shape)
        y, final = kernels._forward(*args)
        assert torch.equal(y, torch.zeros_like(y))
        assert torch.equal(final, args[3])
        weights = [normal(*y.shape), torch.randn_like(final)]
        du, dAbar, dCB, dh0 = kernels._backward(weights, [], *args)
        assert torch.equal(dh0, weights[1])
        assert not any(x.any() for x in (du, dAbar, dCB))
