"""Pairs of features turned by an angle, as in a rotary position embedding."""

import torch
from torch import Tensor

from dualform.core.shapes import wide


def turned(x: Tensor, angle: Tensor, magnitude: float = 1.0, interleaved: bool = False) -> Tensor:
    """``(a, b) -> magnitude (a cos - b sin, b cos + a sin)`` for R pairs of features; the others stay as they are.

    Computed in float32 or wider, with the cosine and the sine of the angle in its own dtype; the result has the dtype
    of x.

    Args:
        x: ``(..., P)``.
        angle: ``(..., R)``, where R is at most ``P / 2``.
        magnitude: the factor.
        interleaved: whether the features ``2 i`` and ``2 i + 1`` are a pair, and not i and ``R + i``.
    """
    half, dtype = angle.shape[-1], wide(x)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    if magnitude != 1:
        cos, sin = magnitude * cos, magnitude * sin
    pairs = x[..., : 2 * half].to(dtype).unflatten(-1, (half, 2) if interleaved else (2, half))
    axis = -1 if interleaved else -2
    a, b = pairs.unbind(axis)
    both = torch.stack([a * cos - b * sin, b * cos + a * sin], axis).flatten(-2)
    return torch.cat([both, x[..., 2 * half :].to(dtype)], -1).to(x.dtype)
