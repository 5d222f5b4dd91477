"""The base of every token-mixing layer."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dualform.core.errors import ArgumentError
from dualform.core.recurrence import State
from dualform.core.shapes import check_tensors
from dualform.core.tree import named_leaves, tree_map
from dualform.layers.part import Part

S = TypeVar("S")  # a tree of tensors
Step = Callable[..., tuple[Any, State]]  # (x, state, ...) -> (y, state)


class Hint(NamedTuple):
    """What an optimiser should know about a parameter: whether it decays, and the largest learning rate it bears."""

    decay: bool = False
    max_lr: float | None = None


class Prepared:
    """Steps of a recurrence, with what depends on its weights alone computed in advance; made by ``prepare()``.

    ``prepared.step(...)`` takes the arguments of the recurrence's own ``step`` and returns the same. What was computed
    in advance is a snapshot: it does not notice that weights change, so prepare again afterwards. Weights that
    are used as they are, such as those of output maps, are not copied. No gradient with respect to the weights
    would come out, so steps are refused where gradients are recorded.

    Raises:
        ArgumentError: where gradients are recorded.
    """

    def __init__(self, step: Step):
        self._step = step
        _refuse_gradients("prepare")

    def step(self, x: Tensor, state: State, *args: Any, **options: Any) -> tuple[Any, State]:
        """One element."""
        _refuse_gradients("step of what was prepared")
        return self._step(x, state, *args, **options)


def _refuse_gradients(where: str) -> None:
    if torch.is_grad_enabled():
        raise ArgumentError(
            f"{where}: gradients are being recorded, and those of the weights would be lost",
            hint="call it under torch.no_grad() or torch.inference_mode(), or use the layer's own step",
        )


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
        self, x: Float[Tensor, "B T D"], state: State | None = None, *, cu_seqlens: Any = None
    ) -> tuple[Tensor, State]:
        """The whole sequence; see :class:`dualform.core.recurrence.Recurrence`."""

    def step(self, x: Float[Tensor, "B D"], state: State) -> tuple[Tensor, State]:
        """One element. The default is ``forward`` at T = 1; a layer overrides it only to be faster."""
        y, state = self.forward(x[:, None], state)
        return y[:, 0], state

    def prepare(self) -> Prepared:
        """Steps that compute in advance what depends on the weights alone; see :class:`Prepared`.

        The default prepares nothing: its steps are those of the layer.
        """
        return Prepared(self.step)


_ORIGIN = "a state comes from init_state, forward or step of the same layer"


def check_kind(where: str, state: Any, kind: type[Any]) -> None:
    """A state must be of the layer's own kind.

    Raises:
        ArgumentError: says what came and what was expected.
    """
    if not isinstance(state, kind):
        raise ArgumentError(f"{where}: state is {type(state).__name__}, expected {kind.__name__}", hint=_ORIGIN)


def check_state(where: str, state: S | None, like: S) -> S:
    """A caller's state in the dtypes of ``like``, the initial one; None is ``like`` itself.

    Raises:
        ArgumentError: for a structure, shape or device other than that of ``like``.
    """
    if state is None:
        return like
    expected = dict(named_leaves(like, "state"))
    found = dict(named_leaves(state, "state")) if isinstance(state, (Tensor, tuple)) else {}
    if found.keys() != expected.keys():
        raise ArgumentError(
            f"{where}: state is {type(state).__name__} of {', '.join(found) or 'no tensors'}, "
            f"expected {type(like).__name__} of {', '.join(expected)}",
            hint=_ORIGIN,
        )
    for name, leaf in found.items():
        want = expected[name]
        if leaf.shape != want.shape:
            raise ArgumentError(f"{where}: {name} has shape {tuple(leaf.shape)}, expected {tuple(want.shape)}")
        if leaf.device != want.device:
            raise ArgumentError(
                f"{where}: {name} is on {leaf.device}, but the layer is on {want.device}",
                hint=f"move it: {name}.to({str(want.device)!r})",
            )
    return tree_map(lambda leaf, start: leaf.to(start.dtype), state, like)


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


@runtime_checkable
class PartConfig(Protocol):
    """A frozen dataclass that describes one sub-layer of a block: a mixer or a feed-forward."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def build(self, d_model: int) -> nn.Module:
        """The module, freshly initialised."""
        ...
