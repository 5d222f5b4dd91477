"""The selective scan on an NVIDIA GPU."""

from functools import lru_cache, partial
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualform.ops.cuda import compiler
from dualform.ops.cuda.structs import SCAN
from dualform.ops.cuda.tensors import TYPES, aligned, borders, by_time, in_place
from dualform.ops.layout import empty_like, lay, time_last
from dualform.ops.op import Backend
from dualform.ops.selective_scan import SelectiveScan, selective_scan_op

TILE = 64  # steps between the states that the backward starts from, as in selective_scan.cuh
_LANE_STATES = (2, 4, 8)  # states of one of the four lanes of a channel


class Inputs(SelectiveScan):
    """The record, with z as u, and what follows from it."""

    @classmethod
    def of(cls, a: SelectiveScan) -> "Inputs":
        """The record as kernels take it."""
        return cls(*a._replace(z=None if a.z is None else a.z.to(a.u.dtype)))

    @property
    def empty(self) -> bool:
        """Whether there is nothing to do."""
        return self.u.numel() == 0 or self.h0.numel() == 0

    @property
    def per_group(self) -> int:
        """Channels that share their B and their C: no border between groups of either lies within so many."""
        return gcd(*(self.u.shape[2] // groups for groups in self.groups))

    @property
    def groups(self) -> tuple[int, int]:
        """Of B and of C; one where they are constant over time, and each channel has its own."""
        of_b, of_c = (1 if m.dim() == 2 else m.shape[2] for m in (self.B, self.C))
        return of_b, of_c

    def in_blocks_of(self, channels: int) -> bool:
        """Whether so many neighbouring channels share their B and their C, and few of the last block are not there."""
        return self.per_group % channels == 0 or self.per_group == self.u.shape[2] >= 8 * channels

    def in_fours(self, size: int, *tensors: tuple[Tensor | None, bool]) -> bool:
        """Whether four neighbours on the last axis of each, channels or states of ``size``, or time, are read at once.

        Packed sequences may begin anywhere in time.
        """
        sizes = {False: size, True: self.u.shape[1] if self.packing is None else 1}
        return all(aligned(sizes[last], m) for m, last in tensors if m is not None)

    def together(self, *tensors: tuple[Tensor | None, bool]) -> int:
        """How many steps are read at once of those with time innermost: 8, 4 or one, as in lines.cuh."""
        length = 1 if self.packing is not None else self.u.shape[1]
        last = [m for m, is_last in tensors if is_last and m is not None]
        return next((many for many in (8, 4) if aligned(length, *last, many=many)), 1)

    @property
    def map_dtype(self) -> torch.dtype:
        """Of B and C, as the kernels read them where they are not constant."""
        over_time = [m.dtype for m in (self.B, self.C) if m.dim() == 4] or [torch.float32]
        both = torch.promote_types(over_time[0], over_time[-1])
        return both if both in TYPES else torch.float32

    @property
    def lane_states(self) -> int:
        """States of one of the four lanes of a channel."""
        return next(s for s in _LANE_STATES if 4 * s >= self.h0.shape[2])

    def spans(self, lead: int, span: int) -> int:
        """How many spans the kernels number: one of ``lead`` steps, then of ``span``, each within one sequence."""
        rows, length = len(self.h0), self.u.shape[1]
        return rows * (1 + -(-max(0, length - lead) // span)) if self.packing is None else length // span + rows


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
    return next(p for p in plans if p.warps == 4 or fitting(p, forward_shared(p, x) + lines(p, x)[1]))


def forward_shared(plan: Plan, x: Inputs) -> int:
    """Bytes of shared memory of a warp."""
    floats = 2 * (6 * plan.steps * plan.line + 32 + 8 * plan.steps * x.lane_states)
    lanes = 32 if plan.warps > 1 else 2  # whose states are handed on; two keep the alignment
    return 4 * (floats + lanes * plan.channels * x.lane_states) + 4 * 32 * 4 * x.u.element_size()


def lines(plan: Plan, x: Inputs) -> tuple[int, int]:
    """Of tensors with time innermost: steps that pass through shared memory at once, and bytes of them for a warp.

    A warp that takes turns at time has no use for more than it takes. The output lies as u.
    """
    steps = plan.steps if plan.warps > 1 else max(16, plan.steps)
    maps = [(4 * x.lane_states, x.map_dtype.itemsize) for m in (x.B, x.C) if time_last(m)]
    rows = [(plan.line, m.element_size()) for m in (x.u, x.u, x.delta, x.z) if m is not None and time_last(m)]
    return steps, sum(2 * many * 16 * (steps * item // 16 | 1) for many, item in rows + maps)


def fitting(plan: Plan, of_warp: int) -> int:
    """How many blocks a multiprocessor holds, each of them with so many bytes for each warp and 1 KiB of its own."""
    return (compiler.limits().shared + 1024) // (plan.teams * plan.warps * of_warp + 1024)


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
    even = x.packing is not None or 2 * blocks < places
    return plan, *cut(TILE * -(-length // TILE), blocks, places, even)


def backward_shared(plan: Plan, x: Inputs) -> int:
    """Bytes of shared memory of a block."""
    tile, states = plan.steps * plan.line, x.lane_states
    of_warp = 4 * (18 * tile + 96 + TILE // plan.steps * 32 * plan.channels * states + 2 * plan.line + 256)
    of_warp += 2 * 32 * 4 * (3 * x.u.element_size() + x.delta.element_size()) + backward_lines(plan, x)
    return plan.warps * of_warp + 4 * (8 * TILE * states + 16 * plan.warps * plan.steps * states)


def backward_lines(plan: Plan, x: Inputs) -> int:
    """Bytes for a warp of the steps of tensors with time innermost: of u, its gradient and that of y, delta and z."""
    lined = ((3, x.u), (2, x.delta), (2, x.z))
    many = sum(many for many, m in lined if m is not None and time_last(m) and m.element_size() == 2)
    return many * plan.line * 16 * (plan.steps // 8 | 1)


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
        others = -(-(whole - lead) // span)
        first, other = lead + 8, span + 8  # a block begins and ends in the time of a few steps
        if others == 0:
            return waves(blocks) * first
        beside = -blocks % places * (first // other)
        behind = waves(max(0, blocks * others - beside))
        joining = 0.32 * (whole - lead) * blocks / places
        uneven = 0.1 * span  # some blocks run faster than others, and wait for them at last
        return -(-blocks // places) * first + behind * other + joining + uneven

    spans = [TILE << k for k in range(32) if whole <= 128 * TILE << k <= 128 * whole]
    cuts = ((whole - n * span, span) for span in spans for n in range(whole // span))
    return min(((span, span) for span in spans) if even else cuts, key=lambda both: time(*both))


def _run(keep: bool, a: SelectiveScan) -> list[Tensor]:
    x = Inputs.of(a)
    y, final = empty_like(x.u), x.h0.clone(memory_format=torch.contiguous_format)
    saved = _saved(a) if keep else []
    if x.empty:
        return [y.zero_(), final, *saved]
    rows, width = len(x.h0), x.u.shape[2]
    plan = plan_forward(x)
    given, macros = _inputs(x)
    of_warp, (steps, of_lines) = forward_shared(plan, x), lines(plan, x)
    plan = plan._replace(blocks=max(1, min(plan.blocks, fitting(plan, of_warp + of_lines))))
    macros |= {"LINE": steps, "LINE_BYTES": of_lines, "SHARED_BYTES": of_warp}
    compiler.launch(
        "selective_scan_forward.cu",
        "selective_scan_forward",
        macros | plan.macros | {"SAVE": keep},
        rows * -(-width // (plan.teams * plan.line)),
        32 * plan.teams * plan.warps,
        plan.teams * plan.warps * (of_warp + of_lines),
        SCAN.pack(**given, y=_whole(y), final=final, saved=saved[0] if keep else None, lead=TILE, span=TILE),
    )
    return [y, final, *saved]


_forward, _infer = partial(_run, True), partial(_run, False)


def _saved(a: SelectiveScan) -> list[Tensor]:
    x = Inputs(*a)
    return [x.h0.new_empty(x.spans(TILE, TILE), *x.h0.shape[1:])]


def _backward(grads: list[Tensor], kept: list[Tensor], a: SelectiveScan) -> dict[str, Tensor]:
    x = Inputs.of(a)
    dh0 = grads[1].clone()
    if x.empty:
        return {**{f: torch.zeros_like(m) for f, m in a._asdict().items() if isinstance(m, Tensor)}, "h0": dh0}
    (batch, length, width), (rows, _, states), new = x.u.shape, x.h0.shape, x.h0.new_empty
    plan, lead, span = plan_backward(x)
    dy, last = in_place(lay(grads[0].to(x.u.dtype), time_last(x.u)))
    dfinal = grads[1].contiguous()
    given, macros = _inputs(x, (dy, last))
    padded, spans, blocks = 4 * macros["STATES"], x.spans(lead, span), -(-width // (plan.line * plan.warps))
    constant = {name: m.dim() == 2 for name, m in (("B", x.B), ("C", x.C))}
    found = {"u": empty_like(x.u), "delta": empty_like(x.delta), "h0": dh0}
    dz = None if x.z is None else empty_like(x.u, time_last(x.z))
    partial = {
        "carry": new(spans, width, states),
        "seconds": new(spans, width),
        "dmaps": new(2 - sum(constant.values()), blocks, batch, length, padded),
        "da": new(spans, width, states),
        "dd": new(spans, width),
        "dbias": new(spans, width),
        "db": new(spans, width, states) if constant["B"] else None,
        "dc": new(spans, width, states) if constant["C"] else None,
    }
    maps = {n: None if constant[n] else empty_like(m.to(x.map_dtype)) for n, m in (("B", x.B), ("C", x.C))}
    sums = {"A": new(width, states), "D": new(width), "delta_bias": new(width)}
    constants = {n: new(width, states) if constant[n] else None for n in constant}
    structure = SCAN.pack(
        **given, **partial, saved=kept[0], lead=lead, span=span, dy=dy, dfinal=dfinal, du=_whole(found["u"]),
        ddelta=_whole(found["delta"]), dz=None if dz is None else _whole(dz), dh0=dh0, spans=spans,
        sums_of_maps=[None if m is None else _whole(m) for m in maps.values()],
        sums=[*sums.values(), *constants.values()],
    )  # fmt: skip

    macros |= plan.macros | {"LINE": plan.steps, "LINE_BYTES": backward_lines(plan, x)}

    def launch(kernel: str, grid: int, threads: int, shared: int) -> None:
        compiler.launch("selective_scan_backward.cu", kernel, macros, grid, threads, shared, structure)

    if x.packing is not None or lead < length:
        of_warp = 4 * (2 * plan.steps * plan.line + plan.steps * padded + 2 * plan.line) + backward_lines(plan, x)
        launch("selective_scan_carry", spans * blocks, 32 * plan.warps, plan.warps * of_warp)
        launch("selective_scan_join", rows * -(-width * states // 256), 256, 0)
    launch("selective_scan_backward", spans * blocks, 32 * plan.warps, backward_shared(plan, x))
    fours = batch * length * macros["STATES"]
    sizes = [
        *(g * fours for g, is_constant in zip(x.groups, constant.values(), strict=True) if not is_constant),
        *(m.numel() for m in (*sums.values(), *constants.values()) if m is not None),
    ]
    launch("selective_scan_sums", sum(-(-size // 256) for size in sizes), 256, 0)
    found |= sums | {n: m for n, m in (*maps.items(), *constants.items()) if m is not None}
    return found if dz is None else {**found, "z": dz}


def _whole(m: Tensor) -> Tensor:
    """New memory ``(B, T, ...)`` as it lies, a contiguous tensor."""
    return by_time(m) if time_last(m) else m


def _inputs(x: Inputs, *more: tuple[Tensor, bool]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of ``Scan`` that forward and backward read, and their macros.

    ``more`` are tensors like u that the kernels read, too, and whether time is innermost.
    """
    laid = {"U": in_place(x.u), "DELTA": in_place(x.delta), "Z": (None, False) if x.z is None else in_place(x.z)}
    maps = {name: _map(m, x.map_dtype) for name, m in (("B", x.B), ("C", x.C))}
    (u, _), (delta, _), (z, _), (B, _), (C, _) = *laid.values(), *maps.values()
    over_time = [m for m in maps.values() if m[0].dim() > 2]
    A, D, bias = (None if m is None else m.float().contiguous() for m in (x.A, x.D, x.delta_bias))
    rows, width, states = x.h0.shape
    given = {
        "rows": rows,
        "length": x.u.shape[1],
        "width": width,
        "states": states,
        "groups_b": x.groups[0],
        "groups_c": x.groups[1],
        "borders": borders(x.packing),
        "u": u,
        "delta": delta,
        "z": z,
        "b": B,
        "c": C,
        "a": A,
        "d": D,
        "bias": bias,
        "h0": x.h0.contiguous(),
    }
    macros = {
        "STATES": x.lane_states,
        "FULL": 4 * x.lane_states == states,
        "INPUT": TYPES[u.dtype],
        "DELTA": TYPES[delta.dtype],
        "MAP": TYPES[x.map_dtype],
        "B_CONSTANT": x.B.dim() == 2,
        "C_CONSTANT": x.C.dim() == 2,
        "INPUT_ALIGNED": x.in_fours(width, *laid.values(), *more),
        "MAP_ALIGNED": x.in_fours(states, *over_time),
        "TOGETHER": x.together(*laid.values(), *over_time, *more),
        "GATED": z is not None,
        "SOFTPLUS": x.delta_softplus,
    }
    return given, macros | {f"{name}_LAST": last for name, (_, last) in (laid | maps).items()}


def _map(m: Tensor, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """B or C as kernels read it, and whether time is innermost; a constant one as floats."""
    return (m.float().contiguous(), False) if m.dim() == 2 else in_place(m.to(dtype), 2)


def _refuses(a: SelectiveScan) -> str | None:
    x = Inputs(*a)
    if x.h0.dtype != torch.float32:
        return f"the state is {x.h0.dtype}, not float32"
    if not 0 < x.h0.shape[2] <= 4 * _LANE_STATES[-1]:
        return f"{x.h0.shape[2]} states, expected 1 to {4 * _LANE_STATES[-1]}"
    if x.per_group < x.u.shape[2] and x.per_group % 8:
        return f"groups of {x.per_group} channels, not a multiple of 8"
    return None


selective_scan_op.add(
    Backend(
        "cuda",
        _forward,
        _backward,
        infer=_infer,
        saved=_saved,
        devices=("cuda",),
        refuses=_refuses,
        missing=compiler.missing,
    )
)
