"""State space duality in Triton: states from chunk to chunk, then all chunks side by side, in matrix products."""

from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from dualform.ops.layout import inner_contiguous
from dualform.ops.op import Backend
from dualform.ops.ssd import ssd_op
from dualform.ops.triton.support import (
    DEVICES,
    INTERPRETED,
    blocks,
    kernels,
    missing,
    power_of_two,
    processors,
    shared_memory,
    warps,
)

_CHUNK = 64  # steps of a matrix product
_STATES = 64  # of one program that passes states on
_LEAST = 16  # rows and columns of a matrix product
_MOST_WIDTH, _MOST_STATES = 128, 256
_SHARED, _SHARED_AHEAD = 76 * 2**10, 145 * 2**10  # bytes for heads of 64 x 128, without and with reading ahead


def _side(size: int) -> int:
    """Of a matrix in a product."""
    return max(_LEAST, power_of_two(size))


def _chunk(x: Tensor, h0: Tensor) -> tuple[int, int]:
    """Steps of a chunk, and how many heads are read at once, as the memory of a processor allows."""
    size, shared = _side(h0.shape[2]) * _side(h0.shape[3]) / (64 * 128), shared_memory(x)
    chunk = _CHUNK
    while chunk > _LEAST and _SHARED * size * chunk / 64 > shared:
        chunk //= 2
    return chunk, 3 if _SHARED_AHEAD * size * chunk / 64 <= shared else 1


def _slots(x: Tensor, h0: Tensor, cu_seqlens: Tensor | None) -> int:
    """Chunks that there may be; no chunk crosses a border."""
    length, (chunk, _) = x.shape[1], _chunk(x, h0)
    return blocks(length, chunk) if cu_seqlens is None else length // chunk + len(h0)


