"""The one protocol of the library: a causal map with a state, over a whole sequence or one element at a time."""

from typing import Protocol, TypeVar, runtime_checkable

from torch import Tensor

from dualform.core.packing import Borders
from dualform.core.tree import Tree

State = Tree  # batch first in every leaf
Out = TypeVar("Out", covariant=True)


@runtime_checkable
class Recurrence(Protocol[Out]):
    """A causal map ``x_1..x_T -> y_1..y_T`` that carries a state.

    Laws, verified for every implementation by :mod:`dualform.core.laws`, forward and backward:

    - *split*: running ``x`` equals running ``x[:, :k]``, then ``x[:, k:]`` from the state that left.
    - *step*: ``step(x[:, 0], s)`` equals ``forward(x[:, :1], s)`` without its time axis.
    - *rows*: row ``i`` of outputs and states depends on row ``i`` of the inputs only.
    - *packed*: sequences laid end to end with ``cu_seqlens`` equal the same sequences run one by one.

    - *ownership*: memory that a state shares is not written to, see below.
    - *contained*: what is not finite in one row or sequence reaches no other.

    ``state=None`` means ``init_state(batch)``. ``max_len`` is a capacity hint for states that grow with the
    context; a state of constant size ignores it.

    A state is used once: ``clone`` it to keep it. Where gradients are recorded nothing that is given is written to.
    Elsewhere ``forward`` and ``step`` may write into the state that they are given, which is spent then, but only into
    memory that belongs to it alone: never into a view of a larger tensor, such as a slice of a batch of states, nor
    into an expanded one; :func:`~dualform.core.tree.may_write` decides. Memory of the caller's choice is an option of
    an operator, ``out_state=``.
    """

    def init_state(self, batch: int, *, max_len: int = 0) -> State: ...

    def forward(self, x: Tensor, state: State | None = None, *, cu_seqlens: Borders = None) -> tuple[Out, State]:
        """``x`` ``(B, T, ...)``; with ``cu_seqlens`` ``(n + 1,)`` B is 1 and the state has n rows."""
        ...

    def step(self, x: Tensor, state: State) -> tuple[Out, State]:
        """One element: ``x`` ``(B, ...)``."""
        ...
