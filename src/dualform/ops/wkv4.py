"""The recurrence of RWKV-4: an average of values whose weights are exponentials and decay."""

from typing import NamedTuple

import torch
from torch import Tensor

from dualform.core.packing import Borders, Packing, each_alone
from dualform.core.scan import associative_scan
from dualform.core.shapes import check_real, check_tensors, once_per_shape, wide
from dualform.core.shift import shift
from dualform.ops.linear_scan import linear_scan
from dualform.ops.op import Op
from dualform.ops.spans import Spanned
from dualform.ops.state import check_dtype, check_state, initial, unless_complex

_WHERE = "wkv4"


def wkv4(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Borders = None,
) -> tuple[Tensor, Tensor]:
    """Average values, ``v_i`` weighed by ``exp((t - 1 - i) w + k_i)`` for i before t, and ``v_t`` by ``exp(u + k_t)``.

    The state is the average without the last term, m, and the logarithm L of the sum of its weights, so that nothing
    overflows. With the logistic function s, ``y_t = m_{t-1} + s(u + k_t - L_{t-1}) (v_t - m_{t-1})``,
    ``m_t = m_{t-1} + s(k_t - L_{t-1} - w) (v_t - m_{t-1})`` and ``L_t = log(exp(L_{t-1} + w) + exp(k_t))``.

    Args:
        k: ``(B, T, D)``, keys.
        v: ``(B, T, D)``, values.
        log_decay: w, ``(D,)``, logarithms of decays, at most 0 for a stable recurrence.
        bonus: u, ``(D,)``.
        initial_state: m and L before the first step, ``(B, 2, D)``; by default 0 and ``-inf``, an average of nothing.
            With ``cu_seqlens`` one row per sequence.
        cu_seqlens: ``(n + 1,)``, cumulative lengths of sequences packed on the time axis, or a ``Packing`` that was
            made of them; B is then 1.

    Returns:
        y ``(B, T, D)`` in the dtype of v, and the final state ``(B, 2, D)``, float32 or wider.

    Raises:
        ArgumentError: for shapes, dtypes or devices that do not fit together.

    References:
        Peng et al. (2023), arXiv:2305.13048, equation 16, and appendix D for another stable form.
    """
    _check_inputs(k, v, log_decay, bonus)
    packing = Packing.of(_WHERE, cu_seqlens, k)
    dtype = wide(k, v, log_decay, bonus, unless_complex(initial_state))
    if initial_state is None:
        h0 = nothing(k, k.shape[0] if packing is None else packing.rows, k.shape[2], dtype)
    else:
        h0 = initial(_WHERE, initial_state, packing, k, (2, k.shape[2]), dtype)
    y, final = wkv4_op(WKV4(k, v, log_decay, bonus, h0, packing))
    return y, final


def nothing(like: Tensor, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """The state of averages of nothing, ``(rows, 2, D)``, on the device of ``like``."""
    zeros = like.new_zeros(rows, 1, width, dtype=dtype)
    return torch.cat([zeros, torch.full_like(zeros, -torch.inf)], 1)


class WKV4(NamedTuple):
    """The arguments of the operator, as in :func:`wkv4`; h0 has the dtype that is computed in."""

    k: Tensor  # (B, T, D)
    v: Tensor  # (B, T, D)
    log_decay: Tensor  # (D,)
    bonus: Tensor  # (D,)
    h0: Tensor  # (rows, 2, D)
    packing: Packing | None


@once_per_shape
def _check_inputs(k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor) -> None:
    check_tensors(_WHERE, k=(k, "B T D"), v=(v, "B T D"), log_decay=(log_decay, "D"), bonus=(bonus, "D"))
    check_real(_WHERE, k=k, v=v, log_decay=log_decay, bonus=bonus)


def _check(a: WKV4) -> None:
    _check_inputs(a.k, a.v, a.log_decay, a.bonus)
    check_state(_WHERE, "the initial state", a.h0, a.packing, a.k, (2, a.k.shape[2]))
    check_real(_WHERE, h0=a.h0)
    check_dtype(_WHERE, a.h0.dtype)


def _reference(a: WKV4) -> tuple[Tensor, Tensor]:
    w, u = a.log_decay.to(a.h0.dtype), a.bonus.to(a.h0.dtype)

    def run(k: Tensor, v: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        m, L = h.unbind(1)
        k, v, ys = k.to(h.dtype), v.to(h.dtype), []
        for t in range(k.shape[1]):
            ys.append(m + torch.sigmoid(u + k[:, t] - L) * (v[:, t] - m))
            m, L = m + torch.sigmoid(k[:, t] - L - w) * (v[:, t] - m), torch.logaddexp(L + w, k[:, t])
        return torch.stack(ys, 1) if ys else v, torch.stack([m, L], 1)

    y, final = each_alone(run, a.packing, a.h0, a.k, a.v)
    return y.to(a.v.dtype), final


def _fake(a: WKV4) -> list[Tensor]:
    return [a.v.new_empty(a.v.shape), a.h0.new_empty(a.h0.shape)]


wkv4_op = Op(_WHERE, WKV4, _reference, fake=_fake, check=_check)


def _run(a: WKV4, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Logarithms of sums by an associative scan, then averages by a linear one."""
    (w, u), (m0, L0) = (t.to(a.h0.dtype) for t in tables), a.h0.unbind(1)
    k, v = a.k.to(a.h0.dtype), a.v.to(a.h0.dtype)
    first, start = torch.zeros_like(k[..., :1], dtype=torch.bool), L0[:, None]
    if a.packing is None:
        first[:, :1] = True
    else:
        ids, index = a.packing.places(k.shape[1])
        first, start = (index == 0)[None, :, None], L0.index_select(0, ids)[None]
    logs = torch.where(first, torch.logaddexp(start + w, k), k)
    L = associative_scan(_combine, (first.expand_as(k), w.expand_as(k), logs))[2]
    before, last = shift(L, L0, a.packing)
    m, final = linear_scan(torch.sigmoid(before + w - k), torch.sigmoid(k - before - w) * v, m0, cu_seqlens=a.packing)
    m, _ = shift(m, m0, a.packing)
    y = m + torch.sigmoid(u + k - before) * (v - m)
    return y.to(a.v.dtype), torch.stack([final, last], 1)


def _combine(earlier: tuple[Tensor, ...], later: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Two runs of steps as one: whether a sequence begins in it, the decay over it, the logarithm of its sum."""
    begins, w, L = later
    before = torch.where(begins, 0.0, earlier[2]) + torch.where(begins, 0.0, w)  # what is not finite stays apart
    return earlier[0] | begins, earlier[1] + w, torch.where(begins, L, torch.logaddexp(before, L))


wkv4_op.add(
    Spanned(wkv4_op, _run, lambda a, most: (a.log_decay, a.bonus), ("k", "v"), lambda a: 8 * a.k.shape[2]).backend()
)
