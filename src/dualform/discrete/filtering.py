"""What a filter gives, and what it keeps."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualform.core.tree import state_class
from dualform.discrete.chunks import by_itself
from dualform.discrete.emission import Emission
from dualform.discrete.smoothing import one_pass, records

_SPAN = 1 << 15  # numbers of an emission that are computed at a time


class Filtered(NamedTuple):
    """``p(z_t | y_1 .. y_t)``, and ``log p(y_t | y_1 .. y_{t-1})``."""

    probs: Tensor  # (B, T, K)
    loglik: Tensor  # (B, T)


@state_class
class HiddenState(NamedTuple):
    """What a filter keeps: ``p(z_{t+1} | y_1 .. y_t)``, and the observations that the next one may depend on."""

    probs: Tensor  # (B, K)
    lags: Tensor  # (B, L, M), the last one last; 0 before the first observation
    seen: Tensor  # (B,), int64: how many of them there are


def log_prob(emission: Emission, x: Tensor, lags: Tensor, seen: Tensor) -> Tensor:
    """``log p(y_t | z_t)`` ``(B, T, K)``; without gradients in spans of steps that stay in the cache."""
    rows, length, _ = x.shape
    span = max(emission.lags, _SPAN // max(1, rows * emission.states * emission.width), 1)
    if length < 2 * span or records(x, *emission.parameters()) or torch.compiler.is_compiling():
        return emission.log_prob(x, lags, seen)
    out = torch.empty(rows, length, emission.states, dtype=lags.dtype, device=x.device)
    with by_itself(_SPAN):
        for begin in range(0, length, span):
            now = x[:, begin : begin + span]
            out[:, begin : begin + span] = emission.log_prob(now, lags, seen)
            lags, seen = now[:, now.shape[1] - lags.shape[1] :].to(lags.dtype), (seen + span).clamp(max=lags.shape[1])
    return out


def run(
    where: str, model: Any, x: Tensor, u: Tensor | None, state: HiddenState, keep: Tensor | None = None
) -> tuple[Filtered, HiddenState]:
    """The filter over rows ``(B, T, M)`` with inputs ``(B, T, U)``; ``keep`` ``(B, T)``: steps from the first on."""
    (rows, length, _), (start, lags, seen) = x.shape, state
    if not length or not rows:
        empty = model.fold(start.new_zeros(rows, length, start.shape[-1]) * start[:, None])
        return Filtered(empty, empty.sum(-1)), state
    log_b = model.spread(log_prob(model.emission, x, lags, seen))
    log_b = log_b if keep is None else torch.where(keep.unsqueeze(-1), log_b, 0)
    A = model.moves(u)
    found, log = one_pass(where, start, between(A), log_b, model.form)
    probs = found.p.exp() if log else found.p
    line, row = torch.cat([lags, x.to(lags.dtype)], 1), torch.arange(rows, device=x.device)
    if keep is None:
        ends, latest = torch.full_like(row, length), line[:, length:]
    else:
        ends = keep.sum(1)
        latest = line[row[:, None], ends[:, None] + torch.arange(lags.shape[1], device=x.device)]
    last = probs[row, ends - 1] if keep is not None else probs[:, -1]
    if A.dim() == 2:
        following = last @ A
    else:
        following = (last.unsqueeze(-2) @ (A[:, -1] if keep is None else A[row, ends - 1])).squeeze(-2)
    seen = (seen + ends).clamp(max=lags.shape[1])
    return Filtered(model.fold(probs), found.log_c), HiddenState(following, latest, seen)


def between(A: Tensor) -> Tensor:
    """The transitions between the steps, of those after every step ``(B, T, K, K)``; a constant one as it is."""
    return A if A.dim() == 2 else A[:, :-1]
