"""``causal_conv1d_fn`` and ``causal_conv1d_varlen_states`` of causal-conv1d."""

import torch
from torch import Tensor

from dualform.compat.layout import check_layout, time_last, time_second, to_the_end
from dualform.core.errors import ArgumentError
from dualform.core.packing import Packing
from dualform.core.shapes import check_tensors
from dualform.ops.causal_conv1d import causal_conv1d
from dualform.ops.op import backend

_WHERE = "causal_conv1d_fn"


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``y_t = act(bias + sum_j weight_j x_{t - (W-1) + j})``, per channel, with time last.

    Args:
        x: ``(B, D, T)``.
        weight: ``(D, W)``.
        bias: ``(D,)``.
        seq_idx: ``(B, T)``, the sequence of each step, which sees its own only; steps with a negative id are padding,
            and their output is 0. A sequence is a run of equal ids.
        initial_states: ``(B, D, W-1)``, the inputs before the first, oldest first; zero by default.
        return_final_states: whether the last W-1 inputs are returned, too.
        final_states_out: memory for them.
        activation: None, "silu" or "swish".

    Returns:
        y ``(B, D, T)`` in the dtype of x; with ``return_final_states`` also the last inputs ``(B, D, W-1)``, so.

    Raises:
        ArgumentError: for shapes, dtypes or an activation that does not fit, and for ``seq_idx`` with states.
    """
    check_layout(_WHERE, weight=(weight, "D W"), x=(x, "B D T"), bias=(bias, "? D"))
    if seq_idx is not None:
        if initial_states is not None or return_final_states:
            raise ArgumentError(
                f"{_WHERE}: seq_idx together with initial_states or return_final_states",
                hint="dualform.ops.causal_conv1d takes and returns one state per sequence, with cu_seqlens",
            )
        y, _ = causal_conv1d(time_second(x), weight, bias, activation=activation, seq_idx=seq_idx)
        return time_last(y, x)
    y, final = causal_conv1d(time_second(x), weight, bias, activation=activation, initial_state=initial_states)
    y = time_last(y, x)
    if not return_final_states:
        return y
    if final_states_out is None:
        return y, final.to(x.dtype)
    check_tensors(_WHERE, final=(final, "B D W"), final_states_out=(final_states_out, "B D W"))
    return y, final_states_out.copy_(final)


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`causal_conv1d_fn` as a plain loop."""
    with backend("reference"):
        return causal_conv1d_fn(
            x, weight, bias, None, initial_states, return_final_states, final_states_out, activation
        )


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last inputs of sequences that are laid end to end, zeros before the first.

    Args:
        x: ``(total, D)``.
        cu_seqlens: ``(n + 1,)``, their cumulative lengths; what lies behind the last one is padding.
        state_len: how many inputs.

    Returns:
        ``(n, D, state_len)``.

    Raises:
        ArgumentError: for shapes that do not fit, or borders that do not rise from 0, or pass the length.
    """
    where = "causal_conv1d_varlen_states"
    check_tensors(where, x=(x, "T D"), cu_seqlens=(cu_seqlens, "*"))
    packing = Packing.of(where, to_the_end(cu_seqlens, len(x)), x[None])
    assert packing is not None
    ends, starts = packing.cu_seqlens[1:-1, None], packing.cu_seqlens[:-2, None]
    steps = ends - state_len + torch.arange(state_len, device=x.device)
    found = x[steps.clamp(min=0)] if x.shape[0] else x.new_zeros(*steps.shape, x.shape[1])
    return found.masked_fill((steps < starts)[..., None], 0).transpose(1, 2)


causal_conv1d_varlen_states_ref = causal_conv1d_varlen_states
