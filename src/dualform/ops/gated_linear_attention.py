"""Gated linear attention: a matrix of key by value channels, every key channel of which decays by itself."""

from typing import NamedTuple

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.packing import Borders, Packing, each_alone
from dualform.core.shapes import check_real, check_tensors, once_per_shape, wide
from dualform.ops.op import Op
from dualform.ops.rows import blank, check_indices, check_rows, pick
from dualform.ops.state import check_dtype, check_out_state, check_state, give_state, initial, unless_complex

_WHERE = "gated_linear_attention"
_STEP = "gated_linear_attention_update"
CHUNK = 64


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Borders = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Run ``S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T``, ``y_t = S_t^T q_t`` per head.

    With a bonus u, as in RWKV-6, an output sees its own step undecayed and weighted, and no decay of that step:
    ``y_t = (S_{t-1} + diag(u) k_t v_t^T)^T q_t``.

    Args:
        q: ``(B, T, H, N)``, queries; scale them first where they are to be scaled.
        k: ``(B, T, H, N)``, keys.
        v: ``(B, T, H, P)``, values.
        log_decay: g, ``(B, T, H, N)``, logarithms of decays, at most 0 for a stable recurrence; ``-inf`` forgets.
        bonus: u, ``(H, N)``.
        initial_state: S before the first step, ``(B, H, N, P)``, zero by default; with ``cu_seqlens`` one row per
            sequence.
        cu_seqlens: ``(n + 1,)``, cumulative lengths of sequences packed on the time axis, or a ``Packing`` that was
            made of them; B is then 1.
        chunk: steps per matrix product, rounded up to a power of two; changes speed and rounding, never the result.

    Returns:
        y ``(B, T, H, P)`` in the dtype of v, and the final state ``(B, H, N, P)``, float32 or wider. What is not finite
        at some step may reach earlier steps of the same chunk; it never reaches another sequence or row.

    Raises:
        ArgumentError: for shapes, dtypes, devices or a chunk that do not fit together.

    References:
        Yang et al. (2024), arXiv:2312.06635, equation 3; Peng et al. (2024), arXiv:2404.05892, equation 19 (bonus).
    """
    _check_inputs(q, k, v, log_decay, bonus)
    check_chunk(_WHERE, chunk)
    packing = Packing.of(_WHERE, cu_seqlens, q)
    dtype = wide(q, k, v, log_decay, bonus, unless_complex(initial_state))
    h0 = initial(_WHERE, initial_state, packing, q, (*q.shape[2:], v.shape[3]), dtype)
    y, final = gated_linear_attention_op(
        GatedLinearAttention(q, k, v, log_decay, bonus, h0, packing, CHUNK if chunk is None else chunk)
    )
    return y, final


class GatedLinearAttention(NamedTuple):
    """The arguments of the operator, as in :func:`gated_linear_attention`; h0 has the dtype that is computed in."""

    q: Tensor  # (B, T, H, N)
    k: Tensor  # (B, T, H, N)
    v: Tensor  # (B, T, H, P)
    log_decay: Tensor  # (B, T, H, N)
    bonus: Tensor | None  # (H, N)
    h0: Tensor  # (rows, H, N, P)
    packing: Packing | None
    chunk: int


def check_chunk(where: str, chunk: int | None) -> None:
    """A chunk has at least one step.

    Raises:
        ArgumentError: says what came.
    """
    if chunk is not None and chunk < 1:
        raise ArgumentError(f"{where}: chunk is {chunk}, expected at least 1")


@once_per_shape
def _check_inputs(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor | None) -> None:
    keys = "B T H N"
    check_tensors(
        _WHERE, q=(q, keys), k=(k, keys), v=(v, "B T H P"), log_decay=(log_decay, keys), bonus=(bonus, "? H N")
    )
    check_real(_WHERE, q=q, k=k, v=v, log_decay=log_decay, bonus=bonus)


def _check(a: GatedLinearAttention) -> None:
    _check_inputs(a.q, a.k, a.v, a.log_decay, a.bonus)
    check_state(_WHERE, "the initial state", a.h0, a.packing, a.q, (*a.q.shape[2:], a.v.shape[3]))
    check_real(_WHERE, h0=a.h0)
    check_dtype(_WHERE, a.h0.dtype)
    check_chunk(_WHERE, a.chunk)


def _one(h: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, bonus: Tensor | None) -> tuple[Tensor, Tensor]:
    """One step: what is seen and the next state, for ``(B, H, N)`` and v ``(B, H, P)``, in the dtype of the state."""
    q, k, v, g = (m.to(h.dtype) for m in (q, k, v, g))
    new = k[..., None] * v[..., None, :]
    after = g.exp()[..., None] * h + new
    seen = after if bonus is None else h + bonus.to(h.dtype)[..., None] * new
    return (q[..., None] * seen).sum(-2), after


def _reference(a: GatedLinearAttention) -> tuple[Tensor, Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        ys = []
        for t in range(q.shape[1]):
            y, h = _one(h, q[:, t], k[:, t], v[:, t], g[:, t], a.bonus)
            ys.append(y)
        return torch.stack(ys, 1) if ys else v.to(h.dtype), h.clone()

    y, final = each_alone(run, a.packing, a.h0, a.q, a.k, a.v, a.log_decay)
    return y.to(a.v.dtype), final


def _fake(a: GatedLinearAttention) -> list[Tensor]:
    return [a.v.new_empty(a.v.shape), a.h0.new_empty(a.h0.shape)]


gated_linear_attention_op = Op(_WHERE, GatedLinearAttention, _reference, fake=_fake, check=_check)


def gated_linear_attention_update(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor | None = None,
    *,
    out_state: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of :func:`gated_linear_attention`.

    Args:
        state: ``(B, H, N, P)``; with ``rows`` a table of states ``(R, H, N, P)``.
        q: ``(B, H, N)``.
        k: ``(B, H, N)``.
        v: ``(B, H, P)``.
        log_decay: ``(B, H, N)``.
        bonus: ``(H, N)``.
        out_state: memory for the next state, of the shape of ``state``; it may be ``state`` itself. It is written in
            its own dtype, rounded once, and returned. Refused while gradients are recorded.
        rows: ``(B,)``, int32 or int64, the row of ``state``, and of ``out_state``, for each row of q. A negative one is
            padding, as in :func:`~dualform.ops.selective_scan.selective_state_update`.

    Returns:
        y ``(B, H, P)`` in the dtype of v, and the next state: ``out_state``, or one for each row of q, float32 or
        wider.

    Raises:
        ArgumentError: for shapes, dtypes, devices or rows that do not fit together.

    References:
        Yang et al. (2024), arXiv:2312.06635, equation 3.
    """
    _check_step(state, q, k, v, log_decay, bonus, rows)
    check_rows(_STEP, rows, state)
    check_out_state(_STEP, out_state, state, q, k, v, log_decay, bonus)
    y, after = gated_linear_attention_update_op(
        GatedLinearAttentionUpdate(state, q, k, v, log_decay, bonus, out_state, rows)
    )
    return y, give_state(after, out_state, rows)


