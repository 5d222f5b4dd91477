"""Whole documents, packed: several sequences end to end on one line, with no state across a border.

A document is trained from the first token of its separator to the token after its text, which is the first of the
next separator: so a model learns where documents end. A document of more than ``length`` predicted tokens is cut into
pieces of that many; each token is predicted once.

The sequences are put into windows of at most ``length + 1`` tokens once for a run, in an order drawn from its seed. A
step takes ``batch`` windows; every epoch takes all of them in an order drawn from the seed and the epoch. So what a
step sees follows from the seed and the step alone.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dualform.core.errors import DataError
from dualform.train.recipe import Data

_FILLING = 2**64 - 1  # the key of the order in which windows are filled; smaller ones are of epochs


class Portion(NamedTuple):
    """What one process computes at once.

    ``tokens`` is ``(B, length + 1)``, or ``(1, T)`` with the ``cu_seqlens`` of its sequences. The mean loss of a
    portion times its ``share``, averaged over the portions of a step, is the mean loss of the step.
    """

    tokens: Tensor
    cu_seqlens: Tensor | None = None
    share: float = 1.0


class Sequences:
    """The documents of a flat array of tokens, as sequences of at most ``length`` predicted tokens.

    Args:
        ids: the tokens; every document begins with its separator.
        starts: where each document begins, rising from 0; None where that was not read.
        length: the most tokens that one sequence predicts.

    Raises:
        DataError: without ``starts``.
    """

    def __init__(self, ids: np.ndarray, starts: np.ndarray | None, length: int):
        if starts is None:
            raise DataError("the dataset does not say where documents begin", hint="open it with data.packed = true")
        sizes = np.diff(starts, append=len(ids))
        pieces = -(-sizes // length)
        offsets = length * (np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces))
        self.ids = ids
        self.begins = np.repeat(starts, pieces) + offsets
        self.sizes = np.minimum(length, np.repeat(sizes, pieces) - offsets)  # predicted tokens; one more is read
        self.learned = self.sizes
        if ids.dtype.kind == "i":  # of conversations, in which a token that is only read is negative
            upto = np.concatenate([[0], np.cumsum(np.append(np.asarray(ids[:]) >= 0, ids[0] >= 0))])
            self.learned = upto[self.begins + self.sizes + 1] - upto[self.begins + 1]

    def places(self, chosen: np.ndarray) -> np.ndarray:
        """Where the tokens of the chosen sequences stand in ``ids``, end to end.

        The token after the last document is the first of all, of a separator like every other.
        """
        sizes = self.sizes[chosen] + 1
        inside = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return (np.repeat(self.begins[chosen], sizes) + inside) % len(self.ids)

    def line(self, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        """The tokens ``(1, T)`` of the chosen sequences end to end, int64, and their ``cu_seqlens``."""
        tokens = torch.from_numpy(self.ids[self.places(chosen)].astype(np.int64))
        return tokens[None], torch.from_numpy(np.concatenate([[0], np.cumsum(self.sizes[chosen] + 1)]))

    def windows(self, order: np.ndarray, capacity: int) -> list[np.ndarray]:
        """All sequences in an order, as runs of at most ``capacity`` tokens each."""
        ends = np.concatenate([[0], np.cumsum(self.sizes[order] + 1)])
        following = (np.searchsorted(ends, ends[:-1] + capacity, "right") - 1).tolist()
        borders = [0]
        while borders[-1] < len(order):
            borders.append(following[borders[-1]])
        return np.split(order, borders[1:-1])


class Packed:
    """The packed portions of a run.

    Args:
        ids: the training tokens; every document begins with its separator.
        starts: where each document begins.
        length: the most tokens that one sequence predicts; a window holds one token more.
        seed: of the run.
    """

    def __init__(self, ids: np.ndarray, starts: np.ndarray | None, length: int, seed: int):
        self._sequences = Sequences(ids, starts, length)
        order = _random(seed, _FILLING).permutation(len(self._sequences.sizes))
        self._windows = self._sequences.windows(order, length + 1)
        self._order = lru_cache(maxsize=2)(lambda epoch: _random(seed, epoch).permutation(len(self._windows)))

    def portions(self, data: Data, step: int, rank: int = 0, ranks: int = 1) -> Iterator[Portion]:
        """This process's share of a step, in ``data.accumulate`` portions."""
        chosen = self._step(data, step)
        total, parts = self._count(chosen), ranks * data.accumulate
        mine = chosen[rank::ranks]
        for at in range(0, len(mine), data.batch // parts):
            some = mine[at : at + data.batch // parts]
            tokens, cu_seqlens = self._sequences.line(np.concatenate(some))
            yield Portion(tokens, cu_seqlens, self._count(some) * parts / max(total, 1))

    def predicted(self, data: Data, step: int) -> int:
        """Tokens that a step learns to predict, over all processes together."""
        return self._count(self._step(data, step))

    def _step(self, data: Data, step: int) -> list[np.ndarray]:
        places = (divmod(i, len(self._windows)) for i in range(step * data.batch, (step + 1) * data.batch))
        return [self._windows[self._order(epoch)[i]] for epoch, i in places]

    def _count(self, windows: list[np.ndarray]) -> int:
        return sum(int(self._sequences.learned[one].sum()) for one in windows)


def _random(seed: int, key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, key], np.uint64)))
