"""From logits to a token: penalty, temperature, the three truncations, and one uniform draw.

The order is that of transformers: repetition penalty, temperature, top-k, top-p, min-p; each truncation renormalises
what the one before it left. Randomness is counter-based: the draw at a position depends on the seed and the position
only, so a generation that is interrupted, moved to another machine or batched with others keeps its random stream.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.generation.options import Sampling

_INF = float("inf")
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def uniform(seed: int, position: int) -> float:
    """The draw in [0, 1) at one position of the stream of one seed: SplitMix64 in closed form.

    References:
        Steele, Lea and Flood (2014), "Fast splittable pseudorandom number generators", figure 16.
    """
    return (_mix(_mix(seed + _GOLDEN) + (position + 1) * _GOLDEN) >> 11) * 2.0**-53


def uniforms(seeds: Sequence[int], positions: Sequence[int], count: int) -> NDArray[np.float64]:
    """:func:`uniform` of ``count`` positions from each row's own on, ``(B, count)``."""
    with np.errstate(over="ignore"):
        start = _mix(np.array(seeds, np.uint64) + np.uint64(_GOLDEN))
        step = np.array(positions, np.uint64)[:, None] + np.arange(1, count + 1, dtype=np.uint64)
        return (_mix(start[:, None] + step * np.uint64(_GOLDEN)) >> np.uint64(11)) * 2.0**-53


def sample(
    logits: Float[Tensor, "B V"],
    sampling: Sampling,
    draws: Float[Tensor, " B"],
    history: Int[Tensor, "B L"] | None = None,
) -> Int[Tensor, " B"]:
    """One token per row: the inverse of the cumulative distribution at the row's draw.

    Args:
        logits: any floating dtype; the arithmetic is float64.
        sampling: penalty, temperature and truncations.
        draws: uniform in [0, 1), one per row (:func:`uniform`); temperature 0 ignores them.
        history: recent tokens of each row for the repetition penalty; -1 fills the empty places.

    Raises:
        ArgumentError: for logits that hold NaN or infinity, or no finite value at all.
    """
    tokens, finite = choose(logits, sampling, draws, history)
    if not finite.all():
        raise not_finite()
    return tokens


def not_finite() -> ArgumentError:
    """What is raised for logits that are not finite."""
    return ArgumentError(
        "sample: the logits are not finite",
        hint="the weights or the state hold NaN or infinity; was the training stable, is the dtype wide enough?",
    )


def choose(
    logits: Float[Tensor, "B V"], sampling: Sampling, draws: Float[Tensor, " B"], history: Int[Tensor, "B L"] | None
) -> tuple[Int[Tensor, " B"], Bool[Tensor, " B"]]:
    """:func:`sample` without waiting for the device: the tokens, and whether the logits of each row are finite."""
    if logits.device.type == "mps":  # has no float64
        logits = logits.cpu()
    top, likeliest = logits.max(-1)
    penal = history is not None and sampling.repetition_penalty != 1
    if sampling.temperature == 0 and not penal:
        return likeliest, top.isfinite()
    return _drawn(logits.double(), sampling, draws, history if penal else None), top.isfinite()


def _drawn(logits: Tensor, sampling: Sampling, draws: Tensor, history: Tensor | None) -> Tensor:
    if history is not None:
        logits = penalize(logits, history.to(logits.device), sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = (logits - logits.max(-1, keepdim=True).values) / sampling.temperature
    if sampling.top_k:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p:
        logits = keep_min_p(logits, sampling.min_p)
    cumulative = logits.softmax(-1).cumsum(-1)
    target = draws.to(cumulative) * cumulative[:, -1]
    found = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    return found.clamp(max=logits.shape[-1] - 1)  # of logits that are not finite: a token all the same


def penalize(logits: Float[Tensor, "B V"], history: Int[Tensor, "B L"], penalty: float) -> Float[Tensor, "B V"]:
    """Make the tokens of ``history`` less likely: a positive logit is divided by ``penalty``, a negative multiplied.

    A finite logit stays finite under any penalty.
    """
    seen = torch.zeros(logits.shape[0], logits.shape[1] + 1, dtype=torch.bool, device=logits.device)
    seen = seen.scatter(1, torch.where(history < 0, logits.shape[1], history), True)[:, :-1]
    most = torch.finfo(logits.dtype).max
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty).clamp(-most, most)
    return torch.where(seen & logits.isfinite(), penalized, logits)


def keep_top_k(logits: Float[Tensor, "B V"], k: int) -> Float[Tensor, "B V"]:
    """The ``k`` largest logits of each row, and those equal to the k-th; -inf elsewhere."""
    kth = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < kth, -_INF)


def keep_top_p(logits: Float[Tensor, "B V"], p: float) -> Float[Tensor, "B V"]:
    """The fewest most likely tokens whose probabilities reach ``p``; -inf elsewhere."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    reached = ordered.softmax(-1).cumsum(-1) >= p
    drop = torch.cat([torch.zeros_like(reached[:, :1]), reached[:, :-1]], -1)  # the token that reaches p stays
    return logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -_INF)


def keep_min_p(logits: Float[Tensor, "B V"], p: float) -> Float[Tensor, "B V"]:
    """The tokens at least ``p`` times as likely as the most likely one, -inf elsewhere."""
    relative = (logits - logits.max(-1, keepdim=True).values).exp()
    return logits.masked_fill(relative < p, -_INF)


def _mix(z: Any) -> Any:
    """The finaliser of SplitMix64, of a whole number or of an array of 64 bits without a sign."""
    a, b, mask, (first, second, third) = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, _MASK, (30, 27, 31)
    if isinstance(z, np.ndarray):
        a, b, mask, first, second, third = (np.uint64(n) for n in (a, b, mask, first, second, third))
    z = z & mask
    z = ((z ^ (z >> first)) * a) & mask
    z = ((z ^ (z >> second)) * b) & mask
    return z ^ (z >> third)
