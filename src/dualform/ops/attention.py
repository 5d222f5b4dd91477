"""Causal softmax attention of new tokens over a cache and over each other, by rows or packed."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dualform.core.errors import ArgumentError
from dualform.core.packing import Borders, Packing
from dualform.core.ring import held
from dualform.core.shapes import check_real, check_tensors, once_per_shape, wide
from dualform.ops.derivatives import through, transformed
from dualform.ops.op import Op, forced
from dualform.ops.rerun import rerun

_WHERE = "attention"
_SCORES = 2**26  # how many scores (rows x heads x queries x keys) one masked call may make


class Past(NamedTuple):
    """Keys and values of earlier tokens: position p lies in slot ``p mod S``."""

    k: Tensor  # (rows, S, G, P)
    v: Tensor  # (rows, S, G, V)
    length: Tensor  # (rows,) int64, tokens that each row has seen; (1,) where all have seen equally many


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: Past | None = None,
    *,
    window: int | None = None,
    cu_seqlens: Borders = None,
    softcap: float | None = None,
) -> Tensor:
    """``y_t = sum_s softmax_s(q_t . k_s / sqrt(P)) v_s`` over the tokens ``s <= t``, earlier ones among them.

    A key or value that is not finite reaches the outputs of its own sequence only, but there it may reach any of the
    same call: earlier ones, and later ones beyond a window.

    Args:
        q: ``(B, T, H, P)``, queries.
        k: ``(B, T, G, P)``, keys, each shared by ``H / G`` heads.
        v: ``(B, T, G, V)``, values.
        past: of every row, or with ``cu_seqlens`` of every sequence; None is no earlier token. Its S slots must hold
            all that the tokens may see.
        window: a token sees itself and the ``window - 1`` before it; None is all of them.
        cu_seqlens: ``(n + 1,)``, cumulative lengths of sequences packed on the time axis, or a ``Packing`` that was
            made of them; B is then 1.
        softcap: c, which bounds the scores: they are ``c tanh(q_t . k_s / (c sqrt(P)))``.

    Returns:
        y ``(B, T, H, V)`` in the dtype of q. Memory grows with T, not with T squared.

    Raises:
        ArgumentError: for shapes, dtypes or devices that do not fit together, a window below 1, or a softcap that is
            not positive.

    References:
        Vaswani et al. (2017), arXiv:1706.03762, section 3.2; Ainslie et al. (2023), arXiv:2305.13245 (shared keys);
        Beltagy et al. (2020), arXiv:2004.05150, section 3.1 (window); Gemma Team (2024), arXiv:2408.00118, section 2
        (softcap).
    """
    if softcap is not None and not 0 < softcap < math.inf:
        raise ArgumentError(f"{_WHERE}: softcap is {softcap}, expected a positive number, or None")
    if window is not None and window < 1:
        raise ArgumentError(f"{_WHERE}: window is {window}, expected at least 1, or None")
    past_k, past_v, length = (None, None, None) if past is None else past
    _check_inputs(q, k, v, past_k, past_v, length)
    a = Attention(q, k, v, past_k, past_v, length, window or 0, softcap or 0.0, Packing.of(_WHERE, cu_seqlens, q))
    _check(a)
    return attention_op(a)[0]


def causal(q: Tensor, k: Tensor, v: Tensor, *, softcap: float | None = None) -> Tensor:
    """The same for the plain case, as PyTorch's own operator: rows without earlier tokens, packing or window."""
    if softcap:
        at = torch.arange(q.shape[1], device=q.device)[None]
        return _banded(q, k, v, at, at, 0, 0, softcap)
    return _products(q, k, v, is_causal=True)


def over(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, *, softcap: float | None = None) -> Tensor:
    """Attention over all keys ``(B, S, G, P)``, or over those that a mask ``(B or 1, 1, T or 1, S)`` shows."""
    return _capped(q, k, v, seen, softcap) if softcap else _products(q, k, v, attn_mask=seen)


class Attention(NamedTuple):
    """The arguments of the operator, as in :func:`attention`."""

    q: Tensor  # (B, T, H, P)
    k: Tensor  # (B, T, G, P)
    v: Tensor  # (B, T, G, V)
    past_k: Tensor | None  # (rows, S, G, P)
    past_v: Tensor | None  # (rows, S, G, V)
    length: Tensor | None  # (rows,) or (1,)
    window: int  # 0 for none
    softcap: float  # 0 for none
    packing: Packing | None


