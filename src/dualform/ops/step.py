"""One step of a recurrence where nobody asks for a gradient: a kernel may do at once what PyTorch does in ten calls."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dualform.ops import op

Step = Callable[..., tuple[Tensor, Tensor] | None]
_STEPS: dict[str, list[tuple[str, Step]]] = {}


def add_step(name: str, backend: str, step: Step) -> None:
    """Register a faster step for the function called ``name``; it returns None for calls that it cannot run."""
    _STEPS.setdefault(name, []).append((backend, step))


def fast_step(name: str, *args: Any) -> tuple[Tensor, Tensor] | None:
    """What the first faster step that can run the call returns, or None: then the function itself has to run.

    Compilers and autograd see the function itself.
    """
    steps = _STEPS.get(name)
    if steps is None or torch.compiler.is_compiling():
        return None
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
        return None
    forced = op.forced()
    for backend, step in steps:
        if forced in ("", backend):
            with op.on_device(args):
                found = step(*args)
            if found is not None:
                return found
    return None
