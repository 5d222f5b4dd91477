"""What is not finite stays in its sequence, and reaches nothing earlier: every operator and backend that a CPU runs."""

from typing import Any

import pytest
import torch

from containment import check_contained, check_contained_in_runs
from dualform.check.op_cases import OpCase, op_cases
from dualform.ops.attention import Past, attention
from dualform.ops.long_conv import long_conv
from dualform.ops.lstm import lstm
from dualform.ops.op import OPS

LENGTH = 67  # unlike any other size
RECURRENT = {
    case.name: case
    for case in op_cases(LENGTH)
    if hasattr(OPS[case.op].arguments, "h0") and case.tensors["initial_state"].numel()
}
# Steps that may see each other, as the docstrings say: in any backend of ssd, elsewhere in the portable one.
CHUNK = {"ssd": 64, "ssd chunk 7": 7, "ssd packed": 13, "ssd seq_idx": 64, "ssd 20 x 40": 64}
PORTABLE_CHUNK = {
    **dict.fromkeys(("causal_conv1d wide", "causal_conv1d wide packed"), LENGTH),
    **dict.fromkeys(("dplr_ssm complex", "dplr_ssm complex packed", "gla packed", "wkv7 packed"), 64),
    **dict.fromkeys(("delta decay", "delta packed", "delta 40 x 20", "delta 16 x 20", "delta channels packed"), 64),
    **dict.fromkeys(("gla", "wkv7", "delta", "delta channels"), 16),
}
BORDERS = torch.tensor([0, 20, 20, 61, LENGTH])


class Captured(Exception):
    pass


def record(case: OpCase, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the public function gives to the operator."""
    found = []

    def capture(self: Any, a: Any) -> Any:
        found.append(a)
        raise Captured

    with monkeypatch.context() as patch, pytest.raises(Captured):
        patch.setattr(type(OPS[case.op]), "__call__", capture)
        case.call(case.cast("cpu", torch.float64))
    return found[0]


@pytest.mark.parametrize("name", ["torch", "native"])
@pytest.mark.parametrize("case", RECURRENT.values(), ids=list(RECURRENT))
def test_recurrences(case: OpCase, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op, a = OPS[case.op], record(case, monkeypatch)
    backend = next((b for b in op.backends if b.name == name), None)
    if backend is None or backend.missing() or backend.refuses(a) or backend.backward is None:
        pytest.skip("another backend runs this call")
    chunks = {**CHUNK, **(PORTABLE_CHUNK if name == "torch" else {})}
    check_contained(op, a, backend.forward, backend.backward, chunk=chunks.get(case.name, 1))


@pytest.mark.parametrize("name", ["torch", "native"])
def test_runs_of_a_convolution(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a = record(RECURRENT["causal_conv1d seq_idx"], monkeypatch)
    backend = next(b for b in OPS["causal_conv1d"].backends if b.name == name)
    if backend.missing():
        pytest.skip("the library was not built")
    assert backend.backward is not None
    check_contained_in_runs(a, backend.forward, backend.backward)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("op", ["attention", "attention window", "long_conv", "lstm"])
def test_operators_with_rows(op: str, value: float, packed: bool) -> None:
    """Planted in all that belongs to one sequence, and in the gradients of its outputs."""
    rows, shape = 4, (1, LENGTH) if packed else (4, 17)
    borders, row = BORDERS if packed else None, 2
    mine = (0, slice(20, 61)) if packed else (row,)
    if op == "lstm":
        timed, kept, weights = [normal(*shape, 3)], [normal(rows, 2), normal(rows, 2)], [normal(8, 3), normal(8, 2)]
        biases = [normal(8), normal(8)]

        def run():
            return lstm(*timed, *kept, *weights, *biases, cu_seqlens=borders)

    elif op == "long_conv":
        timed, kept, k = [normal(*shape, 3)], [normal(rows, 4, 3)], normal(3, 5)

        def run():
            return (long_conv(*timed, k, *kept, cu_seqlens=borders),)

    else:
        timed, kept = [normal(*shape, h, 3) for h in (4, 2, 2)], [normal(rows, 5, 2, 3), normal(rows, 5, 2, 3)]
        length = torch.tensor([5, 0, 3, 4])
        window = 4 if "window" in op else None

        def run():
            return (attention(*timed, Past(*kept, length), window=window, cu_seqlens=borders),)

    def results(planted: bool) -> list[torch.Tensor]:
        outputs = run()
        into = [torch.ones_like(y) for y in outputs]
        if planted:
            into[0][mine] = value
            for g in into[1:]:
                g[row] = value
        return [*outputs, *torch.autograd.grad(outputs, [*timed, *kept], into)]

    want = results(False)
    with torch.no_grad():
        for m in timed:
            m[mine].view(-1)[0] = value
        for m in kept:
            m[row].view(-1)[0] = value
    got, harmed = results(True), 0
    for a, b in zip(got, want, strict=True):
        keep = torch.ones(a.shape[:2] if a.shape[:2] == shape else a.shape[:1], dtype=torch.bool)
        keep[mine if a.shape[:2] == shape else row] = False
        torch.testing.assert_close(a[keep], b[keep])
        harmed += not a[~keep].isfinite().all()
    assert harmed
