"""The gated delta rule: a memory of values under keys, which decays, and in which a write replaces what a key holds."""

from typing import NamedTuple

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.packing import Borders, Packing, each_alone
from dualform.core.shapes import check_real, check_tensors, once_per_shape, wide
from dualform.ops.gated_linear_attention import CHUNK, check_chunk
from dualform.ops.op import Op
from dualform.ops.rows import blank, check_indices, check_rows, pick
from dualform.ops.state import check_dtype, check_out_state, check_state, give_state, initial, unless_complex

_WHERE = "gated_delta_rule"
_STEP = "gated_delta_rule_update"


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Borders = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Run ``S_t = S' + beta_t k_t (v_t - S'^T k_t)^T`` with ``S' = exp(g_t) S_{t-1}``; ``y_t = scale S_t^T q_t``.

    Per head. A step with ``beta = 1`` and a key of length 1 makes the state hold ``v_t`` under ``k_t`` and leaves all
    that is orthogonal to it. The recurrence is stable for keys of length 1 and beta between 0 and 2.

    Args:
        q: ``(B, T, G, N)``, queries; head h uses group ``h // (H / G)``.
        k: ``(B, T, G, N)``, keys, likewise; normalise them before.
        v: ``(B, T, H, P)``, values.
        beta: ``(B, T, H)``, how much of what a key holds is replaced.
        log_decay: g, logarithms of decays, at most 0: ``(B, T, H)`` for one of each head (the gated delta rule),
            ``(B, T, H, N)`` for one of each key channel (Kimi delta attention), None for no decay (the delta rule).
            ``-inf`` forgets.
        scale: of the outputs; many models have ``N**-0.5``.
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
        Yang et al. (2024), arXiv:2412.06464, equation 10; without decay: arXiv:2406.06484, section 3; with a decay of
        each key channel: Kimi Team (2025), arXiv:2510.26692, equation 1.
    """
    _check_inputs(q, k, v, beta, log_decay)
    check_chunk(_WHERE, chunk)
    packing = Packing.of(_WHERE, cu_seqlens, q)
    dtype = wide(q, k, v, beta, log_decay, unless_complex(initial_state))
    h0 = initial(_WHERE, initial_state, packing, q, (v.shape[2], q.shape[3], v.shape[3]), dtype)
    y, final = gated_delta_rule_op(
        GatedDeltaRule(q, k, v, beta, log_decay, float(scale), h0, packing, CHUNK if chunk is None else chunk)
    )
    return y, final


class GatedDeltaRule(NamedTuple):
    """The arguments of the operator, as in :func:`gated_delta_rule`; h0 has the dtype that is computed in."""

    q: Tensor  # (B, T, G, N)
    k: Tensor  # (B, T, G, N)
    v: Tensor  # (B, T, H, P)
    beta: Tensor  # (B, T, H)
    log_decay: Tensor | None  # (B, T, H) or (B, T, H, N)
    scale: float
    h0: Tensor  # (rows, H, N, P)
    packing: Packing | None
    chunk: int

    @property
    def per_group(self) -> int:
        """How many heads share a query and a key."""
        return self.v.shape[2] // self.q.shape[2]


def _check_heads(where: str, axes: str, sizes: dict[str, int], decay: Tensor | None) -> None:
    if sizes["G"] == 0 or sizes["H"] % sizes["G"]:
        raise ArgumentError(f"{where}: q and k have {sizes['G']} heads, which do not divide those of v, {sizes['H']}")
    shape = tuple(sizes[letter] for letter in axes.split())
    if decay is not None and tuple(decay.shape) not in (shape, (*shape, sizes["N"])):
        by_channel = (*shape, sizes["N"])
        raise ArgumentError(
            f"{where}: log_decay has shape {tuple(decay.shape)}, expected {shape}, one for each head, or {by_channel}, "
            "one for each key channel"
        )


@once_per_shape
def _check_inputs(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None) -> None:
    keys, heads = "B T G N", "B T H"
    given = {"q": (q, keys), "k": (k, keys), "v": (v, f"{heads} P"), "beta": (beta, heads)}
    sizes = check_tensors(_WHERE, **given, log_decay=(log_decay, f"? {heads} ..."))
    check_real(_WHERE, q=q, k=k, v=v, beta=beta, log_decay=log_decay)
    _check_heads(_WHERE, heads, sizes, log_decay)


def _check(a: GatedDeltaRule) -> None:
    _check_inputs(a.q, a.k, a.v, a.beta, a.log_decay)
    check_state(_WHERE, "the initial state", a.h0, a.packing, a.q, (a.v.shape[2], a.q.shape[3], a.v.shape[3]))
    check_real(_WHERE, h0=a.h0)
    check_dtype(_WHERE, a.h0.dtype)
    check_chunk(_WHERE, a.chunk)


def _one(h: Tensor, scale: float, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """One step: y and the next state, for q, k ``(B, G, N)``, v, beta and g ``(B, H, ...)``; S has the dtype."""
    q, k, v, beta, *decay = (m.to(h.dtype) for m in inputs)
    q, k = (m.repeat_interleave(v.shape[1] // m.shape[1], 1)[..., None] for m in (q, k))
    for g in decay:
        h = (g[..., None] if g.dim() == 3 else g[..., None, None]).exp() * h
    h = h + k * (beta[..., None] * (v - (k * h).sum(-2)))[..., None, :]
    return scale * (q * h).sum(-2), h


def _reference(a: GatedDeltaRule) -> tuple[Tensor, Tensor]:
    def run(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        *steps, h = inputs
        ys = []
        for t in range(steps[0].shape[1]):
            y, h = _one(h, a.scale, *(m[:, t] for m in steps))
            ys.append(y)
        return torch.stack(ys, 1) if ys else steps[2].to(h.dtype), h.clone()

    decay = () if a.log_decay is None else (a.log_decay,)
    y, final = each_alone(run, a.packing, a.h0, a.q, a.k, a.v, a.beta, *decay)
    return y.to(a.v.dtype), final


def _fake(a: GatedDeltaRule) -> list[Tensor]:
    return [a.v.new_empty(a.v.shape), a.h0.new_empty(a.h0.shape)]


gated_delta_rule_op = Op(_WHERE, GatedDeltaRule, _reference, fake=_fake, check=_check)


def gated_delta_rule_update(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    out_state: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of :func:`gated_delta_rule`.

    Args:
        state: ``(B, H, N, P)``; with ``rows`` a table of states ``(R, H, N, P)``.
        q: ``(B, G, N)``.
        k: ``(B, G, N)``.
        v: ``(B, H, P)``.
        beta: ``(B, H)``.
        log_decay: ``(B, H)`` or ``(B, H, N)``.
        scale: of the output.
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
        Yang et al. (2024), arXiv:2412.06464, equation 10.
    """
    _check_step(state, q, k, v, beta, log_decay, rows)
    check_rows(_STEP, rows, state)
    check_out_state(_STEP, out_state, state, q, k, v, beta, log_decay)
    y, after = gated_delta_rule_update_op(
        GatedDeltaRuleUpdate(state, q, k, v, beta, log_decay, float(scale), out_state, rows)
    )
    return y, give_state(after, out_state, rows)


