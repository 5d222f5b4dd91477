"""The diagonal state space model on a CPU: its recurrence, without a kernel and without a Fourier transform."""

import torch
from torch import Tensor

from dualform.ops.diagonal_ssm import diagonal_ssm_op
from dualform.ops.native import library
from dualform.ops.native.library import NO_VIEW, readable, sequences, view
from dualform.ops.op import Backend

_TILE = 64  # DIAGONAL_SSM_TILE in native/dualform.h


def _run(keep: bool, u: Tensor, Abar: Tensor, CB: Tensor, h0: Tensor, cu_seqlens: Tensor | None) -> list[Tensor]:
    y, final = u.new_empty(u.shape), h0.clone(memory_format=torch.contiguous_format)
    saved = _saved(u, Abar, CB, h0, cu_seqlens) if keep else []
    if u.numel() == 0 or h0.numel() == 0:
        return [y.zero_(), final, *saved]
    given, fields = _fields(u, Abar, CB, h0, cu_seqlens)
    kept = saved[0].data_ptr() if keep else 0
    library.call("diagonal_ssm", *fields, *view(y), final.data_ptr(), kept, *NO_VIEW, 0, *NO_VIEW, 0, 0, 0)
    del given
    return [y, final, *saved]


def _forward(*args) -> list[Tensor]:
    return _run(True, *args)


def _infer(*args) -> list[Tensor]:
    return _run(False, *args)


def _saved(u: Tensor, Abar: Tensor, CB: Tensor, h0: Tensor, cu_seqlens: Tensor | None) -> list[Tensor]:
    return [h0.real.new_empty(u.shape[0], -(-u.shape[1] // _TILE), h0.shape[2], 2, h0.shape[1])]


def _backward(
    grads: list[Tensor],
    kept: list[Tensor],
    u: Tensor,
    Abar: Tensor,
    CB: Tensor,
    h0: Tensor,
    cu_seqlens: Tensor | None,
) -> list[Tensor]:
    found = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (u, Abar, CB)]
    du, dA, dC = found
    dh0 = grads[1].clone()
    if u.numel() == 0 or h0.numel() == 0:
        return [*(g.zero_() for g in found), dh0]
    given, fields = _fields(u, Abar, CB, h0, cu_seqlens)
    library.call(
        "diagonal_ssm_backward",
        *fields,
        *NO_VIEW,
        0,
        kept[0].data_ptr(),
        *view(grads[0]),
        grads[1].data_ptr(),
        *view(du),
        dA.data_ptr(),
        dC.data_ptr(),
        dh0.data_ptr(),
    )
    del given
    return [*found, dh0]


def _fields(
    u: Tensor, Abar: Tensor, CB: Tensor, h0: Tensor, cu_seqlens: Tensor | None
) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
    """What the kernels are given, to be kept alive, and the first fields of ``DiagonalSSM``."""
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
    u, Abar, CB, h0 = readable(u), *(x.resolve_conj().contiguous() for x in (Abar, CB, h0))
    fields = (
        library.number(h0.real),
        *sequences(u, cu_seqlens),
        *Abar.shape,
        *view(u),
        Abar.data_ptr(),
        CB.data_ptr(),
        h0.data_ptr(),
    )
    return (u, Abar, CB, h0, cu_seqlens), fields


diagonal_ssm_op.add(Backend("native", _forward, _backward, _infer, _saved, devices=("cpu",), missing=library.missing))
