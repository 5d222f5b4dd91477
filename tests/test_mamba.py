"""Mamba and Mamba-2 against loops written from the papers, and against the mixers of transformers."""

import math

import pytest
import torch
import torch.nn.functional as F

from dualform.core.errors import ConfigError
from dualform.core.packing import unpack
from dualform.layers.mamba import MambaConfig
from dualform.layers.mamba2 import Mamba2Config
from vectors import close, load

GOLDEN = {
    "mamba1_mixer_0": (MambaConfig(d_state=6, dt_rank=3), 12),
    "mamba1_mixer_1": (MambaConfig(d_state=4, dt_rank=2, d_conv=3, bias=True, conv_bias=False), 10),
    "mamba2_mixer_0": (Mamba2Config(d_state=5, d_head=4), 12),
    "mamba2_mixer_1": (Mamba2Config(d_state=6, d_head=4, groups=2, bias=True, dt_limit=(0.1, 0.9)), 8),
}


def golden(case, dtype):
    """The layer with the stored weights, and the stored tensors."""
    g = {k: v.to(dtype) if v.is_floating_point() else v for k, v in load(case).items()}
    config, d_model = GOLDEN[case]
    layer = config.build(d_model).to(dtype)
    weights = {k.removeprefix("sd."): v for k, v in g.items() if k.startswith("sd.")}
    weights["conv_weight"] = weights.pop("conv1d.weight")[:, 0]
    if "conv1d.bias" in weights:
        weights["conv_bias"] = weights.pop("conv1d.bias")
    if "dt_proj.bias" in weights:
        weights["dt_bias"] = weights.pop("dt_proj.bias")
    layer.load_state_dict(weights)
    return layer.eval(), g


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("case", GOLDEN)
@torch.no_grad()
def test_mixer_of_transformers(case, dtype, tolerance):
    layer, g = golden(case, dtype)
    y, state = layer(g["x"])
    close(y, g["y"], tolerance, "y")
    close(state.conv, g["conv_state"][..., 1:], tolerance, "convolution state")  # theirs keeps one input more
    close(state.h, g["ssm_state"], max(tolerance, 1e-6), "state")
    full, _ = layer(torch.cat([g["x"], g["x_next"]], 1))
    close(full, g["y_full"], tolerance, "both halves at once")
    steps = []
    for x in g["x_next"].unbind(1):
        out, state = layer.step(x, state)
        steps.append(out)
    want = g["y_full"][:, g["x"].shape[1] :] if case == "mamba2_mixer_1" else g["y_decode"]  # its decode drops dt_limit
    close(torch.stack(steps, 1), want, tolerance, "steps")


@pytest.mark.parametrize("case", ["mamba1_mixer_0", "mamba2_mixer_0"])
@torch.no_grad()
def test_left_padding_of_transformers(case):
    """Zeroing padded inputs equals packing where the projection has no bias; with one, theirs lets it leak in."""
    layer, g = golden(case, torch.float64)
    keep = g["attention_mask"].bool()
    lengths = keep.sum(1)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))
    packed, _ = layer(g["x"][keep][None], cu_seqlens=cu_seqlens)
    got = unpack(packed, keep)
    close(got * keep[..., None], g["y_masked"] * keep[..., None], 1e-6, "y")


def loop_conv(x, weight, bias):
    """The short convolution, tap by tap."""
    y = torch.zeros_like(x)
    width = weight.shape[1]
    for t in range(x.shape[1]):
        for j in range(width):
            if (s := t - (width - 1) + j) >= 0:
                y[:, t] += weight[:, j] * x[:, s]
    return F.silu(y + bias)


