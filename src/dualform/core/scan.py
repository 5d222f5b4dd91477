"""Prefix products of any associative operator: the engine under S5, Mamba and the Kalman filter."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from dualform.core.tree import leaves, tree_map

Element = TypeVar("Element")


def associative_scan(
    combine: Callable[[Element, Element], Element], elements: Element, *, reverse: bool = False
) -> Element:
    """All prefix products ``e_1, e_1 * e_2, ...`` along axis 1, in depth ``2 log2 T`` and work ``O(T)``.

    Args:
        combine: associative ``combine(earlier, later)``, elementwise over axes 0 and 1.
        elements: a tree of tensors ``(B, T, ...)``; T may be 0.
        reverse: products run from the last element to the first, ``combine(later, earlier)``.

    References:
        Blelloch (1990), "Prefix sums and their applications", section 1.4.
    """
    if reverse:
        flipped = associative_scan(combine, tree_map(lambda e: e.flip(1), elements))
        return tree_map(lambda e: e.flip(1), flipped)
    length = leaves(elements)[0].shape[1]
    if length < 2:
        return elements
    even, odd = tree_map(lambda e: e[:, 0::2], elements), tree_map(lambda e: e[:, 1::2], elements)
    pairs = combine(tree_map(lambda e: e[:, : length // 2], even), odd)
    at_odd = associative_scan(combine, pairs)
    if length == 2:
        return tree_map(lambda e, o: _interleave(e, o), even, at_odd)
    before = tree_map(lambda e: e[:, : (length - 1) // 2], at_odd)
    after = combine(before, tree_map(lambda e: e[:, 1:], even))
    return tree_map(lambda e, a, o: _interleave(torch.cat([e[:, :1], a], 1), o), even, after, at_odd)


def _interleave(even: Tensor, odd: Tensor) -> Tensor:
    """``even_0, odd_0, even_1, ...``; ``even`` may be one longer."""
    n = odd.shape[1]
    both = torch.stack([even[:, :n], odd], 2).flatten(1, 2)
    return both if even.shape[1] == n else torch.cat([both, even[:, n:]], 1)