def _check(a: Attention) -> None:
    _check_inputs(*a[:6])
    if a.window < 0:
        raise ArgumentError(f"{_WHERE}: window is {a.window}, expected 0 for none, or above")
    if not 0 <= a.softcap < math.inf:
        raise ArgumentError(f"{_WHERE}: softcap is {a.softcap}, expected 0 for none, or a positive number")
    if a.past_k is not None:
        rows = a.q.shape[0] if a.packing is None else a.packing.rows
        if a.past_v is None or a.length is None:
            raise ArgumentError(f"{_WHERE}: past.k comes without past.v or without past.length")
        if a.past_k.shape[0] != rows or a.length.shape[0] not in (1, rows):
            raise ArgumentError(
                f"{_WHERE}: past has keys of {a.past_k.shape[0]} rows and {a.length.shape[0]} lengths, expected {rows}"
            )


@once_per_shape
def _check_inputs(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor | None, past_v: Tensor | None, length: Tensor | None
) -> None:
    past = {"past.k": (past_k, "? R S G P"), "past.v": (past_v, "? R S G V"), "past.length": (length, "? L")}
    check_tensors(_WHERE, q=(q, "B T H P"), k=(k, "B T G P"), v=(v, "B T G V"), **past)
    check_real(_WHERE, q=q, k=k, v=v, **{"past.k": past_k, "past.v": past_v})
    if length is not None and length.dtype != torch.int64:
        raise ArgumentError(f"{_WHERE}: past.length is {length.dtype}, expected torch.int64")
    if q.shape[2] % k.shape[2]:
        raise ArgumentError(f"{_WHERE}: q has {q.shape[2]} heads, not a multiple of the {k.shape[2]} of k and v")


def _reference(a: Attention) -> tuple[Tensor]:
    if a.packing is None:
        rows = [(i, a.q[i], a.k[i], a.v[i]) for i in range(a.q.shape[0])]
        y = [_sequence(a, *row) for row in rows]
        return (torch.stack(y) if y else a.q.new_zeros(_shape(a)),)
    lengths = a.packing.as_tensor().diff().tolist()
    parts = zip(*(m[0].split(lengths) for m in (a.q, a.k, a.v)), strict=True)
    return (torch.cat([_sequence(a, i, *part) for i, part in enumerate(parts)])[None],)


