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
from dualform.ops.native.library import fresh, readable
from dualform.ops.native.structs import SSD, SSD_SPAN
from dualform.ops.op import Backend
from dualform.ops.ssd import SSD as Arguments
from dualform.ops.ssd import ssd_op


def _run(keep: bool, a: Arguments) -> list[Tensor]:
    whole = a.D is None and a.z is None  # else the skip and the gate follow before anything is rounded
    y = fresh(a.x.new_empty(a.x.shape, dtype=a.x.dtype if whole else a.h0.dtype))
    final = a.h0.clone(memory_format=torch.contiguous_format)
    saved = [fresh(m) for m in _states(a)] if keep else []
    if a.x.numel() == 0 or a.h0.numel() == 0:
        y.zero_()
    else:
        library.call("ssd", SSD, **_inputs(a), y=y, final=final, saved=saved[0] if keep else None)
    out, gated = (y, y) if whole else a.finish(y)
    return [out, final, *saved, *([gated] if keep and a.z is not None else [])]


_forward, _infer = partial(_run, True), partial(_run, False)


def _shape(a: Arguments) -> tuple[int, ...]:
    heads, width, states = a.h0.shape[1:]
    return a.x.shape[0], -(-a.x.shape[1] // SSD_SPAN), heads, states, width


def _states(a: Arguments) -> list[Tensor]:
    return [a.h0.new_empty(_shape(a))]


def _saved(a: Arguments) -> list[Tensor]:
    return [*_states(a), *([] if a.z is None else [a.x.new_empty(a.x.shape, dtype=a.h0.dtype)])]


def _backward(grads: list[Tensor], kept: list[Tensor], a: Arguments) -> dict[str, Tensor]:
    whole = a.D is None and a.z is None
    dy, around = (grads[0], {}) if whole else a.start(grads[0], kept[-1])
    dx = fresh(a.x.new_empty(a.x.shape, dtype=a.x.dtype if a.D is None else a.h0.dtype))
    ddt, dA, dB, dC = (fresh(torch.empty_like(m, memory_format=torch.contiguous_format)) for m in (a.dt, a.A, a.B, a.C))
    dh0 = grads[1].clone()
    if a.x.numel() == 0 or a.h0.numel() == 0:
        for g in (dx, ddt, dA, dB, dC):
            g.zero_()
    else:
        library.call(
            "ssd_backward",
            SSD,
            **_inputs(a),
            saved=library.saved_states("ssd", kept, a.h0, *_shape(a)),
            dy=readable(dy, 2),
            dfinal=grads[1].contiguous(),
            dx=dx,
            ddt=ddt,
            db=dB,
            dc=dC,
            da=dA,
            dh0=dh0,
        )
    dx = dx if a.skip is None else dx.addcmul_(a.skip, dy)
    return {**around, "x": dx, "dt": ddt, "A": dA, "B": dB, "C": dC, "h0": dh0}


def _inputs(a: Arguments) -> dict[str, Any]:
    """The fields of ``Ssd`` that forward and backward read; the kernels choose their own ``chunk``."""
    x, B, h0 = readable(a.x, 2), readable(a.B, 2), a.h0.contiguous()
    return {
        "dtype": h0.dtype,
        "sequences": (x, a.packing),
        "heads": h0.shape[1],
        "width": h0.shape[2],
        "states": h0.shape[3],
        "groups": B.shape[2],
        "x": x,
        "dt": readable(a.dt),
        "b": B,
        "c": readable(a.C, 2),
        "a": a.A.contiguous(),
        "h0": h0,
        "ids": None if a.ids is None else a.ids.contiguous(),
    }


ssd_op.add(Backend("native", _forward, _backward, _infer, _saved, devices=("cpu",), missing=library.why_missing))
