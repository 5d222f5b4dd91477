"""The selective scan on an NVIDIA GPU."""

from typing import NamedTuple

import torch
from torch import Tensor

from dualform.ops.cuda import compiler
from dualform.ops.cuda.tensors import NO_VIEW, TYPES, aligned, alive, pointer, readable, view
from dualform.ops.op import Backend
from dualform.ops.selective_scan import selective_scan_op

TILE = 64  # steps between the states that the backward starts from, as in selective_scan.cuh
_MOST_STATES = 32


class Plan(NamedTuple):
    """How a call is cut: channels of a lane, warps of a block (forward: those that share one row's time, then the teams
    of them in a block), and blocks that share a multiprocessor."""

    channels: int
    warps: int
    blocks: int
    teams: int = 1


def plan_forward(rows: int, length: int, width: int, per_group: int) -> Plan:
    """Several warps share the time of one row where rows and channels alone do not fill the chip."""
    channels = 2 if rows * width >= 2**16 and per_group % 16 == 0 else 1
    if per_group % 16 == 0 and rows * width < 2**13:
        channels = 2
    blocks = rows * -(-width // (8 * channels))
    warps = 1
    while warps < 8 and blocks * warps < 2048 and 2 * warps * 16 // channels <= max(length, 32):
        warps *= 2
    return Plan(channels, warps, 16 // warps)


def plan_backward(rows: int, length: int, width: int, per_group: int) -> tuple[Plan, int, int]:
    """The plan, the steps whose decays are held in registers, and the steps of a span."""
    warps = next(w for w in (4, 2, 1) if per_group % (8 * w) == 0 or w == 1)
    span = TILE
    while span < 1024 and span < length and rows * -(-length // (2 * span)) * -(-width // (8 * warps)) >= 1024:
        span *= 2
    return Plan(1, warps, 12 // warps), 4, span


def _run(keep: bool, *args: Tensor) -> list[Tensor]:
    u, delta, A, B, C, D, z, bias, softplus, h0, cu_seqlens = args
    y, final = u.new_empty(u.shape), h0.clone(memory_format=torch.contiguous_format)
    saved = _saved(*args) if keep else []
    if u.numel() == 0 or h0.numel() == 0:
        return [y.zero_(), final, *saved]
    rows = len(h0)
    plan = plan_forward(rows, u.shape[1], u.shape[2], u.shape[2] // max(B.shape[2], C.shape[2]))
    given, fields, defines = _fields(*args)
    states = defines["STATES"]
    line, steps = 8 * plan.channels, 16 // plan.channels
    defines |= {"CHANNELS": plan.channels, "WARPS": plan.warps, "TEAMS": plan.teams, "BLOCKS": plan.blocks}
    defines["SAVE"] = keep
    buffers = 2 * (6 * steps * line + 32 + 2 * steps * 4 * states)
    of_warp = 4 * (buffers + 2 * line + 32 * plan.channels * states) + 4 * 32 * 4 * u.element_size()
    shared = plan.teams * plan.warps * of_warp
    compiler.launch(
        "selective_scan_forward.cu",
        "selective_scan_forward",
        defines,
        rows * -(-u.shape[2] // (plan.teams * line)),
        32 * plan.teams * plan.warps,
        shared,
        (*fields, pointer(y), pointer(final), pointer(saved[0]) if keep else 0, TILE, *[0] * 15),
    )
    alive(given)
    return [y, final, *saved]


def _forward(*args: Tensor) -> list[Tensor]:
    return _run(True, *args)


def _infer(*args: Tensor) -> list[Tensor]:
    return _run(False, *args)


def _slots(length: int, rows: int, packed: bool, size: int) -> int:
    """Pieces of ``size`` steps, as the kernels number them."""
    return length // size + rows if packed else rows * -(-length // size)


def _saved(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
    h0: Tensor,
    cu_seqlens: Tensor | None,
) -> list[Tensor]:
    return [h0.new_empty(_slots(u.shape[1], len(h0), cu_seqlens is not None, TILE), *h0.shape[1:])]


def _backward(
    grads: list[Tensor],
    kept: list[Tensor],
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
    h0: Tensor,
    cu_seqlens: Tensor | None,
) -> list[Tensor]:
    (batch, length, width), rows, states = u.shape, len(h0), h0.shape[2]
    tensors = [x for x in (u, delta, A, B, C, D, z, bias) if x is not None]
    dh0 = grads[1].clone()
    if u.numel() == 0 or h0.numel() == 0:
        return [*(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in tensors), dh0]
    du, ddelta = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (u, delta))
    dz = None if z is None else torch.empty_like(u, memory_format=torch.contiguous_format)
    plan, held, span = plan_backward(rows, length, width, width // max(B.shape[2], C.shape[2]))
    line, steps, packed = 8 * plan.channels, 16 // plan.channels, cu_seqlens is not None
    blocks, spans = -(-width // (line * plan.warps)), _slots(length, rows, packed, span)
    dy = grads[0] if grads[0].dtype == u.dtype else grads[0].to(u.dtype)
    given, fields, defines = _fields(u, delta, A, B, C, D, z, bias, softplus, h0, cu_seqlens, dy)
    groups_b, groups_c, padded = B.shape[2], C.shape[2], 4 * defines["STATES"]
    carry, seconds = h0.new_empty(spans, width, states), h0.new_empty(spans, width)
    dmaps = h0.new_empty(2, blocks, batch, length, padded)
    da, dd, dbias = h0.new_empty(spans, width, states), h0.new_empty(spans, width), h0.new_empty(spans, width)
    fields = (
        *fields,
        *(0, 0, pointer(kept[0]), span),
        *view(dy),
        *(pointer(x) for x in (grads[1], carry, seconds, du, ddelta, dz, dmaps, da, dd, dbias, dh0)),
    )
    defines |= {"CHANNELS": plan.channels, "WARPS": plan.warps, "BLOCKS": plan.blocks, "HELD": held}

    def launch(kernel: str, grid: int, threads: int, shared: int) -> None:
        compiler.launch("selective_scan_backward.cu", kernel, defines, grid, threads, shared, fields)

    if packed or span < length:
        launch("selective_scan_carry", spans * blocks, 32 * plan.warps, plan.warps * 4 * (steps * (2 * line + padded) + 2 * line))
        launch("selective_scan_join", rows * -(-width * states // 256), 256, 0)
    of_warp = 3 * steps * line + 3 * 4 * (steps * line + 8) + (TILE // steps) * 32 * plan.channels * defines["STATES"] + 2 * line + 256
    shared = 4 * (plan.warps * of_warp + 2 * TILE * padded + 4 * plan.warps * steps * padded)
    shared += plan.warps * 32 * 4 * (3 * u.element_size() + delta.element_size())
    launch("selective_scan_backward", spans * blocks, 32 * plan.warps, shared)
    alive((given, kept, carry, seconds))
    maps = [
        m.unflatten(0, (groups, -1)).sum(1).permute(1, 2, 0, 3)[..., :states].to(of.dtype).contiguous()
        for m, groups, of in ((dmaps[0], groups_b, B), (dmaps[1], groups_c, C))
    ]
    found = [du, ddelta, da.sum(0).to(A.dtype), *maps]
    found += [] if D is None else [dd.sum(0).to(D.dtype)]
    found += [] if z is None or dz is None else [dz.to(z.dtype)]
    found += [] if bias is None else [dbias.sum(0).to(bias.dtype)]
    return [*found, dh0]


def _fields(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
    h0: Tensor,
    cu_seqlens: Tensor | None,
    *more: Tensor,
) -> tuple[tuple[Tensor | None, ...], tuple[int, ...], dict]:
    """What the kernels are given, to be kept alive; the first fields of ``Scan``; the macros of both sources."""
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
    B, C = B.to(torch.promote_types(B.dtype, C.dtype)), C.to(torch.promote_types(B.dtype, C.dtype))
    z = None if z is None else readable(z.to(u.dtype))
    u, delta, B, C = readable(u), readable(delta), readable(B, 2), readable(C, 2)
    A, D, bias = (x if x is None else x.float().contiguous() for x in (A, D, bias))
    h0, states = h0.contiguous(), next(s for s in (2, 4, 8) if 4 * s >= h0.shape[2])
    fields = (
        *(len(h0), u.shape[1], *h0.shape[1:], B.shape[2], C.shape[2], pointer(cu_seqlens)),
        *(*view(u), *view(delta), *(NO_VIEW if z is None else view(z)), *view(B), *view(C)),
        *(pointer(x) for x in (A, D, bias, h0)),
    )
    defines = {
        "STATES": states,
        "FULL": 4 * states == h0.shape[2],
        "INPUT": TYPES[u.dtype],
        "DELTA": TYPES[delta.dtype],
        "MAP": TYPES[B.dtype],
        "INPUT_ALIGNED": aligned(u.shape[2], u, delta, z, *more),
        "MAP_ALIGNED": aligned(h0.shape[2], B, C),
        "GATED": z is not None,
        "SOFTPLUS": softplus,
    }
    return (u, delta, A, B, C, D, z, bias, h0, cu_seqlens), fields, defines


def _refuses(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
    h0: Tensor,
    cu_seqlens: Tensor | None,
) -> str | None:
    if h0.dtype != torch.float32:
        return f"the state is {h0.dtype}, not float32"
    if h0.shape[2] > _MOST_STATES:
        return f"{h0.shape[2]} states, more than {_MOST_STATES}"
    groups = max(B.shape[2], C.shape[2])
    if groups > 1 and (u.shape[2] // groups) % 8:
        return f"groups of {u.shape[2] // groups} channels, not a multiple of 8"
    return compiler.missing() or None


selective_scan_op.add(Backend("cuda", _forward, _backward, _infer, _saved, devices=("cuda",), refuses=_refuses))
