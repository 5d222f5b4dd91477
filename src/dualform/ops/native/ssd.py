"""State space duality on a CPU: matrix products within tiles of time, states in cache from tile to tile."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from dualform.ops.native import library
from dualform.ops.native.library import NO_VIEW, fresh, readable, sequences, view
from dualform.ops.op import Backend
from dualform.ops.ssd import ssd_op

_SPAN = 256  # SSD_SPAN in native/dualform.h
_BACKWARD_ONLY = (0,) * 23  # fields of ``Ssd``


def _run(keep: bool, *args: Any) -> list[Tensor]:
    x, h0 = args[0], args[5]
    y, final = fresh(x.new_empty(x.shape)), h0.clone(memory_format=torch.contiguous_format)
    saved = [fresh(m) for m in _saved(*args)] if keep else []
    if x.numel() == 0 or h0.numel() == 0:
        return [y.zero_(), final, *saved]
    given, fields = _fields(*args)
    library.call("ssd", *fields, *view(y), final.data_ptr(), saved[0].data_ptr() if keep else 0, *_BACKWARD_ONLY)
    del given
    return [y, final, *saved]


_forward, _infer = partial(_run, True), partial(_run, False)


def _saved(*args: Any) -> list[Tensor]:
    x, h0 = args[0], args[5]
    heads, width, states = h0.shape[1:]
    return [h0.new_empty(x.shape[0], -(-x.shape[1] // _SPAN), heads, states, width)]


def _backward(grads: list[Tensor], kept: list[Tensor], *args: Any) -> list[Tensor]:
    x, dt, A, B, C, h0, *_ = args
    dx, ddt, dA, dB, dC = (fresh(torch.empty_like(m, memory_format=torch.contiguous_format)) for m in (x, dt, A, B, C))
    dh0 = grads[1].clone()
    if x.numel() == 0 or h0.numel() == 0:
        return [*(g.zero_() for g in (dx, ddt, dA, dB, dC)), dh0]
    given, fields = _fields(*args)
    library.call(
        "ssd_backward",
        *fields,
        *NO_VIEW,
        0,
        kept[0].data_ptr(),
        *view(grads[0]),
        grads[1].data_ptr(),
        *view(dx),
        *view(ddt),
        *view(dB),
        *view(dC),
        dA.data_ptr(),
        dh0.data_ptr(),
    )
    del given
    return [dx, ddt, dA, dB, dC, dh0]


def _fields(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor, cu_seqlens: Tensor | None, chunk: int
) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
    """What the kernels are given, to be kept alive, and the first fields of ``Ssd``; ``chunk`` is not asked for."""
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
    x, B, C, dt, A, h0 = readable(x, 2), readable(B, 2), readable(C, 2), readable(dt), A.contiguous(), h0.contiguous()
    fields = (
        library.number(h0),
        *sequences(x, cu_seqlens),
        *h0.shape[1:],
        B.shape[2],
        *(field for m in (x, dt, B, C) for field in view(m)),
        A.data_ptr(),
        h0.data_ptr(),
    )
    return (x, dt, A, B, C, h0, cu_seqlens), fields


ssd_op.add(Backend("native", _forward, _backward, _infer, _saved, devices=("cpu",), missing=library.missing))
