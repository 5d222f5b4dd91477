"""The selective scan on a CPU, with the pointwise work around it."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from dualform.ops.native import library
from dualform.ops.native.library import NO_VIEW, fresh, readable, sequences, view
from dualform.ops.op import Backend, differentiable
from dualform.ops.selective_scan import Arguments, selective_scan_op

_TILE = 32  # SELECTIVE_SCAN_TILE in native/dualform.h
_BACKWARD_ONLY = (0,) * 29  # fields of ``SelectiveScan``


def _run(keep: bool, *args: Any) -> list[Tensor]:
    u, h0 = args[0], args[9]
    y, final = fresh(u.new_empty(u.shape)), h0.clone(memory_format=torch.contiguous_format)
    saved = [fresh(m) for m in _saved(*args)] if keep else []
    if h0.numel() == 0 or u.shape[1] == 0:
        return [y.zero_(), final, *saved]
    given, fields = _fields(Arguments(*args))
    library.call(
        "selective_scan", *fields, *view(y), final.data_ptr(), saved[0].data_ptr() if keep else 0, *_BACKWARD_ONLY
    )
    del given
    return [y, final, *saved]


_forward, _infer = partial(_run, True), partial(_run, False)


def _saved(*args: Any) -> list[Tensor]:
    u, h0 = args[0], args[9]
    return [h0.new_empty(u.shape[0], -(-u.shape[1] // _TILE), h0.shape[2], h0.shape[1])]


def _backward(grads: list[Tensor], kept: list[Tensor], *args: Any) -> list[Tensor]:
    u, delta, A, B, C, D, z, bias, _, h0, _ = args
    du, ddelta, dA, dB, dC = (
        fresh(torch.empty_like(m, memory_format=torch.contiguous_format)) for m in (u, delta, A, B, C)
    )
    dz = None if z is None else fresh(torch.empty_like(z, memory_format=torch.contiguous_format))
    dD, dbias = (None if m is None else h0.new_empty(m.shape) for m in (D, bias))
    found = [g for g in (du, ddelta, dA, dB, dC, dD, dz, dbias) if g is not None]
    dh0 = grads[1].clone()
    if h0.numel() == 0 or u.shape[1] == 0:
        for g in found:
            g.zero_()
    else:
        given, fields = _fields(Arguments(*args))
        library.call(
            "selective_scan_backward",
            *fields,
            *NO_VIEW,
            0,
            kept[0].data_ptr(),
            *view(grads[0]),
            grads[1].data_ptr(),
            *view(du),
            *view(ddelta),
            *view(dB),
            *view(dC),
            *(NO_VIEW if dz is None else view(dz)),
            dA.data_ptr(),
            0 if dD is None else dD.data_ptr(),
            0 if dbias is None else dbias.data_ptr(),
            dh0.data_ptr(),
        )
        del given
    return [g.to(m.dtype) for g, m in zip((*found, dh0), differentiable(args), strict=True)]


def _fields(x: Arguments) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
    """What the kernels are given, to be kept alive, and the first fields of ``SelectiveScan``."""
    cu_seqlens = None if x.cu_seqlens is None else x.cu_seqlens.to(torch.int64).contiguous()
    u, delta, B, C = readable(x.u), readable(x.delta), readable(x.B, 2), readable(x.C, 2)
    z = None if x.z is None else readable(x.z)
    A, h0 = x.A.contiguous(), x.h0.contiguous()
    D, bias = (None if m is None else m.to(h0.dtype).contiguous() for m in (x.D, x.bias))
    fields = (
        library.number(h0),
        *sequences(u, cu_seqlens),
        *A.shape,
        B.shape[2],
        C.shape[2],
        x.softplus,
        *(field for m in (u, delta, B, C, z) for field in (NO_VIEW if m is None else view(m))),
        A.data_ptr(),
        0 if D is None else D.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        h0.data_ptr(),
    )
    return (u, delta, A, B, C, D, z, bias, h0, cu_seqlens), fields


def _refuses(*args: Any) -> str | None:
    return "A is complex" if args[2].is_complex() else None


selective_scan_op.add(
    Backend("native", _forward, _backward, _infer, _saved, devices=("cpu",), refuses=_refuses, missing=library.missing)
)
