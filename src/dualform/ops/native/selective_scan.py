"""The selective scan on a CPU."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.ops.native import library
from dualform.ops.native.library import NO_VIEW, readable, sequences, view
from dualform.ops.op import Backend
from dualform.ops.selective_scan import selective_scan_op

# What the kernels are given: u, the step after softplus, A, B, C, the initial state and cu_seqlens.
_Core = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]
_TILE = 32  # SELECTIVE_SCAN_TILE in native/dualform.h


def _step(delta: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return delta.to(dtype) if bias is None else delta.to(dtype) + bias.to(dtype)


def _core(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    h0: Tensor,
    cu_seqlens: Tensor | None,
) -> _Core:
    step = _step(delta, delta_bias, h0.dtype)
    return u, F.softplus(step) if delta_softplus else step, A, B, C, h0, cu_seqlens


def _run(keep: bool, *args: Any) -> list[Tensor]:
    u, D, z = args[0], args[5], args[6]
    y, *more = _scan(keep, _core(*args))
    y = y if D is None else y.addcmul_(D.to(y.dtype), u.to(y.dtype))
    y = y if z is None else y.mul_(F.silu(z.to(y.dtype)))
    return [y.to(u.dtype), *more]


def _scan(keep: bool, core: _Core) -> list[Tensor]:
    u, dt, A, B, C, h0, cu_seqlens = core
    y, final = u.new_empty(u.shape, dtype=h0.dtype), h0.clone(memory_format=torch.contiguous_format)
    saved = [_states(u, h0)] if keep else []
    if h0.numel() == 0 or u.shape[1] == 0:
        return [y.zero_(), final, *saved]
    given, fields = _fields(u, dt, A, B, C, h0, cu_seqlens)
    kept = saved[0].data_ptr() if keep else 0
    library.call("selective_scan", *fields, *view(y), final.data_ptr(), kept, *[0] * 31)
    del given
    return [y, final, *saved]


def _forward(*args: Any) -> list[Tensor]:
    return _run(True, *args)


def _infer(*args: Any) -> list[Tensor]:
    return _run(False, *args)


def _saved(*args: Any) -> list[Tensor]:
    return [_states(args[0], args[9])]


def _states(u: Tensor, h0: Tensor) -> Tensor:
    return h0.new_empty(u.shape[0], -(-u.shape[1] // _TILE), h0.shape[2], h0.shape[1])


def _backward(grads: list[Tensor], kept: list[Tensor], *args: Any) -> list[Tensor]:
    u, delta, A, B, C, D, z, bias, softplus, h0, _ = args
    core, dy = _core(*args), grads[0].to(h0.dtype)
    dD = dz = dbias = None
    if z is not None:
        y, gate = _scan(False, core)[0], z.to(h0.dtype)
        y = y if D is None else y.addcmul_(D.to(y.dtype), u.to(y.dtype))
        dz = torch.ops.aten.silu_backward(dy * y, gate)
        dy = dy * F.silu(gate)
    du, ddt, dA, dB, dC, dh0 = _scan_backward(dy, grads[1], kept[0], core)
    if D is not None:
        du, dD = du + D.to(dy.dtype) * dy, (dy * u).sum((0, 1))
    if softplus:
        ddt = torch.ops.aten.softplus_backward(ddt, _step(delta, bias, h0.dtype), 1, 20)
    if bias is not None:
        dbias = ddt.sum((0, 1))
    found = zip((du, ddt, dA, dB, dC, dD, dz, dbias, dh0), (u, delta, A, B, C, D, z, bias, h0), strict=True)
    return [g.to(m.dtype) for g, m in found if g is not None and m is not None]


def _scan_backward(dy: Tensor, dfinal: Tensor, saved: Tensor, core: _Core) -> list[Tensor]:
    u, dt, A, B, C, h0, cu_seqlens = core
    du, ddt = (torch.empty_like(dy, memory_format=torch.contiguous_format) for _ in range(2))
    dA, dB, dC = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (A, B, C))
    found, dh0 = [du, ddt, dA, dB, dC], dfinal.clone()
    if h0.numel() == 0 or u.shape[1] == 0:
        return [*(g.zero_() for g in found), dh0]
    given, fields = _fields(u, dt, A, B, C, h0, cu_seqlens)
    library.call(
        "selective_scan_backward",
        *fields,
        *NO_VIEW,
        0,
        saved.data_ptr(),
        *view(dy),
        dfinal.data_ptr(),
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


def _refuses(*args: Any) -> str | None:
    u, delta, A, B, C, _, z = args[:7]
    if A.is_complex():
        return "A is complex"
    if any(m is not None and m.dtype == torch.float16 for m in (u, delta, B, C, z)):
        return "float16"
    return None


selective_scan_op.add(
    Backend("native", _forward, _backward, _infer, _saved, devices=("cpu",), refuses=_refuses, missing=library.missing)
)
