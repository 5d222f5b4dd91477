"""Steps of the blocks of a model, one by one or in runs that a kernel takes together."""

from collections.abc import Sequence

from dualform.core.recurrence import State
from dualform.layers.block import Block
from dualform.layers.mixer import Step
from dualform.layers.stream_step import StreamStep, StreamSteps


class Steps:
    """How the blocks of a model take a step: each by itself, and where there is a kernel, those in a row together.

    Attributes:
        alone: of each block.
        runs: of blocks in a row, by the number of the first of them.
        whole: of all blocks, where they are one run.
        rate: steps of training that pass with one of these.
        made: the state that the model's last step by these returned, which needs no check when it comes back.
    """

    def __init__(self, alone: list[Step], runs: dict[int, StreamSteps], rate: float = 1.0):
        self.alone, self.runs, self.rate = alone, runs, rate
        first = runs.get(0)
        self.whole = first if first is not None and len(first.steps) == len(alone) else None
        self.made: State | None = None


def stream_runs(blocks: Sequence[Block]) -> dict[int, StreamSteps]:
    """The steps of blocks in a row, each of which is one layer that takes the stream to the stream."""
    residuals = {block: block.residuals() for block in blocks}
    runs: dict[int, list[StreamStep]] = {}
    first = 0
    for number, block in enumerate(blocks):
        if len(residuals[block]) == 1 and len(block.parts) == 1:
            runs.setdefault(first, []).extend(residuals[block].values())
        else:
            first = number + 1
    return {first: StreamSteps(run) for first, run in runs.items()}
