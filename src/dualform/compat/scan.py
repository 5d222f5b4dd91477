"""``selective_scan_fn`` of mamba-ssm."""

import torch
from torch import Tensor

from dualform.compat.layout import check_layout, time_last, time_second
from dualform.compat.plain import plain
from dualform.core.errors import ArgumentError
from dualform.ops.selective_scan import selective_scan

_WHERE = "selective_scan_fn"


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t``, ``y_t = C_t h_t + D u_t``, gated by ``silu(z_t)``, with time last.

    Args:
        u: ``(B, D, T)``.
        delta: ``(B, D, T)``, step before bias and softplus.
        A: ``(D, N)``, real, or complex: the state then stands for conjugate pairs.
        B: ``(D, N)`` for one that does not depend on time, of the dtype of A; or ``(B, N, T)`` or ``(B, G, N, T)``;
            with a complex A then real and imaginary parts alternate along the last axis, ``(B, N, 2 T)``.
        C: as B.
        D: ``(D,)``.
        z: ``(B, D, T)``.
        delta_bias: ``(D,)``.
        delta_softplus: whether the step passes through softplus.
        return_last_state: whether the final state is returned, too.

    Returns:
        y ``(B, D, T)`` in the dtype of u; with ``return_last_state`` also the state ``(B, D, N)``, float32 or wider.
        Gradients pass through both.

    Raises:
        ArgumentError: for shapes or dtypes that do not fit together.
    """
    check_layout(
        _WHERE,
        A=(A, "D N"),
        u=(u, "B D T"),
        delta=(delta, "B D T"),
        D=(D, "? D"),
        z=(z, "? B D T"),
        delta_bias=(delta_bias, "? D"),
    )
    y, final = selective_scan(
        time_second(u),
        time_second(delta),
        A,
        _map("B", B, u, A),
        _map("C", C, u, A),
        D,
        None if z is None else time_second(z),
        delta_bias=delta_bias,
        delta_softplus=delta_softplus,
    )
    y = time_last(y, u)
    return (y, final) if return_last_state else y


selective_scan_ref = plain(selective_scan_fn, "selective_scan_ref")


def _map(name: str, m: Tensor, u: Tensor, A: Tensor) -> Tensor:
    """B or C -> ``(B, T, G, N)``, or constant ``(D, N)``."""
    batch, _, length = u.shape
    if m.dim() == 2:
        check_layout(_WHERE, A=(A, "D N"), **{name: (m, "D N")})
        return m
    times = 2 * length if A.is_complex() else length
    spec = f"{batch} {A.shape[1]} {times}" if m.dim() == 3 else f"{batch} * {A.shape[1]} {times}"
    try:
        check_layout(_WHERE, **{name: (m, spec)})
    except ArgumentError as wrong:
        hint = f"time is the last axis here: {name} is (B, N, T) or (B, G, N, T)"
        if A.is_complex():
            hint += (
                ", and with a complex A its real and imaginary parts alternate along T: torch.view_as_real, flattened"
            )
        raise ArgumentError(str(wrong), hint=hint) from None
    m = m[:, None] if m.dim() == 3 else m
    if A.is_complex():
        m = torch.view_as_complex(m.unflatten(-1, (-1, 2)).contiguous())
    return m.permute(0, 3, 1, 2)


def outputs(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    """Those of :func:`selective_scan_fn`, without the last state."""
    y = selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    assert isinstance(y, Tensor)
    return y
