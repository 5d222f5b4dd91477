"""Steps of layers from the residual stream to the residual stream, in one kernel for each, or for a whole model."""

import sys
from collections.abc import Callable, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from dualform.core.recurrence import State
from dualform.core.shapes import wide
from dualform.core.tree import may_write
from dualform.layers.norm import RMSNorm
from dualform.layers.projection import kernels_run, plain, plain_parameters
from dualform.layers.quantized import QuantizedLinear
from dualform.ops.native.block import Program, Record
from dualform.ops.op import Op

_HALVES = {"cpu": (), "cuda": (torch.bfloat16, torch.float16)}  # of states, beside the dtype of the stream
_ROWS = {"cpu": 128, "cuda": 256}  # of a step that the kernels run; the products of more take more time than all else
_SMALL = 2**21  # numbers in the parameters of a layer: below, they stay in a cache of a CPU, and rows may be many


def runs_as_stream_step(norm: Any, part: nn.Module, *maps: Any) -> bool:
    """Whether a kernel may run a layer with its norm.

    It may where the norm is an RMS norm, the maps are linear ones, nothing wraps or hooks them, and the parameters are
    plain tensors of one dtype and device. On a CPU the maps may be quantised, in groups of one size: the first one, and
    of the others those that are not are float32.
    """
    eight = [m for m in maps if plain(m, kind=QuantizedLinear)]
    quantized = bool(eight) and eight[0] is maps[0]
    others = [m for m in maps if m not in eight]
    if not plain(norm, kind=RMSNorm) or not plain(*others) or (eight and not quantized):
        return False
    dtype, weight = plain_parameters(part), norm.weight
    same = dtype == weight.dtype and maps[0].weight.device == weight.device
    if quantized:
        same = same and weight.is_cpu and wide(weight) == torch.float32 and len({m.group for m in eight}) == 1
        same = same and all(m.weight.dtype == torch.float32 for m in others)
    return same and kernels_run(weight.device.type)


def wide_of(m: Tensor | None) -> Any:
    """A parameter in the dtype that is computed in; None where there is none."""
    return None if m is None else m.detach().to(wide(m))


def size_of(part: nn.Module) -> int:
    """How many numbers a part holds."""
    return sum(m.numel() for m in (*part.parameters(), *part.buffers()))


class StreamStep:
    """Steps ``(x, state) -> (x, state)`` of ``x + layer(norm(x))``.

    Args:
        op: which runs them: ``record -> (x, *state)``.
        record: ``(x, *state) -> record``, which holds the weights.
        kind: the class of a state of the layer; None where it is one tensor.
        dtype: of the stream and the states, which may be complex ones of that precision.
        size: how many numbers the layer's parameters have.
    """

    def __init__(self, op: Op[Any], record: Callable[..., Any], kind: Any, dtype: torch.dtype, size: int):
        self.op, self.kind, self.dtype, self._record = op, kind, dtype, record
        self._rows = _ROWS if size > _SMALL else {**_ROWS, "cpu": sys.maxsize}
        self._dtypes = (dtype, dtype.to_complex())

    def __call__(self, x: Tensor, state: Any) -> tuple[Tensor, State] | None:
        """A step, or None for one that the kernel does not run, such as one of many rows."""
        if x.shape[0] > self._rows.get(x.device.type, 0) or x.dtype != self.dtype or not kernels_run(x.device.type):
            return None
        dtypes = {*self._dtypes, *_HALVES[x.device.type]}
        if not isinstance(state, self.kind or Tensor) or any(m.dtype not in dtypes for m in self.tensors(state)):
            return None
        in_place = not x.is_cpu and all(map(may_write, self.tensors(state)))  # on a CPU steps of a whole model do so
        record = self.record(x, state)._replace(in_place=in_place)
        self.op.check(record)
        x, *new = self.op(record)
        return x, new[0] if self.kind is None else self.kind(*new)

    def record(self, x: Tensor, state: Any) -> Record:
        """The arguments of the op."""
        return self._record(x, *self.tensors(state))

    def tensors(self, state: Any) -> tuple[Tensor, ...]:
        """Those of a state."""
        return (state,) if self.kind is None else state


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
        if (behind := self.continued(x, states)) is not None:
            return behind, self._made
        made, given = [], x
        for step, state in zip(self.steps, states, strict=True):
            done = step(given, state[0]) if isinstance(state, tuple) and len(state) == 1 else None
            if done is None:
                return None
            given, left = done
            made.append((left,))
        self._made, self._program = tuple(made), None
        return given, self._made

    def continued(self, x: Tensor, states: Any) -> Tensor | None:
        """The stream behind a step from the state that the last step made, which is written in place; else None."""
        if not self._continues(states, x.shape[0]):
            return None
        program = self._program = self._program or self._programmed(x)
        return program.run(x)

    def _continues(self, states: Any, rows: int) -> bool:
        made = self._made
        if made is None or not isinstance(states, tuple) or len(states) != len(made) or not kernels_run("cpu"):
            return False
        if states is not made and not all(map(is_, states, made)):  # beside it there may be what an entrance carries
            return False
        (first, *_) = self.steps[0].tensors(states[0][0])
        if not first.is_cpu:
            return False
        fits = self._program is None or self._program.fits(rows)
        return fits and first.shape[0] == rows and may_write(first)

    def _programmed(self, x: Tensor) -> Program:
        stream = torch.empty_like(x, memory_format=torch.contiguous_format)
        return Program([step.record(stream, state) for step, (state,) in zip(self.steps, self._made, strict=True)])
