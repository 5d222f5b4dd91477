"""How far a tree of tensors is from the one it should equal: one relative error, and where it is.

An error is relative to the largest entry of its tensor, and at least to a hundredth of the largest entry among the
tensors beside it, so that a gradient that is zero by symmetry is not compared with rounding noise. A NaN, another
shape, dtype or device, or another integer is an infinite error.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dualform.core.tree import Tree, named_leaves


class Worst(NamedTuple):
    """The greatest relative error a law found, and where."""

    error: float = 0.0
    where: str = ""


def deviation(
    got: Tree | Mapping[str, Tensor], want: Tree | Mapping[str, Tensor], what: str, *, beside: float = 0.0
) -> Worst:
    """The greatest relative error between the leaves of two trees, or the entries of two mappings, of one structure.

    ``beside`` is the largest entry among the tensors of other trees that belong to these, see :func:`largest`.
    """
    pairs, wanted = _named(got), _named(want)
    if pairs.keys() != wanted.keys():
        return Worst(math.inf, f"{what}: leaves {', '.join(pairs)}, expected {', '.join(wanted)}")
    top = max(beside, largest(want))
    found = []
    for name, leaf in wanted.items():
        other, where = pairs[name], f"{what} {name}".strip()
        if other.shape != leaf.shape or other.dtype != leaf.dtype or other.device != leaf.device:
            found.append(Worst(math.inf, f"{where}: {describe(other)}, expected {describe(leaf)}"))
        else:
            found.append(Worst(relative(other, leaf, top), where))
    return worst(found)


def largest(tree: Tree | Mapping[str, Tensor]) -> float:
    """The largest finite entry of a tree, by its absolute value; 0 where there is none."""
    return max((_largest(leaf) for leaf in _named(tree).values()), default=0.0)


def worst(found: Iterable[Worst]) -> Worst:
    """The greatest of several; no error at all when there are none."""
    return max(found, key=lambda w: w.error, default=Worst())


def relative(got: Tensor, want: Tensor, top: float = 0.0) -> float:
    """``max |got - want| / max |want|`` of one shape; ``top`` is the largest entry among the tensors beside."""
    if not want.numel():
        return 0.0
    if not (want.is_floating_point() or want.is_complex()):
        return 0.0 if torch.equal(got, want) else math.inf
    a, b = _exact(got), _exact(want)
    difference = torch.where(a == b, 0.0, (a - b).abs()).max().item()  # equal infinities do not differ
    error = difference / max(_largest(want), 1e-2 * top, 1e-6)
    return math.inf if math.isnan(error) else error


def describe(leaf: Tensor) -> str:
    """Dtype, shape and device, for messages."""
    return f"{leaf.dtype} {tuple(leaf.shape)} on {leaf.device}"


def _named(tree: Tree | Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(tree) if isinstance(tree, Mapping) else dict(named_leaves(tree))


def _largest(leaf: Tensor) -> float:
    if not leaf.numel() or not (leaf.is_floating_point() or leaf.is_complex()):
        return 0.0
    size = _exact(leaf).abs()
    return size[size.isfinite()].max().item() if bool(size.isfinite().any()) else 0.0


def _exact(leaf: Tensor) -> Tensor:
    return leaf.detach().cpu().to(torch.complex128 if leaf.is_complex() else torch.float64)
