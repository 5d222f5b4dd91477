"""The selective scan on a CPU, with the pointwise work around it."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from dualform.ops.native import library
from dualform.ops.native.library import borders, fresh, readable
from dualform.ops.native.structs import SELECTIVE_SCAN, SELECTIVE_SCAN_TILE
from dualform.ops.op import Backend, differentiable
from dualform.ops.selective_scan import Arguments, selective_scan_op


def _run(keep: bool, *args: Any) -> list[Tensor]:
    u, h0 = args[0], args[9]
    y, final = fresh(u.new_empty(u.shape)), h0.clone(memory_format=torch.contiguous_format)
    saved = [fresh(m) for m in _saved(*args)] if keep else []
    if u.numel() == 0:
        return [y.zero_(), final, *saved]
    inputs, kept = _inputs(Arguments(*args)), saved[0] if keep else None
    library.call("selective_scan", SELECTIVE_SCAN, **inputs, y=y, final=final, saved=kept)
    return [y, final, *saved]


_forward, _infer = partial(_run, True), partial(_run, False)


def _saved(*args: Any) -> list[Tensor]:
    u, h0 = args[0], args[9]
    return [h0.new_empty(u.shape[0], -(-u.shape[1] // SELECTIVE_SCAN_TILE), h0.shape[2], h0.shape[1])]


def _backward(grads: list[Tensor], kept: list[Tensor], *args: Any) -> list[Tensor]:
    u, delta, A, B, C, D, z, bias, _, h0, _ = args
    du, ddelta, dA, dB, dC = (
        fresh(torch.empty_like(m, memory_format=torch.contiguous_format)) for m in (u, delta, A, B, C)
    )
    dz = None if z is None else fresh(torch.empty_like(z, memory_format=torch.contiguous_format))
    dD, dbias = (None if m is None else h0.new_empty(m.shape) for m in (D, bias))
    found = [g for g in (du, ddelta, dA, dB, dC, dD, dz, dbias) if g is not None]
    dh0 = grads[1].clone()
    if u.numel() == 0:
        for g in found:
            g.zero_()
    else:
        library.call(
            "selective_scan_backward",
            SELECTIVE_SCAN,
            **_inputs(Arguments(*args)),
            saved=kept[0],
            dy=readable(grads[0]),
            dfinal=grads[1].contiguous(),
            du=du,
            ddelta=ddelta,
            db=dB,
            dc=dC,
            dz=dz,
            da=dA,
            dd=dD,
            dbias=dbias,
            dh0=dh0,
        )
    return [g.to(m.dtype) for g, m in zip((*found, dh0), differentiable(args), strict=True)]


def _inputs(x: Arguments) -> dict[str, Any]:
    """The fields of ``SelectiveScan`` that forward and backward read."""
    u, B, C, h0 = readable(x.u), readable(x.B, 2), readable(x.C, 2), x.h0.contiguous()
    D, bias = (None if m is None else m.to(h0.dtype).contiguous() for m in (x.D, x.bias))
    return {
        "dtype": h0.dtype,
        "sequences": (u, borders(x.cu_seqlens)),
        "width": h0.shape[1],
        "states": h0.shape[2],
        "groups_b": B.shape[2],
        "groups_c": C.shape[2],
        "softplus": x.softplus,
        "u": u,
        "delta": readable(x.delta),
        "b": B,
        "c": C,
        "z": None if x.z is None else readable(x.z),
        "a": x.A.contiguous(),
        "d": D,
        "bias": bias,
        "h0": h0,
    }


def _refuses(*args: Any) -> str | None:
    return "A is complex" if args[2].is_complex() else None


selective_scan_op.add(
    Backend("native", _forward, _backward, _infer, _saved, devices=("cpu",), refuses=_refuses, missing=library.missing)
)
