"""The short depthwise causal convolution in front of Mamba's scans, with its last inputs as state."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.packing import Borders, Packing, each_alone
from dualform.core.shapes import check_real, check_tensors, once_per_shape, wide
from dualform.ops.banded import Banded
from dualform.ops.layout import empty_like, lay, time_last
from dualform.ops.op import Backend, Op
from dualform.ops.rows import blank, check_indices, check_rows, pick
from dualform.ops.runs import as_ids, check_ids, reach
from dualform.ops.state import check_dtype, check_out_state, check_state, give_state, initial, unless_complex

_WHERE, _STEP = "causal_conv1d", "causal_conv1d_update"
_FEW = 16  # taps, up to which products with shifted inputs are faster than matrices
_ACTIVATIONS = {None: False, "silu": True, "swish": True}  # whether there is a SiLU


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Borders = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``y_t = act(bias + sum_j weight_j x_{t - (W-1) + j})``, per channel; inputs before the first come from the state.

    A value that is not finite reaches no other sequence, and no earlier output unless W is large: the portable backend
    then makes matrix products of chunks.

    Args:
        x: ``(B, T, D)``.
        weight: ``(D, W)``; the last column multiplies the current input.
        bias: ``(D,)``.
        activation: None, or "silu" (also called "swish").
        initial_state: ``(B, D, W-1)``, the inputs before the first, oldest first; zero by default; with
            ``cu_seqlens`` one row per sequence.
        cu_seqlens: ``(n + 1,)``, cumulative lengths of sequences packed on the time axis, or a ``Packing`` that was
            made of them; B is then 1.
        seq_idx: ``(B, T)``, int32, the sequence of each step, where rows hold several and no synchronisation of a GPU
            is wanted; not with ``cu_seqlens``. A sequence is a run of equal ids and sees no other one. Steps with a
            negative id are padding: their output is 0. The initial state belongs to the first run of each row, the
            final one to the last: of inputs that its last step does not see, it holds zeros.

    Returns:
        y ``(B, T, D)`` in the dtype of x, and the last W-1 inputs ``(B, D, W-1)``, float32 or wider.

    Raises:
        ArgumentError: for shapes, dtypes, devices or an activation that does not fit, and for ``seq_idx`` together with
            ``cu_seqlens``.

    References:
        Gu & Dao (2023), arXiv:2312.00752, section 3.4 (the block's convolution).
    """
    _check_inputs(_WHERE, "B T D", x, weight, bias, activation)
    packing, dtype = Packing.of(_WHERE, cu_seqlens, x), wide(x, weight, bias, unless_complex(initial_state))
    h0 = initial(_WHERE, initial_state, packing, x, (weight.shape[0], weight.shape[1] - 1), dtype)
    if seq_idx is not None:
        check_ids(_WHERE, seq_idx, x, packing)
    a = CausalConv1d(x, weight, bias, _ACTIVATIONS[activation], h0, packing, as_ids(seq_idx))
    y, final = causal_conv1d_op(a)
    return y, final


class CausalConv1d(NamedTuple):
    """The arguments of the operator, as in :func:`causal_conv1d`."""

    x: Tensor  # (B, T, D)
    weight: Tensor  # (D, W)
    bias: Tensor | None  # (D,)
    silu: bool
    h0: Tensor  # (rows, D, W-1)
    packing: Packing | None
    ids: Tensor | None = None  # (B, T) int32, not with a packing


