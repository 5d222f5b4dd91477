"""The CUDA kernels of the diagonal state space model, run thread by thread and compared with the definition."""

import shutil
import subprocess

import pytest
import torch

from containment import check_contained
from dualform.ops.cuda import compiler
from dualform.ops.cuda import diagonal_ssm as kernels
from dualform.ops.diagonal_ssm import DiagonalSSM, diagonal_ssm_op
from emulation import HERE, SOURCES, close, definition, gradients, normal, packing

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
    return DiagonalSSM(u, Abar, CB, h0, packing(borders))


def run(a, weights):
    """Outputs and gradients."""
    y, final = kernels._forward(a)
    return [y, final, *gradients(diagonal_ssm_op, a, kernels._backward(weights, [], a))]


def weights_of(a):
    return [normal(*a.u.shape, dtype=a.u.dtype), torch.randn_like(a.h0)]


@pytest.mark.parametrize("last", ["both states", "no gradient of the last state"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("case", CASES)
def test_the_kernels_are_the_definition(case, plan, last, emulated, poison, monkeypatch):
    a = arguments(**CASES[case])
    (lanes, warps, span), modes = PLANS[plan], CASES[case]["modes"]
    lanes = 8 if modes > 32 else lanes
    plan = kernels.Plan(lanes, kernels._at_least(modes, lanes), warps, 1, span)
    monkeypatch.setattr(kernels, "plan_forward", lambda *a: plan)
    monkeypatch.setattr(kernels, "plan_backward", lambda *a: plan)
    weights = weights_of(a)
    if last != "both states":
        weights[1].zero_()
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[a.u.dtype]
    close(run(a, weights), definition(diagonal_ssm_op, a, weights), tolerance)


@pytest.mark.parametrize("case", ["odd", "packed"])
def test_what_is_not_finite_stays_in_its_sequence(case, emulated, poison, monkeypatch):
    a = arguments(**CASES[case])
    plan = kernels.Plan(4, kernels._at_least(a.h0.shape[2], 4), 1, 1, 64)
    monkeypatch.setattr(kernels, "plan_forward", lambda *a: plan)
    monkeypatch.setattr(kernels, "plan_backward", lambda *a: plan)
    check_contained(diagonal_ssm_op, a, kernels._forward, kernels._backward, channels=True)


def test_conjugates_that_exist_only_as_a_flag(emulated):
    """PyTorch conjugates without touching memory; kernels read memory."""
    a = arguments(1, 70, 4, 3)
    given = a._replace(Abar=a.Abar.conj(), CB=a.CB.conj(), h0=a.h0.conj())
    weights = weights_of(a)
    found = run(given, [weights[0], weights[1].conj()])
    close(found, definition(diagonal_ssm_op, given, [weights[0], weights[1].conj()]), 2e-5)


def test_slow_poles_over_many_steps(emulated):
    """Decays of e in up to 10^5 steps: rounding must not grow with the number of steps."""
    a = arguments(1, 20000, 4, 8)
    rates = -torch.logspace(-5, -1, 8, dtype=torch.float64).expand(4, 8)
    a = a._replace(Abar=torch.exp(torch.complex(rates, rates[:, :1] * 100 * torch.arange(8))).to(torch.complex64))
    weights = weights_of(a)
    names = [name for name, _ in diagonal_ssm_op.differentiable(a)]
    wide = a._replace(**{f: m.to(torch.promote_types(m.dtype, torch.float64)) for f, m in zip(names, a, strict=False)})
    torch_backend = next(b for b in diagonal_ssm_op.backends if b.name == "torch")
    wide_weights = [w.to(torch.promote_types(w.dtype, torch.float64)) for w in weights]
    want = gradients(diagonal_ssm_op, wide, torch_backend.backward(wide_weights, [], wide))
    close(run(a, weights), [*torch_backend.forward(wide), *want], 5e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("lanes", [4, 8])
def test_shared_memory_holds_what_the_kernels_keep_there(lanes, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(compiler, "launch", lambda *a: asked.append(a[5]))
    inputs, plan = arguments(1, 100, 8, 8), kernels.Plan(lanes, 2, 3, 1, 64)
    call = kernels._Call("", inputs, plan)
    call.over_spans("", 1, 0, b"")
    call.over_spans("", 0, 1, b"")
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
    a, refuses = arguments(1, 2, 3, 65), kernels._refuses
    assert refuses(a._replace(h0=a.h0.to(torch.complex128))) == "the state is torch.complex128, not complex64"
    assert refuses(a._replace(u=a.u.double())) == "u is torch.float64, not float32, bfloat16 or float16"
    assert refuses(a) == "65 modes, more than 64"


def test_empty_calls_write_nothing(poison):
    for shape in ((2, 0, 3, 2), (0, 4, 3, 2), (2, 4, 3, 0)):
        a = arguments(*shape)
        y, final = kernels._forward(a)
        assert torch.equal(y, torch.zeros_like(y))
        assert torch.equal(final, a.h0)
        weights = weights_of(a)
        found = kernels._backward(weights, [], a)
        assert torch.equal(found.pop("h0"), weights[1])
        assert not any(x.any() for x in found.values())
