"""The short depthwise causal convolution in front of Mamba's scans, with its last inputs as state."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.packing import each_alone, sequence_ids
from dualform.core.shapes import check_floating, check_tensors, wide
from dualform.ops.op import Backend, Op
from dualform.ops.state import initial
from dualform.ops.step import fast_step

_ACTIVATIONS = {None: False, "silu": True, "swish": True}  # whether there is a SiLU


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``y_t = act(bias + sum_j weight_j x_{t - (W-1) + j})``, per channel; inputs before the first come from the state.

    Args:
        x: ``(B, T, D)``.
        weight: ``(D, W)``; the last column multiplies the current input.
        bias: ``(D,)``.
        activation: None, or "silu" (also called "swish").
        initial_state: ``(B, D, W-1)``, the inputs before the first, oldest first; zero by default; with
            ``cu_seqlens`` one row per sequence.
        cu_seqlens: ``(n + 1,)``, cumulative lengths of sequences packed on the time axis; B is then 1.

    Returns:
        y ``(B, T, D)`` in the dtype of x, and the last W-1 inputs ``(B, D, W-1)``, float32 or wider.

    Raises:
        ArgumentError: for shapes, dtypes, devices or an activation that does not fit.

    References:
        Gu & Dao (2023), arXiv:2312.00752, section 3.4 (the block's convolution).
    """
    where = "causal_conv1d"
    sizes = check_tensors(where, x=(x, "B T D"), weight=(weight, "D W"), bias=(bias, "D"))
    check_floating(where, x=x, weight=weight, bias=bias)
    silu = _silu(where, activation, sizes["W"])
    h0 = initial(where, initial_state, cu_seqlens, x, (sizes["D"], sizes["W"] - 1), wide(x))
    y, final = causal_conv1d_op(x, weight, bias, silu, h0, cu_seqlens)
    return y, final


def causal_conv1d_update(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None
) -> tuple[Tensor, Tensor]:
    """One step of :func:`causal_conv1d`.

    Args:
        x: ``(B, D)``.
        state: ``(B, D, W-1)``, the inputs before this one, oldest first.
        weight: ``(D, W)``.
        bias: ``(D,)``.
        activation: None, or "silu".

    Returns:
        y ``(B, D)`` and the next state.
    """
    silu = _silu("causal_conv1d_update", activation, weight.shape[1])
    fast = fast_step("causal_conv1d_update", x, state, weight, bias, silu)
    if fast is not None:
        return fast
    window = torch.cat([state, x[..., None].to(state.dtype)], -1)
    y = (window * weight).sum(-1)
    y = y if bias is None else y + bias
    return (F.silu(y) if silu else y).to(x.dtype), window[..., 1:]


def _silu(where: str, name: str | None, width: int) -> bool:
    if name not in _ACTIVATIONS:
        raise ArgumentError(f"{where}: activation is {name!r}, expected None or 'silu'")
    if width < 1:
        raise ArgumentError(f"{where}: weight has no columns, expected a width of at least 1")
    return _ACTIVATIONS[name]


