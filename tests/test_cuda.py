"""The CUDA kernels, run thread by thread on the CPU and compared with the definition."""

import pytest
import torch
from torch import Tensor

from containment import check_contained
from dualform.ops.cuda import selective_scan as scan_kernels
from dualform.ops.layout import time_last
from dualform.ops.selective_scan import SelectiveScan, selective_scan_op
from emulation import close, definition, gradients, normal, packing


def arguments(
    batch,
    length,
    width,
    states,
    groups=(1, 1),
    dtype=torch.float32,
    gated=True,
    softplus=True,
    borders=None,
    last=(),
    more=4,
    constant=(),
):
    """As the kernels take them; halves of one projection, as the layers hand them over.

    ``last`` are the names of those with time innermost; they lie in memory that is ``more`` steps longer. ``constant``
    are those of B and C that are (D, N).
    """
    rows = batch if borders is None else len(borders) - 1
    u, z = normal(batch, length, 2 * width, dtype=dtype).chunk(2, -1)
    delta = normal(batch, length, width, dtype=dtype) if softplus else torch.rand(batch, length, width).to(dtype)
    A = -torch.rand(width, states) * 2
    B, C = (normal(batch, length, g, states, dtype=dtype) for g in groups)
    D, bias = (normal(width), normal(width) - 1) if gated else (None, None)
    h0 = normal(rows, width, states)
    a = SelectiveScan(u, delta, A, B, C, D, z if gated else None, bias, softplus, h0, packing(borders))
    a = a._replace(**{name: normal(width, states, dtype=dtype) for name in constant})
    return a._replace(**{name: turned(getattr(a, name), more) for name in last})


def turned(m, more=4):
    """Time innermost."""
    return torch.nn.functional.pad(m.movedim(1, -1), (0, more), value=torch.nan)[..., :-more].movedim(-1, 1)


def reference(a, weights, dtype=torch.float64):
    return definition(selective_scan_op, a, weights, dtype)


def run(a):
    """Outputs and gradients, for weights of both outputs."""
    y, final, *saved = scan_kernels._forward(a)
    weights = [torch.randn_like(y), torch.randn_like(final)]
    return weights, [y, final, *gradients(selective_scan_op, a, scan_kernels._backward(weights, saved, a))]


CASES = {
    "one": dict(batch=1, length=1, width=1, states=1),
    "odd": dict(batch=2, length=65, width=17, states=5),
    "plain": dict(batch=2, length=63, width=16, states=16, gated=False, softplus=False),
    "tiles": dict(batch=2, length=200, width=48, states=16),
    "bfloat16": dict(batch=1, length=130, width=64, states=16, dtype=torch.bfloat16),
    "groups": dict(batch=2, length=70, width=48, states=8, groups=(3, 1)),
    "groups that cross": dict(batch=1, length=20, width=48, states=8, groups=(2, 3)),
    "packed": dict(batch=1, length=150, width=24, states=16, borders=[0, 1, 1, 40, 41, 150]),
    "constant": dict(batch=2, length=65, width=17, states=5, constant=("B", "C")),
    "constant B": dict(batch=2, length=70, width=48, states=16, groups=(1, 3), constant=("B",)),
    "constant C, packed": dict(
        batch=1, length=150, width=24, states=8, borders=[0, 1, 1, 40, 41, 150], constant=("C",)
    ),
    "float16 wide states": dict(batch=1, length=66, width=20, states=20, dtype=torch.float16),
}
EACH = ("u", "delta", "B", "C", "z")
LAST = {
    "odd": (0, dict(batch=2, length=65, width=17, states=5, last=EACH)),
    "bfloat16": (2, dict(batch=1, length=136, width=64, states=16, dtype=torch.bfloat16, last=EACH)),
    "lines": (1, dict(batch=2, length=200, width=24, states=16, dtype=torch.bfloat16, last=EACH, more=8)),
    "lines by turns": (3, dict(batch=1, length=200, width=40, states=16, dtype=torch.float16, last=EACH, more=8)),
    "lines in fours": (1, dict(batch=1, length=140, width=40, states=7, last=("delta", "C", "u"), constant=("B",))),
    "mixed": (2, dict(batch=1, length=68, width=20, states=20, dtype=torch.float16, last=("u", "z", "B"))),
    "packed": (3, dict(batch=1, length=150, width=24, states=16, borders=[0, 1, 1, 40, 41, 150], last=EACH)),
}
PLANS = [(1, 1, 3, 1, 64), (2, 1, 1, 4, 128), (1, 2, 2, 1, 64), (2, 4, 1, 2, 64)]


def test_plans_follow_the_shape(emulated):
    """Small, with channels in groups that lie across no block; and what the plans choose by themselves."""
    for case in (CASES["odd"], CASES["groups"], CASES["packed"], dict(batch=6, length=20, width=200, states=5)):
        a = arguments(**case)
        weights, found = run(a)
        close(found, reference(a, weights), 2e-5)


# The cases that cross borders in every plan, constant maps in one, the others in half: every combination is compiled.
PAIRS = [
    (case, plan)
    for i, case in enumerate(CASES)
    for j, plan in enumerate(PLANS)
    if case in ("odd", "tiles", "packed") or (i + j) % (4 if case.startswith("constant") else 2) == 0
]


