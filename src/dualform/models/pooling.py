"""From the features of a sequence to one vector: over all of it, or what a stream still remembers."""

from math import expm1, log1p
from typing import Any

import torch
from torch import Tensor, nn

from dualform.core.errors import ConfigError
from dualform.core.packing import Packing
from dualform.core.shapes import check_tensors, wide, widest
from dualform.core.tree import Tree

_LOWEST = -1e30  # a score of nothing: finite, so that no difference of two is NaN


class Mean(nn.Module):
    """``sum h / n``; the sum is in float64, which still moves after 10^9 elements."""

    def nothing(self, rows: int, weight: Tensor) -> Tree:
        """What is pooled of no elements, for features with the width, dtype and device of ``weight`` ``(D,)``."""
        return weight.new_zeros(rows, len(weight), dtype=torch.promote_types(wide(weight), widest(weight)))

    def forward(self, h: Tensor, pooled: Tree, packing: Packing | None) -> Tree:
        """``h`` ``(B, T, D)``, T above 0, and what was pooled before, with a row per row or packed sequence."""
        if packing is None:
            return pooled + h.sum(1, dtype=pooled.dtype)
        return pooled.index_add(0, packing.sequence_ids(h.shape[1]), h[0].to(pooled.dtype))

    def read(self, pooled: Tree, seen: Tensor) -> Tensor:
        """One vector per row, ``(B, D)``, of ``seen`` ``(B,)`` elements."""
        return pooled / seen.clamp(min=1)[:, None]

    def shapes(self, pooled: Tree, width: int) -> dict[str, tuple[Any, str]]:
        """What is expected of a state that is given."""
        return {"pooled": (pooled, f"R {width}")}


class Last(Mean):
    """``h_n``."""

    def nothing(self, rows: int, weight: Tensor) -> Tree:
        return weight.new_zeros(rows, len(weight), dtype=wide(weight))

    def forward(self, h: Tensor, pooled: Tree, packing: Packing | None) -> Tree:
        if packing is None:
            return h[:, -1].to(pooled.dtype, copy=True)
        borders = packing.cu_seqlens
        some, last = borders.diff() > 0, (borders[1:] - 1).clamp(min=0)
        return torch.where(some[:, None], h[0].to(pooled.dtype)[last], pooled)

    def read(self, pooled: Tree, seen: Tensor) -> Tensor:
        return pooled


class Max(Last):
    """``max_t h_t``, of each feature."""

    def nothing(self, rows: int, weight: Tensor) -> Tree:
        return super().nothing(rows, weight).fill_(-torch.inf)

    def forward(self, h: Tensor, pooled: Tree, packing: Packing | None) -> Tree:
        if packing is None:
            return torch.maximum(pooled, h.amax(1).to(pooled.dtype))
        ids = packing.sequence_ids(h.shape[1])
        return pooled.scatter_reduce(0, ids[:, None].expand_as(h[0]), h[0].to(pooled.dtype), "amax")


class Attention(nn.Module):
    """``sum_t w_t h_t / sum_t w_t`` with ``w_t = exp(q h_t)``; q is learned, and zero, the mean, at the start.

    The state is the weighted sum ``(B, D)``, the sum of weights and the greatest score ``(B,)``, which all weights are
    divided by the exponential of.

    References:
        Bahdanau et al. (2015), arXiv:1409.0473, for the weights; Milakov & Gimelshein (2018), arXiv:1805.02867,
        algorithm 3, for computing them in one pass.
    """

    def __init__(self, width: int):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(width))

    def nothing(self, rows: int, weight: Tensor) -> Tree:
        """See :class:`Mean`."""
        zeros = weight.new_zeros(rows, len(weight) + 1, dtype=wide(weight))
        return zeros[:, 1:].clone(), zeros[:, 0].clone(), zeros.new_full((rows,), _LOWEST)

    def forward(self, h: Tensor, pooled: Tree, packing: Packing | None) -> Tree:
        """See :class:`Mean`."""
        total, weights, top = pooled
        h = h.to(total.dtype)
        scores = h @ self.query.to(h.dtype)  # (B, T)
        if packing is None:
            new = torch.maximum(top, scores.amax(1))
            w, left = (scores - new[:, None]).exp(), (top - new).exp()
            return left[:, None] * total + torch.einsum("bt,btd->bd", w, h), left * weights + w.sum(1), new
        ids, scores = packing.sequence_ids(h.shape[1]), scores[0]
        new = top.scatter_reduce(0, ids, scores, "amax")
        w, left = (scores - new[ids]).exp(), (top - new).exp()
        total = (left[:, None] * total).index_add(0, ids, w[:, None] * h[0])
        return total, (left * weights).index_add(0, ids, w), new

    def read(self, pooled: Tree, seen: Tensor) -> Tensor:
        """See :class:`Mean`."""
        total, weights, _ = pooled
        return total / weights.where(seen > 0, 1)[:, None]

    def shapes(self, pooled: Tree, width: int) -> dict[str, tuple[Any, str]]:
        """See :class:`Mean`."""
        parts = pooled if isinstance(pooled, tuple) and len(pooled) == 3 else (pooled, None, None)
        return dict(zip(("total", "weights", "top"), zip(parts, (f"R {width}", "R", "R"), strict=True), strict=True))


