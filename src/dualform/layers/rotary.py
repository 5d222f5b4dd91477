"""Rotary position embedding: a query and a key meet at an angle that depends on their distance only."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dualform.core.shapes import wide, widest


def rotate(
    x: Float[Tensor, "B T H P"], positions: Int[Tensor, "*B T"], base: float = 10000.0
) -> Float[Tensor, "B T H P"]:
    """Turn features ``(i, i + P // 2)`` of every head by the angle ``position * base^(-i / (P // 2))``.

    With an odd head width the last feature is not turned; a head of width 1 therefore carries no position.
    Angles are exact to float64 (float32 on devices without it), so that long contexts keep their positions; the
    rotation is done in float32 or wider and returned in the dtype of ``x``.

    Args:
        x: queries or keys.
        positions: ``(B, T)``, or ``(1, T)`` for all rows alike.
        base: the slowest pair turns about once in ``2 pi base`` tokens.

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
