"""Steps of the blocks of a model, one by one or in runs that a kernel takes together."""

from collections.abc import Callable, Sequence

from torch import Tensor

from dualform.core.recurrence import State
from dualform.layers.block import Block
from dualform.layers.mixer import Step
from dualform.layers.stream_step import StreamStep, StreamSteps
from dualform.ops.head_step import HeadStep


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


def stream_runs(blocks: Sequence[Block], head: Callable[[Tensor], HeadStep] | None = None) -> dict[int, StreamSteps]:
    """The steps of blocks in a row, whose layers take the stream to the stream; a head goes with all of them."""
    residuals = {block: block.residuals() for block in blocks}
    runs: dict[int, list[list[StreamStep]]] = {}
    first = 0
    for number, block in enumerate(blocks):
        if len(residuals[block]) == len(block.parts):
            runs.setdefault(first, []).append(list(residuals[block].values()))
        else:
            first = number + 1
    return {first: StreamSteps(run, head if len(run) == len(blocks) else None) for first, run in runs.items()}
