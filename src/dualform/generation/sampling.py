"""From logits to a token: penalties, temperature, the three truncations, and one uniform draw.

The order is that of transformers: penalties, temperature, top-k, top-p, min-p; each truncation renormalises what the
one before it left. Randomness is counter-based: the draw at a position depends on the seed and the position
only, so a generation that is interrupted, moved to another machine or batched with others keeps its random stream.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.generation.options import Sampling
from dualform.layers.projection import kernels_run
from dualform.ops.triton import draw

_INF = float("inf")
_MOST = 2**31  # a k that keeps all of any vocabulary
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


class Wants(NamedTuple):
    """What rows want of a draw, as the host knows it: what none of them wants is not computed."""

    greedy: bool
    """Whether a row takes the most likely token."""
    drawn: bool
    """Whether a row draws."""
    top_k: int
    """The largest k, as a power of two; 0 where no row has one."""
    top_p: bool
    min_p: bool
    penalty: bool

    @classmethod
    def of(cls, samplings: Iterable[Sampling]) -> "Wants":
        """What rows with these options want."""
        rows = list(samplings)
        drawn = [row for row in rows if row.temperature > 0]
        most = max((row.top_k for row in drawn), default=0)
        return cls(
            greedy=len(drawn) < len(rows),
            drawn=bool(drawn),
            top_k=2 ** (most - 1).bit_length() if most else 0,
            top_p=any(row.top_p < 1 for row in drawn),
            min_p=any(row.min_p > 0 for row in drawn),
            penalty=any(row.repetition_penalty != 1 or row.presence_penalty != 0 for row in rows),
        )


def table(samplings: Sequence[Sampling]) -> Float[Tensor, "B 6"]:
    """The options of rows as numbers, float64: temperature, top-k, top-p (infinite where 1), min-p, penalties."""
    rows = [
        (
            *(s.temperature, min(s.top_k, _MOST), s.top_p if s.top_p < 1 else _INF, s.min_p),
            *(s.repetition_penalty, s.presence_penalty),
        )
        for s in samplings
    ]
    return torch.tensor(rows, dtype=torch.float64).view(len(rows), 6)


def sample(
    logits: Float[Tensor, "B V"],
    sampling: Sampling | Sequence[Sampling],
    draws: Float[Tensor, " B"],
    history: Int[Tensor, "B L"] | None = None,
) -> Int[Tensor, " B"]:
    """One token per row: the inverse of the cumulative distribution at the row's draw.

    Args:
        logits: any floating dtype; the arithmetic is float64.
        sampling: penalty, temperature and truncations, of all rows or of each.
        draws: uniform in [0, 1), one per row (:func:`uniform`); temperature 0 ignores them.
        history: recent tokens of each row for the penalties; -1 fills the empty places.

    Raises:
        ArgumentError: for logits that hold NaN or infinity, or no finite value at all.
    """
    samplings = [sampling] * len(logits) if isinstance(sampling, Sampling) else sampling
    tokens, finite = choose(logits, Wants.of(samplings), table(samplings).to(_home(logits)), draws, history)
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
    logits: Float[Tensor, "B V"],
    wants: Wants,
    options: Float[Tensor, "B 6"],
    draws: Float[Tensor, " B"],
    history: Int[Tensor, "B L"] | None,
) -> tuple[Int[Tensor, " B"], Bool[Tensor, " B"]]:
    """:func:`sample` without waiting for the device: the tokens, and whether the logits of each row are finite.

    Args:
        logits: as there.
        wants: what any of the rows wants.
        options: of the rows, as :func:`table` has them; where the logits are, or on the CPU for a device without
            float64.
        draws: as there.
        history: as there.
    """
    logits = logits.to(_home(logits))
    top, likeliest = logits.max(-1)
    temperature, k, p, least, repetition, presence = options.split(1, -1)
    if wants.penalty and history is not None:
        logits = penalize(logits.double(), history.to(logits.device), repetition, presence)
        likeliest = logits.argmax(-1)
    if not wants.drawn:
        return likeliest, top.isfinite()
    logits = logits.double()
    if wants.greedy:
        temperature = temperature.masked_fill(temperature == 0, 1)
    logits = (logits - logits.max(-1, keepdim=True).values) / temperature
    if wants.top_k:
        logits = keep_top_k(logits, k, wants.top_k)
    if wants.top_p:
        logits = keep_top_p(logits, p)
    if wants.min_p:
        logits = keep_min_p(logits, least)
    cumulative = logits.softmax(-1).cumsum(-1)
    target = draws.to(cumulative) * cumulative[:, -1]
    found = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    found = found.clamp(max=logits.shape[-1] - 1)  # of logits that are not finite: a token all the same
    return torch.where(options[:, 0] == 0, likeliest, found) if wants.greedy else found, top.isfinite()


def likeliest(logits: Float[Tensor, "B V"], found: Int[Tensor, "2 B"]) -> None:
    """What :func:`choose` gives where all rows are greedy, without a penalty: written to ``found``."""
    if logits.is_cuda and logits.dtype == torch.float32 and kernels_run("cuda"):
        draw.largest(logits, found)
    else:
        top, token = logits.to(_home(logits)).max(-1)
        found[0].copy_(token)
        found[1].copy_(top.isfinite())


def scored(logits: Float[Tensor, "B V"], tokens: Int[Tensor, " B"], top: int) -> Float[Tensor, "B S"]:
    """The log-probabilities of tokens, then those of the ``top`` most likely ones, then these; float64."""
    told = logits.log_softmax(-1)
    best = told.topk(top)
    home = _home(logits)
    parts = told.gather(1, tokens[:, None]), best.values, best.indices
    return torch.cat([part.to(home, torch.float64) for part in parts], 1)


def _home(logits: Tensor) -> torch.device:
    """Where float64 is, for logits that may be where it is not."""
    return torch.device("cpu") if logits.device.type == "mps" else logits.device


def penalize(
    logits: Float[Tensor, "B V"], history: Int[Tensor, "B L"], penalty: float | Tensor, presence: float | Tensor = 0.0
) -> Float[Tensor, "B V"]:
    """Make the tokens of ``history`` less likely: a positive logit is divided by ``penalty``, a negative multiplied.

    Then ``presence`` is subtracted. Both are one number, or one for each row, ``(B, 1)``, as the limits of the
    truncations below are. A finite logit stays finite under any penalty.
    """
    seen = torch.zeros(logits.shape[0], logits.shape[1] + 1, dtype=torch.bool, device=logits.device)
    seen = seen.scatter(1, torch.where(history < 0, logits.shape[1], history), True)[:, :-1]
    most = torch.finfo(logits.dtype).max
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty).clamp(-most, most) - presence
    return torch.where(seen & logits.isfinite(), penalized.clamp(-most, most), logits)


def keep_top_k(logits: Float[Tensor, "B V"], k: int | Tensor, most: int = 0) -> Float[Tensor, "B V"]:
    """The ``k`` largest logits of each row, and those equal to the k-th; -inf elsewhere.

    Where ``k`` has one number for each row, ``most`` is at least the largest, and 0 keeps all of a row.
    """
    if not isinstance(k, Tensor):
        kth = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
        return logits.masked_fill(logits < kth, -_INF)
    ordered = logits.topk(min(most, logits.shape[-1])).values
    kth = ordered.gather(1, k.long().clamp(1, ordered.shape[1]) - 1)
    return logits.masked_fill((logits < kth) & (k > 0), -_INF)


def keep_top_p(logits: Float[Tensor, "B V"], p: float | Tensor) -> Float[Tensor, "B V"]:
    """The fewest most likely tokens whose probabilities reach ``p``; -inf elsewhere."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    reached = ordered.softmax(-1).cumsum(-1) >= p
    drop = torch.cat([torch.zeros_like(reached[:, :1]), reached[:, :-1]], -1)  # the token that reaches p stays
    return logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -_INF)


def keep_min_p(logits: Float[Tensor, "B V"], p: float | Tensor) -> Float[Tensor, "B V"]:
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
