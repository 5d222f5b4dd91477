"""The forms of a recurrence: the ways to run it over the same inputs from the same state, which must all agree.

Every form takes ``x`` ``(B, T, ...)`` and a state of B rows, which it uses up, and lays its outputs out alike:
``(B, T, ...)``, zero where a row is shorter than T. So any two can be compared leaf by leaf.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dualform.core.packing import from_lengths, unpack
from dualform.core.recurrence import State
from dualform.core.tree import Tree, concat, take, tree_map

Form = Callable[[Any, Tensor, Any], tuple[Tree, State]]  # (recurrence, x, state) -> (y, state)


def whole(f: Any, x: Tensor, state: State) -> tuple[Tree, State]:
    """One call."""
    return f.forward(x, state)


def chunked(cuts: Sequence[int]) -> Form:
    """Calls on the pieces between ``cuts``, each from the state that the one before left."""

    def run(f: Any, x: Tensor, state: State) -> tuple[Tree, State]:
        parts = []
        for start, end in pairwise([0, *cuts, x.shape[1]]):
            y, state = f.forward(x[:, start:end], state)
            parts.append(y)
        return concat(parts, 1), state

    return run


def stepped(most: int) -> Form:
    """One element at a time; of a longer sequence only the last ``most``, what comes before in one call."""

    def run(f: Any, x: Tensor, state: State) -> tuple[Tree, State]:
        parts, start = [], max(0, x.shape[1] - most)
        if start:
            y, state = f.forward(x[:, :start], state)
            parts.append(y)
        for t in range(start, x.shape[1]):
            y, state = f.step(x[:, t], state)
            parts.append(tree_map(lambda leaf: leaf[:, None], y))
        return concat(parts, 1), state

    return run


def alone(lengths: Sequence[int] | None = None) -> Form:
    """Every row by itself, over the first ``lengths[i]`` elements; an empty row keeps its state."""

    def run(f: Any, x: Tensor, state: State) -> tuple[Tree, State]:
        ends = [x.shape[1]] * x.shape[0] if lengths is None else lengths
        outputs, states = [], []
        for i, end in enumerate(ends):
            row = take(state, slice(i, i + 1))
            if end:
                y, row = f.forward(x[i : i + 1, :end], row)
                outputs.append(y)
            states.append(row)
        keep = _keep(ends, x)
        return tree_map(lambda leaf: unpack(leaf, keep), concat(outputs, 1)), concat(states)

    return run


def packed(lengths: Sequence[int], dtype: torch.dtype = torch.int64) -> Form:
    """The first ``lengths[i]`` elements of all rows laid end to end, with ``cu_seqlens``."""

    def run(f: Any, x: Tensor, state: State) -> tuple[Tree, State]:
        keep = _keep(lengths, x)
        cu_seqlens = from_lengths(keep.sum(1)).to(dtype)
        y, state = f.forward(x[keep][None], state, cu_seqlens=cu_seqlens)
        return tree_map(lambda leaf: unpack(leaf, keep), y), state

    return run


def padded(lengths: Sequence[int], places: str, dtype: torch.dtype = torch.int64) -> Form:
    """The first ``lengths[i]`` elements with padding ``left``, ``right`` or ``between`` and an ``attention_mask``.

    The padding holds the row's other elements, so that a model that looks at it is found out.
    """

    def run(f: Any, x: Tensor, state: State) -> tuple[Tree, State]:
        keep = _keep(lengths, x)
        shuffle = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(0)).to(x.device)
        mask = {"left": keep.flip(1), "right": keep, "between": keep[:, shuffle]}[places]
        order = (~mask).to(torch.int8).argsort(dim=1, stable=True).argsort(dim=1)
        rows = torch.arange(x.shape[0], device=x.device)[:, None]
        y, state = f.forward(x[rows, order], state, attention_mask=mask.to(dtype))
        return tree_map(lambda leaf: _unpad(leaf, mask, keep), y), state

    return run


def _unpad(y: Tensor, mask: Tensor, keep: Tensor) -> Tensor:
    """Outputs under ``mask`` back at the front of their rows; a value that is not zero outside becomes NaN."""
    clean = unpack(y[mask][None], keep)
    outside = y[~mask].detach()
    return clean if bool((outside == 0).all()) else clean + math.nan


def _keep(lengths: Sequence[int], x: Tensor) -> Tensor:
    return torch.arange(x.shape[1], device=x.device) < torch.tensor(list(lengths), device=x.device)[:, None]
