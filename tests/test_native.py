"""The CPU kernels: every operator on every instruction set that this processor has, against the float64 reference."""

import functools
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, bfloat16, complex64, complex128, float16, float32, float64

from dualform.core.errors import ArgumentError, BackendError
from dualform.core.packing import Packing
from dualform.ops import OPS, backend, causal_conv1d_update, selective_scan, selective_state_update
from dualform.ops.native import library
from dualform.ops.structs import Structure
from instructions import INSTRUCTIONS

pytestmark = pytest.mark.skipif(bool(library.missing), reason=library.missing)

TOLERANCE = {float32: 5e-6, float64: 2e-14, bfloat16: 1e-2, float16: 2e-3}
SHORT = [0, 0, 1, 3, 3, 4, 8, 41, 41, 42, 130, 130]  # borders of sequences, empty ones among them


def normal(*shape: int, dtype: torch.dtype = float32) -> Tensor:
    if dtype.is_complex:
        return torch.view_as_complex(torch.randn(*shape, 2, dtype=float64)).to(dtype)
    return torch.randn(*shape, dtype=float64).to(dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, float32)


def packed(borders: list[int] | None) -> Packing | None:
    return None if borders is None else Packing.of_host(torch.tensor(borders), torch.device("cpu"))


def run(op: str, *args: Any) -> tuple[Tensor, ...]:
    """An op, given the fields of its record in their order."""
    return OPS[op](OPS[op].arguments(*args))


def rows(batch: int, borders: list[int] | None) -> int:
    return batch if borders is None else len(borders) - 1


def scan(batch, length, width, states, groups=(1, 1), dtype=float32, borders=None, around=""):
    """``around`` the recurrence: "D" a skip, "z" a gate, "b" a bias and "s" a softplus of the step."""
    real = wide(dtype)
    step = 2 * torch.randn(batch, length, width) - 2 if "s" in around else torch.rand(batch, length, width) * 0.5
    return (
        normal(batch, length, width, dtype=dtype),
        step.to(dtype),
        (-3 * torch.rand(width, states)).to(real),
        normal(batch, length, groups[0], states, dtype=dtype),
        normal(batch, length, groups[1], states, dtype=dtype),
        normal(width, dtype=dtype) if "D" in around else None,
        normal(batch, length, width, dtype=dtype) if "z" in around else None,
        torch.rand(width).to(real) if "b" in around else None,
        "s" in around,
        normal(rows(batch, borders), width, states, dtype=real),
        packed(borders),
    )


def constant(which, *args, **options):
    """A scan whose B ("B"), or C, or both are the same at all times."""
    a: dict[str, Any] = dict(zip(OPS["selective_scan"].fields, scan(*args, **options), strict=True))
    return (*(normal(*a["A"].shape, dtype=a["u"].dtype) if k in which else m for k, m in a.items()),)


def turned(op, names, args):
    """The arguments of an op, of which some have time innermost in memory."""
    named = zip(OPS[op].fields, args, strict=False)  # without those that have a default
    return tuple(m.movedim(1, -1).contiguous().movedim(-1, 1) if k in names.split() else m for k, m in named)


def scan_turned(names, *args, **options):
    return turned("selective_scan", names, scan(*args, **options))


def constant_turned(names, *args, **options):
    return turned("selective_scan", names, constant(*args, **options))


def linear(batch, length, shape, dtypes=(float32, float32), borders=None, alike="", reverse=False):
    """``alike``: whether a is the same at all times ("t") or along the last axis ("c")."""
    sizes = (1, 1, *shape) if alike == "t" else (batch, length, *shape)
    sizes = (*sizes[:-1], 1) if alike == "c" else sizes
    a = torch.rand(sizes) * 1.6 - 0.8
    a = (torch.polar(a.abs(), 3 * a) if dtypes[0].is_complex else a).to(dtypes[0])
    b = normal(batch, length, *shape, dtype=dtypes[1])
    state = torch.promote_types(wide(dtypes[0]), wide(dtypes[1]))
    return a.expand_as(b), b, normal(rows(batch, borders), *shape, dtype=state), packed(borders), reverse


def diagonal(batch, length, width, modes, dtype=float32, borders=None):
    state = torch.promote_types(wide(dtype), complex64)
    decay = torch.polar(torch.rand(width, modes) * 0.4 + 0.6, torch.rand(width, modes) * 6).to(state)
    return (
        normal(batch, length, width, dtype=dtype),
        decay,
        normal(width, modes, dtype=state),
        normal(rows(batch, borders), width, modes, dtype=state),
        packed(borders),
    )


