"""The portable form of RWKV-7's recurrence: a triangular system within each chunk, states from chunk to chunk."""

import torch
from torch import Tensor

from dualform.ops.chunks import Chunks, chunk_size
from dualform.ops.decay import decayed
from dualform.ops.gated_linear_attention import CHUNK
from dualform.ops.spans import Spanned
from dualform.ops.wkv7 import WKV7, wkv7_op


def _run(given: WKV7, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """What is read, ``u_t = S_{t-1}^T a_t``, solves ``(I - A_ab) U = A_ak V + A S``, for S that enters the chunk."""
    chunks = Chunks.of(given.r, given.packing, chunk_size(given.r, given.packing, given.chunk))
    # All are (B, M / B, H, K, N or P).
    r, g, k, v, a, b = (chunks.cut(m, given.h0.dtype).transpose(2, 3) for m in given[:6])
    seen = r * g.exp()  # as r sees the state before its step
    found = decayed([a, seen], [b, k], g)
    (ab, ak), (rb, rk) = found.products
    rb, rk = (m + torch.diag_embed((r * own).sum(-1)) for m, own in ((rb, b), (rk, k)))
    since, until, decay = found.before.exp(), found.after.exp(), found.total.exp().mT

    system = torch.eye(chunks.size, dtype=ab.dtype, device=ab.device) - ab
    sides = torch.cat([ak @ v, a * since], -1)
    solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
    own, of_state = solved.split([v.shape[-1], a.shape[-1]], -1)

    b, k = (b * until).mT, (k * until).mT
    added, carried = b @ own + k @ v, b @ of_state
    enter, final = chunks.carry(lambda s, h: decay[:, s] * h + carried[:, s] @ h + added[:, s], given.h0)
    y = rb @ own + rk @ v + (seen * since + rb @ of_state) @ enter
    return chunks.join(y.transpose(2, 3)).to(given.v.dtype), final


def _width(given: WKV7) -> int:
    """Of keys in every block, values, rows of products, and the matrix of a chunk."""
    heads, keys = given.r.shape[2:]
    return heads * (8 * keys + 2 * given.v.shape[3] + 4 * CHUNK + keys * keys // CHUNK)


wkv7_op.add(
    Spanned(wkv7_op, _run, lambda given, most: (), ("r", "log_decay", "k", "v", "a", "b"), _width, CHUNK).backend()
)
