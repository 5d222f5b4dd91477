"""One layer of an LSTM, by rows or packed, as an operator: compilers see one node, and no loop over time."""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.packing import Borders, Packing, once
from dualform.core.shapes import check_real, check_tensors, once_per_shape, wide
from dualform.ops.op import Op
from dualform.ops.rerun import rerun

_WHERE = "lstm"


def lstm(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    input_weight: Tensor,
    hidden_weight: Tensor,
    input_bias: Tensor,
    hidden_bias: Tensor,
    *,
    cu_seqlens: Borders = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``i, f, g, o = W x_t + b + U h_{t-1} + d``; ``c_t = s(f) c_{t-1} + s(i) tanh(g)``; ``h_t = s(o) tanh(c_t)``.

    s is the logistic function. Weights and their order are those of ``torch.nn.LSTM``; all dtypes are alike.

    Args:
        x: ``(B, T, D)``.
        h: ``(B, N)``, the outputs before the first; with ``cu_seqlens`` one row per sequence.
        c: ``(B, N)``, the cell states before the first.
        input_weight: W, ``(4 N, D)``.
        hidden_weight: U, ``(4 N, N)``.
        input_bias: b, ``(4 N,)``.
        hidden_bias: d, ``(4 N,)``.
        cu_seqlens: ``(n + 1,)``, cumulative lengths of sequences packed on the time axis, or a ``Packing`` that was
            made of them; B is then 1.

    Returns:
        The outputs h of every step ``(B, T, N)``, and h and c after the last.

    Raises:
        ArgumentError: for shapes, dtypes or devices that do not fit together.

    References:
        Hochreiter & Schmidhuber (1997), Neural Computation 9(8); Gers et al. (2000) for the forget gate.
    """
    _check_inputs(x, h, c, input_weight, hidden_weight, input_bias, hidden_bias)
    packing = Packing.of(_WHERE, cu_seqlens, x)
    a = LSTM(x, h, c, input_weight, hidden_weight, input_bias, hidden_bias, packing)
    _check(a)
    y, last, cells = lstm_op(a)
    return y, last, cells


class LSTM(NamedTuple):
    """The arguments of the operator, as in :func:`lstm`."""

    x: Tensor  # (B, T, D)
    h: Tensor  # (rows, N)
    c: Tensor  # (rows, N)
    input_weight: Tensor  # (4 N, D)
    hidden_weight: Tensor  # (4 N, N)
    input_bias: Tensor  # (4 N,)
    hidden_bias: Tensor  # (4 N,)
    packing: Packing | None


def _check(a: LSTM) -> None:
    _check_inputs(*a[:7])
    rows = a.x.shape[0] if a.packing is None else a.packing.rows
    if a.h.shape[0] != rows:
        raise ArgumentError(f"{_WHERE}: h has {a.h.shape[0]} rows, expected {rows}")


@once_per_shape
def _check_inputs(x: Tensor, h: Tensor, c: Tensor, W: Tensor, U: Tensor, b: Tensor, d: Tensor) -> None:
    own = {"x": (x, "B T D"), "h": (h, "R N"), "c": (c, "R N")}
    maps = {
        "input_weight": (W, "4N D"),
        "hidden_weight": (U, "4N N"),
        "input_bias": (b, "4N"),
        "hidden_bias": (d, "4N"),
    }
    sizes = check_tensors(_WHERE, **own, **maps)
    check_real(_WHERE, x=x, h=h, c=c)
    if sizes["4N"] != 4 * sizes["N"]:
        raise ArgumentError(f"{_WHERE}: input_weight has {sizes['4N']} rows, expected {4 * sizes['N']}")
    for name, (m, _) in {**own, **maps}.items():
        if m.dtype != x.dtype:
            raise ArgumentError(f"{_WHERE}: {name} is {m.dtype}, but x is {x.dtype}")


def _reference(a: LSTM) -> tuple[Tensor, Tensor, Tensor]:
    dtype = wide(a.x)
    W, U, b, d = (m.to(dtype) for m in a[3:7])

    def run(x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, h, c = x.to(dtype), h.to(dtype), c.to(dtype)
        outputs = [x.new_zeros(len(x), 0, h.shape[1])]
        for x_t in x.unbind(1):
            gates = x_t @ W.T + b + h @ U.T + d
            i, f, g, o = gates.chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h[:, None])
        return torch.cat(outputs, 1).to(a.x.dtype), h.to(a.x.dtype), c.to(a.x.dtype)

    if a.packing is None:
        y, h, c = run(a.x, a.h, a.c)
        return y, h.clone(), c.clone()
    parts = zip(a.x.split(a.packing.as_tensor().diff().tolist(), 1), a.h.split(1), a.c.split(1), strict=True)
    y, h, c = zip(*(run(*part) for part in parts), strict=True)
    return torch.cat(y, 1), torch.cat(h), torch.cat(c)


def _forward(a: LSTM) -> list[Tensor]:
    """On a CPU in float32 or wider: PyTorch has a kernel of low precision for some processors only."""
    dtype = wide(a.x) if a.x.device.type == "cpu" else a.x.dtype
    x, h, c, *weights = (m.to(dtype).contiguous() for m in a[:7])  # as cuDNN demands
    if x.numel() == 0 or h.numel() == 0:
        return [a.x.new_zeros(*x.shape[:2], h.shape[1]), a.h.clone(), a.c.clone()]
    if a.packing is None:
        y, h, c = torch.lstm(x, (h[None], c[None]), weights, True, 1, 0.0, True, False, True)
        return [m.to(a.x.dtype).contiguous() for m in (y, h[0], c[0])]
    if x.device.type == "cpu":
        y, h, c = in_spans(x[0], h, c, weights, a.packing)
        return [m.to(a.x.dtype) for m in (y[None], h, c)]
    line = side_by_side(a.packing)
    state = tuple(s.index_select(0, line.rows)[None] for s in (h, c))
    y, *after = torch.lstm(x[0].index_select(0, line.steps), line.running, state, weights, True, 1, 0.0, True, False)
    last = [s.index_copy(0, line.rows, new[0]) for s, new in zip((h, c), after, strict=True)]
    return [m.to(a.x.dtype) for m in (y.index_select(0, line.places)[None], *last)]


def in_spans(x: Tensor, h: Tensor, c: Tensor, weights: list[Tensor], packing: Packing) -> tuple[Tensor, Tensor, Tensor]:
    """Packed sequences as padded rows: on a CPU, PyTorch has a kernel for rows, and a loop of small calls for others.

    A row is held where its sequence has ended: one more input, 1 in padding alone, shuts its input gate and opens its
    forget gate, so that c stays as it is and every gradient through the padding is 0. Time is cut in spans where at
    most half of a span's rows go on, so that padding at most doubles the work.

    Args:
        x: ``(T, D)``, the line; T is above 0.
        h: ``(n, N)``.
        c: ``(n, N)``.
        weights: W, U, b and d of :func:`lstm`; all dtypes are alike.
        packing: of n sequences, its borders known.

    Returns:
        h of every step ``(T, N)``, and h and c after the last step of each sequence ``(n, N)``.
    """
    W, *others = weights
    width = h.shape[1]
    hold = W.new_tensor([-_HOLD, _HOLD, 0.0, 0.0]).repeat_interleave(width)
    weights = [torch.cat([W, hold[:, None]], 1), *others]
    x = F.pad(x, (0, 1, 0, 1))  # one more input, and the step that padding reads
    x[-1, -1] = 1
    rows, last, places, *spans = packing.table("spans", _spans)
    state, outputs, cells = [s.index_select(0, rows) for s in (h, c)], [], []
    for steps in spans:
        going = steps.shape[1]
        cells.append(state[1][going:])
        into = x.index_select(0, steps.flatten()).unflatten(0, steps.shape)
        y, *after = torch.lstm(into, [s[None, :going] for s in state], weights, True, 1, 0.0, True, False, False)
        state = [s[0] for s in after]
        outputs.append(y.flatten(0, 1))
    y = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    ends = y.index_select(0, last), torch.cat([state[1], *reversed(cells)])
    h, c = (s.index_copy(0, rows, new) for s, new in zip((h, c), ends, strict=True))
    return y.index_select(0, places), h, c


_HOLD = 1e4  # added to a gate: its logistic function is 0 or 1
_WORTH_A_CUT = 2**12  # steps of padding; fewer take less time than another call


def _spans(host: Tensor) -> tuple[Tensor, ...]:
    """What :func:`in_spans` needs, from the borders.

    The sequences that have steps, longest first; where the outputs of their last steps, and of all steps of the line,
    lie among the outputs of all spans; and for each span the steps of the line that it reads, ``(L, R)``, or T for
    padding.
    """
    lengths, rows = host.diff().sort(descending=True, stable=True)
    rows = rows[lengths > 0]
    lengths = lengths[: len(rows)]
    longest = int(lengths[0])
    going = (len(rows) - torch.bincount(lengths, minlength=longest + 1).cumsum(0)).tolist()[:-1]
    cuts, there = [0], len(rows)
    for t, left in enumerate(going):
        if 2 * left <= there and (longest - t) * (there - left) >= _WORTH_A_CUT:
            cuts.append(t)
            there = left
    spans = []
    for begin, end in pairwise([*cuts, longest]):
        time, here = torch.arange(begin, end)[:, None], going[begin]
        spans.append(torch.where(time < lengths[:here], host[rows[:here]] + time, host[-1]))
    read = torch.cat([steps.flatten() for steps in spans])
    places = torch.empty(int(host[-1]) + 1, dtype=torch.int64)
    places[read] = torch.arange(len(read))
    places = places[:-1]
    return rows, places[host[rows + 1] - 1], places, *spans


class SideBySide(NamedTuple):
    """Packed sequences as PyTorch's recurrent networks take them: step by step, the longer ones first."""

    rows: Tensor  # of the state, those of sequences with steps, longest first
    steps: Tensor  # (T,), of the packed line, in the new order
    places: Tensor  # (T,), in the new order, of the packed line's steps
    running: Tensor  # (longest,), on the CPU: sequences that have a step at each time


def side_by_side(packing: Packing) -> SideBySide:
    """The order of a packing, made once."""
    host, device = packing.host_borders(), packing.cu_seqlens.device

    def make() -> SideBySide:
        lengths, rows = host.diff().sort(descending=True, stable=True)
        rows = rows[lengths > 0]
        time = torch.arange(int(lengths[0]))[:, None]
        running = lengths[: len(rows)] > time  # (longest, rows)
        steps = (host[rows] + time)[running]
        order = rows, steps, steps.argsort()
        rows, steps, places = (m.to(device, non_blocking=True) for m in order)
        return SideBySide(rows, steps, places, running.sum(1))

    return once(host, ("side by side", device), make)


def _fake(a: LSTM) -> list[Tensor]:
    return [a.x.new_empty(*a.x.shape[:2], a.h.shape[1]), a.h.new_empty(a.h.shape), a.c.new_empty(a.c.shape)]


lstm_op = Op(_WHERE, LSTM, _reference, fake=_fake, check=_check, outputs=3)
lstm_op.add(rerun(_forward))
