"""What the tests of operators share: a case by its name, and its arguments as the dispatcher sees them."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dualform.check.op_cases import OpCase, op_cases
from dualform.ops import OPS, Op, backend

NAMES = [case.name for case in op_cases(3)]


def case_of(name: str, length: int) -> OpCase:
    """One of ``op_cases(length)``."""
    return next(case for case in op_cases(length) if case.name == name)


class _Watching(TorchDispatchMode):
    """Calls go through the dispatcher, where they can be seen."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def dispatched(case: OpCase, dtype: torch.dtype) -> tuple[Op[Any], tuple[Any, ...]]:
    """The op of a case, and the arguments with which its operator is called: backend, save, then the record's."""
    op, seen = OPS[case.op], []
    forward = op._forward
    op._forward = lambda *args: seen.append(args) or forward(*args)
    try:
        with torch.no_grad(), backend("torch"), _Watching():
            case.call(case.cast("cpu", dtype))
    finally:
        op._forward = forward
    (args,) = [args for args in seen if args[0] == "torch"]
    return op, args
