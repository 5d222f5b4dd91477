"""The first-order linear recurrence, elementwise: S5, LRU, gated linear units and every diagonal SSM are one."""

import torch
from torch import Tensor

from dualform.core.elements import Affine, combine_affine
from dualform.core.errors import ArgumentError
from dualform.core.packing import each_alone
from dualform.core.scan import associative_scan
from dualform.core.shapes import check_floating, check_tensors, wide
from dualform.ops.op import Backend, Op
from dualform.ops.state import initial


def linear_scan(
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run ``h_t = a_t h_{t-1} + b_t``, elementwise; real or complex.

    Args:
        a: ``(B, T, ...)``, decays; broadcast against ``b``.
        b: ``(B, T, ...)``, inputs.
        initial_state: ``(B, ...)``, zero by default; with ``cu_seqlens`` one row per sequence.
        cu_seqlens: ``(n + 1,)``, cumulative lengths of sequences packed on the time axis; B is then 1.
        reverse: run from the last element to the first, ``h_t = a_t h_{t+1} + b_t``.

    Returns:
        h ``(B, T, ...)`` in the dtype of the inputs, and the final state ``(B, ...)``, float32 or wider: h after the
        last element, or with ``reverse`` after the first.

    Raises:
        ArgumentError: for shapes, dtypes or devices that do not fit together.
    """
    check_tensors("linear_scan", a=(a, "* * ..."), b=(b, "B T ..."))
    check_floating("linear_scan", a=a, b=b)
    try:
        a, b = torch.broadcast_tensors(a, b)
    except RuntimeError:
        raise ArgumentError(
            f"linear_scan: a has shape {tuple(a.shape)} and b {tuple(b.shape)}, expected shapes that broadcast"
        ) from None
    dtype = wide(a, b, initial_state)
    h0 = initial("linear_scan", initial_state, cu_seqlens, b, tuple(b.shape[2:]), dtype)
    h, final = linear_scan_op(a, b, h0, cu_seqlens, reverse)
    return h, final


def _reference(
    a: Tensor, b: Tensor, initial_state: Tensor, cu_seqlens: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    def run(a: Tensor, b: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        hs: list[Tensor] = []
        for t in reversed(range(a.shape[1])) if reverse else range(a.shape[1]):
            h = a[:, t] * h + b[:, t]
            hs.append(h)
        return torch.stack(hs[::-1] if reverse else hs, 1) if hs else (a * b).to(h.dtype), h.clone()

    h, final = each_alone(run, cu_seqlens, initial_state, a, b)
    return h.to(_out_dtype(a, b, initial_state)), final


def scan(a: Tensor, b: Tensor, h: Tensor, *, dim: int = 1, reverse: bool = False, overwrite: bool = False) -> Tensor:
    """``h_t = a_t h_{t-1} + b_t`` for every t along ``dim``, from the state ``h``; one dtype, no autograd.

    On a CPU a loop over time does the least work at memory speed; elsewhere the scan of logarithmic depth wins.
    With ``overwrite`` the memory of ``b`` may be used for the result.
    """
    out = b if overwrite else torch.empty_like(b, memory_format=torch.contiguous_format)
    length = b.shape[dim]
    if b.device.type == "cpu" or length == 1:
        steps = zip(a.unbind(dim), b.unbind(dim), out.unbind(dim), strict=True)
        for at, bt, to in reversed(list(steps)) if reverse else steps:
            h = torch.addcmul(bt, at, h, out=to)
        return out
    a, b = a.movedim(dim, 1), (b if overwrite else b.clone()).movedim(dim, 1)
    edge = length - 1 if reverse else 0
    b[:, edge] += a[:, edge] * h
    return associative_scan(combine_affine, Affine(a, b), reverse=reverse).b.movedim(1, dim).contiguous()


def _borders(cu_seqlens: Tensor, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Which sequences are not empty, and where each of those begins and ends in the direction of the scan."""
    full = cu_seqlens.diff() > 0
    first, last = cu_seqlens[:-1][full].long(), cu_seqlens[1:][full].long() - 1
    return (full, last, first) if reverse else (full, first, last)


def _forward(a: Tensor, b: Tensor, h0: Tensor, cu_seqlens: Tensor | None, reverse: bool) -> list[Tensor]:
    out = _out_dtype(a, b, h0)
    a, b = a.to(h0.dtype), b.to(h0.dtype)
    if b.shape[1] == 0:
        return [b.new_empty(b.shape, dtype=out), h0.clone()]
    if cu_seqlens is None:
        h = scan(a, b, h0, reverse=reverse)
        final = h[:, 0 if reverse else -1].clone()
    else:
        full, begin, end = _borders(cu_seqlens, reverse)
        a, b = a.clone(), b.clone()
        b[0, begin] += a[0, begin] * h0[full]
        a[0, begin] = 0
        h = scan(a, b, torch.zeros_like(h0[:1]), reverse=reverse)
        final = h0.clone()
        final[full] = h[0, end]
    return [h.to(out), final]


def _backward(
    grads: list[Tensor], kept: list[Tensor], a: Tensor, b: Tensor, h0: Tensor, cu_seqlens: Tensor | None, reverse: bool
) -> list[Tensor]:
    """With ``g_t = dL/dh_t`` in full: ``g_t = dh_t + conj(a_{t+1}) g_{t+1}``, the same scan run backwards."""
    if b.shape[1] == 0:
        return [torch.zeros_like(a), torch.zeros_like(b), grads[1].clone()]
    dh, dfinal = grads[0].to(h0.dtype, copy=True), grads[1]
    (h,), conj_a, back = kept, a.to(h0.dtype).conj(), -1 if reverse else 1
    after, before = conj_a.roll(-back, 1).clone(), h.to(h0.dtype).roll(back, 1)
    if cu_seqlens is None:
        full, begin, end = slice(None), -1 if reverse else 0, 0 if reverse else -1
        rows: slice | int = slice(None)
    else:
        full, begin, end = _borders(cu_seqlens, reverse)
        rows = 0
    dh[rows, end] += dfinal[full]
    after[rows, end] = 0
    before[rows, begin] = h0[full]
    g = scan(after, dh, torch.zeros_like(h0[: len(dh)]), reverse=not reverse)
    dh0 = dfinal.clone()
    dh0[full] = conj_a[rows, begin] * g[rows, begin]
    return [as_grad(g * before.conj(), a), as_grad(g, b), as_grad(dh0, h0)]


def as_grad(g: Tensor, of: Tensor) -> Tensor:
    """A gradient in the dtype of its tensor; the real part where the tensor is real."""
    g = g.real if g.is_complex() and not of.is_complex() else g
    return g.to(of.dtype).contiguous()


def _out_dtype(a: Tensor, b: Tensor, h0: Tensor) -> torch.dtype:
    dtype = torch.promote_types(a.dtype, b.dtype)
    return torch.promote_types(dtype, h0.dtype) if h0.is_complex() else dtype


def _fake(a: Tensor, b: Tensor, h0: Tensor, cu_seqlens: Tensor | None, reverse: bool) -> list[Tensor]:
    return [b.new_empty(b.shape, dtype=_out_dtype(a, b, h0)), h0.new_empty(h0.shape)]


linear_scan_op = Op("linear_scan", _reference, fake=_fake, keeps=(0,))
linear_scan_op.add(Backend("torch", _forward, _backward))
