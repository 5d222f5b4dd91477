"""The sLSTM against a loop over its equations, with and without the scale."""

import math

import pytest
import torch
from torch import Tensor

from dualform.core.errors import ArgumentError, ConfigError
from dualform.layers.slstm import SLSTM, SLSTMConfig, SLSTMState
from dualform.ops.slstm import slstm
from vectors import close


def maps(layer: SLSTM, x_t: Tensor, h: Tensor) -> list[Tensor]:
    """The arguments of z, i, f and o for one row ``(D,)`` and the outputs before ``(H, P)``, head by head."""
    by_gate = (layer.in_proj.weight @ x_t).view(4, layer.heads, layer.d_head) + layer.gate_bias
    recurrent = [torch.stack([h[j] @ R[j] for j in range(layer.heads)]) for R in layer.gate_weight]
    return [w + r for w, r in zip(by_gate, recurrent, strict=True)]


def normalised(layer: SLSTM, h: Tensor) -> Tensor:
    u = (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + layer.config.norm_eps).sqrt()
    return layer.out_proj.weight @ (u.flatten() * layer.norm_weight)


def oracle(layer: SLSTM, x: Tensor, state: SLSTMState) -> tuple[Tensor, SLSTMState]:
    """Equations 8 to 17, a row at a time."""
    rows, last = [], []
    for row, x_row in enumerate(x):
        (h, c, n, m), ys = (s[row] for s in state), []
        for x_t in x_row:
            z, a, b, o = maps(layer, x_t, h)
            before, m = m, torch.maximum(torch.log(torch.sigmoid(b)) + m, a)
            f, i = torch.exp(torch.log(torch.sigmoid(b)) + before - m), torch.exp(a - m)
            c, n = f * c + i * torch.tanh(z), f * n + i
            h = torch.sigmoid(o) * c / n
            ys.append(normalised(layer, h))
        rows.append(torch.stack(ys))
        last.append((h, c, n, m))
    return torch.stack(rows), SLSTMState(*(torch.stack(leaf) for leaf in zip(*last, strict=True)))


@pytest.mark.parametrize(
    "config, d_model", [(SLSTMConfig(heads=2, norm_eps=0.01), 6), (SLSTMConfig(heads=1, d_head=3, norm_eps=0.1), 2)]
)
def test_oracle(config: SLSTMConfig, d_model: int) -> None:
    layer = config.build(d_model).double()
    x = torch.randn(2, 9, d_model, dtype=torch.float64, requires_grad=True)
    start = SLSTMState(*(torch.randn_like(s) for s in layer.init_state(2)))
    start = SLSTMState(*(s.requires_grad_() for s in start._replace(n=start.n.exp())))
    y, state = layer(x, start)
    want, last = oracle(layer, x, start)
    gradients = []
    for out, after in ((y, state), (want, last)):
        loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() + sum(s.pow(3).sum() for s in after)
        gradients.append(torch.autograd.grad(loss, [x, *start, *layer.parameters()]))
    for got, expected in zip((y, *state, *gradients[0]), (want, *last, *gradients[1]), strict=True):
        close(got, expected, 1e-10)


def test_it_is_the_recurrence_without_a_scale() -> None:
    """Equations 8 to 14 from nothing, in float64, of gates that float32 could not hold."""
    for strength in (100.0, -100.0):
        layer = SLSTMConfig(heads=2).build(4).double()
        layer.gate_bias.data[1] = strength
        x = torch.randn(1, 12, 4, dtype=torch.float64)
        h = c = n = torch.zeros(2, 2, dtype=torch.float64)
        ys = []
        for x_t in x[0]:
            z, a, b, o = maps(layer, x_t, h)
            c = torch.sigmoid(b) * c + torch.exp(a) * torch.tanh(z)
            n = torch.sigmoid(b) * n + torch.exp(a)
            h = torch.sigmoid(o) * c / n
            ys.append(normalised(layer, h))
        want = torch.stack(ys)[None]
        close(layer(x)[0], want, 1e-9)
        close(layer.float()(x.float())[0], want, 1e-3)


@pytest.mark.parametrize(
    "config, words",
    [
        (SLSTMConfig(heads=3), "d_model 4 is not a multiple of heads 3"),
        (SLSTMConfig(d_head=0), "d_head is 0"),
        (SLSTMConfig(norm_eps=math.inf), "norm_eps is inf"),
    ],
)
def test_a_config_that_cannot_be_built(config: SLSTMConfig, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config.build(4)


def test_wrong_tensors_are_named() -> None:
    layer = SLSTMConfig().build(4)
    with pytest.raises(ArgumentError, match="x has shape"):
        layer(torch.randn(2, 5, 3))
    with pytest.raises(ArgumentError, match="has 3 rows, expected 2"):
        layer(torch.randn(2, 5, 4), layer.init_state(3))
    with pytest.raises(ArgumentError, match="state is tuple, expected SLSTMState"):
        layer.step(torch.randn(2, 4), tuple(layer.init_state(2)))
    state = torch.ones(2, 1, 3)
    with pytest.raises(ArgumentError, match="weight has shape"):
        slstm(torch.randn(2, 5, 4, 1, 3), torch.randn(4, 1, 3, 2), state, state, state, state)
    with pytest.raises(ArgumentError, match="h has 2 rows, expected 3"):
        slstm(torch.randn(3, 5, 4, 1, 3), torch.randn(4, 1, 3, 3), state, state, state, state)
