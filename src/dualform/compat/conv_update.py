"""``causal_conv1d_update`` of causal-conv1d: steps of the convolution that write the caller's state in place."""

import torch
from torch import Tensor

from dualform.compat.layout import time_last, time_second
from dualform.ops.causal_conv1d import causal_conv1d_update as update
from dualform.ops.op import backend


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
    several = isinstance(x, Tensor) and x.dim() == 3
    y, _ = update(
        time_second(x) if several else x,
        conv_state,
        weight,
        bias,
        activation=activation,
        out_state=conv_state,
        rows=conv_state_indices,
        cache_seqlens=cache_seqlens,
    )
    return time_last(y, x) if several else y


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
