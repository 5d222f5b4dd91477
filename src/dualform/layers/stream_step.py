"""Steps of layers from the residual stream to the residual stream, in one kernel for each, or for a whole model."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dualform.core.recurrence import State
from dualform.core.shapes import wide
from dualform.core.tree import may_write
from dualform.layers.norm import RMSNorm
from dualform.layers.projection import kernels_run, plain, plain_parameters
from dualform.ops.native.block import Program, Record
from dualform.ops.op import Op

_ROWS = {"cpu": 128, "cuda": 256}  # of a step that the kernels run; the products of more take more time than all else


def stream_step_dtype(norm: Any, part: nn.Module, *maps: Any) -> torch.dtype | None:
    """The dtype of the matrices of a layer that a kernel may run; None for one that it may not.

    It may where the norm is an RMS norm, the maps are linear ones, nothing wraps or hooks them, and the parameters are
    plain tensors of one dtype and device.
    """
    if not plain(norm, kind=RMSNorm) or not plain(*maps):
        return None
    dtype, weight = plain_parameters(part), norm.weight
    same = dtype == weight.dtype and maps[0].weight.device == weight.device
    return dtype if same and kernels_run(weight.device.type) else None


def wide_of(m: Tensor | None) -> Any:
    """A parameter in the dtype that is computed in; None where there is none."""
    return None if m is None else m.detach().to(wide(m))


class StreamStep:
    """Steps ``(x, state) -> (x, state)`` of ``x + layer(norm(x))``.

    Args:
        op: which runs them: ``record -> (x, *state)``.
        record: ``(x, *state) -> record``, which holds the weights.
        kind: the class of a state of the layer.
        dtype: of the stream and the states.
    """

    def __init__(self, op: Op[Any], record: Callable[..., Any], kind: Any, dtype: torch.dtype):
        self.op, self.kind, self.dtype, self._record = op, kind, dtype, record

    def __call__(self, x: Tensor, state: Any) -> tuple[Tensor, State] | None:
        """A step, or None for one that the kernel does not run, such as one of many rows."""
        if x.shape[0] > _ROWS.get(x.device.type, 0) or x.dtype != self.dtype or not kernels_run(x.device.type):
            return None
        if not isinstance(state, self.kind) or any(m.dtype != self.dtype for m in state):
            return None
        in_place = not x.is_cpu and all(map(may_write, state))  # on a CPU steps of a whole model do so
        record = self.record(x, state)._replace(in_place=in_place)
        self.op.check(record)
        x, *new = self.op(record)
        return x, self.kind(*new)

    def record(self, x: Tensor, state: Any) -> Record:
        """The arguments of the op."""
        return self._record(x, *state)


class StreamSteps:
    """The steps of such layers in a row. A state that they made, and that comes back, is written in place.

    Then one call runs all of them: what is written where is known from the step before.

    Args:
        steps: of the layers, in order.
    """

    def __init__(self, steps: Sequence[StreamStep]):
        self.steps = tuple(steps)
        self._made: Any = None
        self._program: Program | None = None

    def __call__(self, x: Tensor, states: Any) -> tuple[Tensor, State] | None:
        """A step of all, where each block has the state of one layer; None for one that the kernels do not run."""
        if self.continues(states, x.shape[0]):
            program = self._program = self._program or self._programmed(x)
            return program.run(x), self._made
        made, given = [], x
        for step, state in zip(self.steps, states, strict=True):
            done = step(given, state[0]) if isinstance(state, tuple) and len(state) == 1 else None
            if done is None:
                return None
            given, left = done
            made.append((left,))
        self._made, self._program = tuple(made), None
        return given, self._made

    def continues(self, states: Any, rows: int) -> bool:
        """Whether states of so many rows are those that the last step made, which may be written in place."""
        made = self._made
        if made is None or not kernels_run("cpu") or not isinstance(states, tuple) or len(states) != len(made):
            return False
        if any(a is not b for a, b in zip(states, made, strict=True)):
            return False
        first = states[0][0][0]
        if not first.is_cpu:
            return False
        fits = self._program is None or self._program.fits(rows)
        return fits and first.shape[0] == rows and may_write(first)

    def _programmed(self, x: Tensor) -> Program:
        stream = torch.empty_like(x, memory_format=torch.contiguous_format)
        return Program([step.record(stream, state) for step, (state,) in zip(self.steps, self._made, strict=True)])
