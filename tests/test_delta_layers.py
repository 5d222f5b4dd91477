"""The layers of the delta rule against loops written from their papers, and against the mixer of Qwen3-Next."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.core.errors import ConfigError
from dualform.layers import DeltaNetConfig, GatedDeltaNetConfig, GatedDeltaProductConfig, KDAConfig
from vectors import close

D_MODEL, LENGTH = 6, 9
SIZES = {"heads": 4, "key_heads": 2, "d_key": 3, "d_value": 5, "d_conv": 3}
CONFIGS = {
    "delta_net": DeltaNetConfig(**SIZES, negative=True),
    "gated_delta_net": GatedDeltaNetConfig(**SIZES, dt_max=3.0),
    "kda": KDAConfig(**SIZES, dt_max=3.0),
    "kda rank": KDAConfig(**SIZES, rank=2, negative=True),
    "product": GatedDeltaProductConfig(**SIZES, householders=3, dt_max=3.0),
    "product without decay": GatedDeltaProductConfig(**SIZES, decay=False, negative=False),
}


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def loop(layer, config, x: Tensor) -> Tensor:
    """One sequence ``(T, D)``, head by head and step by step, in the words of the papers."""
    w, H, G, N, P = dict(layer.named_parameters()), 4, 2, 3, 5
    J = getattr(config, "householders", 1)
    gated, by_channel = "norm.weight" in w and not isinstance(config, DeltaNetConfig), isinstance(config, KDAConfig)
    widths = {"q": G * N, "k": J * G * N, "v": J * H * P, "b": J * H}
    if by_channel:
        rank = config.rank or P
        widths |= {"f": rank, "z": rank}
    elif gated:
        widths |= {"z": H * P, **({"a": H} if getattr(config, "decay", True) else {})}
    projected = x @ w["in_proj.weight"].T
    parts = dict(zip(widths, projected.split(list(widths.values()), -1), strict=True))
    mixed = torch.cat([parts[name] for name in "qkv"], -1)
    before = torch.cat([mixed.new_zeros(2, mixed.shape[1]), mixed])
    mixed = F.silu(sum(w["conv_weight"][:, i] * before[i : i + len(x)] for i in range(3)))
    q, k, v = mixed.split([widths[name] for name in "qkv"], -1)
    S, ys = [torch.zeros(N, P, dtype=x.dtype) for _ in range(H)], []
    for t in range(len(x)):
        heads = []
        for h in range(H):
            g = h // (H // G)
            query = q[t].view(G, N)[g]
            query = query / (query.square().sum() + 1e-6).sqrt()
            if by_channel:
                step = F.softplus(parts["f"][t] @ w["decay_proj.weight"].T + w["dt_bias"]).view(H, N)[h]
                S[h] = torch.diag(torch.exp(-w["A_log"][h].exp() * step)) @ S[h]
            elif "a" in parts:
                S[h] = torch.exp(-w["A_log"][h].exp() * F.softplus(parts["a"][t, h] + w["dt_bias"][h])) * S[h]
            for j in range(J):
                key = k[t].view(J, G, N)[j, g]
                key = key / (key.square().sum() + 1e-6).sqrt()
                beta = torch.sigmoid(parts["b"][t].view(J, H)[j, h]) * (2 if config.negative else 1)
                S[h] = S[h] - beta * torch.outer(key, key @ S[h]) + beta * torch.outer(key, v[t].view(J, H, P)[j, h])
            heads.append(rms(query @ S[h] / N**0.5, w["norm.weight"]))
        y = torch.cat(heads)
        if by_channel:
            y = y * torch.sigmoid(parts["z"][t] @ w["gate_proj.weight"].T)
        elif "z" in parts:
            y = y * F.silu(parts["z"][t])
        ys.append(y @ w["out_proj.weight"].T)
    return torch.stack(ys)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_layer_is_the_loop_of_its_paper(name):
    config = CONFIGS[name]
    layer = config.build(D_MODEL).double()
    layer.norm.weight.uniform_(0.5, 2)
    x = torch.randn(2, LENGTH, D_MODEL, dtype=torch.float64)
    y, _ = layer(x)
    for row, got in zip(x, y, strict=True):
        torch.testing.assert_close(got, loop(layer, config, row), rtol=1e-9, atol=1e-10)


@torch.no_grad()
def test_the_mixer_of_qwen3_next():
    """Whose map in lies in other order: for each key head its query, its key, and the values and gates of its heads."""
    module = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    options = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 3}
    options |= {"linear_value_head_dim": 5, "linear_conv_kernel_dim": 3, "hidden_size": D_MODEL, "rms_norm_eps": 1e-5}
    given = module.Qwen3NextConfig(**options, num_hidden_layers=1, layer_types=["linear_attention"])
    theirs = module.Qwen3NextGatedDeltaNet(given, 0).eval()
    theirs.norm.weight.uniform_(0.5, 2)
    theirs.A_log.uniform_(-1, 1)
    layer = CONFIGS["gated_delta_net"].build(D_MODEL)
    qkvz = theirs.in_proj_qkvz.weight.unflatten(0, (2, -1)).split([3, 3, 10, 10], 1)
    b, a = theirs.in_proj_ba.weight.unflatten(0, (2, -1)).split([2, 2], 1)
    q, k, v, z = (m.flatten(0, 1) for m in qkvz)
    weights = {"in_proj.weight": torch.cat([q, k, v, b.flatten(0, 1), z, a.flatten(0, 1)])}
    weights |= {"conv_weight": theirs.conv1d.weight[:, 0], "norm.weight": theirs.norm.weight}
    weights |= {name: theirs.state_dict()[name] for name in ("A_log", "dt_bias", "out_proj.weight")}
    layer.load_state_dict(weights)
    x = torch.randn(2, 70, D_MODEL)
    want = theirs(x)
    close(layer(x)[0], want[0] if isinstance(want, tuple) else want, 1e-4, "y")


@torch.no_grad()
def test_bfloat16_keeps_states_and_gates_in_float32():
    layer = CONFIGS["gated_delta_net"].build(D_MODEL).bfloat16()
    x = torch.randn(1, 40, D_MODEL).bfloat16()
    y, state = layer(x)
    want, _ = layer.double()(x.double())
    assert y.dtype == torch.bfloat16 and state.h.dtype == torch.float32
    assert (y.double() - want).norm() <= 3e-2 * want.norm()


def test_what_cannot_be_built_is_refused():
    with pytest.raises(ConfigError, match="delta_net: d_model 6 is not a multiple of heads 4"):
        DeltaNetConfig().build(6)
    with pytest.raises(ConfigError, match="kda: heads 4 is not a multiple of key_heads 3"):
        KDAConfig(key_heads=3).build(8)
    with pytest.raises(ConfigError, match="gated_delta_product: householders is 0"):
        GatedDeltaProductConfig(householders=0).build(8)
    with pytest.raises(ConfigError, match="gated_delta_net: d_value is -1"):
        GatedDeltaNetConfig(d_value=-1).build(8)
    with pytest.raises(ConfigError, match=r"gated_delta_net: dt_min 0 and dt_max 0.1"):
        GatedDeltaNetConfig(dt_min=0).build(8)
    with pytest.raises(ConfigError, match="kda: norm_eps is -1"):
        KDAConfig(norm_eps=-1).build(8)
    with pytest.raises(ConfigError, match="kda: rank is 0"):
        KDAConfig(rank=0).build(8)
