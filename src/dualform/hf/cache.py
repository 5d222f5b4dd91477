"""The state of a model, in the place where transformers hands on a cache."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.recurrence import State
from dualform.core.tree import leaves, take


@dataclass
class StateCache:
    """What ``generate`` of transformers passes from one call of a model to the next.

    Its size does not depend on how many tokens were read, for models without attention.

    Attributes:
        state: of the model, a row for each sequence.
        seen: tokens in each row, padding among them.
    """

    state: State
    seen: int = 0

    is_compileable = False  # not by transformers; the model compiles itself

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen; the same for every layer."""
        return self.seen

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: as many tokens as come."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the rows of a beam search where they go on."""
        self._take(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        rows = leaves(self.state)[0].shape[0]
        self._take(torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._take(indices)

    def crop(self, *args: Any, **options: Any) -> None:
        """Refused: a state does not forget single tokens, as assisted generation asks for."""
        raise ArgumentError(
            "a state cannot forget the last tokens, so that a model of this library cannot be assisted by another",
            hint="generate without assistant_model or prompt_lookup_num_tokens",
        )

    def _take(self, rows: Tensor) -> None:
        self.state = take(self.state, rows)
