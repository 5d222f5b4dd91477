"""Steps of the blocks of a model, one by one or in runs that a kernel takes together."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dualform.core.recurrence import State
from dualform.core.shapes import wide
from dualform.layers.block import Block
from dualform.layers.mixer import Step
from dualform.layers.norm import RMSNorm
from dualform.layers.projection import kernels_run, plain
from dualform.layers.quantized import QuantizedEmbedding, QuantizedLinear
from dualform.layers.stream_step import StreamStep, StreamSteps, wide_of
from dualform.ops.head_step import HeadStep

_HEADS = (nn.Linear, nn.Embedding, QuantizedLinear, QuantizedEmbedding)


class Steps:
    """How the blocks of a model take a step: each by itself, and where there is a kernel, those in a row together.

    Attributes:
        alone: of each block.
        runs: of blocks in a row, by the number of the first of them.
        whole: of all blocks, where they are one run, and of a head behind them, where there is a kernel for it.
        rate: steps of training that pass with one of these.
        made: the state that the model's last step by these returned, which needs no check when it comes back.
    """

    def __init__(self, alone: list[Step], runs: dict[int, StreamSteps], rate: float = 1.0):
        self.alone, self.runs, self.rate = alone, runs, rate
        first = runs.get(0)
        self.whole = first if first is not None and len(first.blocks) == len(alone) else None
        self.made: State | None = None


def stream_runs(
    blocks: Sequence[Block],
    residuals: dict[Block, dict[Any, StreamStep]],
    head: Callable[[Tensor], HeadStep] | None = None,
) -> dict[int, StreamSteps]:
    """The steps of blocks in a row, whose layers take the stream to the stream; a head goes with all of them."""
    runs: dict[int, list[list[StreamStep]]] = {}
    first = 0
    for number, block in enumerate(blocks):
        if len(residuals[block]) == len(block.parts):
            runs.setdefault(first, []).append(list(residuals[block].values()))
        else:
            first = number + 1
    return {first: StreamSteps(run, head if len(run) == len(blocks) else None) for first, run in runs.items()}


def head_behind(norm: Any, head: Any, factor: float = 1.0, cap: float = 0.0) -> Callable[[Tensor], HeadStep] | None:
    """What follows the last block, given the stream: ``factor (W norm(x) + b)`` with a bound, 0 for none, of a CPU.

    None where there is no kernel for it: for another norm, a head that is wrapped or hooked, or weights of which the
    kernel knows nothing.
    """
    if not any(plain(head, kind=kind) for kind in _HEADS) or not plain(norm, kind=RMSNorm):
        return None
    if not norm.weight.is_cpu or not kernels_run("cpu"):
        return None
    weight, scales, bias = head.weight, getattr(head, "scales", None), getattr(head, "bias", None)
    if type(weight) not in (Tensor, nn.Parameter) or (scales is None and weight.dtype != norm.weight.dtype):
        return None
    if scales is not None and wide(norm.weight) != torch.float32:
        return None
    weights = wide_of(norm.weight), weight, wide_of(bias), scales
    options = factor, cap, norm.eps, norm.weight.dtype, getattr(head, "group", 0)
    return lambda x: HeadStep(x, *weights, *options)
