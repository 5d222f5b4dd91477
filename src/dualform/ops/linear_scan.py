"""The first-order linear recurrence, elementwise: S5, LRU, gated linear units and every diagonal SSM are one."""

from typing import NamedTuple

import torch
from torch import Tensor

from dualform.core.elements import Affine, combine_affine
from dualform.core.errors import ArgumentError
from dualform.core.packing import Borders, Packing, each_alone
from dualform.core.scan import associative_scan
from dualform.core.shapes import check_floating, check_tensors, once_per_shape, wide
from dualform.ops.op import Backend, Op
from dualform.ops.state import check_state, initial

_WHERE = "linear_scan"


def linear_scan(
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None = None,
    *,
    cu_seqlens: Borders = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run ``h_t = a_t h_{t-1} + b_t``, elementwise; real or complex.

    Args:
        a: ``(B, T, ...)``, decays; broadcast against ``b``.
        b: ``(B, T, ...)``, inputs.
        initial_state: ``(B, ...)``, zero by default; with ``cu_seqlens`` one row per sequence.
        cu_seqlens: ``(n + 1,)``, cumulative lengths of sequences packed on the time axis, or a ``Packing`` that was
            made of them; B is then 1.
        reverse: run from the last element to the first, ``h_t = a_t h_{t+1} + b_t``.

    Returns:
        h ``(B, T, ...)`` in the dtype of the inputs, and the final state ``(B, ...)``, float32 or wider: h after the
        last element, or with ``reverse`` after the first.

    Raises:
        ArgumentError: for shapes, dtypes or devices that do not fit together.
    """
    _check_inputs(a, b)
    if a.shape != b.shape:
        try:
            a, b = torch.broadcast_tensors(a, b)
        except RuntimeError:
            raise ArgumentError(
                f"{_WHERE}: a has shape {tuple(a.shape)} and b {tuple(b.shape)}, expected shapes that broadcast"
            ) from None
    packing, dtype = Packing.of(_WHERE, cu_seqlens, b), wide(a, b, initial_state)
    h0 = initial(_WHERE, initial_state, packing, b, tuple(b.shape[2:]), dtype)
    h, final = linear_scan_op(LinearScan(a, b, h0, packing, bool(reverse)))
    return h, final


class LinearScan(NamedTuple):
    """The arguments of the operator, as in :func:`linear_scan`; a and b have one shape."""

    a: Tensor  # (B, T, ...)
    b: Tensor  # (B, T, ...)
    h0: Tensor  # (rows, ...)
    packing: Packing | None
    reverse: bool

    @property
    def out_dtype(self) -> torch.dtype:
        """That of h."""
        dtype = torch.promote_types(self.a.dtype, self.b.dtype)
        return torch.promote_types(dtype, self.h0.dtype) if self.h0.is_complex() else dtype


@once_per_shape
def _check_inputs(a: Tensor, b: Tensor) -> None:
    check_tensors(_WHERE, a=(a, "* * ..."), b=(b, "* * ..."))
    check_floating(_WHERE, a=a, b=b)


def _check(a: LinearScan) -> None:
    _check_inputs(a.a, a.b)
    if a.a.shape != a.b.shape:
        raise ArgumentError(f"{_WHERE}: a has shape {tuple(a.a.shape)}, expected that of b, {tuple(a.b.shape)}")
    check_state(_WHERE, "the initial state", a.h0, a.packing, a.b, tuple(a.b.shape[2:]))
    if a.h0.dtype != wide(a.a, a.b, a.h0):
        raise ArgumentError(f"{_WHERE}: the state is {a.h0.dtype}, expected {wide(a.a, a.b, a.h0)}")


def _reference(args: LinearScan) -> tuple[Tensor, Tensor]:
    def run(a: Tensor, b: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        hs: list[Tensor] = []
        for t in reversed(range(a.shape[1])) if args.reverse else range(a.shape[1]):
            h = a[:, t] * h + b[:, t]
            hs.append(h)
        return torch.stack(hs[::-1] if args.reverse else hs, 1) if hs else (a * b).to(h.dtype), h.clone()

    h, final = each_alone(run, args.packing, args.h0, args.a, args.b)
    return h.to(args.out_dtype), final


def scan(
    a: Tensor,
    b: Tensor,
    h: Tensor,
    *,
    dim: int = 1,
    reverse: bool = False,
    overwrite: bool = False,
    starts: Tensor | None = None,
) -> Tensor:
    """``h_t = a_t h_{t-1} + b_t`` for every t along ``dim``, from the state ``h``; one dtype, no autograd.

    On a CPU a loop over time does the least work at memory speed; elsewhere the scan of logarithmic depth wins.

    Args:
        a: decays.
        b: inputs.
        h: the state before the first step.
        dim: of time; 0 or 1.
        reverse: from the last step to the first.
        overwrite: the memory of ``b`` may be used for the result.
        starts: steps of which nothing before is remembered, whatever it was: not even a NaN.
    """
    out = b if overwrite else torch.empty_like(b, memory_format=torch.contiguous_format)
    length = b.shape[dim]
    if b.device.type == "cpu" or length == 1:
        fresh = set() if starts is None else set(starts.tolist())
        steps = list(enumerate(zip(a.unbind(dim), b.unbind(dim), out.unbind(dim), strict=True)))
        for t, (at, bt, to) in reversed(steps) if reverse else steps:
            h = to.copy_(bt) if t in fresh else torch.addcmul(bt, at, h, out=to)
        return out
    a, b = a.movedim(dim, 1), (b if overwrite else b.clone()).movedim(dim, 1)
    edge = length - 1 if reverse else 0
    if starts is None:
        b[:, edge] += a[:, edge] * h
        return associative_scan(combine_affine, Affine(a, b), reverse=reverse).b.movedim(1, dim).contiguous()
    fresh = torch.zeros(length, dtype=torch.bool, device=b.device).index_fill_(0, starts, True)
    fresh = fresh.view(1, length, *[1] * (b.dim() - 2))
    b[:, edge] += torch.where(fresh[:, edge], 0, a[:, edge] * h)
    return associative_scan(_combine_fresh, _Fresh(fresh, a, b), reverse=reverse).b.movedim(1, dim).contiguous()


class _Fresh(NamedTuple):
    """The map ``h -> a h + b``, or ``h -> b`` where it is fresh."""

    fresh: Tensor
    a: Tensor
    b: Tensor


def _combine_fresh(earlier: _Fresh, later: _Fresh) -> _Fresh:
    both = combine_affine(Affine(earlier.a, earlier.b), Affine(later.a, later.b))
    a, b = torch.where(later.fresh, later.a, both.a), torch.where(later.fresh, later.b, both.b)
    return _Fresh(earlier.fresh | later.fresh, a, b)


def _borders(packing: Packing, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of sequences that are not empty, and where each begins and ends in the direction of the scan."""
    rows, first, last = packing.not_empty()
    return (rows, last, first) if reverse else (rows, first, last)


def _forward(args: LinearScan) -> list[Tensor]:
    a, b, h0, packing, reverse = args
    a, b = a.to(h0.dtype), b.to(h0.dtype)
    if b.shape[1] == 0:
        return [b.new_empty(b.shape, dtype=args.out_dtype), h0.clone()]
    if packing is None:
        h = scan(a, b, h0, reverse=reverse)
        final = h[:, 0 if reverse else -1].clone()
    else:
        full, begin, end = _borders(packing, reverse)
        a, b = a.clone(), b.clone()
        b[0, begin] += a[0, begin] * h0[full]
        h = scan(a, b, torch.zeros_like(h0[:1]), reverse=reverse, starts=begin)
        final = h0.clone()
        final[full] = h[0, end]
    return [h.to(args.out_dtype), final]


def _backward(grads: list[Tensor], kept: list[Tensor], args: LinearScan) -> dict[str, Tensor]:
    """With ``g_t = dL/dh_t`` in full: ``g_t = dh_t + conj(a_{t+1}) g_{t+1}``, the same scan run backwards."""
    a, b, h0, packing, reverse = args
    if b.shape[1] == 0:
        return {"a": torch.zeros_like(a), "b": torch.zeros_like(b), "h0": grads[1].clone()}
    dh, dfinal = grads[0].to(h0.dtype, copy=True), grads[1]
    (h,), conj_a, back = kept, a.to(h0.dtype).conj(), -1 if reverse else 1
    after, before = conj_a.roll(-back, 1).clone(), h.to(h0.dtype).roll(back, 1)
    rows: slice | int = 0
    if packing is None:
        full, begin, end, starts, rows = slice(None), -1 if reverse else 0, 0 if reverse else -1, None, slice(None)
    else:
        full, begin, end = _borders(packing, reverse)
        starts = end
    dh[rows, end] += dfinal[full]
    before[rows, begin] = h0[full]
    g = scan(after, dh, torch.zeros_like(h0[: len(dh)]), reverse=not reverse, starts=starts)
    dh0 = dfinal.clone()
    dh0[full] = conj_a[rows, begin] * g[rows, begin]
    return {"a": g * before.conj(), "b": g, "h0": dh0}


def _fake(a: LinearScan) -> list[Tensor]:
    return [a.b.new_empty(a.b.shape, dtype=a.out_dtype), a.h0.new_empty(a.h0.shape)]


linear_scan_op = Op(_WHERE, LinearScan, _reference, fake=_fake, check=_check, keeps=(0,))
linear_scan_op.add(Backend("torch", _forward, _backward))
