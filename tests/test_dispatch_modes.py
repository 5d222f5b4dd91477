"""Operators under a mode that sees every call of PyTorch, as profilers, debuggers and the compiler use them."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dualform.check.op_cases import OpCase, op_cases
from dualform.ops.op import backend

CASES = {case.name: case for case in op_cases(9)}


class Watching(TorchDispatchMode):
    """Passes every call on."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_mode_changes_nothing(case: OpCase) -> None:
    """Inside of one, PyTorch hides conjugates and the recording of gradients from what an operator calls."""

    def results() -> list[torch.Tensor]:
        tensors = {name: m.requires_grad_() for name, m in case.cast("cpu", torch.float64).items()}
        outputs = case.call(tensors)
        loss = sum((y * y.conj()).real.sum() for y in outputs)
        return [*outputs, *torch.autograd.grad(loss, [*tensors.values()], materialize_grads=True)]

    with backend("torch"):
        want = results()
        with Watching():
            got = results()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
