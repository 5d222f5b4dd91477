"""Several writes of the gated delta rule in each step: a product of Householder matrices between two reads."""

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.packing import Borders, Packing
from dualform.core.shapes import check_tensors
from dualform.ops.gated_delta_rule import gated_delta_rule, gated_delta_rule_update

_WHERE, _STEP = "gated_delta_product", "gated_delta_product_update"


def gated_delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Borders = None,
) -> tuple[Tensor, Tensor]:
    """In every step, decay once, write J times, and read: ``y_t = scale S_t^T q_t``.

    ``S' = exp(g_t) S_{t-1}``, then ``S' <- S' + beta_j k_j (v_j - S'^T k_j)^T`` for j from 1 to J, which makes ``S_t``.
    It is :func:`~dualform.ops.gated_delta_rule.gated_delta_rule` on J times as many steps.

    Args:
        q: ``(B, T, G, N)``, queries; head h uses group ``h // (H / G)``.
        k: ``(B, T, J, G, N)``, keys, likewise.
        v: ``(B, T, J, H, P)``, values.
        beta: ``(B, T, J, H)``, from 0 to 2.
        log_decay: g, ``(B, T, H)``, ``(B, T, H, N)``, or None for no decay.
        scale: of the outputs.
        initial_state: S before the first step, ``(B, H, N, P)``, zero by default; with ``cu_seqlens`` one row per
            sequence.
        cu_seqlens: ``(n + 1,)``, cumulative lengths of sequences packed on the time axis, in steps, or a ``Packing``
            that was made of them; B is then 1.

    Returns:
        y ``(B, T, H, P)`` in the dtype of v, and the final state ``(B, H, N, P)``, float32 or wider.

    Raises:
        ArgumentError: for shapes, dtypes or devices that do not fit together.

    References:
        Siems et al. (2025), arXiv:2502.10297, section 3.
    """
    sizes = check_tensors(
        _WHERE, q=(q, "B T G N"), k=(k, "B T J G N"), v=(v, "B T J H P"), beta=(beta, "B T J H"),
        log_decay=(log_decay, "? B T H ..."),
    )  # fmt: skip
    writes, packing = sizes["J"], Packing.of(_WHERE, cu_seqlens, q)
    _check_writes(_WHERE, writes)
    idle = writes - 1
    read = torch.cat([q.new_zeros(*q.shape[:2], idle, *q.shape[2:]), q[:, :, None]], 2)
    if log_decay is not None:
        still = log_decay.new_zeros(*log_decay.shape[:2], idle, *log_decay.shape[2:])
        log_decay = torch.cat([log_decay[:, :, None], still], 2).flatten(1, 2)
    read, k, v, beta = (m.flatten(1, 2) for m in (read, k, v, beta))
    y, final = gated_delta_rule(
        read,
        k,
        v,
        beta,
        log_decay,
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=None if packing is None else packing.times(writes),
    )
    return y.unflatten(1, (-1, writes))[:, :, -1], final


def gated_delta_product_update(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """One step of :func:`gated_delta_product`.

    Args:
        state: ``(B, H, N, P)``.
        q: ``(B, G, N)``.
        k: ``(B, J, G, N)``.
        v: ``(B, J, H, P)``.
        beta: ``(B, J, H)``.
        log_decay: ``(B, H)``, ``(B, H, N)`` or None.
        scale: of the output.

    Returns:
        y ``(B, H, P)`` in the dtype of v, and the next state, float32 or wider.

    Raises:
        ArgumentError: for shapes, dtypes or devices that do not fit together.

    References:
        Siems et al. (2025), arXiv:2502.10297, section 3.
    """
    sizes = check_tensors(_STEP, k=(k, "B J G N"), v=(v, "B J H P"), beta=(beta, "B J H"))
    _check_writes(_STEP, sizes["J"])
    y = v[:, 0]
    for j in range(sizes["J"]):
        given = q, k[:, j], v[:, j], beta[:, j]
        y, state = gated_delta_rule_update(state, *given, log_decay if j == 0 else None, scale=scale)
    return y, state


def _check_writes(where: str, writes: int) -> None:
    if writes < 1:
        raise ArgumentError(f"{where}: k, v and beta have {writes} writes in each step, expected at least 1")
