"""``causal_conv1d_update`` of causal-conv1d: steps of the convolution that write the caller's state in place."""

import torch
from torch import Tensor

from dualform.compat import rows
from dualform.compat.layout import time_second
from dualform.core.errors import ArgumentError
from dualform.core.shapes import check_tensors
from dualform.ops.causal_conv1d import causal_conv1d
from dualform.ops.causal_conv1d import causal_conv1d_update as one_step
from dualform.ops.op import backend

_WHERE = "causal_conv1d_update"


@torch.no_grad()
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """The next steps of a convolution; ``conv_state`` is written in place. No gradient is recorded.

    Args:
        x: ``(B, D)`` for one step, or ``(B, D, T)`` for several.
        conv_state: ``(rows, D, S)``, the last S inputs, at least W-1, oldest first.
        weight: ``(D, W)``.
        bias: ``(D,)``.
        activation: None, "silu" or "swish".
        cache_seqlens: ``(B,)``; conv_state is then a ring, whose next slot is ``cache_seqlens mod S``.
        conv_state_indices: ``(B,)``, the row of conv_state for each row of x; a negative one is padding: the output
            is 0, and no state is written. By default row b of x has row b.

    Returns:
        y, of the shape and dtype of x.

    Raises:
        ArgumentError: for shapes, dtypes or an activation that does not fit, and for a state of fewer than W-1 inputs.
    """
    several = x.dim() == 3
    check_tensors(
        _WHERE,
        weight=(weight, "D W"),
        x=(x, "B D T" if several else "B D"),
        conv_state=(conv_state, "B D S" if conv_state_indices is None else "R D S"),
        bias=(bias, "? D"),
        cache_seqlens=(cache_seqlens, "? B"),
        conv_state_indices=(conv_state_indices, "? B"),
    )
    back, size = weight.shape[1] - 1, conv_state.shape[2]
    if size < back:
        raise ArgumentError(
            f"{_WHERE}: conv_state holds {size} inputs, expected at least {back}: weight has {weight.shape[1]} taps"
        )
    new = x if several else x[..., None]
    state, there = (conv_state, None) if conv_state_indices is None else rows.pick(conv_state, conv_state_indices)
    if cache_seqlens is None:
        past = state[..., size - back :]
        after = torch.cat([state, new.to(state.dtype)], -1)[..., new.shape[2] :]
    else:
        places = cache_seqlens.long()[:, None]
        past = _gather(state, (places - back + torch.arange(back, device=x.device)) % size)
        keep = min(size, new.shape[2])
        newest = torch.arange(new.shape[2] - keep, new.shape[2], device=x.device)
        slots = ((places + newest) % size)[:, None].expand(-1, state.shape[1], -1)
        after = state.scatter(2, slots, new[..., new.shape[2] - keep :].to(state.dtype))
    if new.shape[2] == 1:
        y = one_step(new[..., 0], past, weight, bias, activation=activation)[0][..., None]
    else:
        y = causal_conv1d(time_second(new), weight, bias, activation=activation, initial_state=past)[0].transpose(1, 2)
    if conv_state_indices is None or there is None:
        conv_state.copy_(after)
    else:
        rows.write(conv_state, conv_state_indices, after)
        y = y.masked_fill(~there[:, None, None], 0)
    return y if several else y[..., 0]


@torch.no_grad()
def causal_conv1d_update_ref(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
) -> Tensor:
    """:func:`causal_conv1d_update` in plain PyTorch."""
    with backend("reference"):
        return causal_conv1d_update(x, conv_state, weight, bias, activation, cache_seqlens)


def _gather(state: Tensor, slots: Tensor) -> Tensor:
    """``(B, D, S)`` at slots ``(B, n)`` -> ``(B, D, n)``."""
    return state.gather(2, slots[:, None].expand(-1, state.shape[1], -1))
