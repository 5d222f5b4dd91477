"""The linear recurrence on a CPU, real and complex."""

import torch
from torch import Tensor

from dualform.ops.linear_scan import as_grad, linear_scan_op
from dualform.ops.native import library
from dualform.ops.native.library import NO_VIEW, fresh, readable, sequences, view
from dualform.ops.op import Backend


def _forward(a: Tensor, b: Tensor, h0: Tensor, cu_seqlens: Tensor | None, reverse: bool) -> list[Tensor]:
    out = torch.promote_types(a.dtype, b.dtype)
    out = torch.promote_types(out, h0.dtype) if h0.is_complex() else out
    h = fresh(b.new_empty(b.shape, dtype=out))
    final = h0.clone(memory_format=torch.contiguous_format)
    if h.numel() == 0:
        return [h, final]
    given, fields = _fields(a, b, h0, cu_seqlens, reverse)
    kept = _flat(h, h0)
    library.call("linear_scan", *fields, *view(kept), final.data_ptr(), *NO_VIEW, 0, *NO_VIEW, *NO_VIEW, 0)
    del given
    return [h, final]


def _backward(
    grads: list[Tensor], kept: list[Tensor], a: Tensor, b: Tensor, h0: Tensor, cu_seqlens: Tensor | None, reverse: bool
) -> list[Tensor]:
    dh0 = grads[1].clone()
    if b.numel() == 0:
        return [torch.zeros_like(a), torch.zeros_like(b), dh0]
    da, db = (fresh(h0.new_empty(b.shape, dtype=_grad_dtype(x, h0))) for x in (a, b))
    given, fields = _fields(a, b, h0, cu_seqlens, reverse)
    h, dh = (_flat(x, h0) for x in (kept[0], grads[0]))
    library.call(
        "linear_scan_backward",
        *fields,
        *view(h),
        0,
        *view(dh),
        grads[1].data_ptr(),
        *view(_flat(da, h0)),
        *view(_flat(db, h0)),
        dh0.data_ptr(),
    )
    del given
    return [as_grad(da, a), as_grad(db, b), dh0]


def _fields(
    a: Tensor, b: Tensor, h0: Tensor, cu_seqlens: Tensor | None, reverse: bool
) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
    """What the kernels are given, to be kept alive, and the first fields of ``LinearScan``."""
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
    a, b, h0 = _flat(a, h0), _flat(b, h0), h0.resolve_conj().contiguous()
    fields = (
        library.number(h0.real),
        h0.is_complex(),
        reverse,
        *sequences(b, cu_seqlens),
        b.shape[2],
        *view(a),
        *view(b),
        h0.data_ptr(),
    )
    return (a, b, h0, cu_seqlens), fields


def _flat(x: Tensor, state: Tensor) -> Tensor:
    """``(B, T, ...)`` as rows of real numbers ``(B, T, D)``, without a copy where memory allows."""
    if state.is_complex():
        x = torch.view_as_real(x.to(state.dtype).resolve_conj())
    x = readable(x, x.dim() - 2)
    return x.flatten(2) if x.dim() > 2 else x[..., None]


def _grad_dtype(x: Tensor, state: Tensor) -> torch.dtype:
    return state.dtype if state.is_complex() else x.dtype


linear_scan_op.add(Backend("native", _forward, _backward, devices=("cpu",), missing=library.missing))
