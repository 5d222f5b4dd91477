"""Hand-written gradients and what PyTorch may do with them: first derivatives, in reverse."""

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dualform.core.errors import BackendError
from dualform.ops.layout import lay, time_last

_functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]


def floats(m: Tensor) -> bool:
    """Whether a tensor has a gradient: it is floating or complex."""
    return m.is_floating_point() or m.is_complex()


def as_grad(g: Tensor, of: Tensor) -> Tensor:
    """A gradient in the dtype of its tensor, and lying as that does; the real part where the tensor is real."""
    if g.dtype is of.dtype and g.is_contiguous() and of.is_contiguous() and not g.is_conj():
        return g
    g = g.real if g.is_complex() and not of.is_complex() else g
    return lay(g.to(of.dtype).resolve_conj(), time_last(of))


def unshared(found: list[Tensor]) -> list[Tensor]:
    """Gradients in memory of their own, which compilers rely on: two arguments may have the same."""
    return [m.clone() if any(m is other for other in found[:i]) else m for i, m in enumerate(found)]


def outline(m: Tensor) -> Tensor:
    """A tensor of the same shape and dtype, in the memory of one number."""
    return m.new_empty(()).expand(m.shape)


def transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward mode runs: it derives what it sees, and not by our rules."""
    return forward_ad._current_level >= 0 or _functorch.peek_interpreter_stack() is not None


def mapped() -> bool:
    """Whether ``torch.func.vmap`` runs."""
    if _functorch.peek_interpreter_stack() is None:
        return False
    return any(level.key() == _functorch.TransformType.Vmap for level in _functorch.get_interpreter_stack())


def refuse_transforms(name: str, tensors: list[Tensor]) -> None:
    """Refuse what PyTorch derives from the operations it sees: it does not see into a kernel, and would find zeros.

    Raises:
        BackendError: for tensors of ``torch.func`` (grad, vmap, jvp, ...) and for those with a forward-mode tangent.
    """
    wrapped = _functorch.is_functorch_wrapped_tensor
    if _functorch.peek_interpreter_stack() is not None and any(map(wrapped, tensors)):
        _refuse(name, "the transforms of torch.func (grad, vmap, jvp, ...)")
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(m).tangent is not None for m in tensors):
        _refuse(name, "forward-mode derivatives")


def _refuse(name: str, what: str) -> NoReturn:
    raise BackendError(
        f"{name}: {what} cannot see into its kernels",
        hint="run it in `with dualform.backend('reference'):`, which is plain PyTorch, or use torch.autograd.grad",
    )


class _Once(torch.autograd.Function):
    """Passes gradients on; to differentiate them again raises."""

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor | None) -> Any:
        ctx.name = name
        return tuple(None if m is None else m.clone() for m in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise BackendError(
            f"{ctx.name}: its gradient cannot be differentiated a second time",
            hint="run it in `with dualform.backend('reference'):`, which is differentiable to any order",
        )


def once(name: str, gradients: tuple[Tensor | None, ...], *sources: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients that a hand-written backward found, which refuse to be differentiated a second time.

    PyTorch's ``once_differentiable`` refuses only where the gradients of the outputs were differentiable, and leaves
    out of second derivatives, without a word, what came through the saved tensors.

    Args:
        name: whose gradients they are.
        gradients: what was found, without a graph.
        sources: all that they depend on: the gradients of the outputs, and the saved tensors.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return gradients
    if not any(m is not None and m.requires_grad for m in sources):
        return gradients
    return _Once.apply(name, len(gradients), *gradients, *sources)


class _Through(torch.autograd.Function):
    """Passes tensors on, and their gradients once."""

    @staticmethod
    def forward(ctx: Any, name: str, *tensors: Tensor) -> Any:
        ctx.name = name
        return tuple(m.view_as(m) for m in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, *once(ctx.name, grads, *grads)


def through(name: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The arguments of a kernel of PyTorch's that has no second derivative: it is refused in our words, see above."""
    if torch.is_grad_enabled() and any(m.requires_grad for m in tensors):
        return _Through.apply(name, *tensors)
    return tensors
