"""The one-step updates in Triton, each a single pass over its state."""

import torch
from torch import Tensor

from dualform.ops.causal_conv1d import ConvUpdate, conv_update_op
from dualform.ops.layout import inner_contiguous
from dualform.ops.selective_scan import SelectiveUpdate, selective_update_op
from dualform.ops.triton.support import add_backend, blocks, kernels, power_of_two

_MOST_STATES = 256
_ELEMENTS = 1024  # of the states of a program


def _selective(a: SelectiveUpdate) -> list[Tensor]:
    inner, by_head = a.x.shape, a.by_head
    y, after = a.x.new_empty(inner), _next_state(a.state, a.out_state)
    if y.numel() == 0:
        return [y, after]
    rows, states, per_head = inner[0], a.state.shape[-1], inner[2] if by_head else 1
    width = inner.numel() // rows
    state, x, dt, B, C = _row(a.state), _row(a.x), _row(a.dt), inner_contiguous(a.B), inner_contiguous(a.C)
    z, A, bias = None if a.z is None else _row(a.z), a.A.contiguous(), _like(a.dt_bias, a.dt)
    D, per_skip = _skip(a)
    padded = power_of_two(states)
    channels = min(max(1, _ELEMENTS // padded), power_of_two(width))
    kernels("step").selective_state_update[(rows * blocks(width, channels),)](
        state, x, dt, A, B, C, D, z, bias, y, after, width, per_head, per_skip,
        width // B.shape[1], width // C.shape[1], state.stride(0), x.stride(0), dt.stride(0),
        0 if z is None else z.stride(0), B.stride(0), B.stride(1), C.stride(0), C.stride(1), after.stride(0),
        SOFTPLUS=a.dt_softplus, BY_HEAD=by_head, N=states, NP=padded, BD=channels,
    )  # fmt: skip
    return [y, after]


def _refuses(a: SelectiveUpdate) -> str | None:
    if not 0 < a.state.shape[-1] <= _MOST_STATES:
        return f"N is {a.state.shape[-1]}, expected 1 to {_MOST_STATES}"
    return a.broadcast


def _convolve(a: ConvUpdate) -> list[Tensor]:
    y, after = a.x.new_empty(a.x.shape), _next_state(a.state, a.out_state)
    if y.numel() == 0:
        return [y, after]
    (rows, width), taps = a.x.shape, a.weight.shape[1]
    x, state, weight = _row(a.x), _row(a.state), a.weight.contiguous()
    bias = None if a.bias is None else a.bias.contiguous()
    channels = min(256, power_of_two(width))
    kernels("step").causal_conv1d_update[(rows * blocks(width, channels),)](
        x, state, weight, bias, y, after, width, x.stride(0), state.stride(0), after.stride(0),
        SILU=a.silu, W=taps, BD=channels,
    )  # fmt: skip
    return [y, after]


def _next_state(state: Tensor, out_state: Tensor | None) -> Tensor:
    """The caller's memory for the next state, where a kernel can write to it, or new memory."""
    if out_state is not None and inner_contiguous(out_state, out_state.dim() - 1) is out_state:
        return out_state
    return state.new_empty(state.shape, dtype=torch.promote_types(state.dtype, torch.float32))


def _row(x: Tensor) -> Tensor:
    """``x`` with every row contiguous; slices of a projection pass without a copy."""
    return inner_contiguous(x, x.dim() - 1)


def _like(m: Tensor | None, x: Tensor) -> Tensor | None:
    """``m`` for every entry of a row of x."""
    if m is None:
        return None
    shape = x.shape[1:]
    return m.contiguous() if m.shape == shape else m.expand(shape).contiguous()


def _skip(a: SelectiveUpdate) -> tuple[Tensor | None, int]:
    """D, and how many neighbouring channels share an entry of it."""
    if a.D is not None and a.x.dim() == 3 and a.D.shape == (a.x.shape[1], 1):
        return a.D.contiguous(), a.x.shape[2]
    return _like(a.D, a.x), 1


add_backend(selective_update_op, forward=_selective, refuses=_refuses)
add_backend(conv_update_op, forward=_convolve)
