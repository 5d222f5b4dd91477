"""From logits to a token: penalty, temperature, the three truncations, and one uniform draw.

The order is that of transformers: repetition penalty, temperature, top-k, top-p, min-p; each truncation renormalises
what the one before it left. Randomness is counter-based: the draw at a position depends on the seed and the position
only, so a generation that is interrupted, moved to another machine or batched with others keeps its random stream.
"""

import torch
from jaxtyping import Float, Int
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
    if logits.device.type == "mps":  # has no float64
        logits = logits.cpu()
    logits = logits.double()
    if not logits.max(-1).values.isfinite().all():
        raise ArgumentError(
            "sample: the logits are not finite",
            hint="the weights or the state hold NaN or infinity; was the training stable, is the dtype wide enough?",
        )
    if history is not None and sampling.repetition_penalty != 1:
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
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]


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


def _mix(z: int) -> int:
    z &= _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
