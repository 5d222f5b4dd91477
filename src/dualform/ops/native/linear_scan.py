"""The linear recurrence on a CPU, real and complex."""

from typing import Any

import torch
from torch import Tensor

from dualform.ops.linear_scan import as_grad, linear_scan_op
from dualform.ops.native import library
from dualform.ops.native.library import borders, fresh, readable
from dualform.ops.native.structs import LINEAR_SCAN
from dualform.ops.op import Backend


def _forward(a: Tensor, b: Tensor, h0: Tensor, cu_seqlens: Tensor | None, reverse: bool) -> list[Tensor]:
    out = torch.promote_types(a.dtype, b.dtype)
    out = torch.promote_types(out, h0.dtype) if h0.is_complex() else out
    h = fresh(b.new_empty(b.shape, dtype=out))
    final = h0.clone(memory_format=torch.contiguous_format)
    if h.numel() == 0:
        return [h, final]
    library.call("linear_scan", LINEAR_SCAN, **_inputs(a, b, h0, cu_seqlens, reverse), h=_flat(h, h0), final=final)
    return [h, final]


def _backward(
    grads: list[Tensor], kept: list[Tensor], a: Tensor, b: Tensor, h0: Tensor, cu_seqlens: Tensor | None, reverse: bool
) -> list[Tensor]:
    dh0 = grads[1].clone()
    if b.numel() == 0:
        return [torch.zeros_like(a), torch.zeros_like(b), dh0]
    da, db = (fresh(h0.new_empty(b.shape, dtype=_grad_dtype(x, h0))) for x in (a, b))
    library.call(
        "linear_scan_backward",
        LINEAR_SCAN,
        **_inputs(a, b, h0, cu_seqlens, reverse),
        h=_flat(kept[0], h0),
        dh=_flat(grads[0], h0),
        dfinal=grads[1].resolve_conj().contiguous(),
        da=_flat(da, h0),
        db=_flat(db, h0),
        dh0=dh0,
    )
    return [as_grad(da, a), as_grad(db, b), dh0]


def _inputs(a: Tensor, b: Tensor, h0: Tensor, cu_seqlens: Tensor | None, reverse: bool) -> dict[str, Any]:
    """The fields of ``LinearScan`` that forward and backward read."""
    a, b, h0 = _flat(a, h0), _flat(b, h0), h0.resolve_conj().contiguous()
    return {
        "dtype": h0.dtype.to_real(),
        "complex": h0.is_complex(),
        "reverse": reverse,
        "sequences": (b, borders(cu_seqlens)),
        "width": b.shape[2],
        "a": a,
        "b": b,
        "h0": h0,
    }


def _flat(x: Tensor, state: Tensor) -> Tensor:
    """``(B, T, ...)`` as rows of real numbers ``(B, T, D)``, without a copy where memory allows."""
    if state.is_complex():
        x = torch.view_as_real(x.to(state.dtype).resolve_conj())
    x = readable(x, x.dim() - 2)
    return x.flatten(2) if x.dim() > 2 else x[..., None]


def _grad_dtype(x: Tensor, state: Tensor) -> torch.dtype:
    return state.dtype if state.is_complex() else x.dtype


linear_scan_op.add(Backend("native", _forward, _backward, devices=("cpu",), missing=library.missing))
