"""The Vandermonde kernel; its backends, gradients and registration are tested with those of every operator."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dualform.core.errors import ArgumentError
from dualform.ops.vandermonde import vandermonde_kernel
from vectors import close


def modes(width: int, poles: int) -> tuple[Tensor, Tensor]:
    dt = torch.rand(width, 1, dtype=torch.float64) * 0.1 + 1e-3
    frequency = math.pi * torch.arange(poles, dtype=torch.float64).expand(width, -1)
    return dt * torch.complex(torch.full_like(frequency, -0.5), frequency), torch.randn(width, poles) + 0j


@pytest.mark.parametrize("length", [1, 2, 3, 15, 16, 17, 1000])
def test_definition(length: int):
    z, w = modes(3, 5)
    want = [sum((w[:, n] * torch.exp(t * z[:, n])).real for n in range(5)) * 2 for t in range(length)]
    close(vandermonde_kernel(z, w.to(z.dtype), length), torch.stack(want, 1), 1e-12)


def test_float32_is_exact_far_out():
    """An undamped mode after a hundred thousand taps: powers of a rounded pole would be off by 1e-2."""
    z, w = torch.tensor([[0.5j]], dtype=torch.complex64), torch.ones(1, 1, dtype=torch.complex64)
    t = torch.arange(100_000, dtype=torch.float64)
    close(vandermonde_kernel(z, w, 100_000)[0], 2 * torch.cos(0.5 * t), 1e-6)


class Largest(TorchDispatchMode):
    """The most numbers in one tensor that an operator made."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


def test_memory():
    """Forward and backward hold a few tables of ``sqrt(length)`` entries per pole, never one of ``length``."""
    z, w = (m.to(torch.complex64).requires_grad_() for m in modes(2, 32))
    with Largest() as largest:
        vandermonde_kernel(z, w, 4096).square().sum().backward()
    assert largest.numbers <= 2 * 4096 * 2  # the kernel, and the tables: naive is 2 * 32 * 4096


def test_bad_input():
    z, w = modes(2, 3)
    w = w.to(z.dtype)
    assert vandermonde_kernel(z, w, 0).shape == (2, 0)
    assert vandermonde_kernel(z[:, :0], w[:, :0], 3).eq(0).all()
    with pytest.raises(ArgumentError, match="weights has shape"):
        vandermonde_kernel(z, w[:1], 4)
    with pytest.raises(ArgumentError, match=r"log_poles is torch.float64, expected a complex dtype"):
        vandermonde_kernel(z.real, w, 4)
    with pytest.raises(ArgumentError, match="length is -1"):
        vandermonde_kernel(z, w, -1)
    with pytest.raises(ArgumentError, match=r"grows by exp\(1e\+03\) over 11 taps, which overflows torch.complex128"):
        vandermonde_kernel(z + 100 - z.real, w, 11)
    vandermonde_kernel(0.1 - z, w, 11)  # a growing mode is no error while its response is finite