def _table(cu_seqlens: Tensor, slots: int, chunk: int) -> Tensor:
    """Begin, end, sequence, and first + 2 last of every chunk, ``(slots, 4)``; those that are not needed are empty."""
    begins, counts = cu_seqlens[:-1].long(), -(-cu_seqlens.diff().long() // chunk)
    ends, ids = counts.cumsum(0), torch.arange(slots, device=cu_seqlens.device)
    row = torch.searchsorted(ends, ids, right=True)
    used, row = row < len(counts), row.clamp_(max=len(counts) - 1)
    index = ids - (ends - counts)[row]
    begin = begins[row] + index * chunk
    end = torch.minimum(begin + chunk, cu_seqlens[1:].long()[row])
    flags = (index == 0) + 2 * (index == counts[row] - 1)
    return (torch.stack((begin, end, row, flags), 1) * used[:, None]).contiguous()


class _Plan:
    """How a call is cut, and what all of its kernels are told."""

    def __init__(self, *args: Any):
        x, dt, A, B, C, h0, cu_seqlens, _ = args
        self.dtype = _dtype(x, B, C)
        self.x, self.B, self.C = (self.given(m, 2) for m in (x, B, C))
        self.dt, self.A, self.start = self.given(dt, 1, dt.dtype), A.contiguous(), h0.contiguous()
        (self.batch, self.length, self.heads, self.width), (self.groups, self.states) = x.shape, B.shape[2:]
        chunk, self.ahead = _chunk(x, h0)
        self.slots = _slots(x, h0, cu_seqlens)
        self.table = None if cu_seqlens is None else _table(cu_seqlens, self.slots, chunk)
        self.per_group, fill = self.heads // self.groups, 2 * processors(x)
        self.programs = self.batch * self.heads * blocks(self.states, _STATES)
        segments = 1 if self.programs >= fill else min(self.slots, blocks(2 * fill, self.programs))
        self.steps = blocks(self.slots, segments)
        self.segments = blocks(self.slots, self.steps)
        cells = self.batch * self.slots * self.groups
        self.parts = min(self.per_group, blocks(2 * fill, cells))
        self.cells = cells * self.parts
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
        if self.segments > 1:
            decay, state = (self.start.new_empty(self.batch, self.segments, *each) for _ in range(2))
            self._states(x, maps, start, None, None, None, decay, state, back)
            entering, size = torch.empty_like(state), state[0, 0].numel()
            kernels("chunks").enter[(self.batch * blocks(size, 128),)](
                decay, state, None, entering, self.segments, size, 1, 0, COMPLEX=False, START=False, BD=128
            )
        self._states(x, maps, start, entering, saved, final, None, None, back)
        return saved

    def _states(self, x: Any, maps: Any, start: Tensor, *rest: Any) -> None:
        *outputs, back = rest
        kernels("ssd").states[(self.programs * self.segments,)](
            x, maps, self.dt, self.A, self.table, start, *outputs, self.length, self.heads, self.per_group, self.slots,
            self.segments, self.steps, BACKWARD=back, **self.flags, BN=min(_STATES, _side(self.states)), num_warps=4,
        )  # fmt: skip

    def cell(self, num_warps: int, ahead: int = 3) -> dict[str, Any]:
        """What the kernels of chunks are told beside tensors."""
        sizes = {"length": self.length, "heads": self.heads, "per_group": self.per_group, "slots": self.slots}
        dtype = getattr(kernels("ssd").tl, str(self.start.dtype)[6:])
        how = {"num_warps": num_warps, "num_stages": min(ahead, self.ahead)}
        return {**sizes, "parts": self.parts, **self.flags, "NP": _side(self.states), "dtype": dtype, **how}


def _dtype(*tensors: Tensor) -> torch.dtype:
    return reduce(torch.promote_types, (m.dtype for m in tensors))


def _run(keep: bool, *args: Any) -> list[Tensor]:
    x, h0 = args[0], args[5]
    y, final = x.new_empty(x.shape), h0.clone(memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return [y, final, *(_saved(*args) if keep else [])]
    plan = _Plan(*args)
    saved = plan.run_states(plan.x, plan.B, plan.start, final, False)
    kernels("ssd").outputs[(plan.cells,)](
        plan.x, plan.B, plan.C, plan.dt, plan.A, plan.table, saved, y, BACKWARD=False, **plan.cell(4)
    )  # fmt: skip
    return [y, final, *([saved] if keep else [])]


_forward, _infer = partial(_run, True), partial(_run, False)


def _saved(*args: Any) -> list[Tensor]:
    x, B, C, h0, cu_seqlens = args[0], args[3], args[4], args[5], args[6]
    return [h0.new_empty(len(x), _slots(x, h0, cu_seqlens), *h0.shape[1:], dtype=_dtype(x, B, C))]


def _backward(grads: list[Tensor], kept: list[Tensor], *args: Any) -> list[Tensor]:
    x, dt, A, B, C, h0, *_ = args
    dstart = grads[1].clone(memory_format=torch.contiguous_format)  # an empty sequence passes it on
    if x.numel() == 0:
        zeros = (torch.zeros_like(m, memory_format=torch.contiguous_format) for m in (x, dt, A, B, C))
        return [*zeros, dstart]
    plan = _Plan(*args)
    dy, dx, ddt = plan.given(grads[0], 2), x.new_empty(x.shape), dt.new_empty(dt.shape)
    leaving = plan.run_states(dy, plan.C, grads[1].contiguous(), dstart, True)
    dlog, dA = h0.new_empty(dt.shape), h0.new_empty(plan.batch * plan.slots, plan.heads)
    dB, dC = (m.new_empty(plan.parts, *m.shape, dtype=m.dtype if plan.parts == 1 else h0.dtype) for m in (B, C))
    given, wide = (plan.B, plan.C, plan.dt, plan.A, plan.table), plan.cell(warps(256), ahead=2)
    kernels("ssd").outputs[(plan.cells,)](dy, *given, leaving, dx, BACKWARD=True, **plan.cell(4))
    kernels("ssd").gradients_c[(plan.cells,)](plan.x, *given, kept[0], leaving, dy, dlog, dC, **wide)
    kernels("ssd").gradients[(plan.cells,)](plan.x, *given, leaving, dy, dlog, ddt, dA, dB, **wide)
    maps = ((g[0] if plan.parts == 1 else g.sum(0)).to(m.dtype) for g, m in ((dB, B), (dC, C)))
    return [dx, ddt, dA.sum(0).to(A.dtype), *maps, dstart]


def _refuses(*args: Any) -> str | None:
    x, B, C, (width, states) = args[0], args[3], args[4], args[5].shape[2:]
    if _dtype(x, B, C).itemsize > 2 and not INTERPRETED:
        return f"x, B and C are {_dtype(x, B, C)}; its matrix products are those of bfloat16 or float16"
    if width > _MOST_WIDTH or not 0 < states <= _MOST_STATES:
        return f"P x N is {width} x {states}, expected at most {_MOST_WIDTH} x {_MOST_STATES}"
    return None


ssd_op.add(Backend("triton", _forward, _backward, _infer, _saved, devices=DEVICES, refuses=_refuses, missing=missing))
