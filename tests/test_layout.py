"""Outputs lie in memory as inputs do, and gradients as their tensors: with time second, or with time innermost."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dualform.check.op_cases import OpCase
from dualform.core.errors import BackendError
from dualform.ops import OPS, backend
from dualform.ops.layout import empty_like, lay, time_last
from dualform.ops.native import library
from op_calls import case_of, dispatched

NAMES = [
    "selective_scan",
    "selective_scan complex",
    "selective_scan packed",
    "selective_scan no gate",
    "causal_conv1d",
    "causal_conv1d width 1",
    "causal_conv1d wide",
    "causal_conv1d packed",
    "causal_conv1d seq_idx",
]
TIMED = ("u", "delta", "B", "C", "z", "x")
TURNED = {"all": TIMED, "u, B": ("u", "B"), "delta, C, z": ("delta", "C", "z")}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

case_and_layout = pytest.mark.parametrize(
    "name, turned",
    [(n, t) for n in NAMES for t in TURNED if t == "all" or "scan" in n],
)


def turn(x: Tensor) -> Tensor:
    """The same numbers, time innermost in memory."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def laid(case: OpCase, device: str, dtype: torch.dtype, turned: str) -> dict[str, Tensor]:
    tensors = case.cast(device, dtype)
    return {k: (turn(m) if k in TURNED[turned] else m).requires_grad_() for k, m in tensors.items()}


def run(case: OpCase, tensors: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """The outputs, and gradients of a random functional of them."""
    outputs = case.call(tensors)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device) for y in outputs]
    loss = sum((y * w).sum().real for y, w in zip(outputs, weights, strict=True))
    return outputs, dict(zip(tensors, torch.autograd.grad(loss, list(tensors.values())), strict=True))  # pyright: ignore


def assert_lie_alike(tensors: dict[str, Tensor], outputs: tuple[Tensor, ...], gradients: dict[str, Tensor]) -> None:
    y, first = outputs[0], next(iter(tensors.values()))
    assert y.stride() == empty_like(first).stride()
    for name, g in gradients.items():
        assert g.stride() == empty_like(tensors[name]).stride(), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length", [1, 2, 65])
@case_and_layout
def test_every_backend_keeps_to_the_layout(name, turned, length, device, poison):
    case = case_of(name, length)
    with backend("reference"):
        want = run(case, laid(case, "cpu", torch.float64, turned))
    for found in ("reference", *(b.name for b in OPS[case.op].backends if b.runs_on(device) and not b.missing())):
        for dtype in (torch.float64, torch.float32):
            tensors = laid(case, device, dtype, turned)
            try:
                with backend(found):
                    got = run(case, tensors)
                    with torch.no_grad():
                        alone = case.call(tensors)
            except BackendError:
                continue  # it says why in its own tests
            assert_lie_alike(tensors, got[0], {} if found == "reference" else got[1])  # autograd lays those its own way
            assert alone[0].stride() == got[0][0].stride()
            tolerance = 1e-10 if dtype == torch.float64 else 2e-4
            for a, b in zip((*got[0], *got[1].values()), (*want[0], *want[1].values()), strict=True):
                scale = float(b.detach().norm(torch.inf)) if b.numel() else 0.0
                torch.testing.assert_close(a.cpu().to(b.dtype), b, rtol=tolerance, atol=tolerance * scale)


@case_and_layout
def test_compilers_are_told_the_layout(name, turned):
    """What a fake call makes lies as what a call makes, for the operator and in a compiled program."""
    case = case_of(name, 9)
    op, args = dispatched(case, torch.float64)
    record = dict(zip(op.fields, args[2:], strict=True))
    given = [turn(m) if k in TURNED[turned] and m is not None else m for k, m in record.items()]
    for by in ("native", "torch"):
        if by == "native" and ("complex" in name or library.missing):
            continue
        torch.library.opcheck(op._forward, (by, True, *given), test_utils="test_faketensor")
        outputs = op._forward(by, True, *given)
        kept = [outputs[i] for i in op.keeps] + outputs[op.outputs :]
        torch.library.opcheck(op._backward, (by, outputs[: op.outputs], kept, *given), test_utils="test_faketensor")


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of the compiler itself
@pytest.mark.parametrize("name", ["selective_scan", "causal_conv1d"])
def test_a_compiled_program_keeps_to_the_layout(name):
    case = case_of(name, 9)
    tensors = laid(case, "cpu", torch.float64, "all")
    compiled = torch.compile(case.call, fullgraph=True, backend="aot_eager")

    class Compiled:
        call = staticmethod(compiled)

    got: Any = run(Compiled(), tensors)  # pyright: ignore[reportArgumentType]
    assert_lie_alike(tensors, *got)


def test_what_can_be_taken_as_it_lies():
    x = torch.randn(2, 3, 4, 5)
    assert not time_last(x) and not time_last(x[:, :1]) and not time_last(x.transpose(2, 3))
    assert time_last(turn(x)) and time_last(turn(x)[..., 1:]) and not time_last(turn(x[:, :1]))
    assert empty_like(x.transpose(2, 3)).is_contiguous()
    assert empty_like(turn(x)[..., 1:]).movedim(1, -1).is_contiguous()
    y = turn(x)
    assert lay(x, False) is x and lay(y, True) is y
    assert torch.equal(lay(x, True), x) and time_last(lay(x, True))


def test_the_gradient_of_an_output_in_another_layout():
    """A caller who turns y gives its gradient with time innermost, whichever way y lies."""
    case = case_of("selective_scan", 9)
    for turned in (False, True):
        tensors = case.cast("cpu", torch.float64)
        tensors = {k: (turn(m) if turned and k in TIMED else m).requires_grad_() for k, m in tensors.items()}
        weight = torch.randn(3, 24, 9, dtype=torch.float64)
        found = []
        for name in ("reference", ""):
            with backend(name):
                y, _ = case.call(tensors)
                found.append(torch.autograd.grad((y.transpose(1, 2) * weight).sum(), tensors["u"])[0])
        torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)
