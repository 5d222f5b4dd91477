"""The Cauchy kernel: the convolution kernel of S4 by its generating function."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dualform.core.dplr import DiscreteDPLR, as_complex, as_real
from dualform.core.errors import ArgumentError
from dualform.core.shapes import check_floating, check_real, check_tensors, wide
from dualform.ops.dispatch import exactly
from dualform.ops.op import Backend, Op
from dualform.ops.state import check_dtype

_WHERE = "cauchy_kernel"
_ELEMENTS = 2**21  # of (D, N, frequencies) held at once


def cauchy_kernel(A: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int) -> Tensor:
    """``K_l = 2 Re(C Abar^l Bbar)`` for ``l < length``, with ``diag(A) - sum_r P_r P_r^*`` under the bilinear rule.

    A, P, B and C stand for themselves and their conjugates. The generating function ``sum_l K_l w^l`` of the first
    ``length`` taps at the roots of unity w is ``C~ (I - w Abar)^-1 Bbar`` with ``C~ = C (I - Abar^length)``; by
    Woodbury's identity it takes ``(1 + rank)^2`` Cauchy products, sums of ``1 / (s - c dt A)`` over the poles. An FFT
    leads back to the taps. Memory is ``O(D (N^2 + length))``, never ``D N length``.

    Args:
        A: ``(D, N)``, complex, with negative real part.
        P: ``(rank, D, N)``, complex.
        B: ``(D, N)``, complex.
        C: ``(D, N)``, complex: C itself, not the ``C~`` that the paper trains.
        dt: ``(D,)``, positive.
        length: number of taps, 0 or more.

    Returns:
        K ``(D, length)``, real, float32 or wider.

    Raises:
        ArgumentError: for shapes, dtypes or devices that do not fit together, a negative length, a step that is not
            positive or an unstable A, whose response never ends. Values are checked where reading them costs
            nothing, on the CPU.

    References:
        Gu, Goel and Re (2022), arXiv:2111.00396, algorithm 1 and appendix C.3.
    """
    check_tensors(_WHERE, A=(A, "D N"), P=(P, "* D N"), B=(B, "D N"), C=(C, "D N"), dt=(dt, "D"))
    check_floating(_WHERE, A=A, P=P, B=B, C=C)
    check_real(_WHERE, dt=dt)
    if length < 0:
        raise ArgumentError(f"{_WHERE}: the length is {length}, expected 0 or more")
    if A.device.type == "cpu" and A.numel() and not torch.compiler.is_compiling():
        if not bool((dt > 0).all()):
            raise ArgumentError(f"{_WHERE}: dt is {float(dt.detach().min()):g}, expected positive step sizes")
        if not bool((A.real < 0).all()):
            raise ArgumentError(
                f"{_WHERE}: A has a pole with real part {float(A.detach().real.max()):g}: it is unstable, "
                "and its response never ends",
                hint="the generating function needs Re A < 0; parametrise the real part as -exp(parameter)",
            )
    dtype = wide(A, P, B, C, dt)
    dtype = torch.promote_types(dtype, torch.complex64)
    A, P, B, C, dt = A.to(dtype), P.to(dtype), B.to(dtype), C.to(dtype), dt.to(dtype.to_real())
    if length == 0:
        return dt.new_zeros(len(dt), 0)
    with exactly(A.device.type):
        return _kernel(A, P, B, C, dt, length)


def _kernel(A: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int) -> Tensor:
    """See :func:`cauchy_kernel`; all in one precision."""
    C = _truncated(A, P, B, C, dt, length)
    left, right = torch.cat([C[None], P.conj()]), torch.cat([B[None], P])
    pairs = (left[:, None] * right).flatten(0, 1).transpose(0, 1)
    (sums,) = cauchy_op(Cauchy(pairs.contiguous(), dt[:, None] * A, length))
    k = sums.unflatten(1, (len(left), len(left)))
    _, c, back = _nodes(length, dt)
    scale = dt[:, None, None, None] * torch.polar(c, -back)  # dt (1 + w) / 2
    for i in range(len(P), 0, -1):  # Woodbury, one row of P after another
        column, row, pivot = k[:, :i, i:], k[:, i:, :i], 1 + scale * k[:, i:, i:]
        k = k[:, :i, :i] - scale * column * row / pivot
    return torch.fft.irfft(dt[:, None] * k[:, 0, 0], length)


def _truncated(A: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int) -> Tensor:
    """``C (I - Abar^length)``, by squaring."""
    powers = DiscreteDPLR.of(A, P, B, dt).powers()
    row = as_real(C.conj())[:, None]
    power = row
    for bit in range(length.bit_length()):
        if length >> bit & 1:
            power = powers.moved(power, bit, adjoint=True)
    return as_complex((row - power)[:, 0]).conj()


def _nodes(length: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For the roots of unity ``w = exp(-2 i t)``, t from 0 to pi / 2: ``sin t``, ``cos t`` and t."""
    t = torch.arange(length // 2 + 1, device=like.device, dtype=like.dtype) * (math.pi / length)
    return t.sin(), t.cos(), t


class Cauchy(NamedTuple):
    """The arguments of the operator: sums of simple fractions on half of the unit circle.

    ``sum_n v_n / (s - c z_n) + conj(v_n) / (s - c conj(z_n))`` with ``s = 1 - w``, ``c = (1 + w) / 2`` at the first
    half of the roots of unity ``w = exp(-2 pi i k / length)``: ``(D, Q, length // 2 + 1)``, complex.
    """

    v: Tensor  # (D, Q, N), complex
    z: Tensor  # (D, N), complex, with negative real part
    length: int  # of the full circle


def _check(a: Cauchy) -> None:
    check_tensors(_WHERE, v=(a.v, "D Q N"), z=(a.z, "D N"))
    check_dtype(_WHERE, a.v.dtype, z=a.z)
    if not a.v.is_complex() or a.length < 1:
        raise ArgumentError(f"{_WHERE}: v is {a.v.dtype} and the length {a.length}, expected complex and at least 1")


def _reference(a: Cauchy) -> tuple[Tensor]:
    v, z, length = a
    sine, cosine, t = _nodes(length, z.real)
    s, c = torch.polar(2 * sine, math.pi / 2 - t), torch.polar(cosine, -t)
    z, v = z[:, None, :, None], v[..., None]
    return ((v / (s - c * z) + v.conj() / (s - c * z.conj())).sum(2),)


# Each conjugate pair is one fraction with real coefficients: with t as above,
#
#     v / (s - c z) + conj = e^(it) (4 i sin t Re v - 2 cos t Re(v conj z)) G,
#     1 / G = cos^2 t |z|^2 - 4 sin^2 t - 4 i sin t cos t Re z,
#
# so one reciprocal per pole and frequency serves all Q sums, which are real matrix products.


def _fractions(z: Tensor, sine: Tensor, cosine: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of G, ``(D, N, W)``."""
    x, size = z.real[..., None], (z.real.square() + z.imag.square())[..., None]
    re = cosine.square() * size - 4 * sine.square()
    im = 4 * sine * cosine * x
    norm = re.square() + im.square()
    return re / norm, im / norm


def _windows(length: int, z: Tensor) -> list[tuple[Tensor, Tensor, Tensor, slice]]:
    step = max(1, _ELEMENTS // max(1, z.numel()))
    sine, cosine, t = _nodes(length, z.real)
    parts = [slice(i, i + step) for i in range(0, len(t), step)]
    return [(sine[w], cosine[w], torch.polar(torch.ones_like(t[w]), t[w]), w) for w in parts]


def _forward(a: Cauchy) -> list[Tensor]:
    v, z, length = a
    out = v.new_empty(*v.shape[:2], length // 2 + 1)
    table = torch.cat([v.real, (v * z[:, None].conj()).real], 1)
    for sine, cosine, turn, window in _windows(length, z):
        re, im = _fractions(z, sine, cosine)
        plain, tilted = torch.complex(torch.bmm(table, re), torch.bmm(table, im)).chunk(2, 1)
        out[..., window] = turn * (4j * sine * plain - 2 * cosine * tilted)
    return [out]


def _backward(grads: list[Tensor], kept: list[Tensor], a: Cauchy) -> dict[str, Tensor]:
    v, z, length = a
    table = torch.cat([v.real, (v * z[:, None].conj()).real], 1)
    dtable, dsize, dx = torch.zeros_like(table), torch.zeros_like(z.real), torch.zeros_like(z.real)
    for sine, cosine, turn, window in _windows(length, z):
        re, im = _fractions(z, sine, cosine)
        g = turn.conj() * grads[0][..., window]
        g = torch.cat([-4j * sine * g, -2 * cosine * g], 1)
        dtable += torch.bmm(g.real, re.mT) + torch.bmm(g.imag, im.mT)
        dre, dim = torch.bmm(table.mT, g.real), torch.bmm(table.mT, g.imag)
        # G = 1 / d: the gradient of d is -conj(G^2) times that of G
        square_re, square_im = re.square() - im.square(), -2 * re * im
        dsize += ((square_im * dim - square_re * dre) * cosine.square()).sum(-1)
        dx += 4 * ((square_re * dim + square_im * dre) * sine * cosine).sum(-1)
    plain, tilted = dtable.chunk(2, 1)
    dv = torch.complex(plain, torch.zeros_like(plain)) + tilted * z[:, None]
    dz = (tilted * v).sum(1) + 2 * dsize * z + dx
    return {"v": dv, "z": dz}


def _fake(a: Cauchy) -> list[Tensor]:
    return [a.v.new_empty(*a.v.shape[:2], a.length // 2 + 1)]


cauchy_op = Op(_WHERE, Cauchy, _reference, fake=_fake, check=_check, outputs=1)
cauchy_op.add(Backend("torch", _forward, _backward))
