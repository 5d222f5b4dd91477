"""The LSTM, the classic recurrent baseline, as a mixer around ``torch.nn.LSTM``."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from dualform.core.errors import ConfigError
from dualform.core.options import options
from dualform.core.packing import Borders, Packing
from dualform.core.shapes import check_features, check_tensors, wide
from dualform.core.tree import state_class
from dualform.layers.mixer import Mixer, check_kind
from dualform.layers.part import DEEPEST
from dualform.ops.derivatives import mapped, transformed
from dualform.ops.lstm import in_spans, lstm, side_by_side
from dualform.ops.op import forced


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

    Every gate is an affine map of ``x_t`` and ``h_{t-1}``, with the parameters and the initialisation of
    ``torch.nn.LSTM``. To compile a model that holds one, set ``torch._dynamo.config.allow_rnn = True`` first.

    Raises:
        ConfigError: for a size below 1, or more layers than anyone stacks.

    References:
        Hochreiter & Schmidhuber (1997), Neural Computation 9(8); Gers et al. (2000) for the forget gate.
    """

    def __init__(self, config: LSTMConfig, d_model: int):
        super().__init__()
        hidden = d_model if config.hidden is None else config.hidden
        if hidden < 1 or config.layers < 1:
            raise ConfigError(f"lstm: hidden is {hidden} and layers {config.layers}, expected at least 1 of each")
        if config.layers > DEEPEST:
            raise ConfigError(f"lstm: layers is {config.layers:,}, expected at most {DEEPEST:,}")
        self.d_model, self.hidden, self.layers = d_model, hidden, config.layers
        self.lstm = nn.LSTM(d_model, hidden, config.layers, batch_first=True)
        self.out_proj = nn.Identity() if hidden == d_model else nn.Linear(hidden, d_model, bias=False)
        self._like: Tensor
        self.register_buffer("_like", torch.empty(0), persistent=False)

    @property
    def like(self) -> Tensor:
        """A tensor of the weights' dtype and device; where they are wrapped, one that moves with the layer."""
        return next(self.lstm.parameters(), self._like)

    def init_state(self, batch: int, *, max_len: int = 0) -> LSTMState:
        """Zeros; ``max_len`` is ignored."""
        zeros = torch.zeros(batch, self.layers, self.hidden, dtype=wide(self.like), device=self.like.device)
        return LSTMState(zeros, zeros.clone())

    def forward(
        self, x: Float[Tensor, "B T D"], state: LSTMState | None = None, *, cu_seqlens: Borders = None
    ) -> tuple[Float[Tensor, "B T D"], LSTMState]:
        """The whole sequence; packed sequences run side by side, and each state is that after its own last step."""
        check_features("lstm", x, self.d_model)
        packing = Packing.of("lstm", cu_seqlens, x)
        rows = x.shape[0] if packing is None else packing.rows
        state = self.init_state(rows) if state is None else state
        check_kind("lstm", state, LSTMState)
        of = {"x": (x, "R ...")} if packing is None else {"sequences": (packing.cu_seqlens[1:], "R")}
        spec = f"R {self.layers} {self.hidden}"
        check_tensors("lstm", **of, **{"state.h": (state.h, spec), "state.c": (state.c, spec)})
        if x.numel() == 0:
            return x.clone(), state
        if self._needs_ops(x, packing):
            y, state = self._run_as_ops(x, state, packing)
        elif packing is None:
            y, state = self._run(x, state)
        elif x.device.type == "cpu" and packing.known and type(self.lstm) is nn.LSTM:  # not one that is quantised
            y, state = self._run_in_spans(x[0], state, packing)
        else:
            y, state = self._run_packed(x[0], state, packing)
        return self.out_proj(y), state

    def _needs_ops(self, x: Tensor, packing: Packing | None) -> bool:
        """Where ``nn.LSTM`` computes too coarsely, unrolls, or has no derivatives of the kind that is asked for."""
        if torch.compiler.is_compiling() or forced() == "reference":
            return True
        low = x.device.type == "cpu" and (self.like.dtype.itemsize < 4 or torch.is_autocast_enabled("cpu"))
        return low or (transformed() and (packing is not None or mapped()))

    def _run_as_ops(self, x: Tensor, state: LSTMState, packing: Packing | None) -> tuple[Tensor, LSTMState]:
        """Layer by layer: ``nn.LSTM`` would unroll its loop over time in a compiled program, one for every length.

        On a CPU the states of low precision stay wide, as :func:`dualform.ops.lstm.lstm` computes in float32 there.
        """
        dtype = wide(self.like) if x.device.type == "cpu" else self.like.dtype

        def run(y: Tensor, h: Tensor, c: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            return lstm(y, h, c, *weights, cu_seqlens=packing)

        return self._layer_by_layer(run, x, state, dtype)

    def _run_in_spans(self, x: Tensor, state: LSTMState, packing: Packing) -> tuple[Tensor, LSTMState]:
        """``x`` ``(total, D)``, as rows that are held where their sequences have ended."""
        y, state = self._layer_by_layer(partial(in_spans, packing=packing), x, state, self.like.dtype)
        return y[None], state

    def _layer_by_layer(
        self, run: Callable[..., tuple[Tensor, Tensor, Tensor]], x: Tensor, state: LSTMState, dtype: torch.dtype
    ) -> tuple[Tensor, LSTMState]:
        """``run(x, h, c, weights)`` for each of the stacked layers, in one dtype."""
        y, last = x.to(dtype), []
        for i in range(self.layers):
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            weights = [getattr(self.lstm, f"{name}_l{i}").to(dtype) for name in names]
            h, c = (s[:, i].to(dtype) for s in state)
            y, *after = run(y, h, c, weights)
            last.append(after)
        h, c = (torch.stack(s, 1).to(old.dtype) for s, old in zip(zip(*last, strict=True), state, strict=True))
        return y.to(self.like.dtype), LSTMState(h, c)

    def _run_packed(self, x: Tensor, state: LSTMState, packing: Packing) -> tuple[Tensor, LSTMState]:
        """``x`` ``(total, D)``: a batch that holds, at every time, the sequences that are longer, longest first."""
        line = side_by_side(packing)
        packed = PackedSequence(x.index_select(0, line.steps), line.running)
        y, after = self._run(packed, LSTMState(*(s.index_select(0, line.rows) for s in state)))
        h, c = (old.index_copy(0, line.rows, new) for old, new in zip(state, after, strict=True))
        return y.data.index_select(0, line.places)[None], LSTMState(h, c)

    def _run(self, x: Any, state: LSTMState) -> tuple[Any, LSTMState]:
        """``nn.LSTM``, whose states have the layers first and the dtype of its weights."""
        dtype, mode = self.like.dtype, self.lstm.training
        self.lstm.training = mode or torch.is_grad_enabled()  # as cuDNN demands; nothing is dropped
        try:
            y, after = self.lstm(x.to(dtype), tuple(s.transpose(0, 1).to(dtype).contiguous() for s in state))
        finally:
            self.lstm.training = mode
        h, c = (new.transpose(0, 1).to(old.dtype) for new, old in zip(after, state, strict=True))
        return y, LSTMState(h, c)
