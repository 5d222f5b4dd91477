"""Trees of tensors: a Tensor, or a (named) tuple of trees. Every state of the library is one."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Tree = Any  # Tensor | tuple[Tree, ...] | NamedTuple of Trees
Kind = TypeVar("Kind", bound=type)


def state_class(cls: Kind) -> Kind:
    """Decorate the NamedTuple of a state, so that files of PyTorch may hold it.

    ``torch.load(..., weights_only=True)`` then accepts a state that ``torch.save`` wrote, and ``torch.export.save`` a
    program that takes or returns one.
    """
    torch.serialization.add_safe_globals([cls])
    pytree._register_namedtuple(cls, serialized_type_name=f"{cls.__module__}.{cls.__qualname__}")
    return cls


def tree_map(f: Callable[..., Tensor], tree: Tree, *rest: Tree) -> Tree:
    """Apply ``f`` to matching leaves; the result has the type of ``tree``."""
    if isinstance(tree, Tensor):
        return f(tree, *rest)
    parts = [tree_map(f, *branches) for branches in zip(tree, *rest, strict=True)]
    return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)


def leaves(tree: Tree) -> list[Tensor]:
    """The tensors of a tree, depth first."""
    return [leaf for _, leaf in named_leaves(tree)]


def named_leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """``(path, tensor)`` pairs, depth first; a path reads like ``3.h`` or ``0.1.conv``."""
    if isinstance(tree, Tensor):
        yield prefix, tree
        return
    names = getattr(tree, "_fields", None) or [str(i) for i in range(len(tree))]
    for name, branch in zip(names, tree, strict=True):
        yield from named_leaves(branch, f"{prefix}.{name}" if prefix else name)


def take(tree: Tree, rows: Any) -> Tree:
    """Rows of every leaf along the batch axis, copied: a slice, a list of indices or an index tensor.

    The result shares no memory with ``tree``, so that using it as a state leaves ``tree`` as it was.
    """
    copied = isinstance(rows, Tensor | list)  # by the indexing itself
    return tree_map(lambda leaf: leaf[rows] if copied else leaf[rows].clone(), tree)


def concat(trees: list[Tree], dim: int = 0) -> Tree:
    """Join trees of equal structure along one axis; axis 0 is the batch."""
    return tree_map(lambda *parts: torch.cat(parts, dim), *trees)


def clone(tree: Tree) -> Tree:
    """A copy that shares no memory with ``tree``: keep one before a state is used."""
    return tree_map(torch.clone, tree)


def detach(tree: Tree) -> Tree:
    """The same tensors outside of the graph of gradients: what truncated backpropagation passes on.

    It shares the memory of ``tree``; what is to be kept beside it is to be cloned.
    """
    return tree_map(Tensor.detach, tree)


def may_write(leaf: Tensor) -> bool:
    """Whether a recurrence may write into the memory of a state that it is given, as a state is used once.

    It may not where gradients are recorded, where anything traces or transforms the call, and where the memory may be
    somebody else's: that of a view, of a larger or an expanded tensor, or, outside of inference mode, of a tensor that
    was made inside.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or leaf.requires_grad or type(leaf) is not Tensor:
        return False
    if torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:  # pyright: ignore[reportAttributeAccessIssue]
        return False
    if leaf.is_inference() and not torch.is_inference_mode_enabled():
        return False
    whole = leaf.is_contiguous() and leaf.untyped_storage().nbytes() == leaf.numel() * leaf.element_size()
    return whole and not leaf._is_view()


def nbytes(tree: Tree) -> int:
    """Bytes held by the leaves."""
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves(tree))
