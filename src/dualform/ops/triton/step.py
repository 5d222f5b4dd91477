"""The one-step updates in Triton, each a single pass over its state."""

import math

import torch
from torch import Tensor

from dualform.ops.causal_conv1d import ConvUpdate, conv_update_op
from dualform.ops.layout import inner_contiguous, lay, next_state, time_last
from dualform.ops.selective_scan import SelectiveUpdate, selective_update_op
from dualform.ops.triton.support import add_backend, blocks, early, kernels, power_of_two, processors, warps

MOST_STATES = 256
_ELEMENTS = 1024  # of the states of a program
_MANY = 16384  # bytes of the states of a program, where every processor has so many numbers of them


def selective_update(a: SelectiveUpdate, *, steps: Tensor | None = None, ahead: bool = False) -> list[Tensor]:
    """The step of the scan.

    With ``steps`` ``(D, R)``, dt is ``(B, R)``, of which they make that of each channel. ``ahead`` says that the kernel
    before this one writes neither states nor parameters, which are read while that kernel runs.
    """
    inner, by_head = a.x.shape, a.by_head
    after, given = next_state(a.out_state, a.state, inner[0], a.A.dtype, a.state.dim() - 1)
    y = a.x.new_empty(inner)
    if y.numel() == 0:
        return [y, after]
    rows, states, per_head = inner[0], a.state.shape[-1], inner[2] if by_head else 1
    width = inner.numel() // rows
    state, x, dt, B, C = _row(a.state), _row(a.x), _row(a.dt), inner_contiguous(a.B), inner_contiguous(a.C)
    z, A = None if a.z is None else _row(a.z), a.A.contiguous()
    bias, rank = _like(a.dt_bias, a.dt if steps is None else a.x), 0 if steps is None else steps.shape[1]
    D, per_skip = _skip(a)
    padded = power_of_two(states)
    channels = min(max(1, _ELEMENTS // padded), power_of_two(width))
    kernels("step").selective_state_update[(rows * blocks(width, channels),)](
        state, x, dt, A, B, C, D, z, bias, y, after, _contiguous(a.rows), _contiguous(steps), len(state), width,
        per_head, per_skip, width // B.shape[1], width // C.shape[1], state.stride(0), x.stride(0), dt.stride(0),
        0 if z is None else z.stride(0), B.stride(0), B.stride(1), C.stride(0), C.stride(1), after.stride(0),
        SOFTPLUS=a.dt_softplus, BY_HEAD=by_head, TABLE=given, AHEAD=ahead, RANK=rank, RP=power_of_two(rank), N=states,
        NP=padded, BD=channels, **early(),
    )  # fmt: skip
    return [y, after]


def mamba2_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None, bias: Tensor,
    after: Tensor, dtype: torch.dtype, groups: int, limits: tuple[float, float],
) -> Tensor:  # fmt: skip
    """What a Mamba-2 makes of rows ``(B, H P)``, gated where there is a z: one pass over its states.

    x, B and C are parts of the rows of one tensor, z and dt too. The kernel before this one must not write states or
    parameters, which are read while that runs.
    """
    (rows, heads, width, states), state = state.shape, _row(state)
    y, padded = x.new_empty(rows, heads * width, dtype=dtype), power_of_two(states)
    if y.numel() == 0:
        return y
    many = state.numel() >= _MANY * processors(state)
    elements = _MANY // state.element_size() if many else _ELEMENTS
    channels = min(max(1, elements // padded), power_of_two(width))
    kernels("step").mamba2_update[(rows * heads * blocks(width, channels),)](
        state, x, dt, A.contiguous(), B, C, D.contiguous(), z, bias.contiguous(), y, after,
        heads, width, heads // groups, state.stride(0), x.stride(0), dt.stride(0), after.stride(0),
        LIMITED=limits != (0.0, math.inf), LOW=limits[0], HIGH=limits[1], N=states, NP=padded, BD=channels,
        num_warps=warps(256 if many else 128), **early(),
    )  # fmt: skip
    return y


def _refuses(a: SelectiveUpdate) -> str | None:
    if not 0 < a.state.shape[-1] <= MOST_STATES:
        return f"N is {a.state.shape[-1]}, expected 1 to {MOST_STATES}"
    return a.broadcast


def convolve(a: ConvUpdate, *, ahead: bool = False) -> list[Tensor]:
    """The step of the convolution; ``ahead`` as in :func:`selective_update`."""
    after, given = next_state(a.out_state, a.state, len(a.x), a.dtype)
    y, state, steps, size = a.x.new_empty(a.x.shape), a.state, a.steps, a.state.shape[2]
    if y.numel() == 0:
        return list(conv_update_op.reference(a))
    x, weight = inner_contiguous(a.x), a.weight.contiguous()
    rows, width, taps = len(x), *weight.shape
    channels = min(256, power_of_two(width))
    kernels("step").causal_conv1d_update[(rows * blocks(width, channels),)](
        x, state, weight, _contiguous(a.bias), y, after, _contiguous(a.rows), _contiguous(a.cache_seqlens),
        width, steps, size, len(state),
        x.stride(0), x.stride(-2), *state.stride(), *after.stride(),
        SILU=a.silu, W=taps, BD=channels, DOUBLE=a.dtype == torch.float64, TABLE=given,
        RENEW=given and a.cache_seqlens is not None and after is state, AHEAD=ahead,
        KEPT=size == taps - 1 and a.cache_seqlens is None, **early(),
    )  # fmt: skip
    return [lay(y, time_last(a.x)), after]


def add(stream: Tensor, y: Tensor) -> Tensor:
    """The residual stream and what a block adds to it, in the dtype of the stream."""
    found = torch.empty_like(stream, memory_format=torch.contiguous_format)
    if found.numel() > 0:
        grid = (blocks(found.numel(), _ELEMENTS),)
        kernels("step").add[grid](stream.contiguous(), y.contiguous(), found, found.numel(), BLOCK=_ELEMENTS, **early())
    return found


def _contiguous(m: Tensor | None) -> Tensor | None:
    return None if m is None else m.contiguous()


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


add_backend(selective_update_op, forward=selective_update, refuses=_refuses)
add_backend(conv_update_op, forward=convolve)