def _sequence(a: Attention, row: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One sequence ``(T, H, P)``, query by query."""
    group, dtype, seen = q.shape[1] // k.shape[1], wide(q), 0
    at = torch.arange(len(q), device=q.device)
    if a.past_k is not None and a.past_v is not None and a.length is not None:
        seen = int(a.length[row % len(a.length)])
        at = torch.cat([held(a.length.new_tensor([seen]), a.past_k.shape[1])[0], seen + at])
        k, v = torch.cat([a.past_k[row].to(k.dtype), k]), torch.cat([a.past_v[row].to(v.dtype), v])
    outputs = [q.new_zeros(0, q.shape[1], v.shape[2])]
    for t, q_t in enumerate(q, start=seen):
        visible = (at >= 0) & (at <= t)
        if a.window:
            visible &= at > t - a.window
        keys, values = (m[visible].to(dtype).repeat_interleave(group, 1) for m in (k, v))
        scores = torch.einsum("hp,shp->hs", q_t.to(dtype), keys) / math.sqrt(q.shape[2])
        weights = torch.softmax(a.softcap * torch.tanh(scores / a.softcap) if a.softcap else scores, 1)
        outputs.append(torch.einsum("hs,shp->hp", weights, values)[None].to(q.dtype))
    return torch.cat(outputs)


def _forward(a: Attention) -> list[Tensor]:
    if a.q.numel() == 0 or a.v.shape[3] == 0:
        return [a.q.new_zeros(_shape(a))]

    def run(rows: slice | Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _rows(a, rows, q, k, v)

    if a.packing is None:
        return [run(slice(None), a.q, a.k, a.v).contiguous()]
    return [a.packing.in_rows(run, a.q, a.k, a.v)]


def _rows(a: Attention, rows: slice | Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Tokens ``(R, T, ...)`` of some rows."""
    past = 0 if a.past_k is None else a.past_k.shape[1]
    if past == 0 and (a.window == 0 or q.shape[1] <= a.window):
        return causal(q, k, v, softcap=a.softcap)
    at = torch.arange(q.shape[1], device=q.device)[None]
    if a.past_k is None or a.past_v is None or a.length is None:
        return _banded(q, k, v, at, at, 0, a.window, a.softcap)
    length = a.length[rows] if len(a.length) > 1 else a.length
    at = length[:, None] + at
    keys, values = torch.cat([a.past_k[rows], k], 1), torch.cat([a.past_v[rows], v], 1)
    return _banded(q, keys, values, at, torch.cat([held(length, past), at], 1), past, a.window, a.softcap)


def _banded(
    q: Tensor, k: Tensor, v: Tensor, q_at: Tensor, k_at: Tensor, past: int, window: int, softcap: float
) -> Tensor:
    """Masked attention in blocks of queries, each over the keys it may see.

    ``past`` keys in any order come before those of the queries' own tokens; positions ``(R or 1, ...)`` decide
    what is seen, and a negative one is an empty slot.
    """
    (batch, length, heads), span = q.shape[:3], k.shape[1]
    block = min(length, max(window, 256)) if window else length
    while block > 16 and batch * heads * block * (min(span, window + block) if window else span) > _SCORES:
        block = (block + 1) // 2
    out = []
    for i in range(0, length, block):
        first, last = past + i - window + 1 if window and i >= window - 1 else 0, past + i + block
        at, seen_at = q_at[:, i : i + block, None], k_at[:, None, first:last]
        seen = (seen_at >= 0) & (seen_at <= at)
        if window:
            seen &= seen_at > at - window
        out.append(over(q[:, i : i + block], k[:, first:last], v[:, first:last], seen[:, None], softcap=softcap))
    return torch.cat(out, 1)


def _products(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, attn_mask: Tensor | None = None) -> Tensor:
    """Softmax attention of ``q`` ``(B, T, H, P)`` over ``k`` and ``v`` ``(B, S, G, ...)`` in the dtype of q.

    PyTorch's kernels have first derivatives, in reverse; where others may be asked for, its matrix products are used.
    """
    shared = q.shape[2] != k.shape[2]
    q, k, v = [m.to(q.dtype).transpose(1, 2) for m in (q, k, v)]
    eager = not torch.compiler.is_compiling()
    products = forced() == "reference" or (eager and transformed())
    if eager and not products and torch.is_grad_enabled():
        chosen = torch._fused_sdp_choice(q, k, v, attn_mask, 0.0, is_causal, enable_gqa=shared)  # pyright: ignore[reportPrivateImportUsage]
        q, k, v = (q, k, v) if chosen == SDPBackend.MATH.value else through(_WHERE, q, k, v)
    given: dict[str, Any] = {"attn_mask": attn_mask, "is_causal": is_causal, "enable_gqa": shared}
    if not products:
        return F.scaled_dot_product_attention(q, k, v, **given).transpose(1, 2)
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, **given).transpose(1, 2)


def _capped(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, softcap: float) -> Tensor:
    """The same with bounded scores, which PyTorch's operator does not have."""
    q, k, v = (m.transpose(1, 2) for m in (q, k, v))
    k, v = (m.to(q.dtype).repeat_interleave(q.shape[1] // m.shape[1], 1) for m in (k, v))
    scores = (q @ k.mT).to(wide(q)) / math.sqrt(q.shape[-1])
    scores = softcap * torch.tanh(scores / softcap)
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    return (torch.softmax(scores, -1).to(q.dtype) @ v).transpose(1, 2)


def _shape(a: Attention) -> tuple[int, ...]:
    return (*a.q.shape[:3], a.v.shape[3])


def _fake(a: Attention) -> list[Tensor]:
    return [a.q.new_empty(_shape(a))]


attention_op = Op(_WHERE, Attention, _reference, fake=_fake, check=_check, outputs=1)
attention_op.add(rerun(_forward))
