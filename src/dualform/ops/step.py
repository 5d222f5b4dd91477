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


def has_rates_by_state(state: Tensor, x: Tensor, dt: Tensor, A: Tensor) -> bool | None:
    """How a kernel for ``selective_state_update`` finds its rates and steps; None for what none was written for.

    True for a rate for every state and a step for every channel, ``(B, D, N)`` or ``(B, H, P, N)``; False for one of
    each a head. States and rates are float32 or float64.
    """
    shape, inner = state.shape, x.shape
    if state.dtype not in (torch.float32, torch.float64) or A.dtype != state.dtype or inner != shape[:-1]:
        return None
    if A.shape == shape[1:] and dt.shape == inner:
        return True
    by_head = len(shape) == 4 and A.shape == (shape[1], 1, 1) and dt.shape == (shape[0], shape[1], 1)
    return False if by_head else None
