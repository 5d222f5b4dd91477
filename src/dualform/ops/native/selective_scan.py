"""The selective scan on a CPU."""

import torch
from torch import Tensor

from dualform.ops.native import library
from dualform.ops.native.library import NO_VIEW, readable, sequences, view
from dualform.ops.op import Backend
from dualform.ops.selective_scan import selective_scan_op

_TILE = 32  # SELECTIVE_SCAN_TILE in native/dualform.h


def _run(keep: bool, *args: Tensor) -> list[Tensor]:
    u, dt, A, B, C, h0, cu_seqlens = args
    y, final = u.new_empty(u.shape), h0.clone(memory_format=torch.contiguous_format)
    saved = _saved(*args) if keep else []
    if h0.numel() == 0 or u.shape[1] == 0:
        return [y.zero_(), final, *saved]
    given, fields = _fields(u, dt, A, B, C, h0, cu_seqlens)
    kept = saved[0].data_ptr() if keep else 0
    library.call("selective_scan", *fields, *view(y), final.data_ptr(), kept, *[0] * 31)
    del given
    return [y, final, *saved]


def _forward(*args: Tensor) -> list[Tensor]:
    return _run(True, *args)


def _infer(*args: Tensor) -> list[Tensor]:
    return _run(False, *args)


def _saved(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor, cu_seqlens: Tensor | None
) -> list[Tensor]:
    return [h0.new_empty(u.shape[0], -(-u.shape[1] // _TILE), h0.shape[2], h0.shape[1])]


def _backward(
    grads: list[Tensor],
    kept: list[Tensor],
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h0: Tensor,
    cu_seqlens: Tensor | None,
) -> list[Tensor]:
    found = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (u, dt, A, B, C)]
    du, ddt, dA, dB, dC = found
    dh0 = grads[1].clone()
    if h0.numel() == 0 or u.shape[1] == 0:
        return [*(g.zero_() for g in found), dh0]
    given, fields = _fields(u, dt, A, B, C, h0, cu_seqlens)
    library.call(
        "selective_scan_backward",
        *fields,
        *NO_VIEW,
        0,
        kept[0].data_ptr(),
        *view(grads[0]),
        grads[1].data_ptr(),
        *view(du),
        *view(ddt),
        *view(dB),
        *view(dC),
        dA.data_ptr(),
        dh0.data_ptr(),
    )
    del given
    return [*found, dh0]


def _fields(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor, cu_seqlens: Tensor | None
) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
    """What the kernels are given, to be kept alive, and the first fields of ``SelectiveScan``."""
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
    u, dt, B, C = readable(u), readable(dt), readable(B, 2), readable(C, 2)
    A, h0 = A.contiguous(), h0.contiguous()
    fields = (
        library.number(h0),
        *sequences(u, cu_seqlens),
        *A.shape,
        B.shape[2],
        C.shape[2],
        *(field for tensor in (u, dt, B, C) for field in view(tensor)),
        A.data_ptr(),
        h0.data_ptr(),
    )
    return (u, dt, A, B, C, h0, cu_seqlens), fields


def _refuses(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor, cu_seqlens: Tensor | None
) -> str | None:
    return "A is complex" if A.is_complex() else None


selective_scan_op.add(
    Backend("native", _forward, _backward, _infer, _saved, devices=("cpu",), refuses=_refuses, missing=library.missing)
)