class GatedDeltaRuleUpdate(NamedTuple):
    """The arguments of one step, as in :func:`gated_delta_rule_update`."""

    state: Tensor  # (R, H, N, P), of any floating dtype
    q: Tensor  # (B, G, N)
    k: Tensor  # (B, G, N)
    v: Tensor  # (B, H, P)
    beta: Tensor  # (B, H)
    log_decay: Tensor | None  # (B, H) or (B, H, N)
    scale: float
    out_state: Tensor | None
    rows: Tensor | None  # (B,); without it R is B


@once_per_shape
def _check_step(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, rows: Tensor | None
) -> None:
    table, keys, heads = f"{'B' if rows is None else 'R'} H N P", "B G N", "B H"
    given = {"state": (state, table), "q": (q, keys), "k": (k, keys), "v": (v, f"{heads} P"), "beta": (beta, heads)}
    sizes = check_tensors(_STEP, **given, log_decay=(log_decay, f"? {heads} ..."), rows=(rows, "? B"))
    check_indices(_STEP, rows=rows)
    check_real(_STEP, state=state, q=q, k=k, v=v, beta=beta, log_decay=log_decay)
    _check_heads(_STEP, heads, sizes, log_decay)


def _check_update(a: GatedDeltaRuleUpdate) -> None:
    _check_step(a.state, a.q, a.k, a.v, a.beta, a.log_decay, a.rows)
    check_rows(_STEP, a.rows, a.state)


def _update(a: GatedDeltaRuleUpdate) -> tuple[Tensor, Tensor]:
    decay = () if a.log_decay is None else (a.log_decay,)
    y, after = _one(pick(a.state, a.rows).to(wide(*a[:6])), a.scale, *a[1:5], *decay)
    return blank(y.to(a.v.dtype), a.rows, a.state), blank(after, a.rows, a.state)


def _fake_update(a: GatedDeltaRuleUpdate) -> list[Tensor]:
    after = (a.v.shape[0], *a.state.shape[1:])
    return [a.v.new_empty(a.v.shape), a.v.new_empty(after, dtype=wide(*a[:6]))]


gated_delta_rule_update_op = Op(
    _STEP, GatedDeltaRuleUpdate, _update, fake=_fake_update, check=_check_update, stepwise=True
)
