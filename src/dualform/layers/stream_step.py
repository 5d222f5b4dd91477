"""Steps of layers from the residual stream to the residual stream, in one kernel for each, or for a whole model."""

import sys
from collections.abc import Callable, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from dualform.core.recurrence import State
from dualform.core.shapes import wide
from dualform.core.tree import leaves, may_write
from dualform.layers.norm import RMSNorm
from dualform.layers.projection import kernels_run, plain, plain_parameters
from dualform.layers.quantized import QuantizedLinear, scales_of
from dualform.ops.head_step import HeadStep, head_step_op
from dualform.ops.native.block import Program, Record
from dualform.ops.op import Op

_HALVES = {"cpu": (), "cuda": (torch.bfloat16, torch.float16)}  # of states, beside the dtype of the stream
_ROWS = {"cpu": 128, "cuda": 256}  # of a step that the kernels run; the products of more take more time than all else
_SMALL = 2**21  # numbers in the parameters of a layer: below, they stay in a cache of a CPU, and rows may be many


def runs_as_stream_step(norm: Any, part: nn.Module, *maps: Any, devices: Sequence[str] = ("cpu", "cuda")) -> bool:
    """Whether a kernel may run a layer with its norm.

    It may where the norm is an RMS norm, the maps are linear ones, nothing wraps or hooks them, and the parameters are
    plain tensors of one dtype and device, of those that have the kernel. On a CPU the maps may be quantised, in groups
    of one size: the first one, and of the others those that are not are float32.
    """
    eight = [m for m in maps if plain(m, kind=QuantizedLinear)]
    quantized = bool(eight) and eight[0] is maps[0]
    others = [m for m in maps if m not in eight]
    if not plain(norm, kind=RMSNorm) or not plain(*others) or (eight and not quantized):
        return False
    if norm.weight.device.type not in devices:
        return False
    weight = norm.weight
    bare = quantized and next(part.parameters(), None) is None
    same = (bare or plain_parameters(part) == weight.dtype) and maps[0].weight.device == weight.device
    if quantized:
        same = same and weight.is_cpu and wide(weight) == torch.float32 and len({m.group for m in eight}) == 1
        same = same and all(m.weight.dtype == torch.float32 for m in others)
    return same and kernels_run(weight.device.type)


def wide_of(m: Tensor | None) -> Any:
    """A parameter in the dtype that is computed in; None where there is none."""
    return None if m is None else m.detach().to(wide(m))


def weights_of(into: Any, out: Any) -> tuple[Any, Any, Any, Any, Any, Any]:
    """The matrices and biases of the maps in and out, and the scales of those matrices, as records have them."""
    return into.weight, wide_of(into.bias), out.weight, wide_of(out.bias), scales_of(into), scales_of(out)


def size_of(part: nn.Module) -> int:
    """How many numbers a part holds."""
    return sum(m.numel() for m in (*part.parameters(), *part.buffers()))


class StreamStep:
    """Steps ``(x, state) -> (x, state)`` of ``x + layer(norm(x))``.

    Args:
        op: which runs them: ``record -> (x, *state)``.
        record: ``(x, *state) -> record``, which holds the weights.
        kind: the class of a state of the layer; None where it is one tensor, ``tuple`` where there is none.
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
        if not self.fits(x, state):
            return None
        record = self.record(x, state)
        if (roomy := self.roomy(record, state)) is not state:
            record = self.record(x, roomy)
        in_place = not x.is_cpu and all(map(may_write, self.tensors(state)))  # on a CPU steps of a whole model do so
        record = record._replace(in_place=in_place)
        self.op.check(record)
        x, *new = self.op(record)
        return x, new[0] if self.kind is None else self.kind(*new) if new else ()

    @property
    def stateless(self) -> bool:
        """Whether the layer has no state."""
        return self.kind is tuple

    def fits(self, x: Tensor, state: Any) -> bool:
        """Whether a state has dtypes that kernels read beside that of x."""
        dtypes = {*self._dtypes, *_HALVES[x.device.type]}
        return isinstance(state, self.kind or Tensor) and all(m.dtype in dtypes for m in self.tensors(state))

    def roomy(self, record: Any, state: Any) -> Any:
        """The state with room for one more element."""
        return state

    def record(self, x: Tensor, state: Any) -> Record:
        """The arguments of the op."""
        return self._record(x, *self.tensors(state))

    def tensors(self, state: Any) -> tuple[Tensor, ...]:
        """Those of a state."""
        return (state,) if self.kind is None else state


class StreamSteps:
    """The steps of blocks in a row, of such layers alone.

    A state that they made, and that comes back, is written in place. Then one call runs all of them: what is written
    where is known from the step before.

    Args:
        blocks: the steps of the layers of each block, in order.
        head: what follows the last of them, ``stream -> record``, where steps go on to the logits.
    """

    def __init__(self, blocks: Sequence[Sequence[StreamStep]], head: Callable[[Tensor], HeadStep] | None = None):
        self.blocks, self.head = tuple(map(tuple, blocks)), head
        self._made: Any = None
        self._first: Tensor | None = None  # of the states that were made
        self._program: Program | None = None

    def __call__(self, x: Tensor, states: Any) -> tuple[Tensor, State] | None:
        """The stream, or the logits of the head, and the states of the blocks; None for what kernels do not run."""
        if (y := self.continued(x, states)) is not None:
            return y, self._made
        made = []
        for steps, held in zip(self.blocks, states, strict=True):
            if not isinstance(held, tuple) or len(held) != sum(not step.stateless for step in steps):
                return None
            old, new = iter(held), []
            for step in steps:
                done = step(x, () if step.stateless else next(old))
                if done is None:
                    return None
                x, left = done
                new += [] if step.stateless else [left]
            made.append(tuple(new))
        self._made, self._first, self._program = tuple(made), next(iter(leaves(tuple(made))), None), None
        return x if self.head is None else head_step_op(self.head(x))[0], self._made

    def continued(self, x: Tensor, states: Any) -> Tensor | None:
        """The same from the states that the last step made, which are written in place; None for other states."""
        if not self._continues(states, x.shape[0]):
            return None
        program = self._program = self._program or self._programmed(x)
        return program.run(x)

    def _continues(self, states: Any, rows: int) -> bool:
        made, first = self._made, self._first
        if first is None or not isinstance(states, tuple) or len(states) != len(made) or not kernels_run("cpu"):
            return False
        if states is not made and not all(map(is_, states, made)):  # beside it there may be what an entrance carries
            return False
        fits = first.is_cpu and (self._program is None or self._program.fits(rows))
        return fits and first.shape[0] == rows and may_write(first)

    def _programmed(self, x: Tensor) -> Program:
        stream, records = torch.empty_like(x, memory_format=torch.contiguous_format), []
        for steps, held in zip(self.blocks, self._made, strict=True):
            old = iter(held)
            records += [step.record(stream, () if step.stateless else next(old)) for step in steps]
        return Program([*records, *([] if self.head is None else [self.head(stream)])])
