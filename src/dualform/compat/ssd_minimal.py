"""``ssd_minimal_discrete`` of mamba-ssm: the scan of Mamba-2 with decays and inputs that are discrete already."""

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.shapes import check_tensors
from dualform.ops.linear_scan import linear_scan

_WHERE = "ssd_minimal_discrete"


def ssd_minimal_discrete(
    X: Tensor, A: Tensor, B: Tensor, C: Tensor, block_len: int, initial_states: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``h_t = exp(A_t) h_{t-1} + X_t B_t^T``, ``y_t = h_t C_t``. All states are held: it is for small examples.

    Args:
        X: ``(B, T, H, P)``.
        A: ``(B, T, H)``, logarithms of the decays.
        B: ``(B, T, H, N)``.
        C: ``(B, T, H, N)``.
        block_len: changes nothing here.
        initial_states: ``(B, 1, H, P, N)``, zero by default.

    Returns:
        y ``(B, T, H, P)``, and the final states ``(B, H, P, N)``.

    Raises:
        ArgumentError: for shapes that do not fit together, or a block without steps.
    """
    if block_len < 1:
        raise ArgumentError(f"{_WHERE}: block_len is {block_len}, expected at least 1")
    check_tensors(
        _WHERE,
        X=(X, "B T H P"),
        A=(A, "B T H"),
        B=(B, "B T H N"),
        C=(C, "B T H N"),
        initial_states=(initial_states, "? B 1 H P N"),
    )
    inputs = X[..., None] * B[..., None, :]
    start = None if initial_states is None else initial_states[:, 0]
    h, final = linear_scan(A.exp()[..., None, None].expand_as(inputs), inputs, start)
    return torch.einsum("bthpn,bthn->bthp", h, C).to(X.dtype), final
