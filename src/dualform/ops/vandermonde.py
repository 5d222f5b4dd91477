"""The Vandermonde product: the convolution kernel of a diagonal state space model (S4D, DSS, H3)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.shapes import check_tensors, once_per_shape
from dualform.ops.op import Backend, Op
from dualform.ops.state import check_dtype

_WHERE = "vandermonde_kernel"


def vandermonde_kernel(log_poles: Tensor, weights: Tensor, length: int) -> Tensor:
    """``K_l = 2 Re sum_n w_n exp(l z_n)`` for ``l < length``, per channel.

    The impulse response of a diagonal system, of whose conjugate pairs of poles one each is given. Poles come as
    logarithms, ``z = dt A`` for the zero-order hold and ``log Abar`` in general, because ``exp(l z)`` is exact to
    rounding where the l-th power of a rounded ``exp(z)`` is not.

    Work is one batched matrix product, memory ``O(D N sqrt(length))`` besides the kernel: with ``l = K a + b`` and
    ``K`` about ``sqrt(length)``, ``exp(l z) = exp(K a z) exp(b z)``.

    Args:
        log_poles: ``(D, N)``, complex.
        weights: ``(D, N)``, complex: ``C Bbar`` of the paper.
        length: number of taps, 0 or more.

    Returns:
        K ``(D, length)``, real.

    Raises:
        ArgumentError: for shapes, dtypes or devices that do not fit together, a negative length, or growing modes
            whose response overflows within it. Values are checked where reading them costs nothing, on the CPU.

    References:
        Gu, Goel, Gupta and Re (2022), arXiv:2206.11893, section 3.2.
    """
    _check_inputs(log_poles, weights, length)
    dtype = torch.promote_types(torch.promote_types(log_poles.dtype, weights.dtype), torch.complex64)
    if log_poles.device.type == "cpu" and log_poles.numel() and not torch.compiler.is_compiling():
        growth = float(log_poles.detach().real.max()) * (length - 1)
        if growth > math.log(torch.finfo(dtype).max) / 2:
            raise ArgumentError(
                f"{_WHERE}: a mode grows by exp({growth:.3g}) over {length} taps, which overflows {dtype}",
                hint="the real parts of log_poles are dt Re A: negative for a stable system",
            )
    (kernel,) = vandermonde_op(Vandermonde(log_poles.to(dtype), weights.to(dtype), length))
    return kernel


class Vandermonde(NamedTuple):
    """The arguments of the operator, as in :func:`vandermonde_kernel`; both tensors have one dtype."""

    log_poles: Tensor  # (D, N)
    weights: Tensor  # (D, N)
    length: int


@once_per_shape
def _check_inputs(log_poles: Tensor, weights: Tensor, length: int) -> None:
    check_tensors(_WHERE, log_poles=(log_poles, "D N"), weights=(weights, "D N"))
    for name, tensor in (("log_poles", log_poles), ("weights", weights)):
        if not tensor.is_complex():
            raise ArgumentError(f"{_WHERE}: {name} is {tensor.dtype}, expected a complex dtype")
    if length < 0:
        raise ArgumentError(f"{_WHERE}: the length is {length}, expected 0 or more")


def _check(a: Vandermonde) -> None:
    _check_inputs(*a)
    check_dtype(_WHERE, a.weights.dtype, log_poles=a.log_poles)


def _reference(a: Vandermonde) -> tuple[Tensor]:
    powers = torch.exp(a.log_poles[..., None] * torch.arange(a.length, device=a.log_poles.device))
    return (2 * (a.weights[..., None] * powers).sum(1).real,)


def _two_levels(log_poles: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """``exp(K a z)`` and ``exp(b z)``, ``(D, N, blocks)`` and ``(D, N, K)``."""
    block = max(1, math.isqrt(length))
    steps = torch.arange(block, device=log_poles.device)
    starts = block * torch.arange(-(-length // block), device=log_poles.device)
    return _exp(log_poles, starts), _exp(log_poles, steps)


def _exp(z: Tensor, times: Tensor) -> Tensor:
    """``exp(times z)``, ``(..., len(times))``; several times faster than PyTorch's complex exponential on a CPU."""
    return torch.polar((z.real[..., None] * times).exp(), z.imag[..., None] * times)


def _real(x: Tensor) -> Tensor:
    """``(D, N, J)`` complex -> ``(D, J, 2 N)``, real parts first."""
    return torch.cat([x.real, x.imag], 1).mT


def _complex(x: Tensor) -> Tensor:
    """The inverse of :func:`_real`."""
    return torch.complex(*(half.mT for half in x.chunk(2, -1)))


def _forward(a: Vandermonde) -> list[Tensor]:
    log_poles, weights, length = a
    outer, inner = _two_levels(log_poles, length)
    kernel = torch.bmm(_real(2 * (weights[..., None] * outer).conj()), _real(inner).mT)
    return [kernel.flatten(1)[:, :length].contiguous()]


def _backward(grads: list[Tensor], kept: list[Tensor], a: Vandermonde) -> dict[str, Tensor]:
    """The moments ``sum_l dK_l conj(exp(l z))`` and ``sum_l l dK_l conj(exp(l z))``, again in two levels."""
    log_poles, weights, length = a
    if length == 0:
        return {"log_poles": torch.zeros_like(log_poles), "weights": torch.zeros_like(weights)}
    outer, inner = _two_levels(log_poles, length)
    blocks, block = outer.shape[-1], inner.shape[-1]
    dk = torch.nn.functional.pad(2 * grads[0], (0, blocks * block - length)).unflatten(1, (blocks, block))
    steps = torch.arange(block, device=dk.device, dtype=dk.dtype)
    table = _real(inner)
    plain, later = (_complex(torch.bmm(dk, t)) for t in (table, table * steps[:, None]))
    starts = block * torch.arange(blocks, device=dk.device)
    zeroth = (outer * plain).sum(-1).conj()
    first = (outer * (starts * plain + later)).sum(-1).conj()
    return {"log_poles": weights.conj() * first, "weights": zeroth}


def _fake(a: Vandermonde) -> list[Tensor]:
    return [a.log_poles.new_empty(a.log_poles.shape[0], a.length, dtype=a.log_poles.real.dtype)]


vandermonde_op = Op(_WHERE, Vandermonde, _reference, fake=_fake, check=_check, outputs=1)
vandermonde_op.add(Backend("torch", _forward, _backward))
