"""Products of steps of a chunk under decays that lie between them, when every key channel decays by itself."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Decayed(NamedTuple):
    """What the matrix products of a chunk of K steps need; see :func:`decayed`."""

    products: list[list[Tensor]]  # of every row with every column, (..., K, K), zero on the diagonal and above it
    before: Tensor  # (..., K, N), the sums of logarithms before each step of the chunk
    after: Tensor  # (..., K, N), the sums after each step
    total: Tensor  # (..., 1, N), the sums of all


def decayed(rows: Sequence[Tensor], columns: Sequence[Tensor], log: Tensor) -> Decayed:
    """``P_ij = sum_n r_in c_jn exp(sum of log_sn over the steps s between j and i)`` for steps j before i.

    Two neighbouring blocks of steps become one: the products of the steps of one with those of the other are a matrix
    product, whose factors decay to and from the border of the blocks. No exponent is larger than a sum of logarithms,
    so nothing overflows, and sums are never subtracted from each other, so that a weak decay beside strong ones is
    exact. A logarithm may be ``-inf``.

    Args:
        rows: of tensors ``(..., K, N)``, K a power of two.
        columns: the same.
        log: ``(..., K, N)``, logarithms of decays.
    """
    log, *others = (m.unsqueeze(-2) for m in (log, *rows, *columns))  # (..., blocks, steps of a block, N)
    rows, columns = others[: len(rows)], others[len(rows) :]
    before = after = torch.zeros_like(log)
    products = [[log.new_zeros(*log.shape[:-1], 1) for _ in columns] for _ in rows]
    while log.shape[-3] > 1:
        total = before[..., -1:, :] + log[..., -1:, :]
        until, since = _left(after).exp(), _right(before).exp()
        reached, seen = [_left(m) * until for m in columns], [_right(m) * since for m in rows]
        products = [
            [_joined(p, row @ column.mT) for p, column in zip(of_row, reached, strict=True)]
            for of_row, row in zip(products, seen, strict=True)
        ]
        before = torch.cat([_left(before), _right(before) + _left(total)], -2)
        after = torch.cat([_left(after) + _right(total), _right(after)], -2)
        log, *others = (m.unflatten(-3, (-1, 2)).flatten(-3, -2) for m in (log, *rows, *columns))
        rows, columns = others[: len(rows)], others[len(rows) :]
    before, after, log = before.squeeze(-3), after.squeeze(-3), log.squeeze(-3)
    total = before[..., -1:, :] + log[..., -1:, :]
    return Decayed([[p.squeeze(-3) for p in of_row] for of_row in products], before, after, total)


def _left(m: Tensor) -> Tensor:
    return m[..., 0::2, :, :]


def _right(m: Tensor) -> Tensor:
    return m[..., 1::2, :, :]


def _joined(inside: Tensor, across: Tensor) -> Tensor:
    """The products of steps within blocks, and those of the steps of right blocks with left ones, as one matrix."""
    above = torch.cat([_left(inside), torch.zeros_like(across)], -1)
    return torch.cat([above, torch.cat([across, _right(inside)], -1)], -2)
