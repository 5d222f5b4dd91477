"""Which examples are held out."""

import torch
from torch import Tensor


def held_out_rows(y: Tensor, share: float, seed: int) -> Tensor:
    """About ``share`` of the rows at random, spread evenly over the classes, or over the values of the first number.

    Rows are put in order of y, and one of each ``1 / share`` neighbours is taken. Of every class one row or more stays:
    a class of a single row is not held out.

    Args:
        y: ``(n,)``, int64, of classes, or ``(n, K)`` of numbers.
        share: from 0 to below 1.
        seed: of the choice.
    """
    count = len(y)
    wanted = round(share * count)
    if not wanted:
        return torch.empty(0, dtype=torch.int64)
    source = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(count, generator=source)
    key = y if y.dim() == 1 else y[:, 0]
    order = shuffled[key[shuffled].argsort(stable=True)]
    edges = torch.linspace(0, count, wanted + 1, dtype=torch.float64)
    places = edges[:-1] + torch.rand(wanted, generator=source, dtype=torch.float64) * edges.diff()
    rows = order[places.long().clamp(max=count - 1).unique()]
    if y.dim() > 1:
        return rows.sort().values
    left = y.bincount() - y[rows].bincount(minlength=int(y.max()) + 1)
    for label in (left <= 0).logical_and(y.bincount() > 0).nonzero()[:, 0].tolist():
        mine = (y[rows] == label).nonzero()[:, 0]
        rows = rows[torch.arange(len(rows)) != mine[0]]  # the first of them is learned after all
    return rows.sort().values
