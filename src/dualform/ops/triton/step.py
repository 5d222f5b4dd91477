"""The one-step updates in Triton, each a single pass over its state."""

import torch
from torch import Tensor

from dualform.ops.step import add_step, has_rates_by_state
from dualform.ops.triton.support import DEVICES, blocks, kernels, missing, power_of_two

_STATES = (torch.float32, torch.float64)
_MOST_STATES = 256
_ELEMENTS = 1024  # of the states of a program


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
    shape, inner, matrix = state.shape, x.shape, has_rates_by_state(state, x, dt, A)
    if (
        matrix is None
        or x.device.type not in DEVICES
        or (z is not None and z.shape != inner)
        or B.is_complex()
        or C.is_complex()
        or state.numel() == 0
        or shape[-1] > _MOST_STATES
    ):
        return None
    rows, width, states = shape[0], inner.numel() // shape[0], shape[-1]
    x, dt = _rows(x), _rows(dt)
    z = None if z is None else _rows(z)
    B, C = (m if m.stride(-1) == 1 else m.contiguous() for m in (B, C))
    skip, bias = _like(D, inner), _like(dt_bias, dt.shape)
    state, A = state.contiguous(), A.contiguous()
    y, after = x.new_empty(inner), state.new_empty(shape)
    padded = power_of_two(states)
    channels = min(max(1, _ELEMENTS // padded), power_of_two(width))
    kernels("step").selective_state_update[(rows * blocks(width, channels),)](
        state, x, dt, A, B, C, skip, z, bias, y, after, width, 1 if matrix else shape[2],
        width // B.shape[1], width // C.shape[1], x.stride(0), dt.stride(0), 0 if z is None else z.stride(0),
        B.stride(0), B.stride(1), C.stride(0), C.stride(1),
        SOFTPLUS=dt_softplus, BY_HEAD=not matrix, N=states, NP=padded, BD=channels,
    )  # fmt: skip
    return y, after


def causal_conv1d_update(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor] | None:
    """``(B, D)`` and ``(B, D, W-1)``."""
    if (
        x.device.type not in DEVICES
        or state.dtype not in _STATES
        or state.shape != (*x.shape, weight.shape[1] - 1)
        or x.numel() == 0
    ):
        return None
    x, state, weight, (rows, width) = _rows(x), state.contiguous(), weight.contiguous(), x.shape
    bias = None if bias is None else bias.contiguous()
    y, after = x.new_empty(x.shape), state.new_empty(state.shape)
    channels = min(256, power_of_two(width))
    kernels("step").causal_conv1d_update[(rows * blocks(width, channels),)](
        x, state, weight, bias, y, after, width, x.stride(0), SILU=silu, W=weight.shape[1], BD=channels
    )
    return y, after


def _rows(x: Tensor) -> Tensor:
    """``x`` with contiguous rows; slices of a projection pass without a copy."""
    return x if x[0].is_contiguous() else x.contiguous()


def _like(m: Tensor | None, shape: torch.Size) -> Tensor | None:
    """``m`` for every entry of a row."""
    return None if m is None else m.expand(shape[1:]).contiguous()


if not missing:
    add_step("selective_state_update", "triton", selective_state_update)
    add_step("causal_conv1d_update", "triton", causal_conv1d_update)
