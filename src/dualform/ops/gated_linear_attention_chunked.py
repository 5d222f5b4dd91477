"""The portable form of gated linear attention: matrix products within chunks, states from chunk to chunk."""

import torch
from torch import Tensor

from dualform.ops.chunks import Chunks, chunk_size
from dualform.ops.decay import decayed
from dualform.ops.gated_linear_attention import CHUNK, GatedLinearAttention, gated_linear_attention_op
from dualform.ops.spans import Spanned


def _run(a: GatedLinearAttention, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    chunks = Chunks.of(a.q, a.packing, chunk_size(a.q, a.packing, a.chunk))
    # All are (B, M / B, H, K, N or P).
    q, k, v, g = (chunks.cut(m, a.h0.dtype).transpose(2, 3) for m in (a.q, a.k, a.v, a.log_decay))
    queries = q if tables else q * g.exp()  # as they see the state before their step
    found = decayed([queries], [k], g)
    own = (q * k * tables[0].to(q.dtype)[:, None] if tables else q * k).sum(-1)
    added, decay = (k * found.after.exp()).mT @ v, found.total.exp().mT
    enter, final = chunks.carry(lambda s, h: torch.addcmul(added[:, s], decay[:, s], h), a.h0)
    y = found.products[0][0] @ v + own[..., None] * v + (queries * found.before.exp()) @ enter
    return chunks.join(y.transpose(2, 3)).to(a.v.dtype), final


def _width(a: GatedLinearAttention) -> int:
    """Of keys and their decays in every block, of values, and of a row of products."""
    return a.q.shape[2] * (4 * a.q.shape[3] + a.v.shape[3] + CHUNK)


gated_linear_attention_op.add(
    Spanned(
        gated_linear_attention_op,
        _run,
        lambda a, most: () if a.bonus is None else (a.bonus,),
        ("q", "k", "v", "log_decay"),
        _width,
        CHUNK,
    ).backend()
)
