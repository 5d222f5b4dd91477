"""The feed-forward against its formulas."""

import math

import pytest
import torch

from dualform.core.errors import ConfigError
from dualform.layers.activation import ACTIVATIONS
from dualform.layers.mlp import MLPConfig
from vectors import close


@pytest.mark.parametrize("d_model, d_hidden, bias", [(1, None, False), (3, 5, True), (17, None, True)])
def test_formula(d_model: int, d_hidden: int | None, bias: bool) -> None:
    layer = MLPConfig(d_hidden, bias).build(d_model).double()
    x = torch.randn(2, 3, d_model, dtype=torch.float64)
    weight, half = layer.gate_up_proj.weight, layer.gate_up_proj.weight.shape[0] // 2
    gate, up = x @ weight[:half].T, x @ weight[half:].T
    if bias:
        gate, up = gate + layer.gate_up_proj.bias[:half], up + layer.gate_up_proj.bias[half:]
    want = (gate / (1 + torch.exp(-gate)) * up) @ layer.down_proj.weight.T
    close(layer(x), want + layer.down_proj.bias if bias else want, 1e-12)


@pytest.mark.parametrize("d_model, d_hidden", [(1, 8), (3, 8), (4, 16), (256, 688), (768, 2048)])
def test_default_width(d_model: int, d_hidden: int) -> None:
    assert MLPConfig().build(d_model).down_proj.in_features == d_hidden


FORMULAS = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: torch.where(x > 0, x, 0),
    "relu2": lambda x: torch.where(x > 0, x * x, 0),
}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str, gated: bool) -> None:
    layer = MLPConfig(7, True, name, gated).build(5).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    inner = x @ (layer.gate_up_proj if gated else layer.up_proj).weight.T
    inner = inner + (layer.gate_up_proj if gated else layer.up_proj).bias
    hidden = FORMULAS[name](inner[:, :7]) * (inner[:, 7:] if gated else 1)
    close(layer(x), hidden @ layer.down_proj.weight.T + layer.down_proj.bias, 1e-12)


def test_default_width_without_a_gate() -> None:
    assert MLPConfig(gated=False).build(6).down_proj.in_features == 24


def test_an_activation_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"mlp: activation 'swish' is unknown\n.*known: silu"):
        MLPConfig(activation="swish").build(4)


def test_a_width_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="d_hidden is 0"):
        MLPConfig(0).build(4)
