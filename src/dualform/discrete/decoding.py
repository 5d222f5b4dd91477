"""The most likely path of a Markov chain."""

import torch
from torch import Tensor

from dualform.discrete.chunks import by_itself, chunk_size, in_chunks, in_rows
from dualform.discrete.passes import each_step, safe_log
from dualform.ops.markov_path import MarkovPath, markov_path, markov_path_op, path_score

_WARM = 64  # steps that a chunk looks back, and ahead, to guess how it begins and ends
_ROUNDS = 4


@torch.no_grad()
def viterbi(start: Tensor, A: Tensor, log_b: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``argmax_z p(z, y)`` and ``max_z log p(z, y)``: the path ``(B, T)`` and its log-probability ``(B,)``.

    Args:
        start: of the first state ``(B, K)``.
        A: transition ``(K, K)``, or ``(B, T - 1, K, K)`` with the one after each step.
        log_b: log-likelihoods of the states ``(B, T, K)``, T above 0.
        keep: steps that there are ``(B, T)``, from the first on; the path is -1 after them.

    References:
        Viterbi (1967), "Error bounds for convolutional codes and an asymptotically optimum decoding algorithm";
        Rabiner (1989), "A tutorial on hidden Markov models", section III.B.
    """
    rows, length = log_b.shape[:2]
    size, log_A, first = chunk_size(rows, length), safe_log(A), safe_log(start)
    lengths = None if keep is None else keep.sum(1)
    a = MarkovPath(first, each_step(log_A, log_b), log_b, lengths)
    if A.dim() == 2 and size < length and not markov_path_op.has_kernel(a, False):
        with by_itself(rows * -(-length // size) * A.numel()):
            path = _chunks(first, log_A, log_b, size, keep)
        if path is not None:
            path = path if keep is None else torch.where(keep, path, -1)
            return path, path_score(first, log_A, log_b, path)
    return markov_path(*a)


def _chunks(first: Tensor, log_A: Tensor, log_b: Tensor, size: int, keep: Tensor | None) -> Tensor | None:
    """The loop over chunks of time that stand side by side; None where their guesses do not come true.

    Which state is how much better than the others soon depends no more on the distant past, nor the best path on the
    distant future. So each chunk guesses both from the steps beside it. The guesses are then compared with what the
    chunk before ends in, and with what the chunk after begins with.
    """
    rows, length, states = log_b.shape
    lengths = torch.full_like(log_b[:, 0, 0], length).long() if keep is None else keep.sum(1)
    top, lift = log_b.amax(-1), log_A[:, :, None]
    top = torch.where(top.isfinite(), top, 0)
    scores = in_chunks(log_b, size, top, transposed=True)  # (size, K, rows * chunks)
    chunks = scores.shape[2] // rows

    def shifted(ends: Tensor) -> Tensor:
        """The ends of all chunks, one transition later, as the starts of those after them."""
        moved = (ends[:, None] + lift).amax(0)
        moved = (moved - moved.amax(0)).view(states, rows, chunks)
        return torch.cat([first.mT[:, :, None], moved[:, :, :-1]], 2).flatten(1)

    starts = shifted(_run(torch.zeros_like(scores[0]), lift, scores[-_WARM:].clone()))
    for i in range(_ROUNDS):
        scores = scores if i == 0 else in_chunks(log_b, size, top, transposed=True)
        wanted = shifted(_run(starts, lift, scores))
        gap = torch.where(wanted == starts, 0, (wanted - starts).abs())
        starts = wanted
        largest = scores[-1].amax(0).abs().max()
        if (gap <= 64 * torch.finfo(gap.dtype).eps * (1 + largest)).all():
            return _trace(scores, log_A, lengths, length)
    return None


def _run(start: Tensor, lift: Tensor, scores: Tensor) -> Tensor:
    """The recursion over the first axis: each log-likelihood becomes the best score of a path into its state."""
    now, moved = start.clone(), start.new_empty(len(start), *start.shape)
    for step in scores.unbind(0):
        step.add_(now)
        torch.add(step[:, None], lift, out=moved)
        torch.amax(moved, 0, out=now)
    return scores[-1]


def _trace(scores: Tensor, log_A: Tensor, lengths: Tensor, longest: int) -> Tensor | None:
    """The best path, back through all chunks side by side; None where the guesses of their ends do not come true."""
    (size, _, both), rows, into = scores.shape, len(lengths), log_A.mT.contiguous()
    chunks, everything = both // rows, torch.arange(both, device=scores.device)
    there = lengths > 0
    last = torch.arange(rows, device=scores.device)[there] * chunks + (lengths[there] - 1) // size
    final = torch.full_like(everything, -1)  # the step of a chunk that is the last one of its row
    final[last] = (lengths[there] - 1) % size
    finals = set(final[last].tolist())
    inner = everything[everything % chunks < ((lengths - 1) // size).repeat_interleave(chunks)]

    def back(steps: int, which: Tensor, ends: Tensor) -> Tensor:
        """The states of some chunks, ``(steps, chunks)``, from those that they end in."""
        some, state, states = scores if len(which) == both else scores[:, :, which], ends, []
        for t in range(steps - 1, -1, -1):
            if t < steps - 1:
                state = (some[t] + into.index_select(0, state).mT).max(0).indices
            if t in finals:
                state = torch.where(final[which] == t, some[t].max(0).indices, state)
            states.append(state)
        return torch.stack(states[::-1])

    def ends_before(begins: Tensor) -> Tensor:
        """The states that chunks end in, from those that the chunks after them begin in."""
        return (scores[-1][:, inner] + log_A[:, begins[inner + 1]]).max(0).indices

    ahead = min(_WARM, size)
    path, ends = torch.empty(size, both, dtype=torch.int64, device=scores.device), torch.zeros_like(everything)
    ends[inner] = ends_before(back(ahead, everything, scores[ahead - 1].max(0).indices)[0])
    which = everything
    for _ in range(_ROUNDS):
        path[:, which] = back(size, which, ends[which])
        wanted = ends.clone()
        wanted[inner] = ends_before(path[0])
        which = (wanted != ends).nonzero().squeeze(1)
        ends = wanted
        if not len(which):
            return in_rows(path, rows, longest)
    return None
