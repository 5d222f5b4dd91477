"""The CUDA kernels, run thread by thread on the CPU and compared with the definition."""

import pytest
import torch
from torch import Tensor

from dualform.ops import backend, selective_scan
from dualform.ops.cuda import selective_scan as scan_kernels
from emulation import close, leaf, normal


def arguments(
    batch, length, width, states, groups=(1, 1), dtype=torch.float32, gated=True, softplus=True, borders=None
):
    """As the kernels take them; halves of one projection, as the layers hand them over."""
    rows = batch if borders is None else len(borders) - 1
    u, z = normal(batch, length, 2 * width, dtype=dtype).chunk(2, -1)
    delta = normal(batch, length, width, dtype=dtype) if softplus else torch.rand(batch, length, width).to(dtype)
    A = -torch.rand(width, states) * 2
    B, C = (normal(batch, length, g, states, dtype=dtype) for g in groups)
    D, bias = (normal(width), normal(width) - 1) if gated else (None, None)
    cu_seqlens = None if borders is None else torch.tensor(borders)
    h0 = normal(rows, width, states)
    return [u, delta, A, B, C, D, z if gated else None, bias, softplus, h0, cu_seqlens]


def reference(args, weights, dtype=torch.float64):
    leaves = [leaf(x, dtype) for x in args]
    u, delta, A, B, C, D, z, bias, softplus, h0, cu_seqlens = leaves
    with backend("reference"):
        out = selective_scan(
            u,
            delta,
            A,
            B,
            C,
            D,
            z,
            delta_bias=bias,
            delta_softplus=softplus,
            initial_state=h0,
            cu_seqlens=cu_seqlens,
        )
    wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    return [*(y.detach() for y in out), *torch.autograd.grad(out, wanted, [w.to(dtype) for w in weights])]


CASES = {
    "one": dict(batch=1, length=1, width=1, states=1),
    "odd": dict(batch=2, length=65, width=17, states=5),
    "plain": dict(batch=2, length=63, width=16, states=16, gated=False, softplus=False),
    "tiles": dict(batch=2, length=200, width=48, states=16),
    "bfloat16": dict(batch=1, length=130, width=64, states=16, dtype=torch.bfloat16),
    "groups": dict(batch=2, length=70, width=48, states=8, groups=(3, 1)),
    "packed": dict(batch=1, length=150, width=24, states=16, borders=[0, 1, 1, 40, 41, 150]),
    "float16 wide states": dict(batch=1, length=66, width=20, states=20, dtype=torch.float16),
}
PLANS = [(1, 1, 3, 1, 64), (2, 1, 1, 4, 128), (1, 2, 2, 1, 64), (2, 4, 1, 2, 64)]


def test_plans_follow_the_shape(emulated):
    """Small, with channels in groups that lie across no block; and what the plans choose by themselves."""
    for case in (CASES["odd"], CASES["groups"], CASES["packed"], dict(batch=6, length=20, width=200, states=5)):
        args = arguments(**case)
        y, final, *saved = scan_kernels._forward(*args)
        weights = [normal(*y.shape), normal(*final.shape)]
        close([y, final, *scan_kernels._backward(weights, saved, *args)], reference(args, weights), 2e-5)


# The cases that cross borders in every plan, the others in half of them: every combination is compiled.
PAIRS = [
    (case, plan)
    for i, case in enumerate(CASES)
    for j, plan in enumerate(PLANS)
    if case in ("odd", "tiles", "packed") or (i + j) % 2 == 0
]


@pytest.mark.parametrize("case, plan", PAIRS, ids=str)
def test_the_scan_is_the_definition(case, plan, emulated, poison, monkeypatch):
    channels, forward, teams, warps, span = plan
    args = arguments(**CASES[case])
    per_group = args[0].shape[2] // max(args[3].shape[2], args[4].shape[2])
    if max(args[3].shape[2], args[4].shape[2]) > 1 and per_group % (8 * channels * warps):
        channels, warps, teams = 1, 1, 1
    lead = span if args[-1] is not None else 2 * span
    monkeypatch.setattr(scan_kernels, "plan_forward", lambda *a: scan_kernels.Plan(channels, forward, 1, teams))
    monkeypatch.setattr(scan_kernels, "plan_backward", lambda *a: (scan_kernels.Plan(channels, warps, 1), lead, span))
    y, final, *saved = scan_kernels._forward(*args)
    weights = [normal(*y.shape, dtype=y.dtype), normal(*final.shape)]
    found = scan_kernels._backward(weights, saved, *args)
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}[y.dtype]
    close([y, final, *found], reference(args, weights), tolerance)
    if plan not in (PLANS[0], PLANS[-1]):
        return
    plain = scan_kernels._infer(*args)
    assert torch.equal(plain[0], y)
    assert torch.equal(plain[1], final)


def slow(length):
    """Arguments of states that remember hundreds of steps."""
    torch.manual_seed(0)
    args = arguments(1, length, 16, 16)
    args[2], args[7] = -torch.arange(1, 17.0).repeat(16, 1), args[7] - 3
    return args


def as_exact_as_a_loop(found, args, weights):
    loop, want = reference(args, weights, torch.float32), reference(args, weights)
    for i, (a, b, exact) in enumerate(zip(found, loop, want, strict=True)):
        assert (a - exact).norm() <= 2 * (b - exact).norm(), i


def test_slow_states_are_as_exact_as_a_loop_in_float32(emulated):
    """The emulated 2^x is biased near zero, as that of a GPU; hundreds of steps must not multiply it."""
    args = slow(500)
    y, final, *saved = scan_kernels._forward(*args)
    weights = [normal(*y.shape), normal(*final.shape)]
    as_exact_as_a_loop([y, final, *scan_kernels._backward(weights, saved, *args)], args, weights)


def test_sums_over_long_spans(emulated, monkeypatch):
    """Of D and of the bias, to which every step adds: what is put aside on the way is there at the end."""
    args = slow(2100)
    monkeypatch.setattr(scan_kernels, "plan_backward", lambda *a: (scan_kernels.Plan(1, 1, 1), 2112, 2112))
    y, final, *saved = scan_kernels._forward(*args)
    weights = [normal(*y.shape), normal(*final.shape)]
    as_exact_as_a_loop([y, final, *scan_kernels._backward(weights, saved, *args)], args, weights)


@pytest.mark.gpu
def test_slow_states_on_a_gpu():
    args = [x.cuda() if isinstance(x, Tensor) else x for x in slow(2000)]
    y, final, *saved = scan_kernels._forward(*args)
    weights = [torch.randn_like(y), torch.randn_like(final)]
    as_exact_as_a_loop([y, final, *scan_kernels._backward(weights, saved, *args)], args, weights)
