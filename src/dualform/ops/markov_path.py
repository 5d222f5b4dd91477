"""The most likely path of a Markov chain that is seen through log-likelihoods of its states."""

from typing import NamedTuple

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.linalg import refuse
from dualform.core.shapes import check_tensors
from dualform.ops.markov_filter import check_record, taken
from dualform.ops.op import Op

_WHERE = "markov_path"


class Path(NamedTuple):
    """The path, and the logarithm of the probability of it and the observations."""

    path: Tensor  # (B, T), int64; -1 where there is no step
    score: Tensor  # (B,); 0 without steps


def markov_path(start: Tensor, A: Tensor, log_b: Tensor, lengths: Tensor | None = None) -> Path:
    """``argmax_z log p(z, y)`` of a chain, by Viterbi's recursion.

        s_1 = start + log_b_1,     s_{t+1,j} = max_i (s_ti + A_tij) + log_b_{t+1,j}

    The best state at the end is that of the greatest score; from there, each state leads to the one before it that had
    the maximum, the first one where several have. What is constant in time, or the same in all rows, may be an expanded
    view, which is not copied.

    Args:
        start: log-probabilities of the first state ``(B, K)``.
        A: log-probabilities ``(B, T - 1, K, K)``, from each step to the next.
        log_b: ``log p(y_t | z_t = k)``, ``(B, T, K)``.
        lengths: how many steps each row has ``(B,)``, int64; None is T.

    Returns:
        ``path`` (B, T) and ``score`` (B,).

    Raises:
        ArgumentError: for shapes, dtypes or devices that do not fit together, and lengths beyond T.

    References:
        Viterbi (1967), "Error bounds for convolutional codes and an asymptotically optimum decoding algorithm"; Rabiner
        (1989), "A tutorial on hidden Markov models", section III.B.
    """
    a = MarkovPath(*taken(_WHERE, start, A, log_b), lengths)
    _check_lengths(a)
    if lengths is not None and lengths.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = (lengths < 0) | (lengths > log_b.shape[1])
        refuse(_WHERE, "lengths", lengths, wrong, f"has values that are not from 0 to {log_b.shape[1]}")
    return Path(*markov_path_op(a))


class MarkovPath(NamedTuple):
    """The arguments of the operator, as in :func:`markov_path`; numbers all in one dtype."""

    start: Tensor  # (B, K)
    A: Tensor  # (B, T - 1, K, K)
    log_b: Tensor  # (B, T, K)
    lengths: Tensor | None  # (B,)


def _reference(a: MarkovPath) -> tuple[Tensor, ...]:
    rows, length, states = a.log_b.shape
    if not length or not states or not rows:
        return torch.full((rows, length), -1, device=a.log_b.device), a.log_b.new_zeros(rows)
    lengths = torch.full((rows,), length, device=a.log_b.device) if a.lengths is None else a.lengths
    best, scores, sources = a.start + a.log_b[:, 0], [], []
    scores.append(best)
    for t in range(1, length):
        top, source = (best.unsqueeze(-1) + a.A[:, t - 1]).max(-2)
        best = top + a.log_b[:, t]
        scores.append(best)
        sources.append(source)
    state, path = torch.zeros_like(lengths), []
    for t in range(length - 1, -1, -1):
        if t < length - 1:
            state = sources[t].gather(-1, state.unsqueeze(-1)).squeeze(-1)
        state = torch.where(lengths == t + 1, scores[t].argmax(-1), state)
        path.append(torch.where(lengths > t, state, -1))
    found = torch.stack(path[::-1], 1)
    return found, path_score(a.start, a.A, a.log_b, found)


def path_score(start: Tensor, A: Tensor, log_b: Tensor, path: Tensor) -> Tensor:
    """``log p(z, y)`` ``(B,)`` of a path ``(B, T)``, -1 where there is no step; A may be one matrix ``(K, K)``."""
    keep, path = path >= 0, path.clamp_min(0)
    seen = log_b.gather(-1, path.unsqueeze(-1)).squeeze(-1)
    before, after = path[:, :-1], path[:, 1:]
    if A.dim() == 2:
        moved = A[before, after]
    else:
        of_source = A.gather(-2, before[..., None, None].expand(*before.shape, 1, A.shape[-1])).squeeze(-2)
        moved = of_source.gather(-1, after.unsqueeze(-1)).squeeze(-1)
    begin = start.gather(-1, path[:, :1]).squeeze(-1)
    seen, moved = torch.where(keep, seen, 0), torch.where(keep[:, 1:], moved, 0)
    return torch.where(keep[:, 0], begin, 0) + seen.sum(-1) + moved.sum(-1)


def _fake(a: MarkovPath) -> list[Tensor]:
    rows, length, _ = a.log_b.shape
    return [a.log_b.new_empty((rows, length), dtype=torch.int64), a.log_b.new_empty(rows)]


def _check(a: MarkovPath) -> None:
    check_record(_WHERE, a)
    _check_lengths(a)


def _check_lengths(a: MarkovPath) -> None:
    if a.lengths is None:
        return
    check_tensors(_WHERE, log_b=(a.log_b, "B T K"), lengths=(a.lengths, "B"))
    if a.lengths.dtype != torch.int64:
        raise ArgumentError(f"{_WHERE}: lengths is {a.lengths.dtype}, expected torch.int64")


markov_path_op = Op(_WHERE, MarkovPath, _reference, fake=_fake, check=_check, outputs=2, stepwise=True)
