"""The base of every token-mixing layer."""

from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dualform.core.errors import ArgumentError
from dualform.core.recurrence import State
from dualform.core.shapes import check_tensors
from dualform.layers.part import Part


class Hint(NamedTuple):
    """What an optimiser should know about a parameter: whether it decays, and the largest learning rate it bears."""

    decay: bool = False
    max_lr: float | None = None


class Mixer(Part):
    """A Recurrence on features, ``(B, T, D) -> (B, T, D)``.

    ``Layer(d_model, ...)`` makes one, with the options of its config, and so does ``LayerConfig(...).build(d_model)``.

    ``hints`` names the layer's own parameters that want special treatment by the optimiser.

    A layer that is not ``causal`` (bidirectional) reads whole sequences: ``forward`` takes no state and returns ``()``
    in its place, and ``init_state`` and ``step`` raise.

    A layer with a meaning in continuous time, ``continuous``, also takes samples that come at irregular times: its
    ``forward(..., intervals=None)`` the number of the layer's own steps over which each input is held, ``(B, T)``,
    positive and not necessarily whole; its ``step(x, state, interval=None)`` the same, ``(B,)``. The interval of an
    input ends where its output is read. None is 1 throughout, and an interval of 2 is two steps under one input.
    Layers without that meaning do not have the keyword.
    """

    hints: ClassVar[dict[str, Hint]] = {}
    continuous: ClassVar[bool] = False
    causal: bool = True

    @abstractmethod
    def init_state(self, batch: int, *, max_len: int = 0) -> State:
        """The state before the first element, batch first in every leaf.

        What accumulates is float32 or wider. A cache that only holds copies, such as attention's keys and values,
        has the dtype of the weights.
        """

    @abstractmethod
    def forward(
        self, x: Float[Tensor, "B T D"], state: State | None = None, *, cu_seqlens: Int[Tensor, " n"] | None = None
    ) -> tuple[Tensor, State]:
        """The whole sequence; see :class:`dualform.core.recurrence.Recurrence`."""

    def step(self, x: Float[Tensor, "B D"], state: State) -> tuple[Tensor, State]:
        """One element. The default is ``forward`` at T = 1; a layer overrides it only to be faster."""
        y, state = self.forward(x[:, None], state)
        return y[:, 0], state


def check_intervals(where: str, x: Tensor, intervals: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The intervals in ``dtype``, that of states: one for each of ``x`` ``(B, T, D)``, or of one step ``(B, D)``.

    Raises:
        ArgumentError: for a shape, dtype or device that does not fit ``x``, or a value that is not positive and
            finite. Values are read on the host; a meta tensor's are taken on trust.
    """
    if intervals is None:
        return None
    axes, name = ("B T", "intervals") if x.dim() == 3 else ("B", "interval")
    check_tensors(where, x=(x, f"{axes} D"), **{name: (intervals, axes)})
    if intervals.is_complex() or intervals.dtype == torch.bool:
        raise ArgumentError(f"{where}: {name} is {intervals.dtype}, expected a real dtype")
    if not torch.compiler.is_compiling() and intervals.device.type != "meta":
        wrong = intervals[~((intervals > 0) & (intervals < torch.inf))]
        if len(wrong):
            raise ArgumentError(
                f"{where}: {name} has the value {wrong[0].item():g}, expected positive and finite numbers",
                hint="they are the times between samples, in units of the layer's own step",
            )
    return intervals.to(dtype)


def exactly(device: str) -> AbstractContextManager[object]:
    """Matrix products in the dtype of their factors, autocast or not."""
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


@runtime_checkable
class PartConfig(Protocol):
    """A frozen dataclass that describes one sub-layer of a block: a mixer or a feed-forward."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def build(self, d_model: int) -> nn.Module:
        """The module, freshly initialised."""
        ...
