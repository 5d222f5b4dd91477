"""Rotary position embedding: the product of a query and a key depends on the distance between their positions only."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dualform.core.shapes import wide, widest


def rotate(
    x: Float[Tensor, "B T H P"], positions: Int[Tensor, "*B T"], base: float = 10000.0
) -> Float[Tensor, "B T H P"]:
    """Rotate the features ``i`` and ``i + P // 2`` of every head by the angle ``position * base^(-i / (P // 2))``.

    If the head width is odd, its last feature is left as it is; a head of width 1 therefore knows no positions.
    Angles are computed in float64 (in float32 on devices without it), because in a long context they are large. The
    rotation is computed in float32 or wider, and its result has the dtype of ``x``.

    Args:
        x: queries or keys.
        positions: ``(B, T)``, or ``(1, T)`` where all rows have the same.
        base: sets the range of the angles: the pair of features that rotates most slowly takes nearly ``2 pi base``
            steps for a full turn.

    References:
        Su et al. (2021), arXiv:2104.09864, section 3.2.2, with the pairing of GPT-NeoX and Llama.
    """
    half = x.shape[-1] // 2
    exact, dtype = widest(x), wide(x)
    frequency = base ** (-torch.arange(half, device=x.device, dtype=exact) / max(half, 1))
    angle = positions[..., None, None] * frequency
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    a, b, rest = x.to(dtype).split([half, half, x.shape[-1] - 2 * half], -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1).to(x.dtype)
