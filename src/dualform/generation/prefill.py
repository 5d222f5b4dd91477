"""Prompts that are read together: pieces of several, end to end in one call."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.core.recurrence import State
from dualform.core.tree import leaves, tree_map
from dualform.generation.request import Request, prefill_tokens
from dualform.models.backbone import Backbone
from dualform.models.lm import LanguageModel


def growing(model: Backbone) -> list[bool]:
    """Which leaves of a state grow with the context, along their second axis."""
    small, large = (leaves(model.init_state(1, max_len=n)) for n in (1, 2))
    return [a.shape != b.shape for a, b in zip(small, large, strict=True)]


def read_piece(model: LanguageModel, requests: Sequence[Request]) -> None:
    """Read as many tokens of prompts as are read at once, those of the first requests first.

    Args:
        model: whose requests they are.
        requests: in their order; those with nothing to read only get their memory.
    """
    left, pieces = prefill_tokens(model), list[tuple[Request, Tensor]]()
    for one in requests:
        if not left:
            break
        one.start()
        if len(piece := one.piece(left)):
            pieces.append((one, piece))
            left -= len(piece)
    if len(pieces) == 1:
        pieces[0][0].read()
    elif pieces:
        _read_packed(model, pieces)


def _read_packed(model: LanguageModel, pieces: list[tuple[Request, Tensor]]) -> None:
    device = next(model.parameters()).device
    lengths = [len(piece) for _, piece in pieces]
    borders = torch.tensor([0, *lengths]).cumsum(0)
    before = [one.start() for one, _ in pieces]
    with torch.inference_mode():
        tokens = torch.cat([piece for _, piece in pieces])[None].to(device)
        features, after = model.features(tokens, _joined(before), cu_seqlens=borders.to(device))
        for row, (one, _) in enumerate(pieces):
            capacity = [leaf.shape[1] if leaf.dim() > 1 else 0 for leaf in leaves(before[row])]
            state = _row(after, row, growing(model), one.position + lengths[row], capacity)
            last = int(borders[row + 1]) - 1
            one.took(lengths[row], state, features[:, last : last + 1])


def _joined(states: list[State]) -> State:
    """States of one row each as one; caches get the room of the largest."""

    def one(*rows: Tensor) -> Tensor:
        if len({row.shape for row in rows}) > 1:
            room = max(row.shape[1] for row in rows)
            rows = tuple(F.pad(row, (*(0, 0) * (row.dim() - 2), 0, room - row.shape[1])) for row in rows)
        return torch.cat(rows)

    return tree_map(one, *states)


def _row(states: State, row: int, grows: list[bool], seen: int, capacity: list[int]) -> State:
    """A copy of one row, whose caches have the room that they had, or that their tokens need."""
    known = zip(grows, capacity, strict=True)

    def one(leaf: Tensor) -> Tensor:
        cut, room = next(known)
        return (leaf[row : row + 1, : max(seen, room)] if cut else leaf[row : row + 1]).clone()

    return tree_map(one, states)
