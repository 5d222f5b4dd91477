"""The norms in Triton: one pass forward; one backward, then a sum over its programs."""

from typing import Any

import torch
from torch import Tensor

from dualform.ops.add_norm import AddNorm, add_norm_op
from dualform.ops.gated_norm import GatedNorm, gated_norm_op
from dualform.ops.layout import inner_contiguous
from dualform.ops.triton.support import add_backend, blocks, early, kernels, power_of_two, processors, warps

_WIDEST = 16384  # features of a slice: more of them do not fit into the registers of a program
_ELEMENTS = 1024  # of a tile, where a slice has fewer
_EACH = 8  # elements of a thread
_THREADS = 512  # a processor runs at least so many at once


def _add(a: AddNorm) -> list[Tensor]:
    y, r = (a.x.new_empty(a.x.shape, dtype=dtype) for dtype in (a.dtype, a.residual_dtype))
    if y.numel() > 0:
        _forward(a, _rows(a.residual), None, y, r)
    return [y, r]


def _add_backward(grads: list[Tensor], kept: list[Tensor], a: AddNorm) -> dict[str, Tensor]:
    x, residual = a.summands(kept[0])
    dx = a.x.new_empty(a.x.shape)
    same = a.residual.dtype == a.x.dtype
    dresidual = dx if same else a.residual.new_empty(a.x.shape)
    residual = None if residual is None else _rows(residual)
    sums = _backward(a, _rows(x), residual, None, [*grads, dx, None if same else dresidual, None])
    return {"x": dx, "residual": dresidual, **sums}


def gated_norm(a: GatedNorm) -> list[Tensor]:
    """The norm with its gate, if there is one."""
    y = a.x.new_empty(a.x.shape, dtype=a.dtype)
    if y.numel() > 0:
        _forward(a, None, None if a.z is None else _rows(a.z), y, None)
    return [y]


def _gated_backward(grads: list[Tensor], kept: list[Tensor], a: GatedNorm) -> dict[str, Tensor]:
    found = {"x": a.x.new_empty(a.x.shape)}
    if a.z is not None:
        found["z"] = a.z.new_empty(a.x.shape)
    z = None if a.z is None else _rows(a.z)
    return {**found, **_backward(a, _rows(a.x), None, z, [grads[0], None, found["x"], None, found.get("z")])}


def _forward(a: AddNorm | GatedNorm, residual: Tensor | None, z: Tensor | None, y: Tensor, r: Tensor | None) -> None:
    x, size, slices = _rows(a.x), *_slices(a)
    options = _options(a)
    kernels("norm").forward[(blocks(len(x), options["R"]) * slices,)](
        x, residual, z, a.weight.contiguous(), _contiguous(a.bias), y, r, len(x), size, slices,
        x.stride(0), _stride(residual), _stride(z), **early(), **options,
    )  # fmt: skip


def _backward(
    a: AddNorm | GatedNorm, x: Tensor, residual: Tensor | None, z: Tensor | None, beside: list[Tensor | None]
) -> dict[str, Tensor]:
    """The gradients of weight and bias; ``beside`` are dy and dr, and memory for dx, dresidual and dz."""
    (size, slices), options = _slices(a), _options(a)
    names = ("weight",) if a.bias is None else ("weight", "bias")
    if x.numel() == 0:
        return {name: a.weight.new_zeros(len(a.weight)) for name in names}
    threads = power_of_two(options["R"] * options["BS"]) // _EACH
    wanted = processors(x) * max(1, 2 * _THREADS // max(32, threads))
    programs = max(1, min(blocks(len(x), options["R"]), wanted // slices))
    sums = x.new_empty(len(names), programs, len(a.weight), dtype=a.inside)
    kernels("norm").backward[(programs * slices,)](
        x, residual, z, a.weight.contiguous(), _contiguous(a.bias), *beside, sums[0], sums[-1], len(x), size, slices,
        x.stride(0), _stride(residual), _stride(z), programs, **options,
    )  # fmt: skip
    return dict(zip(names, sums.sum(1), strict=True))


def _options(a: AddNorm | GatedNorm) -> dict[str, Any]:
    """What the kernels are compiled for."""
    behind = None if isinstance(a, AddNorm) or a.z is None else bool(a.norm_before_gate)
    gate = {"BEFORE": behind is False, "AFTER": behind is True}
    return {"EPS": a.eps, "CENTER": a.center, "WIDE": a.inside == torch.float64, **gate, **_tile(_slices(a)[0])}


def _tile(size: int) -> dict[str, int]:
    """Rows and columns of a tile, and the warps for it."""
    padded = power_of_two(size)
    rows = max(1, _ELEMENTS // padded)
    return {"R": rows, "BS": padded, "num_warps": max(1, warps(min(1024, rows * padded // _EACH)))}


def _slices(a: AddNorm | GatedNorm) -> tuple[int, int]:
    """The features of a slice, and the number of slices."""
    slices = a.groups if isinstance(a, GatedNorm) else 1
    return len(a.weight) // slices, slices


def _rows(m: Tensor) -> Tensor:
    """``(rows, D)``, where a row is contiguous."""
    return inner_contiguous(m.reshape(-1, m.shape[-1]))


def _stride(m: Tensor | None) -> int:
    return 0 if m is None else m.stride(0)


def _contiguous(m: Tensor | None) -> Tensor | None:
    return None if m is None else m.contiguous()


def _refuses(a: AddNorm | GatedNorm) -> str | None:
    size, _ = _slices(a)
    return f"it normalises {size} features together, expected at most {_WIDEST}" if size > _WIDEST else None


add_backend(add_norm_op, forward=_add, backward=_add_backward, refuses=_refuses, unread=lambda a: a.unread())
add_backend(gated_norm_op, forward=gated_norm, backward=_gated_backward, refuses=_refuses)
