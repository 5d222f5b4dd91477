"""HGRN and HGRN2 against loops over their papers' equations, and recorded numbers of the recurrence."""

import math

import pytest
import torch
from torch import Tensor

from dualform.core.errors import ConfigError
from dualform.layers.hgrn import HGRN, HGRN2, HGRN2Config, HGRNConfig
from dualform.ops.linear_scan import linear_scan
from vectors import close, load
from wrong_tensors import names_wrong_tensors


def hgrn(layer: HGRN, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Section 3.2: a complex recurrence with tied gates, then an output gate, a norm and a map."""
    E, bound = layer.d_inner, layer.config.lower_bound
    ys = []
    for x_t in x.unbind(1):
        re, im, m, g_re, g_im = layer.in_proj(x_t).split(E, -1)
        c = torch.complex(re * torch.sigmoid(re), im * torch.sigmoid(im))
        f = bound + (1 - bound) * torch.sigmoid(m)
        h = f * torch.exp(1j * layer.theta) * h + (1 - f) * c
        o = torch.cat([torch.sigmoid(g_re) * h.real, torch.sigmoid(g_im) * h.imag], -1)
        o = (o - o.mean(-1, keepdim=True)) / (o.var(-1, correction=0, keepdim=True) + layer.config.norm_eps).sqrt()
        ys.append(layer.out_proj(o * layer.norm.weight + layer.norm.bias))
    return torch.stack(ys, 1), h


def hgrn2(layer: HGRN2, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Section 3: the forget gate is the decay of rows, and what it forgets is the key."""
    bound, ys = layer.config.lower_bound, []
    for x_t in x.unbind(1):
        q, m, v = (p.unflatten(-1, (layer.heads, -1)) for p in (x_t @ layer.in_proj.weight.T).chunk(3, -1))
        f = bound + (1 - bound) * torch.sigmoid(m)
        h = f[..., None] * h + (1 - f)[..., None] * v[..., None, :]
        o = ((q * torch.sigmoid(q))[..., None, :] @ h).flatten(1)
        o = o / (o.square().mean(-1, keepdim=True) + layer.config.norm_eps).sqrt()
        ys.append((o * layer.norm.weight) @ layer.out_proj.weight.T)
    return torch.stack(ys, 1), h


CASES = {
    "hgrn": (HGRNConfig(), 3, hgrn),
    "hgrn bound": (HGRNConfig(d_inner=5, lower_bound=0.7, rope=50.0), 2, hgrn),
    "hgrn2": (HGRN2Config(heads=2), 6, hgrn2),
    "hgrn2 bound": (HGRN2Config(heads=3, d_head=2, lower_bound=0.9), 4, hgrn2),
}


@pytest.mark.parametrize("case", CASES)
def test_oracle(case: str) -> None:
    config, d_model, oracle = CASES[case]
    layer = config.build(d_model).double()
    layer.norm.weight.data.uniform_(0.5, 2)
    x = torch.randn(2, 70, d_model, dtype=torch.float64, requires_grad=True)
    start = layer.init_state(2)
    h = torch.randn_like(start.h).requires_grad_()
    y, state = layer(x, start._replace(h=h))
    found, want = (y, state.h), oracle(layer, x, h)
    gradients = []
    for y, last in (found, want):
        loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() + last.abs().pow(2).sum()
        gradients.append(torch.autograd.grad(loss, [x, h, *layer.parameters()]))
    for got, expected in zip((*found, *gradients[0]), (*want, *gradients[1]), strict=True):
        close(got, expected, 1e-10)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("name", ["hgrn", "hgrn_init"])
def test_recorded_numbers(name: str, dtype: torch.dtype, tolerance: float) -> None:
    m = {key: x.to(dtype) for key, x in load(name).items()}
    y, h = linear_scan(m["g"].exp(), m["x"], m.get("initial_state"))
    close(y, m["o"], tolerance)
    close(h, m["final_state"], tolerance)


@pytest.mark.parametrize(
    "config, words",
    [
        (HGRNConfig(lower_bound=1.0), "lower_bound is 1.0"),
        (HGRNConfig(d_inner=0), "d_inner is 0"),
        (HGRNConfig(rope=-1.0), "rope is -1.0"),
        (HGRN2Config(heads=3), "d_model 4 is not a multiple of heads 3"),
        (HGRN2Config(lower_bound=-0.1), "lower_bound is -0.1"),
        (HGRN2Config(norm_eps=math.nan), "norm_eps is nan"),
    ],
)
def test_a_config_that_cannot_be_built(config: HGRNConfig | HGRN2Config, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config.build(4)


@pytest.mark.parametrize("config", [HGRNConfig(), HGRN2Config()], ids=lambda c: type(c).__name__)
def test_wrong_tensors_are_named(config: HGRNConfig | HGRN2Config) -> None:
    names_wrong_tensors(config.build(4))
