"""The diagonal state space model on an NVIDIA GPU: its recurrence, in registers, without a Fourier transform."""

from typing import NamedTuple

import torch
from torch import Tensor

from dualform.ops.cuda import compiler
from dualform.ops.cuda.structs import SYSTEM
from dualform.ops.cuda.tensors import TYPES, aligned, borders, readable
from dualform.ops.diagonal_ssm import DiagonalSSM, diagonal_ssm_op
from dualform.ops.op import Backend

_MOST_MODES = 64
_LEAST_SPAN = 64  # a multiple of the steps of a tile


class Plan(NamedTuple):
    """How a call is cut.

    Args:
        lanes: that share a channel, 4 or 8.
        modes: of a lane.
        warps: of a block, side by side in channels.
        blocks: that a multiprocessor should hold.
        span: steps of a block.
    """

    lanes: int
    modes: int
    warps: int
    blocks: int
    span: int


def plan_forward(modes: int, batch: int, length: int, width: int) -> Plan:
    """Many modes of a lane, as every lane reads each input and writes each output."""
    lanes, of_lane = (8, 8) if modes > 32 else (4, _at_least(modes, 4))
    return Plan(lanes, of_lane, 4, 4, _span(batch, length, width, lanes))


def plan_backward(modes: int, batch: int, length: int, width: int) -> Plan:
    """Fewer modes of a lane, as it keeps three times the numbers of each."""
    lanes, of_lane = (8, _at_least(modes, 8)) if modes > 16 else (4, _at_least(modes, 4))
    return Plan(lanes, of_lane, 4, 2 if of_lane == 8 else 4, _span(batch, length, width, lanes))


def _at_least(modes: int, lanes: int) -> int:
    return next(m for m in (1, 2, 4, 8) if m * lanes >= modes)


def _span(batch: int, length: int, width: int, lanes: int) -> int:
    """All of the time where sequences and channels alone occupy the chip, as spans are run twice but for one."""
    warps = batch * -(-width * lanes // 32)
    if warps >= 1024:
        return length
    return max(-(-length * warps // 2048 // _LEAST_SPAN), 1) * _LEAST_SPAN


class _Call:
    """What the kernels of one direction are given; ``like_u`` are tensors that they read as they read u."""

    def __init__(self, file: str, a: DiagonalSSM, plan: Plan, *like_u: Tensor):
        u, (rows, width, modes), length = readable(a.u), a.h0.shape, a.u.shape[1]
        spans = rows * -(-length // plan.span) if a.packing is None else length // plan.span + rows
        self.file, self.plan = file, plan
        self.rows, self.blocks = rows, -(-width * plan.lanes // (32 * plan.warps))  # of channels
        self.shape, self.cut = (spans, width, modes), plan.span < length
        self.given = {
            "rows": rows,
            "length": length,
            "width": width,
            "modes": modes,
            "span": plan.span,
            "borders": borders(a.packing),
            "u": u,
            **{name: m.resolve_conj().contiguous() for name, m in (("a", a.Abar), ("c", a.CB), ("h0", a.h0))},
        }
        self.macros = {
            "LANES": plan.lanes,
            "MODES": plan.modes,
            "WARPS": plan.warps,
            "BLOCKS": plan.blocks,
            "INPUT": TYPES[u.dtype],
            "INPUT_ALIGNED": aligned(width, u, *like_u),
        }

    def over_spans(self, kernel: str, tiles: int, sums: int, structure: bytes, **macros: bool) -> None:
        """Run every span. ``tiles`` and ``sums`` are what a warp keeps in shared memory."""
        lanes, threads = self.plan.lanes, 32 * self.plan.warps
        tile = 32 // lanes * (4 * lanes + 4)
        floats = tiles * tile + sums * lanes * (tile + (20 if lanes == 8 else 8))
        grid, shared = self.shape[0] * self.blocks, 4 * floats * self.plan.warps
        compiler.launch(self.file, kernel, self.macros | macros, grid, threads, shared, structure)

    def over_sequences(self, kernel: str, structure: bytes, **macros: bool) -> None:
        """Join the spans of every sequence."""
        grid = self.rows * -(-self.shape[1] * self.shape[2] // 256)
        compiler.launch(self.file, kernel, self.macros | macros, grid, 256, 0, structure)


def _forward(a: DiagonalSSM) -> list[Tensor]:
    y, final = a.u.new_empty(a.u.shape), a.h0.clone(memory_format=torch.contiguous_format)
    if a.u.numel() == 0 or a.h0.numel() == 0:
        return [y.zero_(), final]
    call = _Call("diagonal_ssm_forward.cu", a, plan_forward(a.h0.shape[2], *a.u.shape))
    carry = a.h0.new_empty(call.shape) if call.cut else None
    structure = SYSTEM.pack(**call.given, carry=carry, y=y, final=final)
    if call.cut:
        call.over_spans("diagonal_ssm_carry", 1, 0, structure)
        call.over_sequences("diagonal_ssm_join", structure)
    call.over_spans("diagonal_ssm_forward", 1, 1, structure)
    return [y, final]


def _backward(grads: list[Tensor], kept: list[Tensor], a: DiagonalSSM) -> dict[str, Tensor]:
    du, dfinal = a.u.new_empty(a.u.shape), grads[1].resolve_conj().contiguous()
    dh0 = dfinal.clone()
    if a.u.numel() == 0 or a.h0.numel() == 0:
        return {"u": du.zero_(), "Abar": torch.zeros_like(a.Abar), "CB": torch.zeros_like(a.CB), "h0": dh0}
    dy = readable(grads[0].to(a.u.dtype))
    call = _Call("diagonal_ssm_backward.cu", a, plan_backward(a.h0.shape[2], *a.u.shape), dy)
    carry, carry_q = a.h0.new_empty(2, *call.shape) if call.cut else (None, None)
    da, dc = a.h0.new_empty(2, *call.shape)
    structure = SYSTEM.pack(
        **call.given, carry=carry, dy=dy, dfinal=dfinal, carry_q=carry_q, du=du, da=da, dc=dc, dh0=dh0
    )
    if call.cut:
        call.over_spans("diagonal_ssm_backward_carry", 1, 0, structure, WITH_FINAL=False)
        call.over_sequences("diagonal_ssm_backward_join", structure, WITH_FINAL=False)
    for with_final in (False, True):  # each leaves to the other what is not its own
        call.over_spans("diagonal_ssm_backward", 2, 1, structure, WITH_FINAL=with_final)
    return {"u": du, "Abar": da.sum(0), "CB": dc.sum(0), "h0": dh0}


def _refuses(a: DiagonalSSM) -> str | None:
    if a.h0.dtype != torch.complex64:
        return f"the state is {a.h0.dtype}, not complex64"
    if a.u.dtype not in TYPES:
        return f"u is {a.u.dtype}, not float32, bfloat16 or float16"
    if a.h0.shape[2] > _MOST_MODES:
        return f"{a.h0.shape[2]} modes, more than {_MOST_MODES}"
    return None


diagonal_ssm_op.add(Backend("cuda", _forward, _backward, devices=("cuda",), refuses=_refuses, missing=compiler.missing))
