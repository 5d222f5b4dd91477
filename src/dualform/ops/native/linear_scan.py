"""The linear recurrence on a CPU, real and complex."""

from typing import Any

import torch
from torch import Tensor

from dualform.ops.linear_scan import LinearScan, linear_scan_op
from dualform.ops.native import library
from dualform.ops.native.library import fresh, readable
from dualform.ops.native.structs import LINEAR_SCAN
from dualform.ops.op import Backend


def _forward(a: LinearScan) -> list[Tensor]:
    h = fresh(a.b.new_empty(a.b.shape, dtype=a.out_dtype))
    final = a.h0.clone(memory_format=torch.contiguous_format)
    if h.numel() > 0:
        library.call("linear_scan", LINEAR_SCAN, **_inputs(a), h=_flat(h, a.h0), final=final)
    return [h, final]


def _backward(grads: list[Tensor], kept: list[Tensor], a: LinearScan) -> dict[str, Tensor]:
    dh0, h0 = grads[1].clone(), a.h0
    if a.b.numel() == 0:
        return {"a": torch.zeros_like(a.a), "b": torch.zeros_like(a.b), "h0": dh0}
    da, db = (fresh(h0.new_empty(m.shape, dtype=_grad_dtype(m, h0))) for m in (a.a, a.b))
    library.call(
        "linear_scan_backward",
        LINEAR_SCAN,
        **_inputs(a),
        h=_flat(kept[0], h0),
        dh=_flat(grads[0], h0),
        dfinal=grads[1].resolve_conj().contiguous(),
        da=_flat(da, h0),
        db=_flat(db, h0),
        dh0=dh0,
    )
    return {"a": da, "b": db, "h0": dh0}


def _inputs(args: LinearScan) -> dict[str, Any]:
    """The fields of ``LinearScan`` that forward and backward read."""
    a, b, h0 = _flat(args.a, args.h0), _flat(args.b, args.h0), args.h0.resolve_conj().contiguous()
    return {
        "dtype": h0.dtype.to_real(),
        "complex": h0.is_complex(),
        "reverse": args.reverse,
        "sequences": (b, args.packing),
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


linear_scan_op.add(Backend("native", _forward, _backward, devices=("cpu",), missing=library.why_missing))
