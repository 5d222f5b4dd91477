"""One layer of an sLSTM, by rows or packed, as an operator: compilers see one node, and no loop over time."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.packing import Borders, Packing, once
from dualform.core.shapes import check_real, check_tensors, once_per_shape, wide
from dualform.ops.lstm import side_by_side
from dualform.ops.op import Op
from dualform.ops.rerun import rerun
from dualform.ops.state import check_dtype

_WHERE = "slstm"


def slstm(
    gates: Tensor,
    weight: Tensor,
    h: Tensor,
    c: Tensor,
    n: Tensor,
    m: Tensor,
    *,
    cu_seqlens: Borders = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The LSTM with exponential input gates, a normaliser and a scale, whose recurrent matrices are block-diagonal.

    With ``z, a, b, o = gates_t + R h_{t-1}`` and the logistic function s:
    ``m_t = max(log s(b) + m_{t-1}, a)``, ``f = exp(log s(b) + m_{t-1} - m_t)``, ``i = exp(a - m_t)``,
    ``c_t = f c_{t-1} + i tanh(z)``, ``n_t = f n_{t-1} + i``, ``h_t = s(o) c_t / n_t``.

    Args:
        gates: ``(B, T, 4, H, P)``, what the input gives to the arguments z, a, b and o.
        weight: R, ``(4, H, P, P)``: a matrix for each argument and head, which multiplies h from the right.
        h: ``(B, H, P)``, the output before the first; with ``cu_seqlens`` one row per sequence.
        c: ``(B, H, P)``, the cells before the first, divided by ``exp(m)``.
        n: ``(B, H, P)``, the normaliser before the first, divided by ``exp(m)``.
        m: ``(B, H, P)``, the logarithm of the scale; -1e30 where nothing was read.
        cu_seqlens: ``(n + 1,)``, cumulative lengths of sequences packed on the time axis, or a ``Packing`` that was
            made of them; B is then 1.

    Returns:
        The outputs h of every step ``(B, T, H, P)`` in the dtype of the gates, and h, c, n and m after the last,
        float32 or wider.

    Raises:
        ArgumentError: for shapes, dtypes or devices that do not fit together.

    References:
        Beck et al. (2024), "xLSTM", arXiv:2405.04517: equations 8 to 17.
    """
    _check_inputs(gates, weight, h, c, n, m)
    packing = Packing.of(_WHERE, cu_seqlens, gates)
    dtype = wide(gates, weight, h, c, n, m)
    h, c, n, m = (s.to(dtype) for s in (h, c, n, m))
    _check_rows(gates, h, packing)
    y, h, c, n, m = slstm_op(SLSTM(gates, weight, h, c, n, m, packing))
    return y, h, c, n, m


class SLSTM(NamedTuple):
    """The arguments of the operator, as in :func:`slstm`; states have the dtype that is computed in."""

    gates: Tensor  # (B, T, 4, H, P)
    weight: Tensor  # (4, H, P, P)
    h: Tensor  # (rows, H, P)
    c: Tensor  # (rows, H, P)
    n: Tensor  # (rows, H, P)
    m: Tensor  # (rows, H, P)
    packing: Packing | None


@once_per_shape
def _check_inputs(gates: Tensor, weight: Tensor, h: Tensor, c: Tensor, n: Tensor, m: Tensor) -> None:
    states = {name: (s, "R H P") for name, s in (("h", h), ("c", c), ("n", n), ("m", m))}
    check_tensors(_WHERE, gates=(gates, "B T 4 H P"), weight=(weight, "4 H P P"), **states)
    check_real(_WHERE, gates=gates, weight=weight, h=h, c=c, n=n, m=m)


def _check(a: SLSTM) -> None:
    _check_inputs(*a[:6])
    check_dtype(_WHERE, a.h.dtype, c=a.c, n=a.n, m=a.m)
    _check_rows(a.gates, a.h, a.packing)


def _check_rows(gates: Tensor, h: Tensor, packing: Packing | None) -> None:
    rows = gates.shape[0] if packing is None else packing.rows
    if h.shape[0] != rows:
        raise ArgumentError(f"{_WHERE}: h has {h.shape[0]} rows, expected {rows}")


def _one(gates: Tensor, weight: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One step, for gates ``(B, 4, H, P)``."""
    h, c, n, m = state
    z, a, b, o = (gates + torch.einsum("bhp,ghpq->bghq", h, weight)).unbind(1)
    kept = F.logsigmoid(b) + m
    m = torch.maximum(kept, a)
    f, i = torch.exp(kept - m), torch.exp(a - m)
    c, n = f * c + i * torch.tanh(z), f * n + i
    return torch.sigmoid(o) * c / n, c, n, m


def _reference(a: SLSTM) -> tuple[Tensor, ...]:
    weight = a.weight.to(a.h.dtype)

    def run(gates: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        ys = [state[0][:, None][:, :0]]
        for t in range(gates.shape[1]):
            state = _one(gates[:, t].to(weight.dtype), weight, state)
            ys.append(state[0][:, None])
        return torch.cat(ys, 1).to(a.gates.dtype), *(s.clone() for s in state)

    if a.packing is None:
        return run(a.gates, a[2:6])
    states = zip(*(s.split(1) for s in a[2:6]), strict=True)
    parts = zip(a.gates.split(a.packing.as_tensor().diff().tolist(), 1), states, strict=True)
    y, *last = zip(*(run(*part) for part in parts), strict=True)
    return torch.cat(y, 1), *(torch.cat(s) for s in last)


def _forward(a: SLSTM) -> list[Tensor]:
    """All rows at once; of packed sequences, at every time, those that are longer."""
    gates, weight, state = a.gates.to(a.h.dtype), a.weight.to(a.h.dtype), a[2:6]
    if gates.numel() == 0:
        return [gates.new_zeros(*gates.shape[:2], *a.h.shape[1:], dtype=a.gates.dtype), *(s.clone() for s in state)]
    if a.packing is None:
        ys = []
        for now in gates.unbind(1):
            state = _one(now, weight, state)
            ys.append(state[0])
        return [torch.stack(ys, 1).to(a.gates.dtype), *state]
    line, ys = side_by_side(a.packing), []
    running = once(a.packing.host_borders(), "running", line.running.tolist)
    state = tuple(s.index_select(0, line.rows) for s in state)
    for now in gates[0].index_select(0, line.steps).split(running):
        new = _one(now, weight, tuple(s[: len(now)] for s in state))
        ys.append(new[0])
        state = tuple(torch.cat([s, before[len(now) :]]) for s, before in zip(new, state, strict=True))
    y = torch.cat(ys).index_select(0, line.places)[None].to(a.gates.dtype)
    return [y, *(s.index_copy(0, line.rows, last) for s, last in zip(a[2:6], state, strict=True))]


def _fake(a: SLSTM) -> list[Tensor]:
    return [a.gates.new_empty(*a.gates.shape[:2], *a.h.shape[1:]), *(s.new_empty(s.shape) for s in a[2:6])]


slstm_op = Op(_WHERE, SLSTM, _reference, fake=_fake, check=_check, outputs=5)
slstm_op.add(rerun(_forward))
