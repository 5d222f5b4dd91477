"""Griffin's recurrent block against a loop over its equations, and the gradient of its root."""

import pytest
import torch
from torch import Tensor

from dualform.core.errors import ArgumentError, ConfigError
from dualform.layers.rglru import RGLRU, RGLRUConfig, RGLRUState
from vectors import close


def oracle(layer: RGLRU, x: Tensor, state: RGLRUState) -> tuple[Tensor, Tensor, Tensor]:
    """Equations 1 to 4, a step and a head at a time."""
    past, h, E = state.conv, state.h, layer.d_inner
    W, b = layer.in_proj.weight, layer.in_proj.bias
    ys = []
    for t in range(x.shape[1]):
        z, u = x[:, t] @ W[:E].T + b[:E], x[:, t] @ W[E:].T + b[E:]
        window = torch.cat([past, u[..., None]], -1)
        v = (window * layer.conv_weight).sum(-1) + layer.conv_bias
        past = window[..., 1:]
        gates = []
        for weight, bias in zip(layer.gate_weight, layer.gate_bias, strict=True):
            by_head = [part @ w + c for part, w, c in zip(v.chunk(layer.config.heads, -1), weight, bias, strict=True)]
            gates.append(torch.sigmoid(torch.cat(by_head, -1)))
        a = torch.sigmoid(-layer.decay) ** (layer.config.c * gates[0])
        scale = (1 - a**2).sqrt()
        if not layer.config.scale_first:
            scale = torch.where((state.length + t == 0)[:, None], torch.ones(()), scale)
        h = a * h + scale * gates[1] * v
        ys.append(layer.out_proj(h * torch.nn.functional.gelu(z, approximate="tanh")))
    return torch.stack(ys, 1), past, h


@pytest.mark.parametrize(
    "config, d_model",
    [
        (RGLRUConfig(heads=2), 6),
        (RGLRUConfig(d_inner=6, heads=3, d_conv=2, c=3.0, scale_first=False), 4),
        (RGLRUConfig(heads=1, d_conv=1), 1),
    ],
)
def test_oracle(config: RGLRUConfig, d_model: int) -> None:
    layer = config.build(d_model).double()
    layer.gate_bias.data.normal_()
    x = torch.randn(2, 9, d_model, dtype=torch.float64, requires_grad=True)
    start = layer.init_state(2)
    start = RGLRUState(*(torch.randn_like(m).requires_grad_() for m in start[:2]), torch.tensor([0, 5]))
    y, state = layer(x, start)
    found, want = (y, *state[:2]), oracle(layer, x, start)
    gradients = []
    for y, past, h in (found, want):
        loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() + h.pow(3).sum() + past.pow(3).sum()
        gradients.append(torch.autograd.grad(loss, [x, *start[:2], *layer.parameters()]))
    for got, expected in zip((*found, *gradients[0]), (*want, *gradients[1]), strict=True):
        if expected.numel():
            close(got, expected, 1e-10)
    assert state.length.tolist() == [9, 14]


def test_a_gate_that_is_closed_has_a_gradient() -> None:
    """Where a decay rounds to 1, the root of ``1 - a^2`` is 0, and its own slope infinite."""
    layer, x = RGLRUConfig(heads=1).build(2), torch.randn(1, 3, 2)
    for closed in (-20.0, -60.0, -110.0):  # the last is 0 in float32
        layer.gate_bias.data[0] = closed
        y, state = layer(x)
        gradients = torch.autograd.grad(y.sum() + state.h.sum(), list(layer.parameters()))
        assert all(bool(g.isfinite().all()) for g in gradients), closed


def test_decays_start_evenly() -> None:
    """Section 2.4: ``a^c`` is uniform between 0.9 and 0.999."""
    layer = RGLRUConfig(heads=1).build(4000)
    a = torch.sigmoid(-layer.decay.detach()) ** 8
    even = (a - 0.9) / 0.099
    assert even.min() > -1e-3 and even.max() < 1.001
    assert (even.sort().values - torch.linspace(0, 1, 4000)).abs().max() < 0.04  # Kolmogorov-Smirnov, 1e-5


@pytest.mark.parametrize(
    "config, words",
    [
        (RGLRUConfig(heads=3), "d_model 4 is not a multiple of heads 3"),
        (RGLRUConfig(d_inner=5), "d_inner 5 is not a multiple of heads 4"),
        (RGLRUConfig(d_conv=0), "d_conv is 0"),
        (RGLRUConfig(a_max=1.0), "a_max 1.0"),
        (RGLRUConfig(c=0.0), "c is 0.0"),
    ],
)
def test_a_config_that_cannot_be_built(config: RGLRUConfig, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config.build(4)


def test_wrong_tensors_are_named() -> None:
    layer = RGLRUConfig().build(4)
    with pytest.raises(ArgumentError, match="x has shape"):
        layer(torch.randn(2, 5, 3))
    with pytest.raises(ArgumentError, match="has 3 rows, expected 2"):
        layer(torch.randn(2, 5, 4), layer.init_state(3))
    with pytest.raises(ArgumentError, match="state is tuple, expected RGLRUState"):
        layer.step(torch.randn(2, 4), tuple(layer.init_state(2)))
