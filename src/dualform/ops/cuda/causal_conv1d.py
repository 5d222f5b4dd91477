"""The short causal convolution on an NVIDIA GPU."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualform.ops.causal_conv1d import causal_conv1d_op
from dualform.ops.cuda import compiler
from dualform.ops.cuda.tensors import TYPES, aligned, alive, pointer, readable, view
from dualform.ops.op import Backend
from dualform.ops.step import add_step

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


class Inputs(NamedTuple):
    """The arguments of the operator."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    silu: bool
    state: Tensor
    cu_seqlens: Tensor | None


def plan_forward(rows: int, length: int, width: int, taps: int) -> Plan:
    """As much on its way as registers hold."""
    return Plan(8 if taps <= 4 else 4, 8, 4, _span(rows, length, width, 8), 4)


def plan_backward(rows: int, length: int, width: int, taps: int) -> Plan:
    """Fewer channels, as a thread keeps four times the numbers of each."""
    return Plan(4, 8, 4, _span(rows, length, width, 4), 4 if taps <= 4 else 2)


def _span(rows: int, length: int, width: int, channels: int) -> int:
    """Long, as the steps around a piece are read twice, but with enough warps to go round."""
    span = 1024
    while span > 16 and rows * -(-length // span) * -(-width // (32 * channels)) < (4096 if span > 64 else 1024):
        span //= 2
    return span


def _forward(*args: Any) -> list[Tensor]:
    a = Inputs(*args)
    y, final = a.x.new_empty(a.x.shape), torch.empty_like(a.state, memory_format=torch.contiguous_format)
    if a.x.numel() == 0:
        return [y, final.copy_(a.state)]
    plan = plan_forward(len(a.state), a.x.shape[1], *a.weight.shape)
    given, fields, macros, lines, blocks = _fields(a, plan)
    compiler.launch(
        "causal_conv1d_forward.cu",
        "causal_conv1d_forward",
        macros,
        lines * blocks,
        32 * plan.warps,
        0,
        (*fields, pointer(y), pointer(final), *[0] * 10),
    )
    alive(given)
    return [y, final]


def _backward(grads: list[Tensor], kept: list[Tensor], *args: Any) -> list[Tensor]:
    a = Inputs(*args)
    like = (a.x, a.weight, *(() if a.bias is None else (a.bias,)))
    dfinal = grads[1].contiguous()
    if a.x.numel() == 0:
        return [*(torch.zeros_like(m, memory_format=torch.contiguous_format) for m in like), dfinal.clone()]
    plan = plan_backward(len(a.state), a.x.shape[1], *a.weight.shape)
    dy = readable(grads[0].to(a.x.dtype))
    given, fields, macros, lines, blocks = _fields(a, plan, dy)
    _, weight, bias, *_ = given
    dx, dweight = a.x.new_empty(a.x.shape), torch.empty_like(weight)
    dbias, dstate = None if bias is None else torch.empty_like(bias), torch.empty_like(dfinal)
    width, taps = weight.shape
    rows = taps + (bias is not None)
    sums = dfinal.new_empty(blocks, rows, width)
    fields = (
        *(*fields, 0, 0, *view(dy), pointer(dfinal), pointer(dx), pointer(dstate), blocks),
        *(pointer(m) for m in (sums, dweight, dbias)),
    )
    shared = 32 * plan.warps * macros["CHANNELS"] * max(4 * rows, 2 * plan.steps * a.x.element_size())
    file = "causal_conv1d_backward.cu"
    compiler.launch(file, "causal_conv1d_backward", macros, lines * blocks, 32 * plan.warps, shared, fields)
    compiler.launch(file, "causal_conv1d_sums", macros, rows * -(-width // 32), 256, 4 * 256, fields)
    alive(given, dy, dfinal, sums)
    found = (dx, dweight, *(() if dbias is None else (dbias,)))
    return [*(g.to(m.dtype) for g, m in zip(found, like, strict=True)), dstate]


def _fields(a: Inputs, plan: Plan, *more: Tensor) -> tuple[Any, tuple[int, ...], dict[str, Any], int, int]:
    """What the kernels are given, to be kept alive; the first fields of ``Conv``; their macros; numbers of blocks.

    ``more`` are tensors like x that the kernels read, too. Blocks lie side by side over channels, and over time.
    """
    x, weight, state = readable(a.x), readable(a.weight, 2), a.state.contiguous()
    bias = None if a.bias is None else readable(a.bias)
    cu_seqlens = None if a.cu_seqlens is None else a.cu_seqlens.to(torch.int64).contiguous()
    (rows, width, _), length = state.shape, x.shape[1]
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
    pieces = rows * -(-length // plan.span) if cu_seqlens is None else length // plan.span + rows
    fields = (
        *(rows, length, width, plan.span, pointer(cu_seqlens), *view(x)),
        *(pointer(m) for m in (weight, bias, state)),
    )
    return (x, weight, bias, state, cu_seqlens), fields, macros, -(-width // (32 * channels)), -(-pieces // plan.warps)


def _refuses(*args: Any) -> str | None:
    a = Inputs(*args)
    if a.state.dtype != torch.float32:
        return f"the state is {a.state.dtype}, not float32"
    if a.x.dtype not in TYPES:
        return f"x is {a.x.dtype}, not one of {', '.join(str(dtype) for dtype in TYPES)}"
    if a.weight.shape[1] > _MOST_TAPS:
        return f"a width of {a.weight.shape[1]}, more than {_MOST_TAPS}"
    return compiler.missing() or None


def causal_conv1d_update(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor] | None:
    """``(B, D)`` and ``(B, D, W-1)``: a sequence of one element."""
    if not _on_gpu(x, state, weight, bias) or state.shape != (*x.shape, weight.shape[1] - 1):
        return None
    args = (x[:, None], weight, bias, silu, state, None)
    if _refuses(*args):
        return None
    y, after = _forward(*args)
    return y[:, 0], after


def _on_gpu(*tensors: Tensor | None) -> bool:
    return all(m is None or m.is_cuda for m in tensors)


causal_conv1d_op.add(Backend("cuda", _forward, _backward, devices=("cuda",), refuses=_refuses))
add_step("causal_conv1d_update", "cuda", causal_conv1d_update)
