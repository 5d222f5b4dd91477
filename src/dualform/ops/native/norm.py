"""The norms on a CPU: one pass over memory, each row in a core's cache."""

from typing import Any

from torch import Tensor

from dualform.ops.add_norm import AddNorm, add_norm_op
from dualform.ops.gated_norm import GatedNorm, gated_norm_op
from dualform.ops.native import library
from dualform.ops.native.library import fresh, readable
from dualform.ops.native.structs import DTYPES, NORM
from dualform.ops.op import Backend


def _add(a: AddNorm) -> list[Tensor]:
    y, r = (fresh(a.x.new_empty(a.x.shape, dtype=dtype)) for dtype in (a.dtype, a.residual_dtype))
    if y.numel() > 0:
        library.call("norm", NORM, **_inputs(a, a.x), residual=_rows(a.residual), y=_rows(y), r=_rows(r))
    return [y, r]


def _add_backward(grads: list[Tensor], kept: list[Tensor], a: AddNorm) -> dict[str, Tensor]:
    x, residual = a.summands(kept[0])
    dx = fresh(a.x.new_empty(a.x.shape))
    same = a.residual.dtype == a.x.dtype
    dresidual = dx if same else fresh(a.residual.new_empty(a.x.shape))
    found = {"x": dx, "residual": dresidual, **_sums(a)}
    if dx.numel() > 0:
        library.call(
            "norm_backward",
            NORM,
            **_inputs(a, x),
            residual=None if residual is None else _rows(residual),
            dy=_rows(grads[0]),
            dr=_rows(grads[1]),
            dx=_rows(dx),
            dresidual=None if same else _rows(dresidual),
            dweight=found["weight"],
            dbias=found["bias"],
        )
    return found


def _gated(a: GatedNorm) -> list[Tensor]:
    y = fresh(a.x.new_empty(a.x.shape, dtype=a.dtype))
    if y.numel() > 0:
        library.call("norm", NORM, **_inputs(a, a.x), **_gate(a), y=_rows(y))
    return [y]


def _gated_backward(grads: list[Tensor], kept: list[Tensor], a: GatedNorm) -> dict[str, Tensor]:
    found = {"x": fresh(a.x.new_empty(a.x.shape)), **_sums(a)}
    if a.z is not None:
        found["z"] = fresh(a.z.new_empty(a.x.shape))
    if a.x.numel() > 0:
        library.call(
            "norm_backward",
            NORM,
            **_inputs(a, a.x),
            **_gate(a),
            dy=_rows(grads[0]),
            dx=_rows(found["x"]),
            dz=None if a.z is None else _rows(found["z"]),
            dweight=found["weight"],
            dbias=found["bias"],
        )
    return found


def _inputs(a: AddNorm | GatedNorm, x: Tensor) -> dict[str, Any]:
    """The fields of ``Norm`` that all four calls read."""
    dtype, width = a.inside, len(a.weight)
    return {
        "dtype": dtype,
        "rows": x.numel() // width,
        "width": width,
        "groups": a.groups if isinstance(a, GatedNorm) else 1,
        "center": a.center,
        "eps": a.eps,
        "x": _rows(x),
        "weight": a.weight.to(dtype).contiguous(),
        "bias": None if a.bias is None else a.bias.to(dtype).contiguous(),
    }


def _gate(a: GatedNorm) -> dict[str, Any]:
    return {"z": None if a.z is None else _rows(a.z), "norm_before_gate": a.norm_before_gate}


def _sums(a: AddNorm | GatedNorm) -> dict[str, Tensor]:
    """Memory for the gradients of the weight and the bias."""
    return {name: a.weight.new_zeros(len(a.weight), dtype=a.inside) for name in ("weight", "bias")}


def _rows(m: Tensor) -> Tensor:
    """``(rows, D)``, where a row is contiguous."""
    m = m if m.dim() == 2 else m.reshape(-1, m.shape[-1])
    return readable(m)


def _refuses(a: AddNorm | GatedNorm) -> str | None:
    dtypes = {a.dtype, a.residual_dtype} if isinstance(a, AddNorm) else {a.dtype}
    strange = dtypes - DTYPES.keys()
    return f"it cannot round to {strange.pop()}" if strange else None


add_norm_op.add(
    Backend(
        "native",
        _add,
        _add_backward,
        devices=("cpu",),
        refuses=_refuses,
        missing=library.why_missing,
        unread=lambda a: a.unread(),
    )
)
gated_norm_op.add(
    Backend("native", _gated, _gated_backward, devices=("cpu",), refuses=_refuses, missing=library.why_missing)
)
