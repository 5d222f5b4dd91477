"""The short causal convolution on an NVIDIA GPU."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualform.ops.causal_conv1d import CausalConv1d, causal_conv1d_op
from dualform.ops.cuda import compiler
from dualform.ops.cuda.structs import CONV
from dualform.ops.cuda.tensors import TYPES, aligned, borders, readable
from dualform.ops.layout import lay, time_last
from dualform.ops.op import Backend

_MOST_TAPS = 8


class Plan(NamedTuple):
    """How a call is cut.

    Args:
        channels: of a thread; 8 of them are of 16 bits and lie so that they are read at once, else it takes 4.
        steps: that are on their way from memory.
        warps: of a block, side by side in time.
        span: steps of a warp.
        blocks: that a multiprocessor should hold.
    """

    channels: int
    steps: int
    warps: int
    span: int
    blocks: int = 1


def plan_forward(rows: int, length: int, width: int, taps: int) -> Plan:
    """As much on its way as registers hold."""
    return Plan(8 if taps <= 4 else 4, 8, 4, _span(rows, length, width, 8), 4)


def plan_backward(rows: int, length: int, width: int, taps: int) -> Plan:
    """Fewer channels, as a thread keeps four times the numbers of each."""
    return Plan(4, 8, 4, _span(rows, length, width, 4), 4 if taps <= 4 else 2)


def _span(rows: int, length: int, width: int, channels: int) -> int:
    """Long, as the steps around a span are read twice, but with enough warps to go round."""
    span = 1024
    while span > 16 and rows * -(-length // span) * -(-width // (32 * channels)) < (4096 if span > 64 else 1024):
        span //= 2
    return span


def _forward(a: CausalConv1d) -> list[Tensor]:
    y, final = a.x.new_empty(a.x.shape), torch.empty_like(a.h0, memory_format=torch.contiguous_format)
    if a.x.numel() == 0:
        return [lay(y, time_last(a.x)), final.copy_(a.h0)]
    plan = plan_forward(len(a.h0), a.x.shape[1], *a.weight.shape)
    given, macros, blocks, lines = _inputs(a, plan)
    compiler.launch(
        "causal_conv1d_forward.cu",
        "causal_conv1d_forward",
        macros,
        lines * blocks,
        32 * plan.warps,
        0,
        CONV.pack(**given, y=y, final=final),
    )
    return [lay(y, time_last(a.x)), final]


def _backward(grads: list[Tensor], kept: list[Tensor], a: CausalConv1d) -> dict[str, Tensor]:
    dfinal = grads[1].contiguous()
    if a.x.numel() == 0:
        zeros = {f: torch.zeros_like(m) for f, m in a._asdict().items() if isinstance(m, Tensor)}
        return {**zeros, "h0": dfinal.clone()}
    plan = plan_backward(len(a.h0), a.x.shape[1], *a.weight.shape)
    dy = readable(grads[0].to(a.x.dtype))
    given, macros, blocks, lines = _inputs(a, plan, dy)
    bias = given["bias"]
    dx, dweight, dh0 = a.x.new_empty(a.x.shape), torch.empty_like(given["weight"]), torch.empty_like(dfinal)
    found = {"x": dx, "weight": dweight, "h0": dh0, **({} if bias is None else {"bias": torch.empty_like(bias)})}
    width, taps = dweight.shape
    rows = taps + (bias is not None)
    sums = dfinal.new_empty(blocks, rows, width)
    structure = CONV.pack(
        **given, dy=dy, dfinal=dfinal, dx=dx, dstate=dh0, blocks=blocks, sums=sums, dweight=dweight,
        dbias=found.get("bias"),
    )  # fmt: skip
    shared = 32 * plan.warps * macros["CHANNELS"] * max(4 * rows, 2 * plan.steps * a.x.element_size())
    file = "causal_conv1d_backward.cu"
    compiler.launch(file, "causal_conv1d_backward", macros, lines * blocks, 32 * plan.warps, shared, structure)
    compiler.launch(file, "causal_conv1d_sums", macros, rows * -(-width // 32), 256, 4 * 256, structure)
    return found


def _inputs(a: CausalConv1d, plan: Plan, *more: Tensor) -> tuple[dict[str, Any], dict[str, Any], int, int]:
    """The fields of ``Conv`` that forward and backward read, and their macros; blocks over time, and over channels.

    ``more`` are tensors like x that the kernels read, too.
    """
    x, weight = readable(a.x), readable(a.weight, 2)
    bias = None if a.bias is None else readable(a.bias)
    (rows, width, _), length = a.h0.shape, x.shape[1]
    at_once = all(m is None or m.data_ptr() % 16 == 0 for m in (weight, bias))
    eight = plan.channels == 8 and at_once and x.element_size() == 2 and aligned(width, x, *more, many=8)
    channels = 8 if eight else 4
    macros = {
        "TAPS": weight.shape[1],
        "CHANNELS": channels,
        "STEPS": plan.steps,
        "WARPS": plan.warps,
        "BLOCKS": plan.blocks,
        "INPUT": TYPES[x.dtype],
        "WEIGHT": TYPES[weight.dtype],
        "BIAS": TYPES[weight.dtype if bias is None else bias.dtype],
        "BIASED": bias is not None,
        "SILU": a.silu,
        "ALIGNED": at_once and aligned(width, x, *more),
    }
    given = {
        "rows": rows,
        "length": length,
        "width": width,
        "span": plan.span,
        "borders": borders(a.packing),
        "x": x,
        "weight": weight,
        "bias": bias,
        "state": a.h0.contiguous(),
    }
    spans = rows * -(-length // plan.span) if a.packing is None else length // plan.span + rows
    return given, macros, -(-spans // plan.warps), -(-width // (32 * channels))


def _refuses(a: CausalConv1d) -> str | None:
    if a.h0.dtype != torch.float32:
        return f"the state is {a.h0.dtype}, not float32"
    if a.x.dtype not in TYPES:
        return f"x is {a.x.dtype}, not one of {', '.join(str(dtype) for dtype in TYPES)}"
    if a.weight.shape[1] > _MOST_TAPS:
        return f"a width of {a.weight.shape[1]}, more than {_MOST_TAPS}"
    return None


causal_conv1d_op.add(
    Backend("cuda", _forward, _backward, devices=("cuda",), refuses=_refuses, missing=compiler.missing)
)
