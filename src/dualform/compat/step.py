"""``selective_state_update`` of mamba-ssm: one step of either scan, which writes the caller's state in place."""

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.ops.op import backend
from dualform.ops.selective_scan import selective_state_update as update

_WHERE = "selective_state_update"


@torch.no_grad()
def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """``h = exp(dt A) h + dt B x``, ``y = C h + D x``, gated by ``silu(z)``. No gradient is recorded.

    Args:
        state: ``(rows, D, N)``, or ``(rows, H, P, N)`` by heads; written in place, in its own dtype.
        x: ``(B, D)`` or ``(B, H, P)``.
        dt: as x, before bias and softplus.
        A: ``(D, N)`` or ``(H, P, N)``.
        B: ``(B, N)`` or ``(B, G, N)``; head h uses group ``h // (H / G)``.
        C: as B.
        D: ``(D,)`` or ``(H, P)``.
        z: as x.
        dt_bias: ``(D,)`` or ``(H, P)``.
        dt_softplus: whether dt passes through softplus.
        state_batch_indices: ``(B,)``, the row of the state for each row of x; a negative one is padding: the output is
            0, and no state is written. By default row b of x has row b.

    Returns:
        y, of the shape and dtype of x.

    Raises:
        ArgumentError: for shapes or dtypes that do not fit together.
    """
    if not isinstance(state, Tensor) or state.dim() not in (3, 4):
        came = tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__
        raise ArgumentError(f"{_WHERE}: state is {came}, expected (B, D, N) or (B, H, P, N)")
    B, C = (m[:, None] if isinstance(m, Tensor) and m.dim() == 2 else m for m in (B, C))
    if state.dim() == 4 and all(m is None or _one_per_head(m) for m in (dt, D, dt_bias)) and _one_per_head(A, 2):
        dt, A = dt[..., :1], A[..., :1, :1]
        D, dt_bias = (m if m is None else m[..., :1] for m in (D, dt_bias))
    more = {"dt_bias": dt_bias, "dt_softplus": dt_softplus, "rows": state_batch_indices}
    return update(state, x, dt, A, B, C, D, z, **more, out_state=state)[0]


@torch.no_grad()
def selective_state_update_ref(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """:func:`selective_state_update` in plain PyTorch."""
    with backend("reference"):
        return selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)


def _one_per_head(m: Tensor, axes: int = 1) -> bool:
    """Whether a tensor holds one value for each head, expanded along its last axes."""
    return m.dim() > axes and not any(m.stride()[-axes:])
