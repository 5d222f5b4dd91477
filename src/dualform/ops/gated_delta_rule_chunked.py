"""The portable form of the gated delta rule: a triangular system within each chunk, states from chunk to chunk."""

import torch
from torch import Tensor

from dualform.core.shapes import widest
from dualform.ops.chunks import Chunks, chunk_size
from dualform.ops.decay import decayed
from dualform.ops.gated_delta_rule import GatedDeltaRule, gated_delta_rule_op
from dualform.ops.gated_linear_attention import CHUNK
from dualform.ops.spans import Spanned

_FORGOTTEN = -1e4  # the exponential is 0, and sums of it are numbers


def _run(a: GatedDeltaRule, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """What is written, ``u_t = beta_t (v_t - S'^T k_t)``, solves ``(I + A) U = beta (V - K S)``, for S that enters."""
    chunks = Chunks.of(a.q, a.packing, chunk_size(a.q, a.packing, a.chunk))
    # All are (B, M / B, H, K, N, P or 1).
    q, k, v, beta = (chunks.cut(m, a.h0.dtype).transpose(2, 3) for m in (a.q, a.k, a.v, a.beta[..., None]))
    q, k = (m.repeat_interleave(a.per_group, 2) for m in (q, k))
    if a.log_decay is not None and a.log_decay.dim() == 4:
        g = chunks.cut(a.log_decay, a.h0.dtype).transpose(2, 3)
        seen_q, seen_k = q * g.exp(), k * g.exp()  # as they see the state before their step
        found = decayed([seen_q, seen_k], [k], g)
        (qk,), (kk,) = found.products
        qk = qk + torch.diag_embed((q * k).sum(-1))
        seen_q, seen_k = (m * found.before.exp() for m in (seen_q, seen_k))
        kept, decay = k * found.after.exp(), found.total.exp().mT
    else:
        g = beta if a.log_decay is None else chunks.cut(a.log_decay[..., None], a.h0.dtype).transpose(2, 3)
        mask, since, until = _decays(torch.zeros_like(g) if a.log_decay is None else g)
        qk, kk = (q @ k.mT) * mask, ((k @ k.mT) * mask).tril(-1)
        seen_q, seen_k, kept, decay = q * since, k * since, k * until, since[..., -1:, :]

    system = torch.eye(chunks.size, dtype=kk.dtype, device=kk.device) + beta * kk
    sides = beta * torch.cat([v, seen_k], -1)
    solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
    own, of_state = solved.split([v.shape[-1], k.shape[-1]], -1)

    enter, final = chunks.carry(
        lambda s, h: decay[:, s] * h + kept[:, s].mT @ (own[:, s] - of_state[:, s] @ h),
        a.h0,
    )
    y = a.scale * (qk @ (own - of_state @ enter) + seen_q @ enter)
    return chunks.join(y.transpose(2, 3)).to(a.v.dtype), final


def _decays(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of one logarithm for each step, ``(..., K, 1)``: decays from step to step, since the beginning, until the end.

    Sums are float64, and no logarithm is less than makes an exponential 0, as their differences are what counts.
    """
    total = g.to(widest(g)).clamp(min=_FORGOTTEN).cumsum(-2)
    above = torch.ones(g.shape[-2], g.shape[-2], dtype=torch.bool, device=g.device).triu_(1)
    mask = (total - total.mT).masked_fill(above, -torch.inf).to(g.dtype).exp()
    return mask, total.to(g.dtype).exp(), (total[..., -1:, :] - total).to(g.dtype).exp()


def _width(a: GatedDeltaRule) -> int:
    """Of keys and queries in every block, values, rows of products, and the state of a chunk."""
    heads, keys, width = a.h0.shape[1:]
    return heads * (8 * keys + 2 * width + 4 * CHUNK + keys * width // CHUNK)


gated_delta_rule_op.add(
    Spanned(
        gated_delta_rule_op, _run, lambda a, most: (), ("q", "k", "v", "beta", "log_decay"), _width, CHUNK
    ).backend()
)
