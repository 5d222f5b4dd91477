"""The residual block, of which every model is a stack."""

import math
from collections.abc import Iterator
from functools import partial
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, nn

from dualform.core.errors import ArgumentError
from dualform.core.recurrence import State
from dualform.layers.mixer import Mixer, PartConfig, Prepared, Step
from dualform.layers.norm import RMSNorm
from dualform.layers.part import ELSEWHERE


class Block(nn.Module):
    """``x = x + part(norm(x))`` for each part: a Recurrence on features ``(B, T, D)``.

    Its state is a tuple with one state per mixer; feed-forwards carry none. The stream ``x`` keeps the dtype it
    comes in, float32 in a language model; only what a part reads has the dtype of its norm's weight.

    ``intervals`` and ``rate`` go to every mixer, see :class:`~dualform.layers.mixer.Mixer`; a mixer whose ``forward``
    lacks the keyword refuses it.

    Args:
        parts: the configs of the sub-layers, in order.
        d_model: D.
        norm_eps: epsilon of the RMS norms.
    """

    def __init__(self, parts: tuple[PartConfig, ...], d_model: int, norm_eps: float = 1e-5):
        super().__init__()
        self.parts = nn.ModuleList(part.build(d_model) for part in parts)
        self.norms = nn.ModuleList(RMSNorm(d_model, norm_eps) for _ in parts)
        self._mixes = tuple(isinstance(part, Mixer) for part in self.parts)
        self._refused = {name: _lacking(self.parts, name) for name in ("intervals", "rate")}

    def init_state(self, batch: int, *, max_len: int = 0) -> State:
        """One state per mixer."""
        return tuple(mixer.init_state(batch, max_len=max_len) for mixer in self._mixers())

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        cu_seqlens: Any = None,
        intervals: Tensor | None = None,
        rate: float = 1.0,
    ) -> tuple[Tensor, State]:
        """``x`` ``(B, T, D)`` -> the same shape, and the state.

        Raises:
            ArgumentError: when the state is not one of this block, or a mixer takes no ``intervals`` or ``rate``.
        """
        timing = self.timing("Block", intervals=intervals, rate=rate)
        old, new = self._states(state), []
        made: Tensor | None = None  # by the part before, and not yet added
        for norm, part, mixes in self._sublayers():
            y, x = (norm(x), x) if made is None else norm(made, x)
            if mixes:
                made, left = part(y, old[len(new)], cu_seqlens=cu_seqlens, **timing)
                new.append(left)
            else:
                made = part(y)
        return x if made is None else x + made, tuple(new)

    def step(
        self, x: Tensor, state: State, *, interval: Tensor | None = None, rate: float = 1.0
    ) -> tuple[Tensor, State]:
        """One element ``(B, D)``."""
        given = self.timing("Block", rate=rate)
        return self._step([partial(part.step, **given) for part in self._mixers()], x, state, interval=interval)

    def prepare(self, *, rate: float = 1.0) -> Prepared:
        """Steps with prepared mixers, at one rate; see :class:`~dualform.layers.mixer.Prepared`."""
        given = self.timing("Block", rate=rate)
        return Prepared(partial(self._step, [part.prepare(**given).step for part in self._mixers()]))

    def _step(
        self, steps: list[Step], x: Tensor, state: State, *, interval: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """One element, given the steps of the mixers in order."""
        timing = self.timing("Block", interval=interval)
        old, new = self._states(state), []
        for norm, part, mixes in self._sublayers():
            y = norm(x)
            if mixes:
                y, left = steps[len(new)](y, old[len(new)], **timing)
                new.append(left)
            else:
                y = part(y[:, None])[:, 0]
            x = x + y
        return x, tuple(new)

    def timing(self, where: str, *, rate: float = 1.0, **times: Tensor | None) -> dict[str, Any]:
        """The keywords to call mixers with: ``intervals`` or ``interval``, and ``rate``, where they are given.

        Raises:
            ArgumentError: names a mixer that does not take one of them.
        """
        given: dict[str, Any] = {name: value for name, value in times.items() if value is not None}
        if rate != 1:
            given["rate"] = rate
        for name in given:
            if refused := self._refused["rate" if name == "rate" else "intervals"]:
                raise ArgumentError(
                    f"{where}: {name} is given, and {refused[0]} does not take it", hint=ELSEWHERE[name]
                )
        return given

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

    def _mixers(self) -> list[Any]:
        return [part for part in self.parts if isinstance(part, Mixer)]

    def _sublayers(self) -> Iterator[tuple[RMSNorm, Any, bool]]:
        """Norm, part, and whether the part is a mixer."""
        return zip(cast("list[RMSNorm]", list(self.norms)), self.parts, self._mixes, strict=True)

    def _states(self, state: State | None) -> tuple[State | None, ...]:
        mixers = sum(self._mixes)
        if state is None:
            return (None,) * mixers
        if not isinstance(state, tuple) or len(state) != mixers:
            raise ArgumentError(f"Block: state is not a tuple of {mixers}, one state per mixer")
        return state


def _lacking(parts: nn.ModuleList, keyword: str) -> list[str]:
    """The mixers whose ``forward`` does not have a keyword."""
    mixers = [type(part) for part in parts if isinstance(part, Mixer)]
    return [mixer.__name__ for mixer in mixers if keyword not in signature(mixer.forward).parameters]
