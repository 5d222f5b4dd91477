"""A GRU as a mixer around ``torch.nn.GRU``, to hold others against: it is no layer of the library."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from dualform.core.packing import Borders, Packing
from dualform.layers.mixer import Mixer


@dataclass(frozen=True)
class GRUConfig:
    """A :class:`GRU`, which has no options."""

    def build(self, d_model: int) -> "GRU":
        """The layer, freshly initialised."""
        return GRU(d_model)


class GRU(Mixer):
    """``torch.nn.GRU`` of one layer, as wide as the stream.

    References:
        Cho et al. (2014), arXiv:1406.1078.
    """

    def __init__(self, d_model: int):
        super().__init__()
        self.gru: nn.GRU = nn.GRU(d_model, d_model, batch_first=True)

    def init_state(self, batch: int, *, max_len: int = 0) -> Tensor:
        """Zeros."""
        return self.gru.weight_hh_l0.new_zeros(batch, self.gru.hidden_size)

    def forward(self, x: Tensor, state: Tensor | None = None, *, cu_seqlens: Borders = None) -> tuple[Tensor, Tensor]:
        """The whole sequence; packed ones side by side, of one element or more each."""
        packing = Packing.of("gru", cu_seqlens, x)
        before = self.init_state(x.shape[0] if packing is None else packing.rows) if state is None else state
        if packing is None:
            y, after = self.gru(x, before[None])
            return y, after[0]
        lengths = packing.cu_seqlens.diff().tolist()
        rows = pad_sequence(list(x[0].split(lengths)), batch_first=True)
        packed, after = self.gru(
            pack_padded_sequence(rows, torch.tensor(lengths), batch_first=True, enforce_sorted=False), before[None]
        )
        y = pad_packed_sequence(packed, batch_first=True)[0]
        return torch.cat([row[:n] for row, n in zip(y, lengths, strict=True)])[None], after[0]
