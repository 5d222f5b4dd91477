"""The LSTM, the classic recurrent baseline, as a mixer around ``torch.nn.LSTM``."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from dualform.core.errors import ConfigError
from dualform.core.options import options
from dualform.core.packing import check_cu_seqlens
from dualform.core.shapes import check_tensors, wide
from dualform.core.tree import state_class
from dualform.layers.mixer import Mixer


@options
class LSTMConfig:
    """Sizes of an :class:`LSTM`.

    Args:
        hidden: width of the hidden state; None is ``d_model``. Another width adds an output projection.
        layers: LSTMs stacked inside the mixer.
    """

    hidden: int | None = None
    layers: int = 1

    def build(self, d_model: int) -> "LSTM":
        """The layer, freshly initialised."""
        return LSTM(self, d_model)


@state_class
class LSTMState(NamedTuple):
    """Hidden and cell state of every stacked layer, float32 or wider."""

    h: Tensor  # (B, layers, hidden)
    c: Tensor  # (B, layers, hidden)


class LSTM(Mixer):
    """``i, f, o = sigmoid(...)``, ``g = tanh(...)``, ``c_t = f c_{t-1} + i g``, ``h_t = o tanh(c_t)``, ``y_t = h_t``.

    Every gate is an affine map of ``x_t`` and ``h_{t-1}``, with torch's parameters and initialisation.

    Raises:
        ConfigError: for a size below 1.

    References:
        Hochreiter & Schmidhuber (1997), Neural Computation 9(8); Gers et al. (2000) for the forget gate.
    """

    def __init__(self, config: LSTMConfig, d_model: int):
        super().__init__()
        hidden = d_model if config.hidden is None else config.hidden
        if hidden < 1 or config.layers < 1:
            raise ConfigError(f"lstm: hidden is {hidden} and layers {config.layers}, expected at least 1 of each")
        self.d_model, self.hidden, self.layers = d_model, hidden, config.layers
        self.lstm = nn.LSTM(d_model, hidden, config.layers, batch_first=True)
        self.out_proj = nn.Identity() if hidden == d_model else nn.Linear(hidden, d_model, bias=False)

    def init_state(self, batch: int, *, max_len: int = 0) -> LSTMState:
        """Zeros."""
        weight = next(self.lstm.parameters())
        zeros = torch.zeros(batch, self.layers, self.hidden, dtype=wide(weight), device=weight.device)
        return LSTMState(zeros, zeros.clone())

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: LSTMState | None = None,
        *,
        cu_seqlens: Int[Tensor, " n"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], LSTMState]:
        """The whole sequence; packed sequences run side by side, without padding."""
        check_tensors("lstm", x=(x, f"B T {self.d_model}"))
        batch, length = x.shape[:2]
        rows = batch if cu_seqlens is None else check_cu_seqlens("lstm", cu_seqlens, batch, length)
        state = self.init_state(rows) if state is None else state
        spec = f"{rows} {self.layers} {self.hidden}"
        check_tensors("lstm", x=(x, "* * *"), **{"state.h": (state.h, spec), "state.c": (state.c, spec)})
        if x.numel() == 0:
            return x, state
        if cu_seqlens is None:
            y, state = self._run(x, state)
        else:
            y, state = self._run_packed(x[0], state, cu_seqlens.to(x.device, torch.int64))
        return self.out_proj(y), state

    def _run_packed(self, x: Tensor, state: LSTMState, borders: Tensor) -> tuple[Tensor, LSTMState]:
        """``x`` ``(total, D)``: a batch that holds, at every time, the sequences that are longer, longest first."""
        lengths, rows = borders.diff().sort(descending=True, stable=True)
        rows = rows[: int((lengths > 0).sum())]
        time = torch.arange(int(lengths[0]), device=x.device)
        running = lengths[: len(rows)] > time[:, None]  # (longest, rows)
        order = (borders[rows] + time[:, None])[running]
        packed = PackedSequence(x[order], running.sum(1).cpu())
        y, after = self._run(packed, LSTMState(state.h[rows], state.c[rows]))
        h, c = (old.index_copy(0, rows, new) for old, new in zip(state, after, strict=True))
        return y.data[order.argsort()][None], LSTMState(h, c)

    def _run(self, x: Any, state: LSTMState) -> tuple[Any, LSTMState]:
        """``nn.LSTM``, whose states have the layers first and the dtype of its weights."""
        dtype = next(self.lstm.parameters()).dtype
        y, after = self.lstm(x.to(dtype), tuple(s.transpose(0, 1).to(dtype).contiguous() for s in state))
        h, c = (new.transpose(0, 1).to(old.dtype) for new, old in zip(after, state, strict=True))
        return y, LSTMState(h, c)