def dual(batch, length, heads, width, states, groups=1, dtype=float32, borders=None, around=""):
    real = wide(dtype)
    return (
        normal(batch, length, heads, width, dtype=dtype),
        torch.rand(batch, length, heads).to(real),
        (-3 * torch.rand(heads)).to(real),
        normal(batch, length, groups, states, dtype=dtype),
        normal(batch, length, groups, states, dtype=dtype),
        normal(heads, width, dtype=dtype) if "D" in around else None,
        normal(batch, length, heads, width, dtype=dtype) if "z" in around else None,
        normal(rows(batch, borders), heads, width, states, dtype=real),
        packed(borders),
        64,
    )


def conv(batch, length, width, taps, dtype=float32, borders=None, bias=True, silu=False):
    return (
        normal(batch, length, width, dtype=dtype),
        normal(width, taps, dtype=dtype),
        normal(width, dtype=dtype) if bias else None,
        silu,
        normal(rows(batch, borders), width, taps - 1, dtype=wide(dtype)),
        packed(borders),
    )


def conv_turned(*args, **options):
    return turned("causal_conv1d", "x", conv(*args, **options))


def add(shape, dtype=float32, stream=float32, center=False, bias=True, kept=None):
    """``stream`` is the dtype of what is added to, ``kept`` of the sum."""
    width = shape[-1]
    return (
        normal(*shape, dtype=dtype),
        normal(*shape, dtype=stream),
        normal(width, dtype=dtype),
        normal(width, dtype=dtype) if bias else None,
        1e-5,
        center,
        dtype,
        kept or stream,
    )


def gate(shape, groups=1, dtype=float32, center=False, bias=True, gated=True, before=False):
    width = shape[-1]
    return (
        normal(*shape, dtype=dtype),
        normal(width, dtype=dtype),
        normal(width, dtype=dtype) if bias else None,
        normal(*shape, dtype=dtype) if gated else None,
        groups,
        0.1,
        center,
        before,
        dtype,
    )