@torch.no_grad()
def test_mamba_is_the_papers_recurrence():
    layer = MambaConfig(d_state=3, dt_rank=2).build(5).double()
    u = torch.randn(2, 7, 5, dtype=torch.float64)
    x, z = layer.in_proj(u).chunk(2, -1)
    x = loop_conv(x, layer.conv_weight, layer.conv_bias)
    low, B, C = layer.x_proj(x).split([2, 3, 3], -1)
    dt = F.softplus(low @ layer.dt_proj.weight.T + layer.dt_bias)
    h, ys = torch.zeros(2, 10, 3, dtype=torch.float64), []
    for t in range(7):
        for n in range(3):
            decay = torch.exp(-layer.A_log[:, n].exp() * dt[:, t])
            h[..., n] = decay * h[..., n] + dt[:, t] * B[:, t, n, None] * x[:, t]
        ys.append((h * C[:, t, None]).sum(-1) + layer.D * x[:, t])
    want = layer.out_proj(torch.stack(ys, 1) * F.silu(z))
    y, state = layer(u)
    close(y, want, 1e-12, "y")
    close(state.h, h, 1e-12, "state")


@torch.no_grad()
def test_mamba2_is_the_papers_recurrence():
    layer = Mamba2Config(d_state=4, d_head=2, groups=2).build(4).double()
    u = torch.randn(2, 7, 4, dtype=torch.float64)
    z, xBC, dt = layer.in_proj(u).split([8, 24, 4], -1)
    x, B, C = loop_conv(xBC, layer.conv_weight, layer.conv_bias).split([8, 8, 8], -1)
    dt = F.softplus(dt + layer.dt_bias)
    h, ys = torch.zeros(2, 4, 2, 4, dtype=torch.float64), torch.zeros(2, 7, 8, dtype=torch.float64)
    for t in range(7):
        for head in range(4):
            group = slice(head // 2 * 4, head // 2 * 4 + 4)
            xh = x[:, t, 2 * head : 2 * head + 2]
            decay = torch.exp(-layer.A_log[head].exp() * dt[:, t, head])[:, None, None]
            h[:, head] = decay * h[:, head] + dt[:, t, head, None, None] * xh[..., None] * B[:, t, None, group]
            ys[:, t, 2 * head : 2 * head + 2] = (h[:, head] * C[:, t, None, group]).sum(-1) + layer.D[head] * xh
    gated = (ys * F.silu(z)).unflatten(-1, (2, 4))
    normed = gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    want = layer.out_proj(normed.flatten(2) * layer.norm.weight)
    y, state = layer(u)
    close(y, want, 1e-12, "y")
    close(state.h, h, 1e-12, "state")


@pytest.mark.parametrize("config", [MambaConfig(), Mamba2Config(d_state=16, d_head=8)])
def test_initial_steps_and_rates(config):
    """Steps begin between dt_min and dt_max; every rate is negative; the optimiser is told not to decay them."""
    layer = config.build(32)
    dt = F.softplus(layer.dt_bias)
    assert dt.min() >= 1e-3 * 0.999 and dt.max() <= 1e-1 * 1.001
    assert (layer.A() < 0).all()
    assert not any(layer.hints[name].decay for name in ("A_log", "D", "dt_bias"))


def test_state_is_float32_for_half_precision_weights():
    for config in (MambaConfig(d_state=4), Mamba2Config(d_state=4, d_head=2)):
        layer = config.build(6).to(torch.bfloat16)
        y, state = layer(torch.randn(1, 5, 6, dtype=torch.bfloat16))
        assert y.dtype == torch.bfloat16
        assert state.h.dtype == state.conv.dtype == torch.float32
        again = layer.init_state(1)
        assert (again.h.shape, again.h.dtype) == (state.h.shape, state.h.dtype)
        assert (again.conv.shape, again.conv.dtype) == (state.conv.shape, state.conv.dtype)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Mamba2Config(d_head=7).build(8), "multiple of d_head = 7"),
        (lambda: Mamba2Config(d_head=8, groups=3).build(8), "groups"),
        (lambda: MambaConfig(d_state=0).build(8), "d_state is 0"),
        (lambda: MambaConfig().build(0), "d_model is 0"),
    ],
)
def test_impossible_sizes_are_refused(build, words):
    with pytest.raises(ConfigError, match=words):
        build()


def test_default_bottleneck():
    assert MambaConfig().build(33).dt_rank == math.ceil(33 / 16)