def causal_conv1d_update(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    out_state: Tensor | None = None,
    rows: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of :func:`causal_conv1d`, or several.

    A state of any floating dtype is read as it is; the step is computed in float32 or wider.

    Args:
        x: ``(B, D)`` for one step, or ``(B, T, D)`` for T.
        state: ``(B, D, S)``, the last S inputs before these, oldest first, S at least W-1; with ``rows`` a table
            ``(R, D, S)``.
        weight: ``(D, W)``.
        bias: ``(D,)``.
        activation: None, or "silu".
        out_state: memory for the next state, of the shape of ``state``; it may be ``state`` itself. It is written in
            its own dtype, rounded once, and returned. Refused while gradients are recorded.
        rows: ``(B,)``, int32 or int64, the row of ``state``, and of ``out_state``, for each row of x; a negative one is
            padding. The rules are those of :func:`~dualform.ops.selective_scan.selective_state_update`.
        cache_seqlens: ``(B,)``, int32 or int64, how many inputs came before, for each row of x. The state is then a
            ring: input number i lies in slot ``i mod S``, and the next one goes to slot ``cache_seqlens mod S``.

    Returns:
        y, of the shape and dtype of x, and the next state: ``out_state``, or one for each row of x, float32 or wider.

    Raises:
        ArgumentError: for shapes, dtypes, devices, rows or an activation that does not fit.
    """
    _check_step(x, state, weight, bias, rows, cache_seqlens, activation)
    if rows is not None:
        check_rows(_STEP, rows, state)
    if out_state is not None:
        check_out_state(_STEP, out_state, state, x, weight, bias)
    y, after = conv_update_op(
        ConvUpdate(x, state, weight, bias, _ACTIVATIONS[activation], out_state, rows, cache_seqlens)
    )
    return y, after if out_state is None else give_state(after, out_state, rows)


class ConvUpdate(NamedTuple):
    """The arguments of one step or several, as in :func:`causal_conv1d_update`."""

    x: Tensor  # (B, D) or (B, T, D)
    state: Tensor  # (R, D, S), of any floating dtype
    weight: Tensor  # (D, W)
    bias: Tensor | None  # (D,)
    silu: bool
    out_state: Tensor | None
    rows: Tensor | None  # (B,); without it R is B
    cache_seqlens: Tensor | None  # (B,)

    @property
    def dtype(self) -> torch.dtype:
        """That of what is computed."""
        return wide(self.x, self.state, self.weight, self.bias)

    @property
    def steps(self) -> int:
        """T."""
        return 1 if self.x.dim() == 2 else self.x.shape[1]


@once_per_shape
def _check_inputs(
    where: str, axes: str, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None
) -> None:
    axes = "B T D" if where == _STEP and isinstance(x, Tensor) and x.dim() == 3 else axes
    check_tensors(where, x=(x, axes), weight=(weight, "D W"), bias=(bias, "? D"))
    check_real(where, x=x, weight=weight, bias=bias)
    if activation not in _ACTIVATIONS:
        raise ArgumentError(f"{where}: activation is {activation!r}, expected None or 'silu'")
    if weight.shape[1] < 1:
        raise ArgumentError(f"{where}: weight has no columns, expected a width of at least 1")


@once_per_shape
def _check_step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    cache_seqlens: Tensor | None,
    activation: str | None = None,
) -> None:
    _check_inputs(_STEP, "B D", x, weight, bias, activation)
    like = {"x": (x, "B ..."), "rows": (rows, "? B"), "cache_seqlens": (cache_seqlens, "? B")}
    check_tensors(_STEP, state=(state, f"{'B' if rows is None else 'R'} {weight.shape[0]} S"), **like)
    check_indices(_STEP, rows=rows, cache_seqlens=cache_seqlens)
    check_real(_STEP, state=state)
    size, taps = state.shape[2], weight.shape[1]
    if size < taps - 1:
        raise ArgumentError(f"{_STEP}: state holds {size} inputs, expected at least {taps - 1}: weight has {taps} taps")
    if cache_seqlens is not None and size == 0:
        raise ArgumentError(f"{_STEP}: state holds 0 inputs, expected at least 1: with cache_seqlens it is a ring")


def _check(a: CausalConv1d) -> None:
    _check_inputs(_WHERE, "B T D", a.x, a.weight, a.bias)
    check_state(_WHERE, "the initial state", a.h0, a.packing, a.x, (a.weight.shape[0], a.weight.shape[1] - 1))
    check_real(_WHERE, h0=a.h0)
    check_dtype(_WHERE, a.h0.dtype)
    if a.ids is not None:
        check_ids(_WHERE, a.ids, a.x, a.packing)
        if a.ids.dtype != torch.int32:
            raise ArgumentError(f"{_WHERE}: ids are {a.ids.dtype}, expected torch.int32")


def _check_update(a: ConvUpdate) -> None:
    _check_step(a.x, a.state, a.weight, a.bias, a.rows, a.cache_seqlens)
    check_rows(_STEP, a.rows, a.state)


def _reference(a: CausalConv1d) -> tuple[Tensor, Tensor]:
    taps = a.weight.shape[1]

    def run(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        seen = torch.cat([state.transpose(1, 2), x.to(state.dtype)], 1)
        y = [(seen[:, t : t + taps] * a.weight.T).sum(1) for t in range(x.shape[1])] or [x[:, 0:0].sum(1)]
        return torch.stack(y, 1)[:, : x.shape[1]], seen[:, x.shape[1] :].transpose(1, 2)

    if a.ids is not None:
        return _reference_of_runs(a, a.ids)
    y, final = each_alone(run, a.packing, a.h0, a.x)
    y = y if a.bias is None else y + a.bias
    return lay((F.silu(y) if a.silu else y).to(a.x.dtype), time_last(a.x)), final.contiguous()


def _reference_of_runs(a: CausalConv1d, ids: Tensor) -> tuple[Tensor, Tensor]:
    window, ys = a.h0, []
    for t in range(a.x.shape[1]):
        padding = (ids[:, t] < 0)[:, None]
        begins = (ids[:, t] != ids[:, max(0, t - 1)])[:, None] | padding
        x = a.x[:, t].to(a.h0.dtype).masked_fill(padding, 0)
        seen = torch.cat([window.masked_fill(begins[..., None], 0), x[..., None]], -1)
        y = (seen * a.weight).sum(-1)
        y = y if a.bias is None else y + a.bias
        ys.append((F.silu(y) if a.silu else y).masked_fill(padding, 0))
        window = seen[..., 1:]
    y = torch.stack(ys, 1) if ys else a.x.to(a.h0.dtype)
    return lay(y.to(a.x.dtype), time_last(a.x)), window.clone(memory_format=torch.contiguous_format)


def _update(a: ConvUpdate) -> tuple[Tensor, Tensor]:
    steps, size, taps, dtype = a.steps, a.state.shape[2], a.weight.shape[1], a.dtype
    x = a.x if a.x.dim() == 3 else a.x[:, None]
    past = _turned(pick(a.state, a.rows).to(dtype), a.cache_seqlens)
    line = torch.cat([past, x.transpose(1, 2).to(dtype)], -1)  # (B, D, S + T), oldest first
    windows = torch.stack([line.narrow(-1, size - (taps - 1) + j, steps) for j in range(taps)], -1)
    y = (windows * a.weight[:, None]).sum(-1)
    y = y if a.bias is None else y + a.bias[:, None]
    y = (F.silu(y) if a.silu else y).to(a.x.dtype).transpose(1, 2).reshape(a.x.shape)
    ends = None if a.cache_seqlens is None else -(a.cache_seqlens + steps)
    after = _turned(line[..., steps:], ends).contiguous()
    return lay(blank(y, a.rows, a.state), time_last(a.x)), blank(after, a.rows, a.state)


def _turned(state: Tensor, by: Tensor | None) -> Tensor:
    """A ring ``(B, D, S)`` turned by ``(B,)`` slots: what lies in slot ``by mod S`` comes first."""
    if by is None:
        return state
    slots = (by.long()[:, None] + torch.arange(state.shape[2], device=by.device)) % state.shape[2]
    return state.gather(2, slots[:, None].expand_as(state))


class _Line:
    """Every sequence behind its own W-1 earlier inputs, on one line: packing becomes a plain convolution.

    With ids, ``seen`` takes from a tap what a step does not see.
    """

    def __init__(self, a: CausalConv1d):
        self.back = a.h0.shape[2]
        self.length, self.packed = a.x.shape[1], a.packing is not None
        self.reach = None if a.ids is None or self.length == 0 else reach(a.ids, self.back)
        if a.packing is not None:
            cu_seqlens = a.packing.cu_seqlens
            rows = torch.arange(a.packing.rows, device=a.x.device)
            steps = torch.arange(self.back, device=a.x.device)
            self.tokens = torch.arange(self.length, device=a.x.device)
            self.tokens = self.tokens + self.back * (a.packing.sequence_ids(self.length) + 1)
            self.heads = cu_seqlens[:-1, None] + self.back * rows[:, None] + steps
            self.tails = cu_seqlens[1:, None] + self.back * rows[:, None] + steps

    def lay(self, x: Tensor, state: Tensor) -> Tensor:
        """``(B, T, D)`` and ``(rows, D, W-1)`` -> one line ``(B, L, D)``."""
        if not self.packed:
            return torch.cat([state.transpose(1, 2), x.to(state.dtype)], 1)
        line = state.new_empty(1, self.length + self.heads.numel(), x.shape[2])
        line[0, self.tokens], line[0, self.heads] = x[0].to(state.dtype), state.transpose(1, 2)
        return line

    def seen(self, m: Tensor, back: int) -> Tensor:
        """``m`` ``(B, T, D)``, zero at the steps that do not see the input so many steps before."""
        return m if self.reach is None else m.masked_fill((self.reach < back)[..., None], 0)

    def seen_last(self, m: Tensor) -> Tensor:
        """``m`` ``(B, W-1, D)`` of the last inputs, zero for those that the last step does not see."""
        if self.reach is None:
            return m
        return m.masked_fill((self.reach[:, -1:] < torch.arange(self.back, device=m.device).flip(0))[..., None], 0)

    def tail(self, line: Tensor) -> Tensor:
        """The last W-1 inputs of every sequence, ``(rows, D, W-1)``."""
        found = line[0, self.tails] if self.packed else self.seen_last(line[:, self.length :])
        return found.transpose(1, 2).clone(memory_format=torch.contiguous_format)


def _banded(a: CausalConv1d) -> Banded | None:
    """The form with matrix products, where there are so many taps that it is faster."""
    if a.weight.shape[1] <= _FEW or a.x.numel() == 0 or a.ids is not None:
        return None
    return Banded(a.x.to(a.h0.dtype), a.weight.to(a.h0.dtype), a.h0, a.packing)


def _before_silu(a: CausalConv1d, line: _Line, full: Tensor, banded: Banded | None) -> Tensor:
    """``bias + sum_j weight_j x_{t - (W-1) + j}``, ``(B, T, D)``."""
    if banded is not None:
        y = banded.forward()
        return y if a.bias is None else y + a.bias
    weight, out = a.weight.to(a.h0.dtype), full.shape[1] - line.back
    y = line.seen(full[:, :out], line.back) * weight[:, 0]  # all along the line
    if a.bias is not None:
        y += a.bias
    for j in range(1, weight.shape[1]):
        y.addcmul_(line.seen(full[:, j : j + out], line.back - j), weight[:, j])
    return y[:, line.tokens - line.back] if line.packed else y


def _forward(a: CausalConv1d) -> list[Tensor]:
    line = _Line(a)
    full = line.lay(a.x, a.h0)
    y = _before_silu(a, line, full, _banded(a))
    y = line.seen(F.silu(y, inplace=True) if a.silu else y, 0)
    return [lay(y.to(a.x.dtype), time_last(a.x)), line.tail(full)]


def _backward(grads: list[Tensor], kept: list[Tensor], a: CausalConv1d) -> dict[str, Tensor]:
    line, w = _Line(a), a.weight.to(a.h0.dtype)
    full, dy = line.lay(a.x, a.h0), grads[0].to(a.h0.dtype)
    out = full.shape[1] - line.back
    banded = _banded(a)
    if a.silu:
        dy = torch.ops.aten.silu_backward(dy, _before_silu(a, line, full, banded))
    dy = line.seen(dy, 0)
    dbias = {} if a.bias is None else {"bias": dy.sum((0, 1))}
    dfull, dweight, more = torch.zeros_like(full), torch.empty_like(w), []
    if banded is not None:
        *more, dweight = banded.backward(dy, len(a.h0))
    else:
        if line.packed:
            dy = full.new_zeros(1, out, a.x.shape[2]).index_copy_(1, line.tokens - line.back, dy)
        for j in range(w.shape[1]):
            dfull[:, j : j + out].addcmul_(line.seen(dy, line.back - j), w[:, j])
            dweight[:, j] = (line.seen(full[:, j : j + out], line.back - j) * dy).sum((0, 1))
    dtail = grads[1].transpose(1, 2)
    if line.packed:
        dfull[0].index_put_((line.tails,), dtail, accumulate=True)
        dx, dh0 = dfull[:, line.tokens], dfull[0, line.heads]
    else:
        dfull[:, line.length :] += line.seen_last(dtail)
        dx, dh0 = dfull[:, line.back :], dfull[:, : line.back]
    dh0 = dh0.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    if more:
        dx, dh0 = dx.add_(more[0]), dh0.add_(more[1])
    return {"x": dx, "weight": dweight, "h0": dh0, **dbias}


def _fake(a: CausalConv1d) -> list[Tensor]:
    return [empty_like(a.x), a.h0.new_empty(a.h0.shape)]


def _fake_update(a: ConvUpdate) -> list[Tensor]:
    return [empty_like(a.x), a.state.new_empty((a.x.shape[0], *a.state.shape[1:]), dtype=a.dtype)]


causal_conv1d_op = Op(_WHERE, CausalConv1d, _reference, fake=_fake, check=_check)
causal_conv1d_op.add(Backend("torch", _forward, _backward))
conv_update_op = Op(_STEP, ConvUpdate, _update, fake=_fake_update, check=_check_update, stepwise=True)
