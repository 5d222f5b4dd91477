"""A mixer in both directions of time, made of any mixer that has one."""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dualform.core.errors import ArgumentError, ConfigError
from dualform.core.options import options
from dualform.core.packing import Borders, Packing
from dualform.core.recurrence import State
from dualform.core.shapes import check_features
from dualform.layers.mixer import Mixer, PartConfig

_WHERE = "bidirectional"


@options
class BidirectionalConfig:
    """A :class:`Bidirectional` mixer.

    Args:
        mixer: the config of what runs in both directions.
        tied: whether both directions have the same weights.
        joined: how their outputs are joined: ``added``, ``gated`` or ``concatenated``.
    """

    mixer: PartConfig
    tied: bool = False
    joined: Literal["added", "gated", "concatenated"] = "added"

    def build(self, d_model: int) -> "Bidirectional":
        """The layer, freshly initialised."""
        return Bidirectional(self, d_model)


class Bidirectional(Mixer):
    """``y = f(x)`` forward in time and ``z = b(x)`` from the end, joined.

    ``added``: ``y + z``; ``gated``: ``s y + (1 - s) z`` with ``s = sigmoid(W x)``; ``concatenated``: ``W [y, z]``.
    Each sequence of a packed line is reversed by itself, so that padding, which a model packs, changes nothing.

    Its outputs depend on later inputs: it has no state and no step, and language models refuse it.

    Shapes:
        ``(B, T, d_model) -> (B, T, d_model)``.

    Raises:
        ConfigError: for what is no mixer, is bidirectional already, or reads a model's context.

    References:
        Schuster & Paliwal (1997), Bidirectional recurrent neural networks; the gate, Wang et al. (2022),
        arXiv:2212.10544.
    """

    causal = False

    def __init__(self, config: BidirectionalConfig, d_model: int):
        super().__init__()
        self.d_model, self.joined = d_model, config.joined
        self.forwards: Any = config.mixer.build(d_model)
        kind = type(self.forwards).__name__
        if not callable(getattr(self.forwards, "init_state", None)):
            raise ConfigError(f"{_WHERE}: mixer is {kind}, which sees each step alone, expected a mixer")
        if not self.forwards.causal or getattr(self.forwards, "in_context", False):
            what = "reads what other parts tell" if self.forwards.causal else "is bidirectional already"
            raise ConfigError(f"{_WHERE}: mixer is {kind}, which {what}", hint="a mixer that is causal")
        self.backwards: Any = self.forwards if config.tied else config.mixer.build(d_model)
        if config.joined == "gated":
            self.gate = nn.Linear(d_model, d_model)
        if config.joined == "concatenated":
            self.out_proj = nn.Linear(2 * d_model, d_model, bias=False)

    @property
    def residual(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The last map; where outputs are added, those of both directions."""
        if self.joined == "concatenated":
            return ("out_proj.weight",)
        return tuple(
            f"{way}.{name}" for way in ("forwards", "backwards") for name in getattr(self.forwards, "residual", ())
        )

    def init_state(self, batch: int, *, max_len: int = 0) -> State:
        """Refused.

        Raises:
            ArgumentError: there is none.
        """
        raise _no_state()

    def forward(
        self, x: Float[Tensor, "B T D"], state: State | None = None, *, cu_seqlens: Borders = None
    ) -> tuple[Float[Tensor, "B T D"], tuple[()]]:
        """Whole sequences.

        Raises:
            ArgumentError: for a state.
        """
        check_features(_WHERE, x, self.d_model)
        if state is not None:
            raise _no_state()
        packing = Packing.of(_WHERE, cu_seqlens, x)
        y = self.forwards(x, cu_seqlens=packing)[0]
        z = self.backwards(x.flip(1), cu_seqlens=None if packing is None else packing.reversed())[0].flip(1)
        if self.joined == "added":
            return y + z, ()
        if self.joined == "concatenated":
            return self.out_proj(torch.cat([y, z], -1)), ()
        s = self.gate(x).sigmoid()
        return s * y + (1 - s) * z, ()

    def step(self, x: Float[Tensor, "B D"], state: State) -> tuple[Tensor, State]:
        """Refused.

        Raises:
            ArgumentError: there is none.
        """
        raise _no_state()


def _no_state() -> ArgumentError:
    return ArgumentError(
        f"{_WHERE}: a bidirectional layer has no state and no step: its outputs depend on inputs to come",
        hint="give it whole sequences, without a state",
    )
