"""Exact generation: what order a row is summed in does not depend on how many rows there are."""

from typing import Any

import torch
from torch import nn

from dualform.layers.norm import RMSNorm
from dualform.layers.projection import kernels_run, plain
from dualform.models.lm import LanguageModel
from dualform.ops.linear import FEW

_PLAIN_NORM = 2**16  # numbers, from which on a norm is another kernel
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rows_together(model: LanguageModel) -> int:
    """The most rows that a step may have, so that their number changes no bit of any of them; 1 or more.

    Products of matrices and elementwise functions of PyTorch round a row differently in batches of different sizes, and
    at different places of a batch, so that most models go on one row at a time. The kernels of the CPU do not, for two
    rows and more (:func:`dualform.ops.linear`): where all of a step is theirs, as in stacks of Mamba, Mamba-2 and
    S4D alone, its rows go on together.
    """
    config, head, norm = model.config, model.head, model.norm
    weight = model.embed.weight if head is None else head.weight
    simple = config.embed_norm is None and config.logit_cap is None and plain(norm, kind=RMSNorm)
    if not simple or model.entrance is not None or weight.device.type != "cpu" or not kernels_run("cpu"):
        return 1
    same = weight.dtype == norm.weight.dtype and weight.dtype in _DTYPES and type(weight) is nn.Parameter
    if not same or not (head is None or plain(head)):
        return 1
    blocks: set[Any] = set(model.blocks)
    for block in blocks:
        if len(block.residuals()) != len(block.parts):
            return 1
    return max(1, min(FEW, (_PLAIN_NORM - 1) // config.d_model))