def _reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, initial_state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    taps = weight.shape[1]

    def run(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        seen = torch.cat([state.transpose(1, 2), x.to(state.dtype)], 1)
        y = torch.stack([(seen[:, t : t + taps] * weight.T).sum(1) for t in range(x.shape[1])] or [x[:, 0:0].sum(1)], 1)
        return y[:, : x.shape[1]], seen[:, x.shape[1] :].transpose(1, 2)

    y, final = each_alone(run, cu_seqlens, initial_state, x)
    y = y if bias is None else y + bias
    return (F.silu(y) if silu else y).to(x.dtype), final.contiguous()


class _Line:
    """Every sequence behind its own W-1 earlier inputs, on one line: packing becomes a plain convolution."""

    def __init__(self, x: Tensor, state: Tensor, cu_seqlens: Tensor | None):
        self.back = state.shape[2]
        self.packed, self.length = cu_seqlens is not None, x.shape[1]
        if cu_seqlens is not None:
            rows = torch.arange(len(state), device=x.device)
            steps = torch.arange(self.back, device=x.device)
            self.tokens = torch.arange(self.length, device=x.device)
            self.tokens = self.tokens + self.back * (sequence_ids(cu_seqlens, self.length) + 1)
            self.heads = (cu_seqlens[:-1, None] + self.back * rows[:, None] + steps).long()
            self.tails = (cu_seqlens[1:, None] + self.back * rows[:, None] + steps).long()

    def lay(self, x: Tensor, state: Tensor) -> Tensor:
        """``(B, T, D)`` and ``(rows, D, W-1)`` -> one line ``(B, L, D)``."""
        if not self.packed:
            return torch.cat([state.transpose(1, 2), x.to(state.dtype)], 1)
        line = state.new_empty(1, self.length + self.heads.numel(), x.shape[2])
        line[0, self.tokens], line[0, self.heads] = x[0].to(state.dtype), state.transpose(1, 2)
        return line

    def tail(self, line: Tensor) -> Tensor:
        """The last W-1 inputs of every sequence, ``(rows, D, W-1)``."""
        found = line[0, self.tails] if self.packed else line[:, self.length :]
        return found.transpose(1, 2).clone(memory_format=torch.contiguous_format)


def _before_silu(line: _Line, full: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``bias + sum_j weight_j x_{t - (W-1) + j}`` all along the line, ``(B, L - (W-1), D)``."""
    out = full.shape[1] - line.back
    y = full[:, :out] * weight[:, 0]
    if bias is not None:
        y += bias
    for j in range(1, weight.shape[1]):
        y.addcmul_(full[:, j : j + out], weight[:, j])
    return y


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, state: Tensor, cu_seqlens: Tensor | None
) -> list[Tensor]:
    line = _Line(x, state, cu_seqlens)
    full = line.lay(x, state)
    y = _before_silu(line, full, weight.to(state.dtype), bias)
    y = y[:, line.tokens - line.back] if line.packed else y
    return [(F.silu(y, inplace=True) if silu else y).to(x.dtype), line.tail(full)]


def _backward(
    grads: list[Tensor],
    kept: list[Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> list[Tensor]:
    line, w = _Line(x, state, cu_seqlens), weight.to(state.dtype)
    full, dy = line.lay(x, state), grads[0].to(state.dtype)
    out = full.shape[1] - line.back
    if line.packed:
        dy, dense = full.new_zeros(1, out, x.shape[2]), dy
        dy[:, line.tokens - line.back] = dense
    if silu:
        dy = torch.ops.aten.silu_backward(dy, _before_silu(line, full, w, bias))
    dfull, dweight = torch.zeros_like(full), torch.empty_like(w)
    for j in range(w.shape[1]):
        dfull[:, j : j + out].addcmul_(dy, w[:, j])
        dweight[:, j] = (full[:, j : j + out] * dy).sum((0, 1))
    dtail = grads[1].transpose(1, 2)
    if line.packed:
        dfull[0].index_put_((line.tails,), dtail, accumulate=True)
        dx, dstate = dfull[:, line.tokens], dfull[0, line.heads]
    else:
        dfull[:, line.length :] += dtail
        dx, dstate = dfull[:, line.back :], dfull[:, : line.back]
    dbias = [] if bias is None else [dy.sum((0, 1)).to(bias.dtype)]
    return [dx.to(x.dtype).contiguous(), dweight.to(weight.dtype), *dbias, dstate.transpose(1, 2).contiguous()]


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, state: Tensor, cu_seqlens: Tensor | None
) -> list[Tensor]:
    return [x.new_empty(x.shape), state.new_empty(state.shape)]


causal_conv1d_op = Op("causal_conv1d", _reference, fake=_fake)
causal_conv1d_op.add(Backend("torch", _forward, _backward))
