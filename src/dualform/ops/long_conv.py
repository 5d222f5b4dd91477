"""The long causal convolution of new inputs behind earlier ones, by rows or packed."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.packing import Borders, Packing
from dualform.core.shapes import check_real, check_tensors, once_per_shape, wide, widest
from dualform.ops.fft_conv import fft_conv
from dualform.ops.op import Op
from dualform.ops.rerun import rerun

_WHERE = "long_conv"


def long_conv(u: Tensor, k: Tensor, past: Tensor | None = None, *, cu_seqlens: Borders = None) -> Tensor:
    """``y_t = sum_{s >= 0} k_s u_{t-s}`` per channel; the inputs before the first are those of the past.

    A sequence much longer than the filter is cut into frames, each behind the ``K - 1`` inputs that it needs: what
    lies further apart then does not meet, not even as rounding errors. The FFT is of double precision where there is
    one: that of single precision spreads rounding errors over all times, to earlier outputs too. So does a value that
    is not finite, within its own sequence and channel.

    Args:
        u: ``(B, T, D)``.
        k: ``(D, K)``, filter, zero beyond its K taps.
        past: ``(B, S, D)``, the S inputs before the first, zeros where there were none; with ``cu_seqlens`` one row
            per sequence. None is no earlier input.
        cu_seqlens: ``(n + 1,)``, cumulative lengths of sequences packed on the time axis, or a ``Packing`` that was
            made of them; B is then 1.

    Returns:
        y ``(B, T, D)`` in the dtype of u.

    Raises:
        ArgumentError: for shapes, dtypes or devices that do not fit together.

    References:
        Poli et al. (2023), arXiv:2302.10866, section 2 (long convolutions).
    """
    _check_inputs(u, k, past)
    packing = Packing.of(_WHERE, cu_seqlens, u)
    if past is None:
        past = u.new_zeros(u.shape[0] if packing is None else packing.rows, 0, u.shape[2])
    a = LongConv(u, k, past, packing)
    _check(a)
    return long_conv_op(a)[0]


class LongConv(NamedTuple):
    """The arguments of the operator, as in :func:`long_conv`."""

    u: Tensor  # (B, T, D)
    k: Tensor  # (D, K)
    past: Tensor  # (rows, S, D)
    packing: Packing | None


def _check(a: LongConv) -> None:
    _check_inputs(a.u, a.k, a.past)
    rows = a.u.shape[0] if a.packing is None else a.packing.rows
    if a.past.shape[0] != rows:
        raise ArgumentError(f"{_WHERE}: past has {a.past.shape[0]} rows, expected {rows}")


@once_per_shape
def _check_inputs(u: Tensor, k: Tensor, past: Tensor | None) -> None:
    check_tensors(_WHERE, u=(u, "B T D"), k=(k, "D K"), past=(past, "? R S D"))
    check_real(_WHERE, u=u, k=k, past=past)


def _reference(a: LongConv) -> tuple[Tensor]:
    def run(u: Tensor, past: Tensor) -> Tensor:
        line = torch.cat([past, u], 1).to(wide(u, a.k))
        y = []
        for t in range(past.shape[1] + 1, line.shape[1] + 1):
            seen = line[:, max(0, t - a.k.shape[1]) : t].flip(1)
            y.append((seen * a.k[:, : seen.shape[1]].T).sum(1))
        return torch.stack(y, 1).to(u.dtype) if y else u.clone()

    if a.packing is None:
        return (run(a.u, a.past),)
    parts = a.u.split(a.packing.as_tensor().diff().tolist(), 1)
    return (torch.cat([run(u, past) for u, past in zip(parts, a.past.split(1), strict=True)], 1),)


def _forward(a: LongConv) -> list[Tensor]:
    if a.u.numel() == 0:
        return [torch.zeros_like(a.u)]
    if a.packing is None:
        return [_rows(a.u, a.past, a.k)]
    return [a.packing.in_rows(lambda rows, u: _rows(u, a.past[rows], a.k), a.u)]


def _rows(u: Tensor, past: Tensor, k: Tensor) -> Tensor:
    past = past[:, max(0, past.shape[1] - k.shape[1] + 1) :]
    (batch, length, width), reach, exact = u.shape, k.shape[1] - 1, widest(u)
    line, hop = torch.cat([past.to(exact), u.to(exact)], 1), 4 * reach
    if reach <= 0 or length <= hop:
        return fft_conv(line, k.to(exact))[:, past.shape[1] :].to(u.dtype).contiguous()
    count = -(-length // hop)
    line = F.pad(line, (0, 0, reach - past.shape[1], count * hop - length))
    frames = line.unfold(1, reach + hop, hop).transpose(2, 3).flatten(0, 1)
    y = fft_conv(frames, k.to(exact))[:, reach:].reshape(batch, count * hop, width)
    return y[:, :length].to(u.dtype).contiguous()


def _fake(a: LongConv) -> list[Tensor]:
    return [a.u.new_empty(a.u.shape)]


long_conv_op = Op(_WHERE, LongConv, _reference, fake=_fake, check=_check, outputs=1)
long_conv_op.add(rerun(_forward))
