"""The portable form of the gated delta rule: a triangular system within each chunk, states from chunk to chunk."""

import torch
from torch import Tensor

from dualform.ops.chunks import Chunks, chunk_size
from dualform.ops.decay import decayed
from dualform.ops.gated_delta_rule import GatedDeltaRule, gated_delta_rule_op
from dualform.ops.gated_linear_attention import CHUNK
from dualform.ops.spans import Spanned


def _run(a: GatedDeltaRule, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """What is written, ``u_t = beta_t (v_t - S'^T k_t)``, solves ``(I + A) U = beta (V - K S)``, for S that enters."""
    chunks = Chunks.of(a.q, a.packing, chunk_size(a.q, a.packing, a.chunk))
    # All are (B, M / B, H, K, N, P or 1).
    q, k, v, beta = (chunks.cut(m, a.h0.dtype).transpose(2, 3) for m in (a.q, a.k, a.v, a.beta[..., None]))
    q, k = (m.repeat_interleave(a.per_group, 2) for m in (q, k))
    g = torch.zeros_like(beta)
    if a.log_decay is not None:
        g = a.log_decay if a.log_decay.dim() == 4 else a.log_decay[..., None]
        g = chunks.cut(g, a.h0.dtype).transpose(2, 3)
    seen_q, seen_k = q * g.exp(), k * g.exp()  # as they see the state before their step
    found = decayed([seen_q, seen_k], [k], g)
    (qk,), (kk,) = found.products
    qk = qk + torch.diag_embed((q * k).sum(-1))
    since, until, decay = found.before.exp(), found.after.exp(), found.total.exp().mT

    system = torch.eye(chunks.size, dtype=kk.dtype, device=kk.device) + beta * kk
    sides = beta * torch.cat([v, seen_k * since], -1)
    solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
    own, of_state = solved.split([v.shape[-1], k.shape[-1]], -1)

    kept = (k * until).mT
    enter, final = chunks.carry(
        lambda s, h: decay[:, s] * h + kept[:, s] @ (own[:, s] - of_state[:, s] @ h),
        a.h0,
    )
    y = a.scale * (qk @ (own - of_state @ enter) + (seen_q * since) @ enter)
    return chunks.join(y.transpose(2, 3)).to(a.v.dtype), final


def _width(a: GatedDeltaRule) -> int:
    """Of keys and queries in every block, values, rows of products, and the state of a chunk."""
    heads, keys, width = a.h0.shape[1:]
    return heads * (8 * keys + 2 * width + 4 * CHUNK + keys * width // CHUNK)


gated_delta_rule_op.add(
    Spanned(
        gated_delta_rule_op, _run, lambda a, most: (), ("q", "k", "v", "beta", "log_decay"), _width, CHUNK
    ).backend()
)
