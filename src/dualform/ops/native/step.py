"""The one-step updates on a CPU, each a single pass over its state."""

import torch
from torch import Tensor

from dualform.ops.causal_conv1d import ConvUpdate, conv_update_op
from dualform.ops.layout import lay, next_state, time_last
from dualform.ops.native import library
from dualform.ops.native.library import readable
from dualform.ops.native.structs import CONV_UPDATE, DTYPES, SELECTIVE_UPDATE
from dualform.ops.op import Backend
from dualform.ops.selective_scan import SelectiveUpdate, selective_update_op


def _selective(a: SelectiveUpdate) -> list[Tensor]:
    shape, dtype, inner, by_head = a.state.shape, a.A.dtype, a.x.shape, a.by_head
    state, x, dt, B, C = _rows(a.state), _rows(a.x), _rows(a.dt), _rows(a.B), _rows(a.C)
    y, rows = torch.empty(inner, dtype=a.x.dtype), _int64(a.rows)
    after, given = next_state(a.out_state, a.state, inner[0], dtype, len(shape) - 1)
    if y.numel() > 0:
        library.call(
            "selective_update",
            SELECTIVE_UPDATE,
            dtype=dtype,
            rows=inner[0],
            width=inner.numel() // inner[0],
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
            h_rows=state.shape[0],
            next_rows=after.shape[0],
            reads=rows,
            writes=rows if given else None,
        )
    return [y, after]


def _conv(a: ConvUpdate) -> list[Tensor]:
    dtype, state, steps, size = a.dtype, a.state, a.steps, a.state.shape[2]
    if state.dtype not in DTYPES:
        state = state.to(dtype)
    y, rows = torch.empty(a.x.shape, dtype=a.x.dtype), _int64(a.rows)
    after, given = next_state(a.out_state, a.state, y.shape[0], dtype)
    if y.numel() == 0:
        return list(conv_update_op.reference(a))
    library.call(
        "conv_update",
        CONV_UPDATE,
        dtype=dtype,
        rows=y.shape[0],
        length=steps,
        width=a.weight.shape[0],
        taps=a.weight.shape[1],
        size=size,
        renewed=min(steps, size) if a.cache_seqlens is not None and after is state else size,
        silu=a.silu,
        x=readable(a.x),
        h=state,
        weight=_dense(a.weight, dtype),
        bias=_dense(a.bias, dtype),
        y=y,
        next=after,
        h_rows=state.shape[0],
        next_rows=after.shape[0],
        reads=rows,
        writes=rows if given else None,
        seen=_int64(a.cache_seqlens),
    )
    return [lay(y, time_last(a.x)), after]


def _int64(indices: Tensor | None) -> Tensor | None:
    return None if indices is None else indices.to(torch.int64).contiguous()


def _rows(x: Tensor) -> Tensor:
    return x if x.dtype in DTYPES and x.is_contiguous() else readable(x, x.dim() - 1)


def _dense(m: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return m if m is None or (m.dtype == dtype and m.is_contiguous()) else m.to(dtype).contiguous()


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