class GatedLinearAttentionUpdate(NamedTuple):
    """The arguments of one step, as in :func:`gated_linear_attention_update`."""

    state: Tensor  # (R, H, N, P), of any floating dtype
    q: Tensor  # (B, H, N)
    k: Tensor  # (B, H, N)
    v: Tensor  # (B, H, P)
    log_decay: Tensor  # (B, H, N)
    bonus: Tensor | None  # (H, N)
    out_state: Tensor | None
    rows: Tensor | None  # (B,); without it R is B


@once_per_shape
def _check_step(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor | None, rows: Tensor | None
) -> None:
    table, keys = f"{'B' if rows is None else 'R'} H N P", "B H N"
    given = {"state": (state, table), "q": (q, keys), "k": (k, keys), "v": (v, "B H P"), "log_decay": (log_decay, keys)}
    check_tensors(_STEP, **given, bonus=(bonus, "? H N"), rows=(rows, "? B"))
    check_indices(_STEP, rows=rows)
    check_real(_STEP, state=state, q=q, k=k, v=v, log_decay=log_decay, bonus=bonus)


def _check_update(a: GatedLinearAttentionUpdate) -> None:
    _check_step(a.state, a.q, a.k, a.v, a.log_decay, a.bonus, a.rows)
    check_rows(_STEP, a.rows, a.state)


def _update(a: GatedLinearAttentionUpdate) -> tuple[Tensor, Tensor]:
    dtype = wide(a.state, a.q, a.k, a.v, a.log_decay, a.bonus)
    y, after = _one(pick(a.state, a.rows).to(dtype), a.q, a.k, a.v, a.log_decay, a.bonus)
    return blank(y.to(a.v.dtype), a.rows, a.state), blank(after, a.rows, a.state)


def _fake_update(a: GatedLinearAttentionUpdate) -> list[Tensor]:
    dtype = wide(a.state, a.q, a.k, a.v, a.log_decay, a.bonus)
    return [a.v.new_empty(a.v.shape), a.v.new_empty((a.v.shape[0], *a.state.shape[1:]), dtype=dtype)]


gated_linear_attention_update_op = Op(
    _STEP, GatedLinearAttentionUpdate, _update, fake=_fake_update, check=_check_update, stepwise=True
)
