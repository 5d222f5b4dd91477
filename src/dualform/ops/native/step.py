"""The one-step updates on a CPU, each a single pass over its state."""

import torch
from torch import Tensor

from dualform.ops.causal_conv1d import ConvUpdate, conv_update_op
from dualform.ops.native import library
from dualform.ops.native.library import readable
from dualform.ops.native.structs import CONV_UPDATE, DTYPES, SELECTIVE_UPDATE
from dualform.ops.op import Backend
from dualform.ops.selective_scan import SelectiveUpdate, selective_update_op


def _selective(a: SelectiveUpdate) -> list[Tensor]:
    shape, dtype, inner, by_head = a.state.shape, a.state.dtype, a.x.shape, a.by_head
    state, x, dt, B, C = a.state.contiguous(), _rows(a.x), _rows(a.dt), _rows(a.B), _rows(a.C)
    y, after = torch.empty(inner, dtype=a.x.dtype), _after(a.out_state, state)
    if y.numel() > 0:
        library.call(
            "selective_update",
            SELECTIVE_UPDATE,
            dtype=dtype,
            rows=shape[0],
            width=inner.numel() // shape[0],
            states=shape[-1],
            groups_b=B.shape[1],
            groups_c=C.shape[1],
            per=shape[2] if by_head else 1,
            matrix=not by_head,
            softplus=a.dt_softplus,
            gated=a.z is not None,
            h=state,
            x=x,
            dt=dt,
            a=a.A.contiguous(),
            b=B,
            c=C,
            d=_like(a.D, x, dtype),
            z=None if a.z is None else _rows(a.z),
            dt_bias=_like(a.dt_bias, dt, dtype),
            y=y,
            next=after,
        )
    return [y, after]


def _conv(a: ConvUpdate) -> list[Tensor]:
    dtype, state = a.state.dtype, a.state.contiguous()
    y, after = torch.empty(a.x.shape, dtype=a.x.dtype), _after(a.out_state, state)
    if y.numel() > 0:
        library.call(
            "conv_update",
            CONV_UPDATE,
            dtype=dtype,
            rows=len(y),
            width=a.weight.shape[0],
            taps=a.weight.shape[1],
            silu=a.silu,
            x=_rows(a.x),
            h=state,
            weight=a.weight.to(dtype).contiguous(),
            bias=None if a.bias is None else a.bias.to(dtype).contiguous(),
            y=y,
            next=after,
        )
    return [y, after]


def _after(out_state: Tensor | None, state: Tensor) -> Tensor:
    """Where the next state goes; a state may be its own successor, as each number is read before it is written."""
    if out_state is not None and out_state.dtype == state.dtype and out_state.is_contiguous():
        return out_state
    return torch.empty_like(state)


def _rows(x: Tensor) -> Tensor:
    return x if x.dtype in DTYPES and x.is_contiguous() else readable(x, x.dim() - 1)


def _like(m: Tensor | None, x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """``m`` in the shape of a row of x."""
    if m is None:
        return None
    m = m if m.dtype == dtype else m.to(dtype)
    return m if m.shape == x.shape[1:] and m.is_contiguous() else m.expand(x.shape[1:]).contiguous()


selective_update_op.add(
    Backend("native", _selective, devices=("cpu",), refuses=lambda a: a.broadcast, missing=library.why_missing)
)
conv_update_op.add(Backend("native", _conv, devices=("cpu",), missing=library.why_missing))