@pytest.mark.parametrize("case, plan", PAIRS, ids=str)
def test_the_scan_is_the_definition(case, plan, emulated, poison, monkeypatch):
    channels, forward, teams, warps, span = plan
    a = arguments(**CASES[case])
    per_group = scan_kernels.Inputs(*a).per_group
    if per_group < a.u.shape[2] and per_group % (8 * channels * warps):
        channels, warps, teams = 1, 1, 1
    lead = span if a.packing is not None else 2 * span
    monkeypatch.setattr(scan_kernels, "plan_forward", lambda *a: scan_kernels.Plan(channels, forward, 1, teams))
    monkeypatch.setattr(scan_kernels, "plan_backward", lambda *a: (scan_kernels.Plan(channels, warps, 1), lead, span))
    weights, found = run(a)
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}[a.u.dtype]
    close(found, reference(a, weights), tolerance)
    if plan not in (PLANS[0], PLANS[-1]):
        return
    plain = scan_kernels._infer(a)
    assert torch.equal(plain[0], found[0])
    assert torch.equal(plain[1], found[1])


@pytest.mark.parametrize("case", LAST)
def test_time_may_be_innermost(case, emulated, poison, monkeypatch):
    number, sizes = LAST[case]
    channels, forward, teams, warps, span = PLANS[number]
    a = arguments(**sizes)
    lead = span if a.packing is not None else 2 * span
    monkeypatch.setattr(scan_kernels, "plan_forward", lambda *a: scan_kernels.Plan(channels, forward, 1, teams))
    monkeypatch.setattr(scan_kernels, "plan_backward", lambda *a: (scan_kernels.Plan(channels, warps, 1), lead, span))
    weights, found = run(a)
    close(found, reference(a, weights), {torch.float32: 2e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}[a.u.dtype])
    assert time_last(found[0]) == ("u" in sizes["last"])


@pytest.mark.parametrize("case, plan", [("tiles", PLANS[0]), ("packed", PLANS[1])], ids=str)
def test_what_is_not_finite_stays_in_its_sequence(case, plan, emulated, poison, monkeypatch):
    channels, forward, teams, warps, span = plan
    lead = span if case == "packed" else 2 * span
    monkeypatch.setattr(scan_kernels, "plan_forward", lambda *a: scan_kernels.Plan(channels, forward, 1, teams))
    monkeypatch.setattr(scan_kernels, "plan_backward", lambda *a: (scan_kernels.Plan(channels, warps, 1), lead, span))
    check_contained(selective_scan_op, arguments(**CASES[case]), scan_kernels._forward, scan_kernels._backward)


def test_what_it_refuses():
    a, refuses = arguments(1, 2, 16, 16), scan_kernels._refuses
    assert refuses(a) is None
    assert refuses(arguments(1, 2, 16, 33)) == "33 states, expected 1 to 32"
    assert refuses(arguments(1, 2, 16, 0)) == "0 states, expected 1 to 32"  # whose output is the skip, not zero
    assert refuses(arguments(1, 2, 12, 4, groups=(3, 1))) == "groups of 4 channels, not a multiple of 8"
    assert refuses(arguments(1, 2, 48, 4, groups=(2, 3))) is None
    assert refuses(arguments(1, 2, 12, 4, groups=(3, 1), constant=("B",))) is None
    assert refuses(a._replace(h0=a.h0.double())) == "the state is torch.float64, not float32"


def slow(length):
    """Arguments of states that remember hundreds of steps."""
    torch.manual_seed(0)
    a = arguments(1, length, 16, 16)
    return a._replace(A=-torch.arange(1, 17.0).repeat(16, 1), delta_bias=a.delta_bias - 3)


def as_exact_as_a_loop(a):
    weights, found = run(a)
    loop, want = reference(a, weights, torch.float32), reference(a, weights)
    for i, (a, b, exact) in enumerate(zip(found, loop, want, strict=True)):
        assert (a - exact).norm() <= 2 * (b - exact).norm(), i


def test_slow_states_are_as_exact_as_a_loop_in_float32(emulated):
    """The emulated 2^x is biased near zero, as that of a GPU; hundreds of steps must not multiply it."""
    as_exact_as_a_loop(slow(500))


def test_sums_over_long_spans(emulated, monkeypatch):
    """Of D and of the bias, to which every step adds: what is put aside on the way is there at the end."""
    monkeypatch.setattr(scan_kernels, "plan_backward", lambda *a: (scan_kernels.Plan(1, 1, 1), 2112, 2112))
    as_exact_as_a_loop(slow(2100))


@pytest.mark.gpu
def test_slow_states_on_a_gpu():
    a = slow(2000)
    as_exact_as_a_loop(a._replace(**{f: m.cuda() for f, m in a._asdict().items() if isinstance(m, Tensor)}))


@pytest.mark.gpu
@pytest.mark.parametrize("last", [EACH, ("u", "B", "z"), ("delta", "C")], ids=str)
@pytest.mark.parametrize("length", [197, 1000])
@pytest.mark.parametrize("warps", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_time_may_be_innermost_on_a_gpu(dtype, warps, length, last, monkeypatch):
    """Aligned for reads of eight steps, and not; the numbers are those of the other layout."""
    torch.manual_seed(0)
    monkeypatch.setattr(scan_kernels, "plan_forward", lambda *a: scan_kernels.Plan(2, warps, 1))
    a = arguments(2, length, 72, 16, dtype=dtype)
    a = a._replace(**{f: m.cuda() for f, m in a._asdict().items() if isinstance(m, Tensor)})
    weights, found = run(a._replace(**{name: turned(getattr(a, name), 8) for name in last}))
    y, final, *saved = scan_kernels._forward(a)
    want = [y, final, *gradients(selective_scan_op, a, scan_kernels._backward(weights, saved, a))]
    close(found, [m.double() for m in want], 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("constant", [("B",), ("C",), ("B", "C")], ids=str)
def test_constant_maps_on_a_gpu(constant):
    torch.manual_seed(0)
    a = arguments(2, 197, 72, 16, constant=constant)
    a = a._replace(**{f: m.cuda() for f, m in a._asdict().items() if isinstance(m, Tensor)})
    weights, found = run(a)
    close(found, reference(a, weights), 2e-5)
