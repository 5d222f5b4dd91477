"""The selective scan on an NVIDIA GPU."""

from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualform.ops.cuda import compiler
from dualform.ops.cuda.tensors import NO_VIEW, TYPES, aligned, alive, pointer, readable, view
from dualform.ops.op import Backend
from dualform.ops.selective_scan import Arguments, selective_scan_op

TILE = 64  # steps between the states that the backward starts from, as in selective_scan.cuh
_LANE_STATES = (2, 4, 8)  # states of one of the four lanes of a channel


class Inputs(Arguments):
    """The arguments, and what follows from them."""

    @property
    def empty(self) -> bool:
        """Whether there is nothing to do."""
        return self.u.numel() == 0 or self.h0.numel() == 0

    @property
    def per_group(self) -> int:
        """Channels that share their B and their C."""
        return self.u.shape[2] // max(self.B.shape[2], self.C.shape[2])

    def in_blocks_of(self, channels: int) -> bool:
        """Whether so many neighbouring channels share their B and their C, and few of the last block are not there."""
        return self.per_group % channels == 0 or self.per_group == self.u.shape[2] >= 8 * channels

    @property
    def map_dtype(self) -> torch.dtype:
        """Of B and C, as the kernels read them."""
        both = torch.promote_types(self.B.dtype, self.C.dtype)
        return both if both in TYPES else torch.float32

    @property
    def lane_states(self) -> int:
        """States of one of the four lanes of a channel."""
        return next(s for s in _LANE_STATES if 4 * s >= self.h0.shape[2])

    def spans(self, lead: int, span: int) -> int:
        """Pieces of ``lead`` steps, then ``span``, as the kernels number them: sequences do not share one."""
        rows, length = len(self.h0), self.u.shape[1]
        return rows * (1 + -(-max(0, length - lead) // span)) if self.cu_seqlens is None else length // span + rows


class Plan(NamedTuple):
    """How a call is cut.

    Args:
        channels: of a lane.
        warps: of a block, side by side over channels; in the forward, those that take turns at the time of one row.
        blocks: that a multiprocessor should hold.
        teams: of such warps in a block, side by side over channels.
    """

    channels: int
    warps: int
    blocks: int
    teams: int = 1

    @property
    def line(self) -> int:
        """Channels of a warp."""
        return 8 * self.channels

    @property
    def steps(self) -> int:
        """Steps that a warp takes at once."""
        return 16 // self.channels

    @property
    def macros(self) -> dict[str, int]:
        """What the sources call it."""
        return {"CHANNELS": self.channels, "WARPS": self.warps, "BLOCKS": self.blocks, "TEAMS": self.teams}


def plan_forward(x: Inputs) -> Plan:
    """Warps with a row's time to themselves where there are enough of them, else twelve or three take turns at it.

    Wide states need more registers, which fewer warps have.
    """
    rows, width, limits, wide = len(x.h0), x.u.shape[2], compiler.limits(), x.lane_states > 4
    channels = 2 if x.in_blocks_of(16) and rows * width >= 1024 else 1
    teams = rows * -(-width // (8 * channels))
    if x.u.shape[1] <= 16 or teams > 4 * limits.multiprocessors:
        return Plan(channels, 1, 3 if wide else 4, teams=4)
    if teams > 2 * limits.multiprocessors:
        return Plan(channels, 2 if wide else 3, 4)
    plans = (Plan(channels, warps, 1) for warps in ((8, 4) if wide else (12, 8, 4)))
    return next(plan for plan in plans if forward_shared(plan, x) <= limits.shared or plan.warps == 4)


def forward_shared(plan: Plan, x: Inputs) -> int:
    """Bytes of shared memory of a block."""
    floats = 2 * (6 * plan.steps * plan.line + 32 + 8 * plan.steps * x.lane_states)
    of_warp = 4 * (floats + 32 * plan.channels * x.lane_states) + 4 * 32 * 4 * x.u.element_size()
    return plan.teams * plan.warps * of_warp


def plan_backward(x: Inputs) -> tuple[Plan, int, int]:
    """The plan, and the steps of a row's first span and of the others."""
    rows, (_, length, width), limits = len(x.h0), x.u.shape, compiler.limits()
    channels = 2 if x.in_blocks_of(16) else 1
    plans = (Plan(channels, warps, 8 // warps) for warps in (4, 2, 1))
    plan = next(
        plan
        for plan in plans
        if plan.warps == 1 or (x.in_blocks_of(plan.line * plan.warps) and backward_shared(plan, x) <= limits.shared)
    )
    blocks, places = rows * -(-width // (plan.line * plan.warps)), limits.multiprocessors * plan.blocks
    even = x.cu_seqlens is not None or 2 * blocks < places
    return plan, *cut(TILE * -(-length // TILE), blocks, places, even)


def backward_shared(plan: Plan, x: Inputs) -> int:
    """Bytes of shared memory of a block."""
    tile, states = plan.steps * plan.line, x.lane_states
    of_warp = 4 * (18 * tile + 96 + TILE // plan.steps * 32 * plan.channels * states + 2 * plan.line + 256)
    of_warp += 2 * 32 * 4 * (3 * x.u.element_size() + x.delta.element_size())
    return plan.warps * of_warp + 4 * (8 * TILE * states + 16 * plan.warps * plan.steps * states)


@lru_cache(1024)
def cut(whole: int, blocks: int, places: int, even: bool) -> tuple[int, int]:
    """The steps of a row's first span, and of the others: those that take the least time.

    A row in one span needs no joining; but the blocks of all spans should come out even on the multiprocessors. So the
    first span of every row is a long one, and where those leave places free, or in their last wave, short ones run.

    Args:
        whole: steps of a row.
        blocks: of all rows.
        places: blocks that run at once.
        even: all spans are to be of one size.
    """

    def waves(count: int) -> float:  # one block on a multiprocessor runs faster than each of several
        full, last = divmod(count, places)
        return full + (0 if last == 0 else 1 if last > places / 2 else 0.7)

    def time(lead: int, span: int) -> float:
        pieces = -(-(whole - lead) // span)
        first, other = lead + 8, span + 8  # a block begins and ends in the time of a few steps
        if pieces == 0:
            return waves(blocks) * first
        beside = -blocks % places * (first // other)
        behind = waves(max(0, blocks * pieces - beside))
        joining = 0.32 * (whole - lead) * blocks / places
        uneven = 0.1 * span  # some blocks run faster than others, and wait for them at last
        return -(-blocks // places) * first + behind * other + joining + uneven

    spans = [TILE << k for k in range(32) if whole <= 128 * TILE << k <= 128 * whole]
    cuts = ((whole - n * span, span) for span in spans for n in range(whole // span))
    return min(((span, span) for span in spans) if even else cuts, key=lambda both: time(*both))


def _run(keep: bool, *args: Any) -> list[Tensor]:
    x = Inputs(*args)
    y, final = x.u.new_empty(x.u.shape), x.h0.clone(memory_format=torch.contiguous_format)
    saved = _saved(*args) if keep else []
    if x.empty:
        return [y.zero_(), final, *saved]
    rows, width = len(x.h0), x.u.shape[2]
    plan = plan_forward(x)
    given, fields, macros = _fields(x)
    compiler.launch(
        "selective_scan_forward.cu",
        "selective_scan_forward",
        macros | plan.macros | {"SAVE": keep},
        rows * -(-width // (plan.teams * plan.line)),
        32 * plan.teams * plan.warps,
        forward_shared(plan, x),
        (*fields, pointer(y), pointer(final), pointer(saved[0]) if keep else 0, TILE, TILE, *[0] * 20),
    )
    alive(given)
    return [y, final, *saved]


_forward, _infer = partial(_run, True), partial(_run, False)


def _saved(*args: Any) -> list[Tensor]:
    x = Inputs(*args)
    return [x.h0.new_empty(x.spans(TILE, TILE), *x.h0.shape[1:])]


def _backward(grads: list[Tensor], kept: list[Tensor], *args: Any) -> list[Tensor]:
    x = Inputs(*args)
    dh0 = grads[1].clone()
    if x.empty:
        tensors = [m for m in x[:8] if isinstance(m, Tensor)]
        return [*(torch.zeros_like(m, memory_format=torch.contiguous_format) for m in tensors), dh0]
    (batch, length, width), (rows, _, states), new = x.u.shape, x.h0.shape, x.h0.new_empty
    plan, lead, span = plan_backward(x)
    dy = grads[0].to(x.u.dtype)
    given, fields, macros = _fields(x, dy)
    padded, spans, blocks = 4 * macros["STATES"], x.spans(lead, span), -(-width // (plan.line * plan.warps))
    du, ddelta = (torch.empty_like(m, memory_format=torch.contiguous_format) for m in (x.u, x.delta))
    dz = None if x.z is None else torch.empty_like(du)
    carry, seconds = new(spans, width, states), new(spans, width)
    dmaps, da, dd, dbias = (
        new(2, blocks, batch, length, padded),
        new(spans, width, states),
        new(spans, width),
        new(spans, width),
    )
    outputs = (grads[1], carry, seconds, du, ddelta, dz, dmaps, da, dd, dbias, dh0)
    sums_of_maps = [m.new_empty(m.shape, dtype=x.map_dtype) for m in (x.B, x.C)]
    sums = (new(width, states), new(width), new(width))
    fields = (*fields, 0, 0, pointer(kept[0]), lead, span, *view(dy), *(pointer(m) for m in outputs))
    fields = (*fields, spans, *(pointer(m) for m in (*sums_of_maps, *sums)))

    def launch(kernel: str, grid: int, threads: int, shared: int) -> None:
        compiler.launch("selective_scan_backward.cu", kernel, macros | plan.macros, grid, threads, shared, fields)

    if x.cu_seqlens is not None or lead < length:
        of_warp = 4 * (2 * plan.steps * plan.line + plan.steps * padded + 2 * plan.line)
        launch("selective_scan_carry", spans * blocks, 32 * plan.warps, plan.warps * of_warp)
        launch("selective_scan_join", rows * -(-width * states // 256), 256, 0)
    launch("selective_scan_backward", spans * blocks, 32 * plan.warps, backward_shared(plan, x))
    fours = batch * length * macros["STATES"]
    sizes = (x.B.shape[2] * fours, x.C.shape[2] * fours, width * states, width, width)
    launch("selective_scan_sums", sum(-(-size // 256) for size in sizes), 256, 0)
    alive(given, kept, outputs)
    found = [du, ddelta, *(m.to(like.dtype) for m, like in zip((sums[0], *sums_of_maps), x[2:5], strict=True))]
    found += [] if x.D is None else [sums[1].to(x.D.dtype)]
    found += [] if x.z is None or dz is None else [dz.to(x.z.dtype)]
    found += [] if x.bias is None else [sums[2].to(x.bias.dtype)]
    return [*found, dh0]


def _fields(x: Inputs, *more: Tensor) -> tuple[tuple[Tensor | None, ...], tuple[int, ...], dict[str, Any]]:
    """What the kernels are given, to be kept alive; the first fields of ``Scan``; the macros of both sources.

    ``more`` are tensors like u that the kernels read, too.
    """
    u, delta, B, C = readable(x.u), readable(x.delta), *(readable(m.to(x.map_dtype), 2) for m in (x.B, x.C))
    z = None if x.z is None else readable(x.z.to(x.u.dtype))
    A, D, bias = (None if m is None else m.float().contiguous() for m in (x.A, x.D, x.bias))
    h0, cu_seqlens = x.h0.contiguous(), None if x.cu_seqlens is None else x.cu_seqlens.to(torch.int64).contiguous()
    fields = (
        *(len(h0), u.shape[1], *h0.shape[1:], B.shape[2], C.shape[2], pointer(cu_seqlens)),
        *(*view(u), *view(delta), *(NO_VIEW if z is None else view(z)), *view(B), *view(C)),
        *(pointer(m) for m in (A, D, bias, h0)),
    )
    macros = {
        "STATES": x.lane_states,
        "FULL": 4 * x.lane_states == h0.shape[2],
        "INPUT": TYPES[u.dtype],
        "DELTA": TYPES[delta.dtype],
        "MAP": TYPES[B.dtype],
        "INPUT_ALIGNED": aligned(u.shape[2], u, delta, z, *more),
        "MAP_ALIGNED": aligned(h0.shape[2], B, C),
        "GATED": z is not None,
        "SOFTPLUS": x.softplus,
    }
    return (u, delta, A, B, C, D, z, bias, h0, cu_seqlens), fields, macros


def _refuses(*args: Any) -> str | None:
    x = Inputs(*args)
    if x.h0.dtype != torch.float32:
        return f"the state is {x.h0.dtype}, not float32"
    if x.h0.shape[2] > 4 * _LANE_STATES[-1]:
        return f"{x.h0.shape[2]} states, more than {4 * _LANE_STATES[-1]}"
    if x.per_group < x.u.shape[2] and x.per_group % 8:
        return f"groups of {x.per_group} channels, not a multiple of 8"
    return compiler.missing() or None


selective_scan_op.add(Backend("cuda", _forward, _backward, _infer, _saved, devices=("cuda",), refuses=_refuses))