class Window(nn.Module):
    """The mean of the last ``window`` elements, which are the state, in order: ``(B, window, D)``."""

    def __init__(self, window: int):
        super().__init__()
        self.window = window

    def nothing(self, rows: int, weight: Tensor) -> Tree:
        """See :class:`Mean`."""
        return weight.new_zeros(rows, self.window, len(weight), dtype=wide(weight))

    def forward(self, h: Tensor, pooled: Tree, packing: Packing | None) -> Tree:
        """See :class:`Mean`."""
        h = h.to(pooled.dtype)
        if packing is None:
            return torch.cat([pooled[:, min(h.shape[1], self.window) :], h[:, -self.window :]], 1)
        lengths, place = packing.cu_seqlens.diff()[:, None], torch.arange(self.window, device=h.device)
        new = packing.cu_seqlens[1:, None] - self.window + place  # of the line, or before the sequence
        older = (place + lengths).clamp(max=self.window - 1)[..., None].expand_as(pooled)
        here = (new >= packing.cu_seqlens[:-1, None])[..., None]
        return torch.where(here, h[0][new.clamp(min=0)], pooled.gather(1, older))

    def read(self, pooled: Tree, seen: Tensor) -> Tensor:
        """See :class:`Mean`."""
        return pooled.sum(1) / seen.clamp(1, self.window)[:, None]

    def shapes(self, pooled: Tree, width: int) -> dict[str, tuple[Any, str]]:
        """See :class:`Mean`."""
        return {"pooled": (pooled, f"R {self.window} {width}")}


class Forgetting(Last):
    """``sum_t r^(n - t) h_t / sum_t r^(n - t)`` with ``r = 1 - 1 / window``: the mean, forgotten exponentially."""

    def __init__(self, window: int):
        super().__init__()
        self.log_keep = log1p(-1 / window) if window > 1 else -1e3  # with a window of 1, the last element

    def forward(self, h: Tensor, pooled: Tree, packing: Packing | None) -> Tree:
        h, length = h.to(pooled.dtype), h.shape[1]
        if packing is None:
            kept = (torch.arange(length, -1, -1, device=h.device, dtype=h.dtype) * self.log_keep).exp()
            return kept[0] * pooled + torch.einsum("t,btd->bd", kept[1:], h)
        ids, lengths = packing.sequence_ids(length), packing.cu_seqlens.diff()
        ages = packing.cu_seqlens[1:][ids] - 1 - torch.arange(length, device=h.device)
        kept = (lengths.to(h.dtype) * self.log_keep).exp()[:, None] * pooled
        return kept.index_add(0, ids, (ages.to(h.dtype) * self.log_keep).exp()[:, None] * h[0])

    def read(self, pooled: Tree, seen: Tensor) -> Tensor:
        weights = torch.expm1(seen.clamp(min=1).to(pooled.dtype) * self.log_keep) / expm1(self.log_keep)
        return pooled / weights[:, None]


_WHOLE = {"mean": Mean, "last": Last, "max": Max}
_RECENT = {"window": Window, "forgetting": Forgetting}
POOLINGS = (*_WHOLE, "attention", *_RECENT)


def make_pooling(where: str, kind: str, width: int, window: int | None) -> Any:
    """The pooling of that name, of features ``(B, T, width)``.

    Raises:
        ConfigError: for an unknown name, listing those that exist, or a window that is missing, or has no meaning.
    """
    if kind not in POOLINGS:
        raise ConfigError(f"{where}: pooling {kind!r} is unknown", hint=f"one of {', '.join(POOLINGS)}")
    if kind in _RECENT:
        if not isinstance(window, int) or window < 1:
            raise ConfigError(f"{where}: window is {window}, expected at least 1 element for pooling {kind!r}")
        return _RECENT[kind](window)
    if window is not None:
        raise ConfigError(f"{where}: window is {window}, and pooling {kind!r} has none", hint="window or forgetting")
    return Attention(width) if kind == "attention" else _WHOLE[kind]()


def check_pooled(where: str, pooling: Any, pooled: Tree, seen: Tensor, width: int) -> None:
    """That what a state holds fits the pooling.

    Raises:
        ArgumentError: names what came and what was expected.
    """
    check_tensors(where, **pooling.shapes(pooled, width), seen=(seen, "R"))
