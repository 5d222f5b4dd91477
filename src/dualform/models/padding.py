"""Padding at the door of a model: rows with an ``attention_mask`` become one packed line, and results rows again."""

from typing import NamedTuple

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.packing import Borders, Packing, from_lengths, readable
from dualform.core.recurrence import State
from dualform.core.shapes import check_indices, check_tensors
from dualform.core.tree import Tree, concat, take

_VALUES = "1 or true for an element, 0 or false for padding; where all is padding, in whole numbers or bool"


class Line(NamedTuple):
    """What a model runs on, and the way back to the rows that a caller gave; made by :func:`lay_out`.

    Without a mask, or where it hides nothing, the inputs are as they came. A mask that hides something makes one line
    of the elements it shows. Compiled code knows no values, and so no lengths: there the line keeps its full length,
    with the padding moved behind everything else, as one more sequence whose results nobody sees.
    """

    x: Tensor
    state: State | None
    packing: Packing | None
    intervals: Tensor | None
    keep: Tensor | None = None  # (B, T), where the line has been laid out anew
    order: Tensor | None = None  # the places of the line's elements among B T
    spare: bool = False  # whether the last sequence is padding

    def pack(self, rows: Tensor) -> Tensor:
        """Something else of every element, ``(B, T, ...)``, laid out like ``x``."""
        return rows if self.order is None else rows.flatten(0, 1)[self.order][None]

    def unpack(self, y: Tensor) -> Tensor:
        """``y``, laid out like ``x``, as rows ``(B, T, ...)``: 0 where there is padding."""
        if self.keep is None or self.order is None:
            return y
        rows = y.new_zeros(self.keep.numel(), *y.shape[2:]).index_copy(0, self.order, y[0])
        rows = rows.unflatten(0, self.keep.shape)
        return rows.masked_fill(~self.keep.view(*self.keep.shape, *[1] * (y.dim() - 2)), 0)

    def counted(self) -> Tensor | None:
        """``(1, T)``, which elements of the line are no padding; None where all are."""
        if not self.spare or self.packing is None:
            return None
        return (torch.arange(self.x.shape[1], device=self.x.device) < self.packing.cu_seqlens[-2])[None]

    def rows(self, tree: Tree) -> Tree:
        """What there is for every sequence of the line, without that of the padding."""
        if not self.spare or self.keep is None:
            return tree
        return take(tree, torch.arange(self.keep.shape[0], device=self.keep.device))  # a slice would fix the number


def lay_out(
    where: str,
    x: Tensor,
    state: State | None,
    cu_seqlens: Borders,
    attention_mask: Tensor | None,
    intervals: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Line:
    """The line of inputs ``(B, T, ...)``, with a mask ``(B, T)`` of 1 for an element and 0 for padding.

    ``lengths`` ``(B,)`` is the mask of rows that are padded on the right.

    The borders or the mask are read on the host once: one synchronisation where they are on a GPU, and none for a
    ``Packing``.

    Raises:
        ArgumentError: for more than one of ``cu_seqlens``, a mask and lengths, a mask of another shape or with other
            values, or a length that is none of 0 to T.
    """
    if lengths is not None:
        if cu_seqlens is not None or attention_mask is not None:
            raise ArgumentError(f"{where}: give one of cu_seqlens, attention_mask and lengths")
        attention_mask = _mask_of(where, x, lengths)
    if attention_mask is None:
        return Line(x, state, Packing.of(where, cu_seqlens, x), intervals)
    if cu_seqlens is not None:
        raise ArgumentError(f"{where}: give cu_seqlens or attention_mask, not both")
    check_tensors(where, x=(x, "B T ..."), attention_mask=(attention_mask, "B T"), intervals=(intervals, "? B T"))
    keep, unread = attention_mask != 0, not readable(attention_mask)
    if unread:
        order = keep.flatten().logical_not().to(torch.int8).argsort(stable=True)
        lengths = keep.sum(1)
        borders = from_lengths(torch.cat([lengths, (keep.numel() - lengths.sum())[None]]))
        packing = Packing(borders, None)
        x = x.masked_fill(~keep.view(*keep.shape, *[1] * (x.dim() - 2)), 0)
        intervals = None if intervals is None else intervals.masked_fill(~keep, 1)
        state = None if state is None else concat([state, take(state, slice(0, 1))])
    else:
        mask = attention_mask.cpu()
        shown = mask != 0
        if not torch.equal(shown.to(mask.dtype), mask):
            raise ArgumentError(f"{where}: attention_mask has values other than 0 and 1", hint=_VALUES)
        if (
            mask.is_floating_point() and mask.numel() and not shown.any()
        ):  # to add, as attention takes it, it hides nothing
            raise ArgumentError(f"{where}: attention_mask is {mask.dtype} and 0 everywhere", hint=_VALUES)
        if shown.all():
            return Line(x, state, None, intervals)
        order = shown.flatten().nonzero()[:, 0].to(x.device, non_blocking=True)
        packing = Packing.of_host(from_lengths(shown.sum(1)), x.device)
    line = Line(x, state, packing, intervals, keep, order, spare=unread)
    return line._replace(x=line.pack(x), intervals=None if intervals is None else line.pack(intervals))


def _mask_of(where: str, x: Tensor, lengths: Tensor) -> Tensor:
    """``(B, T)``, bool: the first ``lengths[i]`` elements of row i."""
    check_tensors(where, x=(x, "B T ..."), lengths=(lengths, "B"))
    check_indices(where, "lengths", lengths, x.shape[1] + 1, hint="how many elements each row has")
    return torch.arange(x.shape[1], device=x.device) < lengths[:, None]
