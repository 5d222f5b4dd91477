"""The one-step updates on a CPU, each a single pass over its state."""

import torch
from torch import Tensor

from dualform.ops.native import library
from dualform.ops.native.library import readable
from dualform.ops.native.structs import CONV_UPDATE, DTYPES, SELECTIVE_UPDATE
from dualform.ops.step import add_step, has_rates_by_state

_STATES = (torch.float32, torch.float64)


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor] | None:
    """``(B, D, N)`` or ``(B, H, P, N)``; a rate for every state and a step for every channel, or one of each a head."""
    shape, dtype, inner, matrix = state.shape, state.dtype, x.shape, has_rates_by_state(state, x, dt, A)
    if (
        matrix is None
        or (z is not None and (z.dtype != x.dtype or z.shape != inner))
        or not all(_known(m) for m in (state, x, dt, A, B, C, D, z, dt_bias))
        or state.numel() == 0
    ):
        return None
    per = 1 if matrix else shape[2]
    skip, bias = _like(D, x, dtype), _like(dt_bias, dt, dtype)
    x, dt, B, C = _rows(x), _rows(dt), _rows(B), _rows(C)
    z = None if z is None else _rows(z)
    state, A = state.contiguous(), A.contiguous()
    y, after = torch.empty(inner, dtype=x.dtype), torch.empty(shape, dtype=dtype)
    library.call(
        "selective_update",
        SELECTIVE_UPDATE,
        dtype=dtype,
        rows=shape[0],
        width=inner.numel() // shape[0],
        states=shape[-1],
        groups_b=B.shape[1],
        groups_c=C.shape[1],
        per=per,
        matrix=matrix,
        softplus=dt_softplus,
        gated=z is not None,
        h=state,
        x=x,
        dt=dt,
        a=A,
        b=B,
        c=C,
        d=skip,
        z=z,
        dt_bias=bias,
        y=y,
        next=after,
    )
    return y, after


def causal_conv1d_update(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor] | None:
    """``(B, D)`` and ``(B, D, W-1)``."""
    shape, dtype = state.shape, state.dtype
    if (
        dtype not in _STATES
        or shape != (*x.shape, weight.shape[1] - 1)
        or not all(_known(m) for m in (state, x, weight, bias))
        or x.numel() == 0
    ):
        return None
    x, state, weight = _rows(x), state.contiguous(), weight.to(dtype).contiguous()
    bias = None if bias is None else bias.to(dtype).contiguous()
    y, after = torch.empty(x.shape, dtype=x.dtype), torch.empty(shape, dtype=dtype)
    library.call(
        "conv_update",
        CONV_UPDATE,
        dtype=dtype,
        rows=shape[0],
        width=weight.shape[0],
        taps=weight.shape[1],
        silu=silu,
        x=x,
        h=state,
        weight=weight,
        bias=bias,
        y=y,
        next=after,
    )
    return y, after


def _known(x: Tensor | None) -> bool:
    return x is None or (x.is_cpu and x.dtype in DTYPES)


def _rows(x: Tensor) -> Tensor:
    return x if x.is_contiguous() else readable(x, x.dim() - 1)


def _like(m: Tensor | None, x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """``m`` in the shape of a row of x."""
    if m is None:
        return None
    m = m if m.dtype == dtype else m.to(dtype)
    return m if m.shape == x.shape[1:] and m.is_contiguous() else m.expand(x.shape[1:]).contiguous()


if not library.missing:
    add_step("selective_state_update", "native", selective_state_update)
    add_step("causal_conv1d_update", "native", causal_conv1d_update)
