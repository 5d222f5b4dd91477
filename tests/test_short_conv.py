"""The gated short convolution against a loop over its formula."""

import pytest
import torch
from torch import Tensor

from dualform.core.errors import ArgumentError, ConfigError
from dualform.layers.short_conv import GatedShortConv, GatedShortConvConfig, GatedShortConvState
from vectors import close


def oracle(layer: GatedShortConv, u: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    """Two gates around a convolution of ``past`` ``(B, D, W-1)`` and what comes."""
    bias = 0 if layer.conv_bias is None else layer.conv_bias
    ys = []
    for u_t in u.unbind(1):
        B, C, x = layer.in_proj(u_t).chunk(3, -1)
        window = torch.cat([past, (B * x)[..., None]], -1)
        ys.append(layer.out_proj(C * ((window * layer.conv_weight).sum(-1) + bias)))
        past = window[..., 1:]
    return torch.stack(ys, 1), past


@pytest.mark.parametrize(
    "config, d_model",
    [(GatedShortConvConfig(), 3), (GatedShortConvConfig(d_conv=4, bias=True), 5), (GatedShortConvConfig(d_conv=1), 1)],
)
def test_oracle(config: GatedShortConvConfig, d_model: int) -> None:
    layer = config.build(d_model).double()
    u = torch.randn(2, 7, d_model, dtype=torch.float64, requires_grad=True)
    past = torch.randn(2, d_model, config.d_conv - 1, dtype=torch.float64, requires_grad=True)
    y, state = layer(u, GatedShortConvState(past))
    found, want = (y, state.conv), oracle(layer, u, past)
    gradients = []
    for y, last in (found, want):
        loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() + last.pow(3).sum()
        gradients.append(torch.autograd.grad(loss, [u, past, *layer.parameters()]))
    for got, expected in zip((*found, *gradients[0]), (*want, *gradients[1]), strict=True):
        if expected.numel():
            close(got, expected, 1e-12)


def test_errors_say_what_came() -> None:
    with pytest.raises(ConfigError, match="d_conv is 0"):
        GatedShortConvConfig(d_conv=0).build(3)
    layer = GatedShortConvConfig().build(3)
    with pytest.raises(ArgumentError, match="x has shape"):
        layer(torch.randn(1, 2, 4))
    with pytest.raises(ArgumentError, match="has 2 rows, expected 1"):
        layer(torch.randn(1, 2, 3), layer.init_state(2))
    with pytest.raises(ArgumentError, match="state is tuple, expected GatedShortConvState"):
        layer.step(torch.randn(1, 3), (torch.zeros(1, 3, 2),))
