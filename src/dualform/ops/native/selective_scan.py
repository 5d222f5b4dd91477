"""The selective scan on a CPU, with the pointwise work around it."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from dualform.ops.layout import empty_like
from dualform.ops.native import library
from dualform.ops.native.library import fresh, timed
from dualform.ops.native.structs import SELECTIVE_SCAN, SELECTIVE_SCAN_TILE
from dualform.ops.op import Backend
from dualform.ops.selective_scan import SelectiveScan, selective_scan_op


def _run(keep: bool, a: SelectiveScan) -> list[Tensor]:
    y, final = fresh(empty_like(a.u)), a.h0.clone(memory_format=torch.contiguous_format)
    saved = [fresh(m) for m in _saved(a)] if keep else []
    if a.u.numel() == 0:
        return [y.zero_(), final, *saved]
    library.call("selective_scan", SELECTIVE_SCAN, **_inputs(a), y=y, final=final, saved=saved[0] if keep else None)
    return [y, final, *saved]


_forward, _infer = partial(_run, True), partial(_run, False)


def _shape(a: SelectiveScan) -> tuple[int, ...]:
    return a.u.shape[0], -(-a.u.shape[1] // SELECTIVE_SCAN_TILE), a.h0.shape[2], a.h0.shape[1]


def _saved(a: SelectiveScan) -> list[Tensor]:
    return [a.h0.new_empty(_shape(a))]


def _backward(grads: list[Tensor], kept: list[Tensor], a: SelectiveScan) -> dict[str, Tensor]:
    found = {
        name: fresh(empty_like(m))
        for name, m in (("u", a.u), ("delta", a.delta), ("A", a.A), ("B", a.B), ("C", a.C), ("z", a.z))
        if m is not None
    }
    found |= {name: a.h0.new_empty(m.shape) for name, m in (("D", a.D), ("delta_bias", a.delta_bias)) if m is not None}
    found |= {name: a.h0.new_empty(m.shape) for name, m in (("B", a.B), ("C", a.C)) if m.dim() == 2}
    dh0 = grads[1].clone()
    if a.u.numel() == 0:
        for g in found.values():
            g.zero_()
    else:
        library.call(
            "selective_scan_backward",
            SELECTIVE_SCAN,
            **_inputs(a),
            saved=library.saved_states("selective_scan", kept, a.h0, *_shape(a)),
            dy=timed(grads[0]),
            dfinal=grads[1].contiguous(),
            du=found["u"],
            ddelta=found["delta"],
            db=found["B"],
            dc=found["C"],
            dz=found.get("z"),
            da=found["A"],
            dd=found.get("D"),
            dbias=found.get("delta_bias"),
            dh0=dh0,
        )
    return {**found, "h0": dh0}


def _inputs(a: SelectiveScan) -> dict[str, Any]:
    """The fields of ``SelectiveScan`` that forward and backward read."""
    u, B, C, h0 = timed(a.u), _map(a.B, a), _map(a.C, a), a.h0.contiguous()
    D, bias = (None if m is None else m.to(h0.dtype).contiguous() for m in (a.D, a.delta_bias))
    return {
        "dtype": h0.dtype,
        "sequences": (u, a.packing),
        "width": h0.shape[1],
        "states": h0.shape[2],
        "groups_b": _groups(B),
        "groups_c": _groups(C),
        "constant_b": a.B.dim() == 2,
        "constant_c": a.C.dim() == 2,
        "softplus": a.delta_softplus,
        "u": u,
        "delta": timed(a.delta),
        "b": B,
        "c": C,
        "z": None if a.z is None else timed(a.z),
        "a": a.A.contiguous(),
        "d": D,
        "bias": bias,
        "h0": h0,
    }


def _map(m: Tensor, a: SelectiveScan) -> Tensor:
    """B or C as kernels read it; a constant one is of the dtype of the states, and so is its gradient."""
    return timed(m) if m.dim() == 4 else m.to(a.h0.dtype).contiguous()


def _groups(m: Tensor) -> int:
    return m.shape[2] if m.dim() == 4 else 1


def _refuses(a: SelectiveScan) -> str | None:
    return "A is complex" if a.A.is_complex() else None


selective_scan_op.add(
    Backend(
        "native",
        _forward,
        _backward,
        _infer,
        _saved,
        devices=("cpu",),
        refuses=_refuses,
        missing=library.why_missing,
    )
)
