"""What a decoder has of each row beside the state of the model, as tensors of all rows."""

from typing import NamedTuple

import torch
from torch import Tensor

from dualform.generation.options import Sampling
from dualform.generation.sampling import table
from dualform.generation.session import WINDOW

DRAWS = 64
"""Random numbers of a row that are on the device at a time."""


class Slots(NamedTuple):
    """Places for rows: a tree of tensors, batch first in every leaf."""

    logits: Tensor  # (B, V), of the next token
    history: Tensor  # (B, WINDOW), the last tokens; -1 fills the empty places on the left
    options: Tensor  # (B, 6), how tokens are drawn, see sampling.table
    draws: Tensor  # (B, DRAWS), random numbers, float64
    scores: Tensor  # (B, 1 + 2 top), log-probabilities, then the most likely tokens, float64


def free_slot(device: torch.device, home: torch.device, vocab: int, top: int | None) -> Slots:
    """A place that nobody has taken.

    Args:
        device: of the model.
        home: of numbers in float64, which not every device has.
        vocab: V, how many tokens there are.
        top: of how many tokens log-probabilities are told; None for not even those that are drawn.
    """
    wide = 0 if top is None else 1 + 2 * top
    return Slots(
        logits=torch.zeros(1, vocab, device=device),
        history=torch.full((1, WINDOW), -1, device=device),
        options=table([Sampling()]).to(home),
        draws=torch.zeros(1, DRAWS, dtype=torch.float64, device=home),
        scores=torch.zeros(1, wide, dtype=torch.float64, device=home),
    )
