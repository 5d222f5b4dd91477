"""LRU against the recurrence of its paper, and its ring of eigenvalues."""

import math

import pytest
import torch
from torch import Tensor

from dualform.core.errors import ArgumentError, ConfigError
from dualform.layers.lru import LRU, LRUConfig
from vectors import close


def oracle(layer: LRU, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Appendix A of the paper as a loop, then GELU and a gated linear map."""
    eigenvalues = torch.exp(-torch.exp(layer.nu_log) + 1j * torch.exp(layer.theta_log))
    B = (layer.B[..., 0] + 1j * layer.B[..., 1]) * torch.exp(layer.gamma_log)[:, None]
    C = layer.C[..., 0] + 1j * layer.C[..., 1]
    ys = []
    for u in x.unbind(1):
        h = eigenvalues * h + u.to(h.dtype) @ B.T
        g = torch.nn.functional.gelu((h @ C.T).real + layer.D * u)
        W, b = layer.out_proj.weight.chunk(2), layer.out_proj.bias.chunk(2)
        ys.append((g @ W[0].T + b[0]) * torch.sigmoid(g @ W[1].T + b[1]))
    return torch.stack(ys, 1), h


@pytest.mark.parametrize(
    "config, d_model", [(LRUConfig(d_state=5), 3), (LRUConfig(d_state=1, r_min=0.9, r_max=0.99, max_phase=0.5), 4)]
)
@pytest.mark.parametrize("length", [1, 30])
def test_oracle(config: LRUConfig, d_model: int, length: int) -> None:
    layer = config.build(d_model).double()
    x = torch.randn(2, length, d_model, dtype=torch.float64, requires_grad=True)
    h = torch.randn(2, config.d_state, dtype=torch.complex128, requires_grad=True)
    pairs = [*zip(layer(x, h), oracle(layer, x, h), strict=True)]
    for got, want in pairs:
        close(got, want, 1e-12)
    gradients = []
    for y, last in zip(*pairs, strict=True):
        loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() + torch.view_as_real(last).pow(3).sum()
        gradients.append(torch.autograd.grad(loss, [x, h, *layer.parameters()]))
    for got, want in zip(*gradients, strict=True):
        close(got, want, 1e-10)


def test_eigenvalues_start_evenly_on_the_ring() -> None:
    """Lemma 3.2: an eigenvalue is uniform on the area of the ring, cut to the sector of the phases."""
    layer = LRUConfig(d_state=4000, r_min=0.5, r_max=0.9, max_phase=math.pi / 2).build(2)
    eigenvalues = layer.log_eigenvalues().exp()
    area = (eigenvalues.abs() ** 2 - 0.5**2) / (0.9**2 - 0.5**2)
    for even in (area, eigenvalues.angle() / (math.pi / 2)):
        assert even.min() >= -1e-5 and even.max() <= 1 + 1e-5
        assert (even.sort().values - torch.linspace(0, 1, 4000)).abs().max() < 0.04  # Kolmogorov-Smirnov, 1e-5


def test_noise_keeps_its_variance() -> None:
    """Section 3.4: with gamma, white noise of variance 1 keeps the states at the variance of B's rows."""
    layer = LRUConfig(d_state=200, r_min=0.9, r_max=0.999).build(8).double()
    with torch.no_grad():
        _, h = layer(torch.randn(4, 3000, 8, dtype=torch.float64))
    assert abs(h.abs().pow(2).mean().item() - 1) < 0.2


def test_eigenvalues_cannot_leave_the_unit_disc() -> None:
    layer = LRUConfig(d_state=4).build(2)
    assert bool((LRUConfig(d_state=1000).build(1).log_eigenvalues().real < 0).all())
    with torch.no_grad():
        for parameter in (layer.nu_log, layer.theta_log):
            parameter.uniform_(-5, 5)
        y, h = layer(torch.ones(1, 1000, 2))
    assert bool(y.isfinite().all()) and bool(h.isfinite().all())
    assert {name for name, hint in layer.hints.items() if not hint.decay} >= {"nu_log", "theta_log", "gamma_log"}


def test_low_precision_is_computed_in_float32() -> None:
    layer, x = LRUConfig(d_state=4).build(4), torch.randn(1, 30, 4)
    want, want_h = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, h = layer(x)
    close(h, want_h, 1e-6)
    close(y, want, 2e-2)
    y, h = layer.bfloat16()(x.bfloat16())
    assert (y.dtype, h.dtype) == (torch.bfloat16, torch.complex64)


@pytest.mark.parametrize(
    "config, words",
    [
        (LRUConfig(d_state=0), "d_state is 0"),
        (LRUConfig(r_min=0.9, r_max=0.5), "r_min 0.9"),
        (LRUConfig(r_max=1.1), "r_max 1.1"),
        (LRUConfig(r_min=-0.1), "r_min -0.1"),
        (LRUConfig(r_max=0.0), "r_max 0.0"),
        (LRUConfig(max_phase=0.0), "max_phase is 0.0"),
    ],
)
def test_a_config_that_cannot_be_built(config: LRUConfig, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config.build(4)


def test_wrong_tensors_are_named() -> None:
    layer = LRUConfig().build(3)
    with pytest.raises(ArgumentError, match="x has shape"):
        layer(torch.randn(2, 5, 4))
    with pytest.raises(ArgumentError, match="state has 3 rows, expected 2"):
        layer(torch.randn(2, 5, 3), layer.init_state(3))
