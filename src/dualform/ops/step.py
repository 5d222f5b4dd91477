"""One step of a recurrence where nobody asks for a gradient: a kernel may do at once what PyTorch does in ten calls."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dualform.ops import op

Step = Callable[..., tuple[Tensor, Tensor] | None]
_STEPS: dict[str, tuple[str, Step]] = {}


def add_step(name: str, backend: str, step: Step) -> None:
    """Register a faster step for the function called ``name``; it returns None for calls that it cannot run."""
    _STEPS[name] = backend, step


def fast_step(name: str, *args: Any) -> tuple[Tensor, Tensor] | None:
    """What the faster step of a function returns, or None: then the function itself has to run.

    Compilers and autograd see the function itself.
    """
    backend, step = _STEPS.get(name, ("", None))
    if step is None or op.forced() not in ("", backend) or torch.compiler.is_compiling():
        return None
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
        return None
    return step(*args)
