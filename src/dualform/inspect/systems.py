"""The linear systems inside layers, as dense matrices."""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from dualform.core.errors import ArgumentError
from dualform.core.system import StateSpace
from dualform.layers.lti import LTI
from dualform.layers.mixer import Mixer


def is_linear(mixer: nn.Module) -> bool:
    """Whether a layer is one linear time-invariant system and then a nonlinearity: S4, S4D, DSS, S5 and LRU are."""
    return isinstance(mixer, LTI)


def linear_parts(model: nn.Module) -> dict[str, Mixer]:
    """The layers of a model with a linear time-invariant system, by name; a shared one once."""
    return {name: part for name, part in model.named_modules() if isinstance(part, LTI)}


def other_parts(model: nn.Module) -> dict[str, nn.Module]:
    """The other mixers of a model, by name: no single linear time-invariant system says what they do."""
    return {name: part for name, part in model.named_modules() if isinstance(part, Mixer) and not isinstance(part, LTI)}


def state_spaces(mixer: Mixer, channels: Sequence[int] | None = None) -> list[StateSpace]:
    """The discrete systems of a layer, see :meth:`~dualform.layers.lti.LTI.systems`, of all channels or of some.

    Where all channels share one system, some of them are some of its inputs and outputs.

    Args:
        mixer: a layer for which :func:`is_linear` holds.
        channels: those to keep; None keeps all.

    Raises:
        ArgumentError: for a layer without such a system, or a channel that does not exist.

    Example:
        >>> import torch
        >>> from dualform.layers.s4d import S4DConfig
        >>> (first,) = state_spaces(S4DConfig(d_state=8).build(4), channels=[0])
        >>> first
        StateSpace(N=8, inputs=1, outputs=1, dt=1)
    """
    if not isinstance(mixer, LTI):
        raise ArgumentError(
            f"state_spaces: {type(mixer).__name__} has no single linear time-invariant system",
            hint="layers that have one: S4, S4D, DSS, S5, LRU",
        )
    chosen = list(range(mixer.d_model)) if channels is None else list(channels)
    if wrong := [c for c in chosen if not 0 <= c < mixer.d_model]:
        raise ArgumentError(f"state_spaces: channel {wrong[0]}, expected 0 to {mixer.d_model - 1}")
    systems = mixer.systems()
    if len(systems) == mixer.d_model:
        return [systems[c] for c in chosen]
    (shared,) = systems
    return [replace(shared, B=shared.B[:, chosen], C=shared.C[chosen], D=shared.D[chosen][:, chosen])]
