"""SwiGLU against its formula."""

import pytest
import torch

from dualform.core.errors import ConfigError
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


def test_a_width_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="d_hidden is 0"):
        MLPConfig(0).build(4)
