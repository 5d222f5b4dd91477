"""State space duality in Triton: states from chunk to chunk, then all chunks side by side, in matrix products."""

from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from dualform.ops.layout import inner_contiguous
from dualform.ops.ssd import SSD, ssd_op
from dualform.ops.triton.support import (
    INTERPRETED,
    add_backend,
    blocks,
    enter,
    kernels,
    power_of_two,
    processors,
    shared_memory,
    table_of_chunks,
    warps,
)

_CHUNK = 64  # steps of a matrix product
_STATES = 64  # of one program that passes states on
_LEAST = 16  # rows and columns of a matrix product
_ELEMENTS = 2048  # of a program that does single numbers
_MOST_WIDTH, _MOST_STATES = 128, 256
_SHARED, _SHARED_AHEAD = 76 * 2**10, 145 * 2**10  # bytes for heads of 64 x 128, without and with reading ahead


def _side(size: int) -> int:
    """Of a matrix in a product."""
    return max(_LEAST, power_of_two(size))


def _chunk(a: SSD) -> tuple[int, int]:
    """Steps of a chunk, and how many heads are read at once, as the memory of a processor allows.

    A chunk is gone through once for each run of equal ids that it has a part of, so that with ids it is shorter.
    """
    size, shared = _side(a.h0.shape[2]) * _side(a.h0.shape[3]) / (64 * 128), shared_memory(a.x)
    chunk = _CHUNK if a.ids is None else max(_LEAST, _CHUNK // 2)
    while chunk > _LEAST and _SHARED * size * chunk / 64 > shared:
        chunk //= 2
    return chunk, 3 if _SHARED_AHEAD * size * chunk / 64 <= shared else 1


def _slots(a: SSD) -> int:
    """How many chunks there may be; no chunk crosses a border."""
    length, (chunk, _) = a.x.shape[1], _chunk(a)
    return blocks(length, chunk) if a.packing is None else length // chunk + a.packing.rows


class _Plan:
    """How a call is cut, and what all of its kernels are told."""

    def __init__(self, a: SSD):
        self.dtype = _dtype(a)
        self.x, self.B, self.C = (self.given(m, 2) for m in (a.x, a.B, a.C))
        self.dt, self.A, self.start = self.given(a.dt, 1, a.dt.dtype), a.A.contiguous(), a.h0.contiguous()
        self.D = None if a.D is None else a.D.contiguous()
        self.z = None if a.z is None else self.given(a.z, 2, a.z.dtype)
        (self.batch, self.length, self.heads, self.width), (self.groups, self.states) = a.x.shape, a.B.shape[2:]
        chunk, self.ahead = _chunk(a)
        self.slots = _slots(a)
        self.table = None if a.packing is None else table_of_chunks(a.packing, self.slots, chunk)
        self.ids = None if a.ids is None else a.ids.contiguous()
        self.per_group, fill = self.heads // self.groups, 2 * processors(a.x)
        self.programs = self.batch * self.heads * blocks(self.states, _STATES)
        spans = 1 if self.programs >= fill else min(self.slots, blocks(2 * fill, self.programs))
        self.steps = blocks(self.slots, spans)
        self.spans = blocks(self.slots, self.steps)
        places = self.batch * self.slots * self.groups
        self.parts = min(self.per_group, blocks(2 * fill, places))
        self.programs_of_chunks = places * self.parts
        self.flags = {"P": self.width, "N": self.states, "BP": _side(self.width), "Q": chunk}

    def given(self, m: Tensor, inner: int, dtype: torch.dtype | None = None) -> tuple[Any, ...]:
        """A tensor for a kernel, and its strides along the batch and along time."""
        m = inner_contiguous(m.to(dtype or self.dtype), inner)
        return m, m.stride(0), m.stride(1)

    def run_states(self, x: tuple[Any, ...], maps: tuple[Any, ...], start: Tensor, final: Tensor, back: bool) -> Tensor:
        """What enters every chunk, or BACKWARD leaves it; ``final`` is filled where sequences end, or begin."""
        each = (self.heads, self.width, self.states)
        saved = self.start.new_empty(self.batch, self.slots, *each, dtype=self.dtype)
        entering = None
        if self.spans > 1:
            decay, state = (self.start.new_empty(self.batch, self.spans, *each) for _ in range(2))
            self._states(x, maps, start, None, None, None, decay, state, back)
            entering = enter(
                decay, state, self.batch, self.spans, packed=self.table is not None or self.ids is not None
            )
        self._states(x, maps, start, entering, saved, final, None, None, back)
        return saved

    def _states(self, x: Any, maps: Any, start: Tensor, *rest: Any) -> None:
        *outputs, back = rest
        kernels("ssd").states[(self.programs * self.spans,)](
            x, maps, self.dt, self.A, self.table, self.ids, start, *outputs, self.length, self.heads, self.per_group,
            self.slots, self.spans, self.steps, BACKWARD=back, **self.flags, BN=min(_STATES, _side(self.states)),
            num_warps=4,
        )  # fmt: skip

    def before_gate(self, dy: Tensor, gated: Tensor, dz: Tensor) -> Tensor:
        """The gradient of what was gated; fills ``dz``."""
        found, width = dy.new_empty(dy.shape, dtype=self.dtype), self.heads * self.width
        columns = min(_ELEMENTS // 2, power_of_two(width))
        steps = _ELEMENTS // columns
        kernels("ssd").before_gate[(self.batch * blocks(self.length, steps) * blocks(width, columns),)](
            dy, self.z, gated, found, dz, self.length, width, BT=steps, BD=columns, dtype=self.number, num_warps=4
        )
        return found

    @property
    def number(self) -> Any:
        """The dtype of sums, as Triton has it."""
        return getattr(kernels("ssd").tl, str(self.start.dtype)[6:])

    def of_chunks(self, num_warps: int, ahead: int = 3) -> dict[str, Any]:
        """What the kernels of chunks are told beside tensors."""
        sizes = {"length": self.length, "heads": self.heads, "per_group": self.per_group, "slots": self.slots}
        flags = {**self.flags, "NP": _side(self.states), "SKIP_BY_HEAD": self.D is not None and self.D.dim() == 1}
        how = {"dtype": self.number, "num_warps": num_warps, "num_stages": min(ahead, self.ahead)}
        return {**sizes, "parts": self.parts, **flags, **how}


def _dtype(a: SSD) -> torch.dtype:
    """That of matrix products."""
    return reduce(torch.promote_types, (a.x.dtype, a.B.dtype, a.C.dtype))


def _run(keep: bool, a: SSD) -> list[Tensor]:
    y, final = a.x.new_empty(a.x.shape), a.h0.clone(memory_format=torch.contiguous_format)
    if y.numel() == 0:
        return [y, final, *(_saved(a) if keep else [])]
    plan, gated = _Plan(a), [a.x.new_empty(a.x.shape)] if keep and a.z is not None else []
    saved = plan.run_states(plan.x, plan.B, plan.start, final, False)
    kernels("ssd").outputs[(plan.programs_of_chunks,)](
        plan.x, plan.B, plan.C, plan.dt, plan.A, plan.D, plan.z, plan.table, plan.ids, saved, y,
        gated[0] if gated else None, BACKWARD=False, **plan.of_chunks(4),
    )  # fmt: skip
    return [y, final, *([saved] if keep else []), *gated]


_forward, _infer = partial(_run, True), partial(_run, False)


def _saved(a: SSD) -> list[Tensor]:
    states = a.h0.new_empty(a.x.shape[0], _slots(a), *a.h0.shape[1:], dtype=_dtype(a))
    return [states, *([] if a.z is None else [a.x.new_empty(a.x.shape)])]


def _backward(grads: list[Tensor], kept: list[Tensor], a: SSD) -> dict[str, Tensor]:
    dstart = grads[1].clone(memory_format=torch.contiguous_format)  # an empty sequence passes it on
    if a.x.numel() == 0:
        return {**{f: torch.zeros_like(m) for f, m in a._asdict().items() if isinstance(m, Tensor)}, "h0": dstart}
    plan, found, new = _Plan(a), {"h0": dstart}, a.h0.new_empty
    dy, dx, ddt = grads[0], a.x.new_empty(a.x.shape), a.dt.new_empty(a.dt.shape)
    if a.z is not None:
        found["z"] = a.z.new_empty(a.z.shape)
        dy = plan.before_gate(dy, kept[1], found["z"])
    dy = plan.given(dy, 2)
    leaving = plan.run_states(dy, plan.C, grads[1].contiguous(), dstart, True)
    rows = plan.batch * plan.slots
    sums = new if a.ids is None else a.h0.new_zeros  # of runs, which add up
    dlog, dA, dD = new(a.dt.shape), sums(rows, plan.heads), None if a.D is None else sums(rows, *a.D.shape)
    dB, dC = (m.new_empty(plan.parts, *m.shape, dtype=m.dtype if plan.parts == 1 else dA.dtype) for m in (a.B, a.C))
    given, wide = (plan.B, plan.C, plan.dt, plan.A), plan.of_chunks(warps(256), ahead=2)
    kernels("ssd").outputs[(plan.programs_of_chunks,)](
        dy, *given, plan.D, None, plan.table, plan.ids, leaving, dx, None, BACKWARD=True, **plan.of_chunks(4)
    )
    kernels("ssd").gradients_c[(plan.programs_of_chunks,)](
        plan.x, *given, plan.table, plan.ids, kept[0], leaving, dy, dlog, dC, dD, **wide
    )
    wide.pop("SKIP_BY_HEAD")
    kernels("ssd").gradients[(plan.programs_of_chunks,)](
        plan.x, *given, plan.table, plan.ids, leaving, dy, dlog, ddt, dA, dB, **wide
    )
    dB, dC = (g[0] if plan.parts == 1 else g.sum(0) for g in (dB, dC))
    found |= {"x": dx, "dt": ddt, "A": dA.sum(0), "B": dB, "C": dC}
    return found if dD is None else {**found, "D": dD.sum(0)}


def _refuses(a: SSD) -> str | None:
    width, states = a.h0.shape[2:]
    if _dtype(a).itemsize > 2 and not INTERPRETED:
        return f"x, B and C are {_dtype(a)}; its matrix products are those of bfloat16 or float16"
    if width > _MOST_WIDTH or not 0 < states <= _MOST_STATES:
        return f"P x N is {width} x {states}, expected at most {_MOST_WIDTH} x {_MOST_STATES}"
    return None


add_backend(ssd_op, products=True, forward=_forward, backward=_backward, infer=_infer, saved=_saved, refuses=_refuses)
