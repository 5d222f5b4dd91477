"""The passes of :mod:`dualform.discrete.chunks` with logarithms, which lose nothing."""

import torch
from torch import Tensor

from dualform.discrete.chunks import BLOCK, ROUNDING, Arithmetic, Chunks, Counted, Memory, Smoothed, settle, shares
from dualform.discrete.passes import safe_log


@torch.no_grad()
def forward_pass(start: Tensor, A: Tensor, chunks: Chunks) -> tuple[Tensor, Tensor]:
    """``log p`` and ``log c``, laid out in chunks; start and A are probabilities."""
    p, c = torch.empty_like(chunks.e), chunks.e.new_empty(*chunks.e.shape[:2], 1)
    settle(safe_log(start), safe_log(A), chunks, (p, c, None), LOG, backward=False)
    return p, c


@torch.no_grad()
def smooth(start: Tensor, A: Tensor, log_b: Tensor, size: int, counted: Counted | None) -> Smoothed:
    """Both passes, and the posterior, as :func:`dualform.discrete.chunks.smooth`."""
    chunks = Chunks.of(log_b, size, log=True)
    p, c = forward_pass(start, A, chunks)
    v = torch.empty_like(p)
    after = None if counted is None else torch.empty_like(p)
    settle(torch.zeros_like(start), safe_log(A).mT.contiguous(), chunks, (after, None, v), LOG, backward=True)
    v.add_(p)
    weight = v.logsumexp(-1, keepdim=True)
    probs, log_c = chunks.back(v.sub_(weight).exp_()), chunks.back(c).squeeze(-1)
    if counted is None or after is None:
        return Smoothed(probs, log_c, chunks.top, weight.min(), None, None)
    first = after[0].view(chunks.rows, chunks.per_row, -1)[:, 0]
    first = (first - (first + safe_log(start)).logsumexp(-1, keepdim=True)).exp()
    share, p = shares(chunks, size, *counted), p.sub_(weight)
    begun = chunks.before(after[0], torch.full_like(start, -torch.inf))  # of a row's last chunk nothing comes after
    later, counts = torch.cat([after[1:], begun[None]]), torch.zeros_like(A)
    for t in range(0, size, BLOCK):
        now = slice(t, t + BLOCK)
        pairs = (p[now].unsqueeze(-1) + later[now].unsqueeze(-2)).exp()
        counts += (pairs if share is None else pairs * share[now].unsqueeze(-1)).sum((0, 1))
    return Smoothed(probs, log_c, chunks.top, weight.min(), first, counts)


def _run(start: Tensor, log_A: Tensor, e: Tensor, memory: Memory, backward: bool) -> Tensor:
    now, (p, c, v) = start, memory
    for t in range(len(e) - 1, -1, -1) if backward else range(len(e)):
        if v is not None:
            v[t] = now
        joint = now + e[t]
        total = joint.logsumexp(-1, keepdim=True)
        joint -= total
        if p is not None:
            p[t] = joint
        if c is not None:
            c[t] = total
        now = (joint.unsqueeze(-1) + log_A).logsumexp(-2)
    return now


def _equal(a: Tensor, b: Tensor) -> Tensor:
    close = (a - b).abs() <= ROUNDING * torch.finfo(a.dtype).eps * (1 + a.abs())
    return (close | (a == b) | (a.isnan() & b.isnan())).all(-1)


def _starts(start: Tensor, log_A: Tensor, chunks: Chunks, backward: bool) -> Tensor:
    e, rows, states = chunks.e, chunks.rows, chunks.e.shape[-1]
    now = safe_log(torch.eye(states, dtype=e.dtype, device=e.device)).expand(e.shape[1], states, states)
    log_scale = e.new_zeros(e.shape[1], states)
    for e_t in reversed(e.unbind(0)) if backward else e.unbind(0):
        joint = now + e_t[:, None]
        total = joint.logsumexp(-1, keepdim=True)
        log_scale += total.squeeze(-1)
        now = ((joint - torch.where(total.isfinite(), total, 0)).unsqueeze(-1) + log_A).logsumexp(-2)
    P, scale = now.unflatten(0, (rows, -1)), log_scale.unflatten(0, (rows, -1))
    found, v = [start], start
    for i in range(P.shape[1] - 1, 0, -1) if backward else range(P.shape[1] - 1):
        weights = v + scale[:, i]
        weights = weights - weights.logsumexp(-1, keepdim=True)
        v = (weights.unsqueeze(-1) + P[:, i]).logsumexp(1)
        found.append(v)
    return torch.stack(found[::-1] if backward else found, 1).flatten(0, 1)


LOG = Arithmetic(_run, _equal, _starts)
