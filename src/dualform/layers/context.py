"""What the parts of a model tell each other in one call, beside the stream that runs through them."""

from typing import NamedTuple

from torch import Tensor

from dualform.core.errors import ArgumentError

EMBEDDING = "embedding"
"""The name of what enters the first block."""


class Told(NamedTuple):
    """What a context holds, as a tree of tensors."""

    values: dict[str, Tensor]
    losses: list[Tensor]


class Context:
    """Values by name, and losses, of one call of a model.

    A part that sets ``in_context`` is called with ``context=``, and may read and write::

        first = context["value"]      # (B, T, ...), of an earlier part; in a step T is 1
        context["value"] = v
        if context.collects:          # while the model trains
            context.add_loss(0.01 * balance)

    A value is of the same elements as the part's input, in the same layout: packed where that is packed. It is not part
    of a state: what later elements need of it, its reader keeps in its own.

    Args:
        values: by name.
        collects: whether losses are added up by whoever made the context.
        counted: ``(B, T)``, which elements are no padding; None where all are.
    """

    def __init__(self, values: dict[str, Tensor], *, collects: bool = False, counted: Tensor | None = None):
        self.values, self.collects, self.counted = dict(values), collects, counted
        self.losses: list[Tensor] = []

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.values:
            raise ArgumentError(
                f"context: nothing before has saved {name!r}", hint=f"there is {', '.join(self.values) or 'nothing'}"
            )
        return self.values[name]

    def __setitem__(self, name: str, value: Tensor) -> None:
        self.values[name] = value

    def add_loss(self, loss: Tensor) -> None:
        """Add a scalar to the loss of the training, weighted as it is to count there."""
        self.losses.append(loss)

    def within(self, values: dict[str, Tensor]) -> "Context":
        """A context of the same call for one part alone: what that tells is not yet told here."""
        return Context(values, collects=self.collects, counted=self.counted)

    def told(self) -> Told:
        """What has been said in this context."""
        return Told(self.values, self.losses)

    def hear(self, told: Told) -> None:
        """Take over what was said in another one."""
        self.values = {**self.values, **told.values}
        self.losses = [*self.losses, *told.losses]


def value_for(stream: Tensor, context: Context | None, name: str) -> Tensor:
    """A value of the context, shaped as the stream: without its time axis in a step.

    Raises:
        ArgumentError: where there is no context, or nothing of that name in it.
    """
    if context is None:
        raise ArgumentError(f"Block: no context, which {name!r} is read from", hint="a model gives it to its blocks")
    value = context[name]
    return (value if stream.dim() == value.dim() else value[:, 0]).to(stream.dtype)


def save_from(stream: Tensor, context: Context | None, name: str, made: Tensor) -> None:
    """Keep what was made of the stream in the context, if there is one, with a time axis."""
    if context is not None:
        context[name] = made[:, None] if stream.dim() == 2 else made
