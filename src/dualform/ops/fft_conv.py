"""The long causal convolution: the parallel form of every time-invariant system (S4, S4D, H3, Hyena)."""

from typing import NamedTuple

import torch
from torch import Tensor

from dualform.core.shapes import check_real, check_tensors, once_per_shape, wide
from dualform.ops.op import Backend, Op

_WHERE = "fft_conv"


def fft_conv(u: Tensor, k: Tensor, D: Tensor | None = None) -> Tensor:
    """``y_t = sum_{s=0}^{t} k_s u_{t-s} + D u_t``, per channel; causal, never circular.

    Args:
        u: ``(B, T, D)``, input.
        k: ``(D, K)``, filter; K may be shorter than T (zero beyond) or longer (the rest is unused).
        D: ``(D,)``, skip.

    Returns:
        y ``(B, T, D)`` in the dtype of u; computed in float32 or wider. What is not finite in a row and channel of u
        reaches all of that row and channel, earlier outputs included, and no others.

    Raises:
        ArgumentError: for shapes, dtypes or devices that do not fit together.

    References:
        Gu et al. (2021), arXiv:2111.00396, section 2.4, equation 5.
    """
    _check_inputs(u, k, D)
    (y,) = fft_conv_op(FFTConv(u, k[:, : u.shape[1]]))
    return y if D is None else y + D.to(y.dtype) * u


class FFTConv(NamedTuple):
    """The arguments of the operator, as in :func:`fft_conv`."""

    u: Tensor  # (B, T, D)
    k: Tensor  # (D, K)


@once_per_shape
def _check_inputs(u: Tensor, k: Tensor, D: Tensor | None = None) -> None:
    check_tensors(_WHERE, u=(u, "B T D"), k=(k, "D K"), D=(D, "? D"))
    check_real(_WHERE, u=u, k=k, D=D)


def _reference(a: FFTConv) -> tuple[Tensor]:
    u, k = a
    dtype, length = wide(u, k), u.shape[1]
    y = [(u[:, max(0, t + 1 - k.shape[1]) : t + 1].to(dtype).flip(1) * k[:, : t + 1].T).sum(1) for t in range(length)]
    return (torch.stack(y, 1).to(u.dtype) if y else u.clone(),)


def _fast_length(n: int) -> int:
    """The smallest length of at least n that is 1, 3, 5, 9 or 15 times a power of two: no prime factor above 5."""
    return min(m << max(0, (-(-n // m) - 1).bit_length()) for m in (1, 3, 5, 9, 15))


def _spectra(u: Tensor, k: Tensor) -> tuple[Tensor, Tensor, int]:
    dtype, n = wide(u, k), _fast_length(u.shape[1] + k.shape[1] - 1)
    return torch.fft.rfft(u.to(dtype), n, 1), torch.fft.rfft(k.to(dtype), n, 1).T, n


def _forward(a: FFTConv) -> list[Tensor]:
    u, k = a
    if u.numel() == 0 or k.shape[1] == 0:
        return [torch.zeros_like(u)]
    U, K, n = _spectra(u, k)
    return [torch.fft.irfft(U.mul_(K), n, 1)[:, : u.shape[1]].to(u.dtype).contiguous()]


def _backward(grads: list[Tensor], kept: list[Tensor], a: FFTConv) -> dict[str, Tensor]:
    """Correlation with the other factor: in frequency, multiplication with its conjugate."""
    u, k = a
    if u.numel() == 0 or k.shape[1] == 0:
        return {"u": torch.zeros_like(u), "k": torch.zeros_like(k)}
    U, K, n = _spectra(u, k)
    Y = torch.fft.rfft(grads[0].to(wide(u, k)), n, 1)
    dk = torch.fft.irfft((U.conj() * Y).sum(0), n, 0)[: k.shape[1]].T
    return {"u": torch.fft.irfft(Y.mul_(K.conj()), n, 1)[:, : u.shape[1]], "k": dk}


def _fake(a: FFTConv) -> list[Tensor]:
    return [a.u.new_empty(a.u.shape)]


fft_conv_op = Op(_WHERE, FFTConv, _reference, fake=_fake, check=lambda a: _check_inputs(*a), outputs=1)
fft_conv_op.add(Backend("torch", _forward, _backward))
