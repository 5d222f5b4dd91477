"""The diagonal state space model on a CPU: its recurrence, without a kernel and without a Fourier transform."""

import torch
from torch import Tensor

from dualform.ops.diagonal_ssm import diagonal_ssm_op
from dualform.ops.native import library
from dualform.ops.native.library import NO_VIEW, fresh, readable, sequences, view
from dualform.ops.op import Backend


def _forward(u: Tensor, Abar: Tensor, CB: Tensor, h0: Tensor, cu_seqlens: Tensor | None) -> list[Tensor]:
    y, final = fresh(u.new_empty(u.shape)), h0.clone(memory_format=torch.contiguous_format)
    if u.numel() == 0 or h0.numel() == 0:
        return [y.zero_(), final]
    given, fields = _fields(u, Abar, CB, h0, cu_seqlens)
    library.call("diagonal_ssm", *fields, *view(y), final.data_ptr(), *NO_VIEW, 0, *NO_VIEW, 0, 0, 0)
    del given
    return [y, final]


def _backward(
    grads: list[Tensor],
    kept: list[Tensor],
    u: Tensor,
    Abar: Tensor,
    CB: Tensor,
    h0: Tensor,
    cu_seqlens: Tensor | None,
) -> list[Tensor]:
    du, dh0 = fresh(u.new_empty(u.shape)), grads[1].clone()
    dA, dC = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (Abar, CB))
    if u.numel() == 0 or h0.numel() == 0:
        return [du.zero_(), dA.zero_(), dC.zero_(), dh0]
    given, fields = _fields(u, Abar, CB, h0, cu_seqlens)
    library.call(
        "diagonal_ssm_backward",
        *fields,
        *NO_VIEW,
        0,
        *view(grads[0]),
        grads[1].data_ptr(),
        *view(du),
        dA.data_ptr(),
        dC.data_ptr(),
        dh0.data_ptr(),
    )
    del given
    return [du, dA, dC, dh0]


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


diagonal_ssm_op.add(Backend("native", _forward, _backward, devices=("cpu",), missing=library.missing))
