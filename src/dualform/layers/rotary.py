"""Rotary position embedding: the product of a query and a key depends on the distance between their positions only."""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dualform.core.errors import ConfigError
from dualform.core.options import options
from dualform.core.shapes import widest
from dualform.ops.turned import turned


@options
class RotaryConfig:
    """How positions turn the features of a head.

    Scaling stretches the angles of a model to contexts longer than it was trained on: ``linear`` divides all of them by
    the factor. ``llama3`` and ``yarn`` divide only those of slow pairs, and leave fast ones as they are. A scaling that
    depends on how long the sequence will become (``dynamic``, ``longrope``) is no function of a position, and does not
    exist here.

    Args:
        base: sets the range of the angles: the pair of features that rotates most slowly takes nearly ``2 pi base``
            steps for a full turn.
        interleaved: whether features ``2 i`` and ``2 i + 1`` are a pair, and not i and ``i + P // 2``.
        scaling: ``linear``, ``llama3``, ``yarn`` or none.
        factor: how much longer the context is.
        original: steps of the context in training.
        slow: pairs with fewer turns than this over the original context are slow.
        fast: those with more turns are fast. Between the two, ``llama3`` interpolates over turns, ``yarn`` over the
            numbers of pairs.
        rounded: whether ``yarn`` rounds the numbers of the pairs at both ends outwards.
        magnitude: factor of rotated features; None is ``0.1 log(factor) + 1`` for ``yarn``, and 1 otherwise.

    Raises:
        ConfigError: for a number that is out of range.

    References:
        Chen et al. (2023), arXiv:2306.15595 (linear); Llama Team (2024), arXiv:2407.21783, section 3.4.2; Peng et al.
        (2023), arXiv:2309.00071, sections 3.2 and 3.4 (yarn).
    """

    base: float = 10000.0
    interleaved: bool = False
    scaling: Literal["linear", "llama3", "yarn"] | None = None
    factor: float = 1.0
    original: int = 8192
    slow: float = 1.0
    fast: float = 32.0
    rounded: bool = True
    magnitude: float | None = None

    def __post_init__(self) -> None:
        for name in ("base", "factor", "slow"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"rotary: {name} is {getattr(self, name)}, expected a number above 0")
        if self.magnitude is not None and not 0 < self.magnitude < math.inf:
            raise ConfigError(f"rotary: magnitude is {self.magnitude}, expected a number above 0, or none")
        if self.original < 1:
            raise ConfigError(f"rotary: original is {self.original}, expected at least 1")
        if self.fast <= self.slow:
            raise ConfigError(f"rotary: fast is {self.fast}, expected more turns than slow = {self.slow}")
        if self.scaling == "yarn" and self.base <= 1:
            raise ConfigError(f"rotary: base is {self.base}, expected more than 1 for yarn")

    def frequencies(self, half: int, device: torch.device, dtype: torch.dtype) -> Float[Tensor, " half"]:
        """The angle by which each of ``half`` pairs turns in a step."""
        pair = torch.arange(half, device=device, dtype=dtype)
        turning = self.base ** (-pair / max(half, 1))
        if self.scaling is None:
            return turning
        if self.scaling == "linear":
            return turning / self.factor
        if self.scaling == "llama3":
            turns = self.original * turning / (2 * math.pi)
            kept = ((turns - self.slow) / (self.fast - self.slow)).clamp(0, 1)
        else:
            first, last = self._ends(half)
            kept = 1 - ((pair - first) / (last - first)).clamp(0, 1)
        return turning * (kept + (1 - kept) / self.factor)

    def _ends(self, half: int) -> tuple[float, float]:
        """The numbers, not necessarily whole, of the pairs with ``fast`` and with ``slow`` turns."""

        def number(turns: float) -> float:
            return half * math.log(self.original / (2 * math.pi * turns)) / math.log(self.base)

        first, last = number(self.fast), number(self.slow)
        if self.rounded:
            first, last = math.floor(first), math.ceil(last)
        first, last = float(max(first, 0)), float(min(last, 2 * half - 1))
        return (first, last) if first != last else (first, last + 0.001)

    def size(self) -> float:
        """The factor of rotated features."""
        if self.magnitude is None and self.scaling == "yarn":
            return 0.1 * math.log(max(self.factor, 1)) + 1
        return 1.0 if self.magnitude is None else self.magnitude


def rotate(
    x: Float[Tensor, "B T H P"], positions: Int[Tensor, "*B T"], rope: float | RotaryConfig = 10000.0
) -> Float[Tensor, "B T H P"]:
    """Rotate the features ``i`` and ``i + P // 2`` of every head by the angle ``position * base^(-i / (P // 2))``.

    If the head width is odd, its last feature is left as it is; a head of width 1 therefore knows no positions.
    Angles are computed in float64 (in float32 on devices without it), because in a long context they are large. The
    rotation is computed in float32 or wider, and its result has the dtype of ``x``.

    Args:
        x: queries or keys.
        positions: ``(B, T)``, or ``(1, T)`` where all rows have the same.
        rope: the base, or all options.

    References:
        Su et al. (2021), arXiv:2104.09864, section 3.2.2, with the pairing of GPT-NeoX and Llama.
    """
    options = RotaryConfig(rope) if isinstance(rope, int | float) else rope
    frequencies = options.frequencies(x.shape[-1] // 2, x.device, widest(x))
    return turned(x, positions[..., None, None] * frequencies, options.size(), options.interleaved)
