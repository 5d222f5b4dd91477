"""Rows of a table of states, which a step reads, and writes, at indices that lie on the device."""

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.packing import readable


def check_rows(where: str, rows: Tensor | None, table: Tensor) -> None:
    """Indices must be rows of the table, or negative; asked where reading them costs nothing, on a CPU.

    Their shape, dtype and device were checked. On other devices nothing is read on the host: what would lie beyond the
    table is not touched, see :func:`pick`.

    Raises:
        ArgumentError: for a table without rows, and for an index beyond its last row.
    """
    if rows is None or rows.shape[0] == 0:
        return
    if table.shape[0] == 0:
        raise ArgumentError(f"{where}: state has no rows, expected at least one for rows to choose from")
    if rows.device.type == "cpu" and readable(rows):
        most = int(rows.max())
        if most >= table.shape[0]:
            raise ArgumentError(
                f"{where}: rows has an index {most}, but state has {table.shape[0]} rows",
                hint="indices are counted from 0; a negative one is padding",
            )


def check_indices(where: str, **tensors: Tensor | None) -> None:
    """Every tensor present must be int32 or int64.

    Raises:
        ArgumentError: names the argument and its dtype.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in (torch.int32, torch.int64):
            raise ArgumentError(f"{where}: {name} is {tensor.dtype}, expected int32 or int64")


def pick(table: Tensor, rows: Tensor | None) -> Tensor:
    """The rows ``(B,)`` of a table ``(R, ...)``: zero for a negative one, NaN for one that the table does not have."""
    if rows is None:
        return table
    return blank(table.index_select(0, rows.clamp(0, max(table.shape[0] - 1, 0))), rows, table)


def blank(found: Tensor, rows: Tensor | None, table: Tensor) -> Tensor:
    """What was computed for each of ``rows`` ``(B, ...)``: zero for a negative one, NaN for one beyond the table."""
    if rows is None:
        return found
    rows = rows.view(-1, *[1] * (found.dim() - 1))
    return found.masked_fill(rows < 0, 0).masked_fill(rows >= table.shape[0], torch.nan)


def put(table: Tensor, rows: Tensor, after: Tensor) -> Tensor:
    """Write ``after`` ``(B, ...)`` to the rows ``(B,)`` of a table, rounded to its dtype, except where there are none.

    Nothing is read on the host. What is no row of the table writes what the first one that is writes as well, to the
    same place; where none is, what lies there already.
    """
    if rows.shape[0] == 0 or table.shape[0] == 0:
        return table
    there = (rows >= 0) & (rows < table.shape[0])
    first = there.to(torch.int8).argmax()[None]
    place = rows.index_select(0, first).clamp(0, table.shape[0] - 1).long()
    shape = (-1, *[1] * (table.dim() - 1))
    after = after.to(table.dtype)
    same = torch.where(
        there.index_select(0, first).view(shape), after.index_select(0, first), table.index_select(0, place)
    )
    after = torch.where(there.view(shape), after, same)
    return table.index_copy_(0, torch.where(there, rows.long(), place), after)
