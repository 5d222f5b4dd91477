"""The mLSTM against a loop over its equations, with and without the scale, and gates of any strength."""

import math

import pytest
import torch
from torch import Tensor

from dualform.core.errors import ArgumentError, ConfigError
from dualform.core.packing import Packing
from dualform.layers.mlstm import MLSTM, MLSTMConfig, MLSTMState, scales
from vectors import close


def oracle(layer: MLSTM, x: Tensor, state: MLSTMState) -> tuple[Tensor, Tensor, Tensor]:
    """Equations 19 to 27, scaled as in appendix A.3, with what the layer of xLSTM 7B has around them."""
    c, H, N, P = layer.config, layer.heads, layer.d_key, layer.d_value
    C, n, m = state.h[..., :-1], state.h[..., -1], state.m
    ys = []
    for x_t in x.unbind(1):
        q, k, v, o = layer.in_proj(x_t).split([H * N, H * N, H * P, H * P], -1)
        q, k, v = q.view(-1, H, N) / math.sqrt(N), k.view(-1, H, N), v.view(-1, H, P)
        gates = x_t @ layer.gate_proj.weight.T + layer.gate_bias
        if c.gate_cap is not None:
            gates = c.gate_cap * torch.tanh(gates / c.gate_cap)
        a, log_f = gates[:, :H], torch.log(torch.sigmoid(gates[:, H:]))
        before, m = m, torch.maximum(log_f + m, a)
        f, i = torch.exp(log_f + before - m)[..., None], torch.exp(a - m)[..., None]
        C = f[..., None] * C + i[..., None] * k[..., None] * v[..., None, :]
        n = f * n + i * k
        below = torch.maximum((n * q).sum(-1).abs(), torch.exp(-m)) + c.eps
        u = (q[..., None] * C).sum(-2) / below[..., None]
        u = (u - u.mean(-1, keepdim=True)) / (u.var(-1, correction=0, keepdim=True) + c.norm_eps).sqrt()
        u = u.flatten(1) * layer.norm_weight + (0 if layer.norm_bias is None else layer.norm_bias)
        ys.append(layer.out_proj(torch.sigmoid(o) * u))
    return torch.stack(ys, 1), torch.cat([C, n[..., None]], -1), m


@pytest.mark.parametrize(
    "config, d_model",
    [
        (MLSTMConfig(heads=2, norm_eps=0.01), 6),
        (MLSTMConfig(heads=3, d_key=2, d_value=5, gate_cap=None, bias=True, norm_eps=0.01), 4),
        (MLSTMConfig(heads=1, d_value=3, gate_cap=0.5, eps=0.1, norm_eps=0.01), 1),
    ],
)
def test_oracle(config: MLSTMConfig, d_model: int) -> None:
    layer = config.build(d_model).double()
    layer.gate_bias.data.normal_()
    x = torch.randn(2, 70, d_model, dtype=torch.float64, requires_grad=True)
    start = layer.init_state(2)
    start = MLSTMState(*(torch.randn_like(s).requires_grad_() for s in start))
    y, state = layer(x, start)
    found, want = (y, *state), oracle(layer, x, start)
    gradients = []
    for y, h, m in (found, want):
        loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() + h.pow(3).sum() + m.pow(3).sum()
        gradients.append(torch.autograd.grad(loss, [x, *start, *layer.parameters()]))
    for got, expected in zip((*found, *gradients[0]), (*want, *gradients[1]), strict=True):
        close(got, expected, 1e-9)


def test_it_is_the_recurrence_without_a_scale() -> None:
    """Equations 19 to 27 as they stand, in float64, of gates that float32 could not hold."""
    layer = MLSTMConfig(heads=1, gate_cap=None, eps=1e-30).build(4).double()
    layer.gate_bias.data = torch.tensor([100.0, 1.0], dtype=torch.float64)
    x = torch.randn(1, 20, 4, dtype=torch.float64)
    C, n, ys = torch.zeros(4, 4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64), []
    for x_t in x[0]:
        q, k, v, o = layer.in_proj(x_t).chunk(4)
        a, b = layer.gate_proj(x_t) + layer.gate_bias
        C = torch.sigmoid(b) * C + torch.exp(a) * torch.outer(k, v)
        n = torch.sigmoid(b) * n + torch.exp(a) * k
        u = (q / 2) @ C / torch.clamp((n @ q / 2).abs(), min=1)
        ys.append(layer.out_proj(torch.sigmoid(o) * torch.nn.functional.layer_norm(u, (4,), eps=layer.config.norm_eps)))
    want = torch.stack(ys)[None]
    close(layer(x)[0], want, 1e-9)
    close(layer.float()(x.float())[0], want, 1e-3)


def test_gates_of_any_strength_are_finite() -> None:
    layer, x = MLSTMConfig(heads=1, gate_cap=None).build(4), torch.randn(1, 30, 4)
    for a in (-1000.0, -100.0, 100.0, 1000.0):
        for b in (-1000.0, 1000.0):
            layer.gate_bias.data = torch.tensor([a, b])
            y, state = layer(x)
            loss = y.square().sum() + state.h.sum() + state.m.sum()
            gradients = torch.autograd.grad(loss, list(layer.parameters()))
            assert all(bool(m.isfinite().all()) for m in (y, *state, *gradients)), (a, b)


@pytest.mark.parametrize("lengths", [(2, 0, 5, 1), (0, 3), (0, 0), (4,)])
def test_scales_of_packed_sequences(lengths: tuple[int, ...]) -> None:
    """Each is that of its sequence alone, however far the sequences lie apart."""
    total = sum(lengths)
    packing = Packing.of("test", torch.tensor([0, *lengths]).cumsum(0), torch.empty(1, total))
    log_f, a = -torch.rand(1, total, 2).double(), 5 * torch.randn(1, total, 2).double()
    a[:, :2] += 1000
    start = torch.randn(len(lengths), 2).double()
    before, m, last = scales(log_f, a, start, packing)
    t = 0
    for row, length in enumerate(lengths):
        now = start[row]
        for _ in range(length):
            close(before[0, t], now, 1e-12)
            now = torch.maximum(log_f[0, t] + now, a[0, t])
            close(m[0, t], now, 1e-12)
            t += 1
        close(last[row], now, 1e-12)


@pytest.mark.parametrize(
    "config, words",
    [
        (MLSTMConfig(heads=3), "d_model 4 is not a multiple of heads 3"),
        (MLSTMConfig(d_key=0), "d_key is 0"),
        (MLSTMConfig(gate_cap=0.0), "gate_cap is 0.0"),
        (MLSTMConfig(eps=-1.0), "eps is -1.0"),
        (MLSTMConfig(norm_eps=math.inf), "norm_eps is inf"),
    ],
)
def test_a_config_that_cannot_be_built(config: MLSTMConfig, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config.build(4)


def test_wrong_tensors_are_named() -> None:
    layer = MLSTMConfig().build(4)
    with pytest.raises(ArgumentError, match="x has shape"):
        layer(torch.randn(2, 5, 3))
    with pytest.raises(ArgumentError, match="has 3 rows, expected 2"):
        layer(torch.randn(2, 5, 4), layer.init_state(3))
    with pytest.raises(ArgumentError, match="state is tuple, expected MLSTMState"):
        layer.step(torch.randn(2, 4), tuple(layer.init_state(2)))
