"""The recurrence of RWKV-7: every key channel decays by itself, and a matrix of rank one is added to the decays."""

from typing import NamedTuple

import torch
from torch import Tensor

from dualform.core.packing import Borders, Packing, each_alone
from dualform.core.shapes import check_real, check_tensors, once_per_shape, wide
from dualform.ops.gated_linear_attention import CHUNK, check_chunk
from dualform.ops.op import Op
from dualform.ops.rows import blank, check_indices, check_rows, pick
from dualform.ops.state import check_dtype, check_out_state, check_state, give_state, initial, unless_complex

_WHERE = "wkv7"
_STEP = "wkv7_update"


def wkv7(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Borders = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Run ``S_t = (diag(exp(g_t)) + b_t a_t^T) S_{t-1} + k_t v_t^T``, ``y_t = S_t^T r_t`` per head.

    RWKV-7 has ``a = -kappa`` and ``b = alpha kappa`` for a key ``kappa`` of length 1 and a learning rate ``alpha`` for
    each of its channels: what the state holds under ``kappa`` is replaced. With other a and b it is the delta rule
    with a matrix that is diagonal plus low rank. The paper writes the transpose of S.

    Args:
        r: ``(B, T, H, N)``, the receptance, which other layers call a query.
        log_decay: g, ``(B, T, H, N)``, logarithms of decays, at most 0; ``-inf`` forgets.
        k: ``(B, T, H, N)``, keys.
        v: ``(B, T, H, P)``, values.
        a: ``(B, T, H, N)``, by which the state is read before it decays.
        b: ``(B, T, H, N)``, under which what was read is added.
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
        Peng et al. (2025), arXiv:2503.14456, equation 17.
    """
    _check_inputs(r, log_decay, k, v, a, b)
    check_chunk(_WHERE, chunk)
    packing = Packing.of(_WHERE, cu_seqlens, r)
    dtype = wide(r, log_decay, k, v, a, b, unless_complex(initial_state))
    h0 = initial(_WHERE, initial_state, packing, r, (*r.shape[2:], v.shape[3]), dtype)
    y, final = wkv7_op(WKV7(r, log_decay, k, v, a, b, h0, packing, CHUNK if chunk is None else chunk))
    return y, final


class WKV7(NamedTuple):
    """The arguments of the operator, as in :func:`wkv7`; h0 has the dtype that is computed in."""

    r: Tensor  # (B, T, H, N)
    log_decay: Tensor  # (B, T, H, N)
    k: Tensor  # (B, T, H, N)
    v: Tensor  # (B, T, H, P)
    a: Tensor  # (B, T, H, N)
    b: Tensor  # (B, T, H, N)
    h0: Tensor  # (rows, H, N, P)
    packing: Packing | None
    chunk: int


@once_per_shape
def _check_inputs(r: Tensor, log_decay: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> None:
    keys = "B T H N"
    given = {"r": (r, keys), "log_decay": (log_decay, keys), "k": (k, keys), "v": (v, "B T H P")}
    check_tensors(_WHERE, **given, a=(a, keys), b=(b, keys))
    check_real(_WHERE, r=r, log_decay=log_decay, k=k, v=v, a=a, b=b)


def _check(given: WKV7) -> None:
    _check_inputs(*given[:6])
    check_state(_WHERE, "the initial state", given.h0, given.packing, given.r, (*given.r.shape[2:], given.v.shape[3]))
    check_real(_WHERE, h0=given.h0)
    check_dtype(_WHERE, given.h0.dtype)
    check_chunk(_WHERE, given.chunk)


def _one(h: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """One step: y and the next state, for r, g, k, v, a, b ``(B, H, N or P)``, in the dtype of the state."""
    r, g, k, v, a, b = (m.to(h.dtype) for m in inputs)
    read = (a[..., None] * h).sum(-2)
    h = g.exp()[..., None] * h + b[..., None] * read[..., None, :] + k[..., None] * v[..., None, :]
    return (r[..., None] * h).sum(-2), h


def _reference(given: WKV7) -> tuple[Tensor, Tensor]:
    def run(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        *steps, h = inputs
        ys = []
        for t in range(steps[0].shape[1]):
            y, h = _one(h, *(m[:, t] for m in steps))
            ys.append(y)
        return torch.stack(ys, 1) if ys else steps[3].to(h.dtype), h.clone()

    y, final = each_alone(run, given.packing, given.h0, *given[:6])
    return y.to(given.v.dtype), final


def _fake(given: WKV7) -> list[Tensor]:
    return [given.v.new_empty(given.v.shape), given.h0.new_empty(given.h0.shape)]


wkv7_op = Op(_WHERE, WKV7, _reference, fake=_fake, check=_check)


def wkv7_update(
    state: Tensor,
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    out_state: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of :func:`wkv7`.

    Args:
        state: ``(B, H, N, P)``; with ``rows`` a table of states ``(R, H, N, P)``.
        r: ``(B, H, N)``.
        log_decay: ``(B, H, N)``.
        k: ``(B, H, N)``.
        v: ``(B, H, P)``.
        a: ``(B, H, N)``.
        b: ``(B, H, N)``.
        out_state: memory for the next state, of the shape of ``state``; it may be ``state`` itself. It is written in
            its own dtype, rounded once, and returned. Refused while gradients are recorded.
        rows: ``(B,)``, int32 or int64, the row of ``state``, and of ``out_state``, for each row of r. A negative one is
            padding, as in :func:`~dualform.ops.selective_scan.selective_state_update`.

    Returns:
        y ``(B, H, P)`` in the dtype of v, and the next state: ``out_state``, or one for each row of r, float32 or
        wider.

    Raises:
        ArgumentError: for shapes, dtypes, devices or rows that do not fit together.

    References:
        Peng et al. (2025), arXiv:2503.14456, equation 17.
    """
    _check_step(state, r, log_decay, k, v, a, b, rows)
    check_rows(_STEP, rows, state)
    check_out_state(_STEP, out_state, state, r, log_decay, k, v, a, b)
    y, after = wkv7_update_op(WKV7Update(state, r, log_decay, k, v, a, b, out_state, rows))
    return y, give_state(after, out_state, rows)


class WKV7Update(NamedTuple):
    """The arguments of one step, as in :func:`wkv7_update`."""

    state: Tensor  # (R, H, N, P), of any floating dtype
    r: Tensor  # (B, H, N)
    log_decay: Tensor  # (B, H, N)
    k: Tensor  # (B, H, N)
    v: Tensor  # (B, H, P)
    a: Tensor  # (B, H, N)
    b: Tensor  # (B, H, N)
    out_state: Tensor | None
    rows: Tensor | None  # (B,); without it R is B


@once_per_shape
def _check_step(
    state: Tensor,
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    rows: Tensor | None,
) -> None:
    table, keys = f"{'B' if rows is None else 'R'} H N P", "B H N"
    given = {"state": (state, table), "r": (r, keys), "log_decay": (log_decay, keys), "k": (k, keys)}
    check_tensors(_STEP, **given, v=(v, "B H P"), a=(a, keys), b=(b, keys), rows=(rows, "? B"))
    check_indices(_STEP, rows=rows)
    check_real(_STEP, state=state, r=r, log_decay=log_decay, k=k, v=v, a=a, b=b)


def _check_update(given: WKV7Update) -> None:
    _check_step(*given[:7], given.rows)
    check_rows(_STEP, given.rows, given.state)


def _update(given: WKV7Update) -> tuple[Tensor, Tensor]:
    y, after = _one(pick(given.state, given.rows).to(wide(*given[:7])), *given[1:7])
    return blank(y.to(given.v.dtype), given.rows, given.state), blank(after, given.rows, given.state)


def _fake_update(given: WKV7Update) -> list[Tensor]:
    after = (given.v.shape[0], *given.state.shape[1:])
    return [given.v.new_empty(given.v.shape), given.v.new_empty(after, dtype=wide(*given[:7]))]


wkv7_update_op = Op(_STEP, WKV7Update, _update, fake=_fake_update, check=_check_update, stepwise=True)
