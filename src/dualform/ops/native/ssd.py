"""State space duality on a CPU: matrix products within chunks of 64 steps, states in cache from chunk to chunk.

An input that is not finite affects outputs from its own step on, in its own sequence, as in the reference. Gradients go
through products of whole chunks: those of the same sequence may become NaN in the whole chunk around the step, which
begins and ends at multiples of 64 or at a border.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from dualform.ops.native import library
from dualform.ops.native.library import borders, fresh, readable
from dualform.ops.native.structs import SSD, SSD_SPAN
from dualform.ops.op import Backend
from dualform.ops.ssd import ssd_op


def _run(keep: bool, *args: Any) -> list[Tensor]:
    x, h0 = args[0], args[5]
    y, final = fresh(x.new_empty(x.shape)), h0.clone(memory_format=torch.contiguous_format)
    saved = [fresh(m) for m in _saved(*args)] if keep else []
    if x.numel() == 0 or h0.numel() == 0:
        return [y.zero_(), final, *saved]
    library.call("ssd", SSD, **_inputs(*args), y=y, final=final, saved=saved[0] if keep else None)
    return [y, final, *saved]


_forward, _infer = partial(_run, True), partial(_run, False)


def _saved(*args: Any) -> list[Tensor]:
    x, h0 = args[0], args[5]
    heads, width, states = h0.shape[1:]
    return [h0.new_empty(x.shape[0], -(-x.shape[1] // SSD_SPAN), heads, states, width)]


def _backward(grads: list[Tensor], kept: list[Tensor], *args: Any) -> list[Tensor]:
    x, dt, A, B, C, h0, *_ = args
    dx, ddt, dA, dB, dC = (fresh(torch.empty_like(m, memory_format=torch.contiguous_format)) for m in (x, dt, A, B, C))
    dh0 = grads[1].clone()
    if x.numel() == 0 or h0.numel() == 0:
        return [*(g.zero_() for g in (dx, ddt, dA, dB, dC)), dh0]
    library.call(
        "ssd_backward",
        SSD,
        **_inputs(*args),
        saved=kept[0],
        dy=readable(grads[0], 2),
        dfinal=grads[1].contiguous(),
        dx=dx,
        ddt=ddt,
        db=dB,
        dc=dC,
        da=dA,
        dh0=dh0,
    )
    return [dx, ddt, dA, dB, dC, dh0]


def _inputs(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor, cu_seqlens: Tensor | None, chunk: int
) -> dict[str, Any]:
    """The fields of ``Ssd`` that forward and backward read; the kernels choose their own ``chunk``."""
    x, B, h0 = readable(x, 2), readable(B, 2), h0.contiguous()
    return {
        "dtype": h0.dtype,
        "sequences": (x, borders(cu_seqlens)),
        "heads": h0.shape[1],
        "width": h0.shape[2],
        "states": h0.shape[3],
        "groups": B.shape[2],
        "x": x,
        "dt": readable(dt),
        "b": B,
        "c": readable(C, 2),
        "a": A.contiguous(),
        "h0": h0,
    }


ssd_op.add(Backend("native", _forward, _backward, _infer, _saved, devices=("cpu",), missing=library.missing))
