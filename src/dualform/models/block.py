"""The residual block, of which every model is a stack."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from dualform.core.errors import ArgumentError
from dualform.core.recurrence import State
from dualform.layers.mixer import Mixer, PartConfig, Prepared, Step


class Block(nn.Module):
    """``x = x + part(norm(x))`` for each part: a Recurrence on features ``(B, T, D)``.

    Its state is a tuple with one state per mixer; feed-forwards carry none. The stream ``x`` keeps the dtype it
    comes in, float32 in a language model; only what a part reads is cast to the dtype of its norm's weight.

    Args:
        parts: the configs of the sub-layers, in order.
        d_model: D.
        norm_eps: epsilon of the RMS norms.
    """

    def __init__(self, parts: tuple[PartConfig, ...], d_model: int, norm_eps: float = 1e-5):
        super().__init__()
        self.parts = nn.ModuleList(part.build(d_model) for part in parts)
        self.norms = nn.ModuleList(nn.RMSNorm(d_model, eps=norm_eps) for _ in parts)
        self._mixes = tuple(isinstance(part, Mixer) for part in self.parts)

    def init_state(self, batch: int, *, max_len: int = 0) -> State:
        """One state per mixer."""
        return tuple(part.init_state(batch, max_len=max_len) for _, part, mixes in self._sublayers() if mixes)

    def forward(
        self, x: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """``x`` ``(B, T, D)`` -> the same shape, and the state.

        Raises:
            ArgumentError: when the state is not one of this block.
        """
        old, new = self._states(state), []
        for norm, part, mixes in self._sublayers():
            y = norm(x.to(norm.weight.dtype))
            if mixes:
                y, left = part(y, old[len(new)], cu_seqlens=cu_seqlens)
                new.append(left)
            else:
                y = part(y)
            x = x + y
        return x, tuple(new)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One element ``(B, D)``."""
        return self._step([part.step for _, part, mixes in self._sublayers() if mixes], x, state)

    def prepare(self) -> Prepared:
        """Steps with prepared mixers; see :class:`~dualform.layers.mixer.Prepared`."""
        steps = [part.prepare().step for _, part, mixes in self._sublayers() if mixes]
        return Prepared(partial(self._step, steps))

    def _step(self, steps: list[Step], x: Tensor, state: State) -> tuple[Tensor, State]:
        """One element, given the steps of the mixers in order."""
        old, new = self._states(state), []
        for norm, part, mixes in self._sublayers():
            y = norm(x.to(norm.weight.dtype))
            if mixes:
                y, left = steps[len(new)](y, old[len(new)])
                new.append(left)
            else:
                y = part(y[:, None])[:, 0]
            x = x + y
        return x, tuple(new)

    @torch.no_grad()
    def initialise(self, residual_parts: int) -> None:
        """Start the biases of linear maps at zero, and scale down what each part adds to the stream.

        It is divided by the root of the number of parts in the whole model, so that the variance of the stream does
        not grow with depth: Radford et al. (2019), section 2.3, as in Mamba's own initialisation. Scaled are the
        parameters that a part names in ``residual``; a part without them, such as an LSTM as wide as the stream, starts
        as it is. A bias that must not start at zero is a parameter of its own, such as Mamba's ``dt_bias``.
        """
        for part in self.parts:
            for module in part.modules():
                if isinstance(module, nn.Linear) and module.bias is not None:
                    module.bias.zero_()
            parameters = dict(part.named_parameters())
            for name in getattr(part, "residual", ()):
                if name in parameters:
                    parameters[name].div_(math.sqrt(residual_parts))

    def _sublayers(self) -> Iterator[tuple[nn.RMSNorm, Any, bool]]:
        """Norm, part, and whether the part is a mixer."""
        return zip(cast("list[nn.RMSNorm]", list(self.norms)), self.parts, self._mixes, strict=True)

    def _states(self, state: State | None) -> tuple[State | None, ...]:
        mixers = sum(self._mixes)
        if state is None:
            return (None,) * mixers
        if not isinstance(state, tuple) or len(state) != mixers:
            raise ArgumentError(f"Block: state is not a tuple of {mixers}, one state per mixer")
        return state
