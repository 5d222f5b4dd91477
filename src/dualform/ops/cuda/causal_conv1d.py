"""The short causal convolution on an NVIDIA GPU."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualform.ops.causal_conv1d import CausalConv1d, causal_conv1d_op
from dualform.ops.cuda import compiler
from dualform.ops.cuda.structs import CONV
from dualform.ops.cuda.tensors import TYPES, aligned, borders, readable
from dualform.ops.layout import empty_like, lay, time_last
from dualform.ops.op import Backend

_MOST_TAPS = 8


class Plan(NamedTuple):
    """How a call is cut.

    Args:
        channels: of a thread; 8 of them are of 16 bits and lie so that they are read at once, else it takes 4.
        steps: that are on their way from memory; rounds of a warp's lanes where time is last.
        warps: of a block, side by side in time.
        span: steps of a warp.
        blocks: that a multiprocessor should hold.
    """

    channels: int
    steps: int
    warps: int
    span: int
    blocks: int = 1


def plan_forward(rows: int, length: int, width: int, taps: int, ids: bool = False) -> Plan:
    """As much on its way as registers hold; ids need some, too."""
    return Plan(8 if taps <= 4 and not ids else 4, 8, 4, _span(rows, length, width, 8), 4)


def plan_backward(rows: int, length: int, width: int, taps: int, ids: bool = False) -> Plan:
    """Fewer channels, as a thread keeps four times the numbers of each."""
    return Plan(4, 8, 4, _span(rows, length, width, 4), 2 if taps > 4 else 3 if ids else 4)


def _span(rows: int, length: int, width: int, channels: int) -> int:
    """Long, as the steps around a span are read twice, but with enough warps to go round."""
    span = 1024
    while span > 16 and rows * -(-length // span) * -(-width // (32 * channels)) < (4096 if span > 64 else 1024):
        span //= 2
    return span


def plan_time_last(rows: int, length: int, width: int, each: int) -> Plan:
    """A warp a channel, for as many rounds of its lanes as leave enough warps to go round."""
    span = 32 * each
    while span < length and rows * -(-length // (2 * span)) * width >= 8192:
        span *= 2
    return Plan(each, 2, 2, span, 12)


class _Call(NamedTuple):
    """What forward and backward have in common.

    Args:
        given: fields of ``Conv``.
        macros: of the sources.
        spans: parts of time that sums are made of.
        grid: blocks.
        threads: of a block.
    """

    given: dict[str, Any]
    macros: dict[str, Any]
    spans: int
    grid: int
    threads: int


def _is_last(a: CausalConv1d) -> bool:
    """Whether time is innermost for the kernels, too; they take packed sequences with channels innermost."""
    return a.packing is None and time_last(a.x)


def _forward(a: CausalConv1d) -> list[Tensor]:
    final = torch.empty_like(a.h0, memory_format=torch.contiguous_format)
    if a.x.numel() == 0:
        return [empty_like(a.x), final.copy_(a.h0)]
    last = _is_last(a)
    call, y = _time_last(a) if last else _time_second(a, plan_forward), empty_like(a.x, last)
    file, kernel = ("time_last", "time_last_forward") if last else ("forward", "forward")
    compiler.launch(
        f"causal_conv1d_{file}.cu", f"causal_conv1d_{kernel}", call.macros, call.grid, call.threads, 0,
        CONV.pack(**call.given, y=y.mT if last else y, final=final),
    )  # fmt: skip
    return [lay(y, time_last(a.x)), final]


def _backward(grads: list[Tensor], kept: list[Tensor], a: CausalConv1d) -> dict[str, Tensor]:
    dfinal = grads[1].contiguous()
    if a.x.numel() == 0:
        zeros = {f: torch.zeros_like(m) for f, m in a._asdict().items() if isinstance(m, Tensor)}
        return {**zeros, "h0": dfinal.clone()}
    last = _is_last(a)
    dy = lay(grads[0].to(a.x.dtype), True).mT if last else readable(grads[0].to(a.x.dtype))
    call = _time_last(a, dy) if last else _time_second(a, plan_backward, dy)
    given, macros, dx = call.given, call.macros, empty_like(a.x, last)
    dweight, dh0, bias = torch.empty_like(given["weight"]), torch.empty_like(dfinal), given["bias"]
    found = {"x": dx, "weight": dweight, "h0": dh0, **({} if bias is None else {"bias": torch.empty_like(bias)})}
    width, taps = dweight.shape
    rows = taps + (bias is not None)
    sums = dfinal.new_empty(call.spans, rows, width)
    structure = CONV.pack(
        **given, dy=dy, dfinal=dfinal, dx=dx.mT if last else dx, dstate=dh0, blocks=call.spans, sums=sums,
        dweight=dweight, dbias=found.get("bias"),
    )  # fmt: skip
    rings = call.threads * macros["EACH"] * max(4 * rows, 2 * macros["STEPS"] * a.x.element_size())
    file, kernel = ("time_last", "time_last_backward") if last else ("backward", "backward")
    for name, grid, threads, shared in (
        (f"causal_conv1d_{kernel}", call.grid, call.threads, rings),
        ("causal_conv1d_sums", rows * -(-width // 32), 256, 4 * 256),
    ):
        compiler.launch(f"causal_conv1d_{file}.cu", name, macros, grid, threads, shared, structure)
    return found


def _time_second(a: CausalConv1d, planned: Callable[..., Plan], *more: Tensor) -> _Call:
    """Of kernels whose threads walk through time with some channels; ``more`` are tensors like x that they read."""
    x, plan = readable(a.x), planned(len(a.h0), a.x.shape[1], *a.weight.shape, a.ids is not None)
    given, macros = _inputs(a, x, plan)
    width, length, rows = a.weight.shape[0], x.shape[1], len(a.h0)
    at_once = all(m is None or m.data_ptr() % 16 == 0 for m in (given["weight"], given["bias"]))
    eight = plan.channels == 8 and at_once and x.element_size() == 2 and aligned(width, x, *more, many=8)
    each = 8 if eight else 4
    macros |= {"EACH": each, "ALIGNED": at_once and aligned(width, x, *more)}
    spans = rows * -(-length // plan.span) if a.packing is None else length // plan.span + rows
    blocks = -(-spans // plan.warps)
    return _Call(given, macros, blocks, blocks * -(-width // (32 * each)), 32 * plan.warps)


def _time_last(a: CausalConv1d, *more: Tensor) -> _Call:
    """Of kernels whose lanes share the time of a channel; ``more`` are tensors ``(B, D, T)`` that they read, too."""
    x, (rows, width, _) = a.x.mT, a.h0.shape
    length, each = x.shape[2], 16 // x.element_size()
    each = each if aligned(length, x, *more, many=each) else 1
    plan = plan_time_last(rows, length, width, each)
    given, macros = _inputs(a, x, plan)
    macros |= {"EACH": each, "ALIGNED": each > 1}
    spans = rows * -(-length // plan.span)
    return _Call(given, macros, spans, -(-spans * width // plan.warps), 32 * plan.warps)


def _inputs(a: CausalConv1d, x: Tensor, plan: Plan) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of ``Conv`` that forward and backward read, and macros."""
    weight, bias = readable(a.weight, 2), None if a.bias is None else readable(a.bias)
    macros = {
        "TAPS": weight.shape[1],
        "STEPS": plan.steps,
        "WARPS": plan.warps,
        "BLOCKS": plan.blocks,
        "INPUT": TYPES[x.dtype],
        "WEIGHT": TYPES[weight.dtype],
        "BIAS": TYPES[weight.dtype if bias is None else bias.dtype],
        "BIASED": bias is not None,
        "SILU": a.silu,
        "IDS": a.ids is not None,
    }
    given = {
        "rows": len(a.h0),
        "length": a.x.shape[1],
        "width": len(weight),
        "span": plan.span,
        "borders": borders(a.packing),
        "ids": None if a.ids is None else a.ids.contiguous(),
        "x": x,
        "weight": weight,
        "bias": bias,
        "state": a.h0.contiguous(),
    }
    return given, macros


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