# Widths beside and across the lanes of every vector, lengths beside and across tiles.
CASES: dict[str, tuple[str, Callable[[], tuple[Any, ...]]]] = {
    "scan one": ("selective_scan", lambda: scan(1, 1, 1, 1)),
    "scan odd": ("selective_scan", lambda: scan(2, 65, 17, 3, around="D")),
    "scan step": ("selective_scan", lambda: scan(2, 65, 17, 3, around="bs")),
    "scan gate": ("selective_scan", lambda: scan(2, 65, 17, 3, around="z")),
    "scan three rows": ("selective_scan", lambda: scan(3, 33, 48, 16, around="Dzbs")),
    "scan groups": ("selective_scan", lambda: scan(1, 100, 40, 20, (2, 4), around="Dzs")),
    "scan groups of one": ("selective_scan", lambda: scan(1, 64, 12, 5, (3, 12), float64, around="Dzb")),
    "scan packed": ("selective_scan", lambda: scan(1, 130, 33, 16, (1, 3), float32, SHORT, "Dzbs")),
    "scan packed bfloat16": ("selective_scan", lambda: scan(1, 130, 35, 17, (1, 1), bfloat16, SHORT, "Dzbs")),
    "scan wide bfloat16": ("selective_scan", lambda: scan(2, 70, 300, 16, (1, 2), bfloat16, around="Dzbs")),
    "scan float16": ("selective_scan", lambda: scan(2, 20, 30, 4, (1, 1), float16, around="Dzbs")),
    "scan float64": ("selective_scan", lambda: scan(5, 40, 130, 31, (1, 1), float64, around="Dzbs")),
    "scan B constant": ("selective_scan", lambda: constant("B", 3, 33, 48, 16, (1, 2), around="Dzbs")),
    "scan C constant": ("selective_scan", lambda: constant("C", 2, 70, 17, 5, (17, 1), bfloat16, around="zs")),
    "scan both constant": ("selective_scan", lambda: constant("BC", 2, 65, 35, 3, dtype=float64)),
    "scan constant packed": ("selective_scan", lambda: constant("BC", 1, 130, 40, 20, borders=SHORT, around="Dzbs")),
    "scan time last": ("selective_scan", lambda: scan_turned("u delta B C z", 2, 65, 17, 3, around="Dzbs")),
    "scan time last one": ("selective_scan", lambda: scan_turned("u delta B C z", 3, 63, 1, 1, around="z")),
    "scan time last wide": ("selective_scan", lambda: scan_turned("u delta B C", 1, 100, 300, 16, (1, 2))),
    "scan time last mixed": (
        "selective_scan",
        lambda: scan_turned("u B z", 2, 70, 40, 20, (2, 4), float64, around="Dz"),
    ),
    "scan time last bfloat16": (
        "selective_scan",
        lambda: scan_turned("u delta B z", 1, 130, 35, 17, (1, 1), bfloat16, SHORT, "Dzbs"),
    ),
    "scan time last packed": (
        "selective_scan",
        lambda: scan_turned("delta C z", 1, 130, 33, 16, (1, 3), float32, SHORT, "z"),
    ),
    "scan time last constant": (
        "selective_scan",
        lambda: constant_turned("u z", "BC", 2, 2, 19, 4, dtype=float16, around="z"),
    ),
    "scan no states": ("selective_scan", lambda: scan(2, 65, 17, 0, around="D")),
    "scan no states gate": ("selective_scan", lambda: scan(1, 130, 35, 0, (1, 5), bfloat16, SHORT, "Dzbs")),
    "linear one": ("linear_scan", lambda: linear(1, 1, (1,))),
    "linear no axes": ("linear_scan", lambda: linear(4, 64, ())),
    "linear odd": ("linear_scan", lambda: linear(2, 65, (17,))),
    "linear mixed": ("linear_scan", lambda: linear(3, 33, (130,), (float32, bfloat16))),
    "linear float16": ("linear_scan", lambda: linear(3, 33, (13,), (float16, float16))),
    "linear axes": ("linear_scan", lambda: linear(2, 70, (3, 5), (float64, float64))),
    "linear packed": ("linear_scan", lambda: linear(1, 130, (33,), borders=SHORT)),
    "linear packed back": ("linear_scan", lambda: linear(1, 130, (70,), (float64, float64), SHORT, reverse=True)),
    "linear complex": ("linear_scan", lambda: linear(1, 130, (70,), (complex64, complex64), SHORT)),
    "linear complex back": ("linear_scan", lambda: linear(2, 100, (9,), (complex128, complex128), reverse=True)),
    "linear complex alike": ("linear_scan", lambda: linear(2, 64, (100,), (complex64, complex64), alike="t")),
    "linear real decay": ("linear_scan", lambda: linear(2, 40, (21,), (float32, complex64))),
    "linear alike": ("linear_scan", lambda: linear(2, 50, (64,), (bfloat16, bfloat16), alike="t")),
    "linear channels alike": ("linear_scan", lambda: linear(2, 33, (6, 4), (float64, float64), alike="c")),
    "dual one": ("ssd", lambda: dual(1, 1, 1, 1, 1)),
    "dual odd": ("ssd", lambda: dual(2, 65, 6, 5, 7, 3)),
    "dual skip": ("ssd", lambda: dual(3, 40, 4, 6, 5, 2, float64, around="D")),
    "dual gate": ("ssd", lambda: dual(3, 40, 4, 6, 5, 2, float64, around="z")),
    "dual tiles": ("ssd", lambda: dual(1, 600, 5, 16, 32)),
    "dual wide": ("ssd", lambda: dual(2, 130, 3, 70, 13)),
    "dual packed": ("ssd", lambda: dual(1, 130, 4, 17, 9, 2, float32, SHORT, "Dz")),
    "dual packed spans": ("ssd", lambda: dual(1, 700, 2, 16, 8, 1, float64, [0, 100, 256, 257, 257, 520, 700])),
    "dual bfloat16": ("ssd", lambda: dual(2, 100, 4, 32, 16, 2, bfloat16, around="Dz")),
    "dual float16": ("ssd", lambda: dual(1, 70, 2, 20, 12, 1, float16)),
    "dual float64": ("ssd", lambda: dual(3, 300, 7, 9, 20, 1, float64)),
    "diagonal one": ("diagonal_ssm", lambda: diagonal(1, 1, 1, 1)),
    "diagonal odd": ("diagonal_ssm", lambda: diagonal(2, 65, 17, 3)),
    "diagonal three rows": ("diagonal_ssm", lambda: diagonal(3, 200, 48, 32)),
    "diagonal packed": ("diagonal_ssm", lambda: diagonal(1, 130, 33, 16, float32, SHORT)),
    "diagonal wide bfloat16": ("diagonal_ssm", lambda: diagonal(2, 70, 300, 5, bfloat16)),
    "diagonal float16": ("diagonal_ssm", lambda: diagonal(2, 20, 30, 5, float16)),
    "diagonal float64": ("diagonal_ssm", lambda: diagonal(1, 300, 64, 4, float64, [0, 70, 299, 300])),
    "conv one": ("causal_conv1d", lambda: conv(1, 1, 1, 4)),
    "conv odd": ("causal_conv1d", lambda: conv(2, 65, 17, 4, silu=True)),
    "conv without bias": ("causal_conv1d", lambda: conv(3, 33, 130, 3, bias=False, silu=True)),
    "conv width 1": ("causal_conv1d", lambda: conv(2, 40, 21, 1)),
    "conv short": ("causal_conv1d", lambda: conv(2, 2, 5, 4, float64)),
    "conv packed": ("causal_conv1d", lambda: conv(1, 130, 33, 4, float32, SHORT, silu=True)),
    "conv packed width 6": ("causal_conv1d", lambda: conv(1, 12, 20, 6, float64, [0, 2, 3, 5, 5, 12], silu=True)),
    "conv wide bfloat16": ("causal_conv1d", lambda: conv(2, 70, 300, 4, bfloat16, silu=True)),
    "conv time last": ("causal_conv1d", lambda: conv_turned(2, 65, 17, 4, silu=True)),
    "conv time last one": ("causal_conv1d", lambda: conv_turned(2, 63, 1, 4)),
    "conv time last short": ("causal_conv1d", lambda: conv_turned(2, 2, 5, 4, float64)),
    "conv time last packed": ("causal_conv1d", lambda: conv_turned(1, 130, 33, 6, float32, SHORT, silu=True)),
    "conv time last bfloat16": ("causal_conv1d", lambda: conv_turned(2, 70, 300, 4, bfloat16, silu=True)),
    "conv time last float16": ("causal_conv1d", lambda: conv_turned(2, 33, 64, 1, float16)),
    "add one": ("add_norm", lambda: add((3, 1), bias=False)),
    "add odd": ("add_norm", lambda: add((2, 5, 3), float64, float64, center=True)),
    "add three": ("add_norm", lambda: add((2, 41, 17), bias=False)),
    "add rows": ("add_norm", lambda: add((700, 100), center=True)),
    "add no axes": ("add_norm", lambda: add((130,))),
    "add bfloat16": ("add_norm", lambda: add((3, 20, 300), bfloat16, float32)),
    "add bfloat16 stream": ("add_norm", lambda: add((3, 20, 35), bfloat16, bfloat16, center=True)),
    "add float16": ("add_norm", lambda: add((1, 2, 3, 33), float16, float64, kept=float32)),
    "gate one": ("gated_norm", lambda: gate((3, 1), bias=False)),
    "gate odd": ("gated_norm", lambda: gate((2, 5, 17), center=True)),
    "gate groups": ("gated_norm", lambda: gate((2, 33, 102), 6, bias=False)),
    "gate groups before": ("gated_norm", lambda: gate((2, 33, 51), 3, float64, center=True, before=True)),
    "gate before": ("gated_norm", lambda: gate((500, 100), before=True)),
    "gate none": ("gated_norm", lambda: gate((130, 3), 1, float64, center=True, gated=False)),
    "gate none groups": ("gated_norm", lambda: gate((5, 64), 2, bias=False, gated=False)),
    "gate bfloat16": ("gated_norm", lambda: gate((2, 20, 300), 2, bfloat16)),
    "gate float16": ("gated_norm", lambda: gate((2, 20, 35), 1, float16, center=True, before=True)),
    "conv float16": ("causal_conv1d", lambda: conv(2, 20, 30, 4, float16, silu=True)),
}


