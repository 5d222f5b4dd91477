"""Caches that grow with the context up to a limit: position p lies in slot ``p mod S``, rows may differ in length."""

import torch
from torch import Tensor


def held(length: Tensor, capacity: int) -> Tensor:
    """The position each of S slots holds after ``length`` ``(B,)`` tokens, ``(B, S)``; negative where empty."""
    last = length[:, None] - 1
    return last - (last - torch.arange(capacity, device=length.device)) % max(capacity, 1)


def write(cache: Tensor, at: tuple[Tensor, Tensor], new: Tensor) -> Tensor:
    """Put ``new`` at (row, slot): into the memory of the cache where no gradient is recorded, else into a copy."""
    return (cache.index_put if torch.is_grad_enabled() or _shared(cache) else cache.index_put_)(at, new)


def _shared(z: Tensor) -> bool:
    """Whether a tensor may not be written to: an expanded one, or one of inference mode outside of it."""
    expanded = any(step == 0 and size > 1 for step, size in zip(z.stride(), z.shape, strict=True))
    if expanded or torch.compiler.is_compiling():
        return expanded
    return z.is_inference() and not torch.is_inference_mode_enabled()
