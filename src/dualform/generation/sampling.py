"""From logits to a token: penalty, temperature, the three truncations, and one uniform draw.

The order is that of transformers: repetition penalty, temperature, top-k, top-p, min-p; each truncation renormalises
what the one before it left. Randomness is counter-based: the draw at a position depends on the seed and the position
only, so a generation that is interrupted, moved to another machine or batched with others keeps its random stream.
"""

from math import isfinite

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.options import options

_INF = float("inf")
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


@options(error=ArgumentError)
class Sampling:
    """How a token is drawn from the logits; the defaults sample the model's own distribution.

    Args:
        temperature: divides the logits; 0 takes the most likely token (greedy; the truncations do not matter then).
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the fewest most likely tokens whose probabilities sum to at least top_p.
        min_p: keep tokens at least min_p times as likely as the most likely one.
        repetition_penalty: logits of recent tokens are divided by it where positive, multiplied where negative; 1 is
            off. "Recent" are the last ``dualform.generation.session.WINDOW`` tokens, prompt included.

    Raises:
        ArgumentError: for an unknown keyword, or a value outside its range.

    References:
        top-k: Fan et al. (2018), arXiv:1805.04833. top-p: Holtzman et al. (2020), arXiv:1904.09751.
        min-p: Nguyen et al. (2025), arXiv:2407.01082. Penalty: Keskar et al. (2019), arXiv:1909.05858, section 4.1.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        ranges = {
            "temperature": (self.temperature >= 0 and isfinite(self.temperature), "a finite number of at least 0"),
            "top_k": (self.top_k >= 0, "a whole number of at least 0 (0 keeps all)"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1] (1 keeps all)"),
            "min_p": (0 <= self.min_p <= 1, "in [0, 1] (0 keeps all)"),
            "repetition_penalty": (
                self.repetition_penalty > 0 and isfinite(self.repetition_penalty),
                "a finite number above 0 (1 is off)",
            ),
        }
        for name, (fits, expected) in ranges.items():
            if not fits:
                raise ArgumentError(f"Sampling: {name} is {getattr(self, name)}, expected {expected}")


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
    """Make the tokens of ``history`` less likely: a positive logit is divided by ``penalty``, a negative multiplied."""
    seen = torch.zeros(logits.shape[0], logits.shape[1] + 1, dtype=torch.bool, device=logits.device)
    seen = seen.scatter(1, torch.where(history < 0, logits.shape[1], history), True)[:, :-1]
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


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
