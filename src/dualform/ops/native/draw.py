"""The draw of tokens on a CPU, in one pass over the logits of a row."""

import torch
from torch import Tensor

from dualform.ops.native import library
from dualform.ops.native.library import readable
from dualform.ops.native.structs import DRAW


def draw(logits: Tensor, options: Tensor, draws: Tensor, history: Tensor | None, found: Tensor) -> None:
    """A token of each row, and whether its logits are finite; in float64.

    Args:
        logits: ``(B, V)``.
        options: ``(B, 6)``, float64: temperature, k, p, the least share, and the two penalties, as the sampler's table
            has them.
        draws: ``(B,)``, float64, in [0, 1).
        history: ``(B, L)``, int64, the tokens that are penalised; negative ones are none. None for no penalties.
        found: where the tokens and 0 or 1 are written, int64 ``(2, B)``.
    """
    rows, tokens = logits.shape
    if rows == 0:
        return
    written = [one if one.is_contiguous() else one.new_empty(rows) for one in found.unbind()]
    library.call(
        "draw",
        DRAW,
        rows=rows,
        tokens=tokens,
        remembered=0 if history is None else history.shape[1],
        logits=readable(logits),
        options=options.contiguous(),
        draws=draws.contiguous(),
        history=None if history is None else history.contiguous(),
        token=written[0],
        finite=written[1],
    )
    if not found.is_contiguous():
        found.copy_(torch.stack(written))