def differentiable(x: Any) -> bool:
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def double(x: Any) -> Any:
    """In float64 or complex128, if it is a tensor of numbers."""
    return x.to(torch.promote_types(x.dtype, float64)) if differentiable(x) else x


def leaves(args: tuple[Any, ...]) -> list[Any]:
    return [x.detach().requires_grad_() if differentiable(x) else x for x in args]


def evaluate(op: str, args: tuple[Any, ...], name: str, weights: list[Tensor]) -> list[Tensor]:
    """The outputs, and the gradients of their sum with weights by every argument."""
    args = tuple(leaves(args))
    with backend(name):
        out = run(op, *args)
        weights = [w.to(y.dtype) for w, y in zip(weights, out, strict=True)]
        found = torch.autograd.grad(out, [x for x in args if differentiable(x)], weights)
    return [*(y.detach() for y in out), *found]


def weights_for(op: str, args: tuple[Any, ...]) -> list[Tensor]:
    with torch.no_grad(), backend("torch"):
        return [normal(*y.shape, dtype=y.dtype) for y in run(op, *args)]


@functools.cache
def definition(case: str) -> tuple[str, tuple[Any, ...], list[Tensor], list[Tensor]]:
    """An op, its arguments, weights of its outputs, and what the reference makes of both in float64, on one thread."""
    torch.manual_seed(0)
    op, make = CASES[case]
    args = make()
    weights = weights_for(op, args)
    return op, args, weights, evaluate(op, tuple(double(x) for x in args), "reference", [double(w) for w in weights])


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_every_kernel_is_the_definition(case, count, instructions, poison, threads):
    op, args, weights, want = definition(case)
    threads(count)
    got = evaluate(op, args, "native", weights)
    tolerance = max(TOLERANCE[x.dtype.to_real()] for x in args if differentiable(x))
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape
        error = float((double(a) - b).abs().max() / b.abs().max().clamp(min=1e-30)) if b.numel() else 0.0
        assert error <= tolerance, f"result {i}: {error:.3g}"


