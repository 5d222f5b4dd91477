"""A portable backend for what PyTorch can differentiate by itself: its backward runs the forward once more."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from dualform.ops.derivatives import floats
from dualform.ops.op import Backend

Arguments = TypeVar("Arguments", bound=tuple)


def rerun(forward: Callable[[Arguments], list[Tensor]]) -> Backend[Arguments]:
    """The backend ``torch`` of an op whose ``forward`` is made of operations that PyTorch differentiates.

    An eager call that wants a gradient runs it as plain PyTorch, which records it, so that its gradient can be
    differentiated again. Where the op is one node, in compiled and exported programs, nothing is kept for the
    backward: it runs the forward once more under autograd.
    """

    def backward(grads: list[Tensor], kept: list[Tensor], a: Any) -> dict[str, Tensor]:
        given = {f: m for f, m in zip(a._fields, a, strict=True) if isinstance(m, Tensor) and floats(m)}
        sources = {name: m.detach().requires_grad_() for name, m in given.items()}
        with torch.enable_grad():
            outputs = forward(a._replace(**sources))
        pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if y.requires_grad]
        roots, into = [y for y, _ in pairs], [g for _, g in pairs]
        found = torch.autograd.grad(roots, list(sources.values()), into, allow_unused=True, materialize_grads=True)
        return dict(zip(sources, found, strict=True))

    return Backend("torch", forward, backward, plain=lambda a: tuple(forward(a)))
