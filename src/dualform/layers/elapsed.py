"""Counting the steps that each row of a state has seen, for layers whose maps depend on the position."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dualform.core.packing import Packing


def positions(
    x: Float[Tensor, "B T ..."], length: Int[Tensor, " R"] | None, packing: Packing | None
) -> Int[Tensor, "*B T"]:
    """How many steps come before each step of ``x``: ``(B, T)``, or ``(1, T)`` where all rows have the same.

    Args:
        x: what is read.
        length: ``(R,)`` int64, steps seen before, one for each row of the state; None is 0 throughout.
        packing: of ``x``.
    """
    if packing is None:
        at = torch.arange(x.shape[1], device=x.device)[None]
        return at if length is None else length[:, None] + at
    ids, at = packing.places(x.shape[1])
    return (at if length is None else length[ids] + at)[None]


def advanced(
    x: Float[Tensor, "B T ..."], length: Int[Tensor, " R"] | None, packing: Packing | None
) -> Int[Tensor, " R"]:
    """The lengths after ``x``, as :func:`positions` takes them."""
    if packing is None:
        added = torch.full((x.shape[0],), x.shape[1], dtype=torch.int64, device=x.device)
    else:
        added = packing.cu_seqlens.diff()
    return added if length is None else length + added