@pytest.mark.parametrize(
    "case", ["scan groups", "dual tiles", "linear complex", "diagonal three rows", "conv wide bfloat16", "gate before"]
)
def test_two_runs_are_alike_to_the_last_bit(case, instructions, threads):
    threads(2)
    op, make = CASES[case]
    args = make()
    weights = weights_for(op, args)
    first, second = (evaluate(op, args, "native", weights) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("case", ["scan packed", "dual packed", "diagonal packed"])
def test_inference_gives_the_same(case, instructions):
    op, make = CASES[case]
    args = make()
    with backend("native"):
        kept = run(op, *leaves(args))
        with torch.no_grad():
            plain = run(op, *args)
    assert all(torch.equal(a, b) for a, b in zip(kept, plain, strict=True))


@pytest.mark.parametrize(
    "op, state", [("selective_scan", 9), ("ssd", 7), ("linear_scan", 2), ("diagonal_ssm", 3), ("causal_conv1d", 4)]
)
@pytest.mark.parametrize("batch, length", [(2, 0), (0, 3)])
def test_nothing_to_do(op, state, batch, length):
    args = {
        "selective_scan": lambda: scan(batch, length, 5, 3, around="Dzbs"),
        "ssd": lambda: dual(batch, length, 4, 5, 3, 2),
        "linear_scan": lambda: linear(batch, length, (5,)),
        "diagonal_ssm": lambda: diagonal(batch, length, 5, 3),
        "causal_conv1d": lambda: conv(batch, length, 5, 4, silu=True),
    }[op]()
    args = leaves(args)
    with backend("native"):
        y, final = run(op, *args)
    (y.sum() + final.real.sum()).backward()
    assert y.shape[:2] == (batch, length)
    assert torch.equal(final, args[state])
    assert torch.equal(args[state].grad, torch.ones_like(final))
    assert torch.equal(args[1].grad, torch.zeros_like(args[1]))


def test_strided_inputs():
    """Halves of one projection, and maps cut from another, as the layers hand them over."""
    both, maps = normal(2, 40, 2 * 24, dtype=float64), normal(2, 40, 4 + 2 * 8, dtype=float64)
    dt, A = torch.rand(2, 40, 24, dtype=float64), -torch.rand(24, 8, dtype=float64)
    _, B, C = maps.split([4, 8, 8], -1)
    args = both[..., 24:], dt, A, B.unsqueeze(2), C.unsqueeze(2)
    with backend("native"):
        got = selective_scan(*args)
    with backend("reference"):
        want = selective_scan(*(x.contiguous() for x in args))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_slow_decay_is_as_exact_as_a_loop(instructions):
    """Rounding of decays near 1 accumulates over thousands of steps, in the kernel no more than in a float32 loop."""
    u, dt = normal(1, 3000, 16), torch.rand(1, 3000, 16) * 1e-3
    maps, plain = normal(2, 1, 3000, 1, 8), (None, None, None, False)
    scan = u, dt, -torch.rand(16, 8), *maps, *plain, torch.zeros(1, 16, 8), None
    dual = u.view(1, 3000, 2, 8), dt[..., :2], -torch.rand(2), *maps, None, None, torch.zeros(1, 2, 8, 8), None, 64
    for op, args in (("selective_scan", scan), ("ssd", dual)):
        with backend("reference"):
            exact, loop = run(op, *(double(x) for x in args))[0], run(op, *args)[0]
        with backend("native"):
            y = run(op, *args)[0]
        assert (y - exact).norm() <= 2 * (loop - exact).norm()


@pytest.mark.parametrize("step, state", [(0.0, 1.0), (1e4, 0.0), (3e38, 0.0), (float("nan"), float("nan"))])
def test_extreme_steps(step, state, instructions):
    """One that forgets nothing, some that forget everything, and one that is not a number."""
    one, dt = torch.zeros(1, 1, 1), torch.full((1, 1, 1), step)
    with backend("native"):
        _, h = selective_scan(one, dt, -torch.ones(1, 1), one[None], one[None], initial_state=torch.ones(1, 1, 1))
    assert float(h) == pytest.approx(state, abs=1e-37, nan_ok=True)


@pytest.mark.parametrize("step", [0.0, 1e4, 1e30])
def test_extreme_steps_of_a_head(step, instructions):
    """What came before is kept or forgotten, what comes after is as if alone; another sequence's NaN is its own."""
    x, B, C = normal(1, 200, 2, 3), normal(1, 200, 1, 4), normal(1, 200, 1, 4)
    dt = torch.rand(1, 200, 2) * 0.1
    dt[:, 90:100] = step
    x[:, 90:100] = 0  # a step is also a weight
    x[:, 70] = float("nan")
    args = x, dt, -torch.ones(2), B, C, None, None, normal(3, 2, 3, 4), packed([0, 69, 75, 200]), 64
    weights = [normal(*x.shape), normal(3, 2, 3, 4)]
    want = evaluate("ssd", tuple(map(double, args)), "reference", weights)
    both = [*evaluate("ssd", args, "native", weights), *evaluate("ssd", args, "torch", weights)]
    for i, (a, b) in enumerate(zip(both, [*want, *want], strict=True)):
        if a.dim() == 1:  # of A, to which all sequences add
            continue
        if len(a) == 1:  # along time
            a, b = (torch.cat((m[:, :69], m[:, 75:]), 1) for m in (a, b))
        else:
            a, b = a[[0, 2]], b[[0, 2]]
        assert b.isfinite().all() and (a - b).abs().max() <= 1e-5 * b.abs().max(), i


def test_a_fading_state_becomes_zero(instructions):
    """Not a denormal number, which would never reach zero and slow every step."""
    with backend("native"):
        h, final = run(
            "linear_scan", torch.full((1, 400, 3), 0.75), torch.zeros(1, 400, 3), torch.ones(1, 3), None, False
        )
    assert torch.equal(final, torch.zeros(1, 3))
    assert float(h[0, 200].min()) > 0


@pytest.mark.parametrize("dtype", [float32, float64, bfloat16, float16], ids=str)
@pytest.mark.parametrize(
    "shape, states, groups",
    [((17,), 5, 1), ((12,), 20, 3), ((6, 5), 7, 2), ((1, 64), 32, 1), ((5,), 0, 1), ((2, 3), 0, 1)],
)
@pytest.mark.parametrize("gated", [False, True])
def test_one_step(dtype, shape, states, groups, gated, instructions, threads):
    """With a rate for every state, and with one for every head; inputs are halves of a projection."""
    threads(2)
    real, heads = wide(dtype), len(shape) == 2
    x, z = normal(3, 2, *shape, dtype=dtype).unbind(1)
    one = (shape[0], 1) if heads else shape
    dt, A = 4 * normal(3, *one, dtype=dtype), -torch.rand(*one, 1 if heads else states).to(real)
    args = normal(3, *shape, states, dtype=real), x, dt, A, *normal(2, 3, groups, states, dtype=dtype)
    more = {"D": normal(*one, dtype=real), "z": z, "dt_bias": normal(*one, dtype=real)} if gated else {}
    with torch.no_grad():
        with backend("native"):
            got = selective_state_update(*args, **more, dt_softplus=gated)
        with backend("torch"):
            more = {name: double(m) for name, m in more.items()}
            want = selective_state_update(*(double(a) for a in args), **more, dt_softplus=gated)
    assert got[0].dtype == dtype and got[1].dtype == real
    for a, b in zip(got, want, strict=True):
        assert not b.numel() or (double(a) - b).abs().max() <= TOLERANCE[dtype] * b.abs().max()


@pytest.mark.parametrize("dtype", [float32, float64, bfloat16, float16], ids=str)
@pytest.mark.parametrize("width, taps, activation", [(17, 4, "silu"), (5, 2, None), (9, 1, None)])
def test_one_step_of_the_convolution(dtype, width, taps, activation, instructions):
    x, state = normal(3, 2 * width, dtype=dtype)[:, :width], normal(3, width, taps - 1, dtype=wide(dtype))
    args = x, state, normal(width, taps, dtype=dtype), normal(width, dtype=dtype)
    with torch.no_grad():
        got = causal_conv1d_update(*args, activation=activation)
        with backend("torch"):
            want = causal_conv1d_update(*(double(a) for a in args), activation=activation)
    assert got[1].shape == want[1].shape
    for a, b in zip(got, want, strict=True):
        assert not b.numel() or (double(a) - b).abs().max() <= TOLERANCE[dtype] * b.abs().max()


def test_softplus_and_silu_everywhere(instructions):
    """Relative to the value, far into both tails."""
    dt, z = torch.linspace(-600, 100, 2001, dtype=float64), torch.linspace(-100, 100, 2001, dtype=float64)
    one, x = torch.ones(1, 1, 1, dtype=float64), torch.ones(1, 2001, dtype=float64)
    with torch.no_grad():
        h, A = torch.zeros(1, 2001, 1, dtype=float64), torch.zeros(2001, 1, dtype=float64)
        y, _ = selective_state_update(h, x, dt[None], A, one, one, z=z[None], dt_softplus=True)
    want = torch.where(dt > 30, dt, torch.log1p(torch.exp(dt))) * F.silu(z)
    torch.testing.assert_close(y[0], want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("factor", [1.0, 3.0, 1 / 3, 1e-4])
def test_every_float16_is_read_and_rounded(factor, instructions):
    """Denormal numbers, infinities and NaN among them, and results that overflow or fall between two numbers."""
    x, one = torch.arange(-(2**15), 2**15).to(torch.int16).view(float16).reshape(1, -1, 1), torch.zeros(1, 1, 0)
    with backend("native"):
        y = run("causal_conv1d", x, torch.full((1, 1), factor), None, False, one, None)[0]
    assert torch.equal(y.nan_to_num(nan=1.5), (x.float() * factor).half().nan_to_num(nan=1.5))


def test_a_step_that_is_differentiated_runs_in_pytorch():
    h = normal(1, 3, 2).requires_grad_()
    y, _ = selective_state_update(h, normal(1, 3), normal(1, 3), -torch.rand(3, 2), *normal(2, 1, 1, 2))
    assert torch.autograd.grad(y.sum(), h)[0].abs().sum() > 0


def test_complex_rates_are_refused_with_the_reason():
    u, dt, A, B, C, *_ = scan(1, 3, 2, 2)
    with backend("native"), pytest.raises(BackendError, match="native: A is complex"):
        selective_scan(u, dt, torch.complex(A, A), B, C)


def test_without_a_library_it_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "_FILE", tmp_path / "kernels.so")
    found, missing = library._load()
    assert found is None
    assert "install a C++ compiler" in missing
    (tmp_path / "kernels.so").write_text("not a library")
    assert "reinstall" in library._load()[1]


def test_an_unknown_instruction_set(monkeypatch):
    monkeypatch.setenv("DUALFORM_NATIVE_ISA", "mmx")
    assert "cannot run DUALFORM_NATIVE_ISA='mmx'" in library._load()[1]
    assert library.choose("mmx") == ""
    assert library.choose() == INSTRUCTIONS[0]


def test_calls_from_several_python_threads(threads):
    threads(2)
    args, results = scan(2, 200, 64, 16), []
    with backend("native"), torch.no_grad():
        want, _ = run("selective_scan", *args)

        def work() -> None:
            with torch.no_grad():
                results.extend(run("selective_scan", *args)[0] for _ in range(10))

        callers = [threading.Thread(target=work) for _ in range(3)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert len(results) == 30
    assert all(torch.equal(found, want) for found in results)


@pytest.fixture
def kernel_calls(monkeypatch) -> list[tuple[str, Structure, dict[str, Any]]]:
    """The calls of kernels that are made, with their fields."""
    made, call = [], library.call

    def record(name: str, structure: Structure, **fields: Any) -> None:
        made.append((name, structure, fields))
        call(name, structure, **fields)

    monkeypatch.setattr(library, "call", record)
    return made


@pytest.mark.parametrize("case", ["scan time last", "scan both constant", "conv time last", "conv odd"])
def test_nothing_is_copied_on_the_way_to_a_kernel_and_back(case, kernel_calls):
    """Kernels are given the tensors of the caller, and their outputs and gradients are what it gets."""
    op, make = CASES[case]
    args = make()
    found = evaluate(op, args, "native", weights_for(op, args))
    (_, _, forward), (_, _, backward) = kernel_calls
    made = {m.data_ptr() for call in (forward, backward) for m in call.values() if isinstance(m, Tensor)}
    for name, m in zip(OPS[op].fields, args, strict=False):
        assert not differentiable(m) or m.data_ptr() in made, name
    assert all(y.data_ptr() in made for y in found)


BAD_BORDERS = [[0, 5, 3, 7], [0, 9], [1, 7], [-4, 7], [0, 2**60, 7], [0, -(2**60), 7]]


@pytest.mark.parametrize(
    "op", ["selective_scan", "ssd", "linear_scan", "diagonal_ssm", "causal_conv1d", "norm", "steps"]
)
def test_kernels_refuse_what_they_cannot_run(op, kernel_calls, monkeypatch):
    """Whatever passes the checks in Python, no kernel divides by zero, loops for ever or leaves its memory."""
    make = {"selective_scan": scan, "ssd": dual, "linear_scan": linear, "diagonal_ssm": diagonal, "causal_conv1d": conv}
    sizes = {"selective_scan": (4, 3), "ssd": (4, 2, 3), "linear_scan": ((4,),), "diagonal_ssm": (4, 3)}
    if op == "steps":
        with torch.no_grad(), backend("native"):
            selective_state_update(normal(1, 4, 3), normal(1, 4), normal(1, 4), -torch.rand(4, 3), *normal(2, 1, 1, 3))
            causal_conv1d_update(normal(1, 4), normal(1, 4, 1), normal(4, 2))
    elif op == "norm":
        args = gate((7, 4), 2)
        evaluate("gated_norm", args, "native", weights_for("gated_norm", args))
    else:
        args = make[op](1, 7, *sizes.get(op, (4, 2)), borders=[0, 3, 7])
        evaluate(op, args, "native", weights_for(op, args))
    monkeypatch.undo()
    assert len(kernel_calls) == 2
    for name, structure, fields in kernel_calls:
        names = {field for _, field, _ in structure.fields}
        wrong: list[dict[str, Any]] = [{"dtype": bfloat16}, {"width": -1}]
        wrong += [{size: value} for size in names & {"groups", "groups_b", "groups_c"} for value in (0, -1, 3)]
        wrong += [{size: 0} for size in names & {"per", "taps"}]
        wrong += [{one: None} for one in names & {"h", "h0", "u", "x", "a", "b", "weight", "dy", "dh", "dfinal"}]
        if op == "norm":
            wrong += [{"residual": fields["x"]}, {"rows": -1}]
        if op == "steps":
            wrong += [{table: 0} for table in ("h_rows", "next_rows")]
            wrong += [{rows: torch.tensor([row])} for rows, row in (("reads", 1), ("writes", 2**40), ("writes", -1))]
            wrong += [{"reads": torch.tensor([-1]), "writes": torch.tensor([0])}]
            wrong += [{"size": 0}, {"renewed": 2}, {"renewed": -1}] if "size" in names else []
        if op == "linear_scan":
            wrong.append({"complex": True, "width": 3})
        if "sequences" in names:
            like, right = fields["sequences"]
            for borders in map(torch.tensor, BAD_BORDERS):
                bad = borders if isinstance(right, Tensor) else right._replace(cu_seqlens=borders)
                wrong.append({"sequences": (like, bad)})
        for change in wrong:
            if not name.endswith("_backward") and change.keys() & {"dy", "dh", "dfinal"}:
                continue
            with pytest.raises(ArgumentError, match=f"{name}: the CPU kernel refuses"):
                library.call(name, structure, **(fields | change))
                pytest.fail(f"{name} runs with {change}")
        library.call(name, structure, **(fields | {"width": 0}))  # nothing to do


FORK = """
import os, torch
from dualform.ops import backend, linear_scan
torch.set_num_threads(2)
a, b = torch.rand(2, 300, 300), torch.rand(2, 300, 300)
with backend("native"):
    want, _ = linear_scan(a, b)
    child = os.fork()
    found, _ = linear_scan(a, b)
    torch.set_num_threads(1)  # PyTorch's own operations would wait for threads that a fork leaves behind
    same = torch.equal(found, want)
    if child == 0:
        os._exit(0 if same else 1)
    assert same and os.waitpid(child, 0)[1] == 0
"""

# In the child of a fork, which has no threads of PyTorch.
NO_MORE_THREADS = """
import os, resource, torch
from dualform.ops import backend, linear_scan
a, b = torch.rand(2, 400, 100), torch.rand(2, 400, 100)
torch.set_num_threads(1)
with backend("native"):
    want, _ = linear_scan(a, b)
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0
        os._exit(0)
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    if os.geteuid() == 0:
        os.setuid(65534)  # the limit is not for root
    torch.set_num_threads(2)
    found, _ = linear_scan(a, b)
    torch.set_num_threads(1)
    os._exit(0 if torch.equal(found, want) else 1)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is that of Linux")
def test_where_no_thread_can_be_started_the_caller_does_the_work():
    subprocess.run([sys.executable, "-c", NO_MORE_THREADS], check=True, timeout=60)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_the_threads_survive_a_fork():
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], check=True, timeout=60)
