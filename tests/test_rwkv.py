"""Gated linear attention and the layers of RWKV, against loops transcribed from their papers."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualform.core.errors import ConfigError
from dualform.layers import GLA, RWKV4, RWKV6, RWKV7, RWKVChannel, RWKVChannelConfig
from dualform.layers.block import SublayerConfig
from dualform.layers.rwkv7 import RWKV7Config
from dualform.models.config import ModelConfig
from dualform.models.lm import LanguageModel
from dualform.ops import wkv4

T = 9


def drawn(layer: nn.Module, seed: int = 0) -> nn.Module:
    """The layer in float64, every parameter of it random: none is one that a layer starts with by chance."""
    generator = torch.Generator().manual_seed(seed)
    layer = layer.double()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(0.6 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return layer


def inputs(width: int) -> Tensor:
    return torch.randn(2, T, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def layer_norm(x: Tensor, eps: float) -> Tensor:
    return (x - x.mean()) / ((x - x.mean()).square().mean() + eps).sqrt()


def check(layer: nn.Module, x: Tensor, loop) -> None:
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[0], torch.stack([loop(row) for row in x]), rtol=1e-9, atol=1e-9)


def test_rwkv4_is_equations_11_to_17():
    layer = drawn(RWKV4(3, d_inner=5))

    def loop(x: Tensor) -> Tensor:
        before, ys, past = torch.zeros(3).double(), [], []
        for x_t in x:
            r, k, v = (
                project.weight @ (mix * x_t + (1 - mix) * before)
                for project, mix in (
                    (layer.receptance, layer.mix_receptance),
                    (layer.key, layer.mix_key),
                    (layer.value, layer.mix_value),
                )
            )
            w, u, t = layer.time_decay.exp(), layer.time_first, len(past)
            weights = [torch.exp(-(t - 1 - i) * w + k_i) for i, (k_i, _) in enumerate(past)] + [torch.exp(u + k)]
            values = [v_i for _, v_i in past] + [v]
            wkv = sum(a * b for a, b in zip(weights, values, strict=True)) / sum(weights)
            ys.append(layer.out_proj.weight @ (r.sigmoid() * wkv))
            past, before = [*past, (k, v)], x_t
        return torch.stack(ys)

    check(layer, inputs(3), loop)


def test_the_weights_of_rwkv4_do_not_overflow():
    """Keys of any size: the average stays between the values, and a key alone above the others is all of it."""
    k = torch.tensor([0.0, 3e4, -3e4, 1e5, 2.0, 0.0])[None, :, None]
    v = torch.arange(1.0, 7.0)[None, :, None]
    y, state = wkv4(k, v, torch.tensor([-0.1]), torch.tensor([0.5]))
    assert y[0, :, 0].tolist() == pytest.approx([1, 2, 2, 4, 4, 4])
    assert state.flatten().tolist() == pytest.approx([4, 1e5 - 0.2])


@pytest.mark.parametrize("receptance", [True, False])
def test_channel_mixing_is_equation_18(receptance):
    layer = drawn(RWKVChannel(3, d_hidden=5, receptance=receptance))

    def loop(x: Tensor) -> Tensor:
        before, ys = torch.zeros(3).double(), []
        for x_t in x:
            k = layer.key.weight @ (layer.mix_key * x_t + (1 - layer.mix_key) * before)
            y = layer.value.weight @ k.clamp(min=0) ** 2
            if receptance:
                mixed = layer.mix_receptance * x_t + (1 - layer.mix_receptance) * before
                y = torch.sigmoid(layer.receptance.weight @ mixed) * y
            ys.append(y)
            before = x_t
        return torch.stack(ys)

    check(layer, inputs(3), loop)


def test_rwkv6_is_equations_11_to_19():
    layer = drawn(RWKV6(6, d_head=3, mix_rank=2, decay_rank=1, norm_eps=0.1))

    def loop(x: Tensor) -> Tensor:
        before, ys, S = torch.zeros(6).double(), [], torch.zeros(2, 3, 3).double()
        for x_t in x:

            def lerp(i, a=x_t, b=before):
                inner = a + (b - a) * layer.mix_x
                return a + (b - a) * (layer.mix[i] + (inner @ layer.mix_in[i]).tanh() @ layer.mix_out[i])

            d = layer.time_decay + layer.decay_out.weight @ (layer.decay_in.weight @ lerp(0)).tanh()
            k, v, r = layer.key.weight @ lerp(1), layer.value.weight @ lerp(2), layer.receptance.weight @ lerp(3)
            w, heads = torch.exp(-torch.exp(d)), []
            for h in range(2):
                c = slice(3 * h, 3 * h + 3)
                new = torch.outer(k[c], v[c])
                heads.append(layer_norm((S[h] + torch.diag(layer.bonus[h]) @ new).T @ r[c], 0.1))
                S[h] = torch.diag(w[c]) @ S[h] + new
            o = torch.cat(heads) * layer.norm_weight + layer.norm_bias
            ys.append(layer.out_proj.weight @ (o * F.silu(layer.gate.weight @ lerp(4))))
            before = x_t
        return torch.stack(ys)

    check(layer, inputs(6), loop)


def rwkv7_loop(layer: RWKV7, x: Tensor, first: Tensor | None = None) -> Tensor:
    before, ys, S = torch.zeros(6).double(), [], torch.zeros(2, 3, 3).double()

    def low(m, z, inner=lambda a: a):
        return (0 if m.bias is None else m.bias) + m.up.weight @ inner(m.down.weight @ z)

    for t, x_t in enumerate(x):
        xr, xw, xk, xv, xa, xg = (x_t + mix * (before - x_t) for mix in layer.mix)
        r, k, v = layer.receptance.weight @ xr, layer.key.weight @ xk, layer.value.weight @ xv
        w = torch.exp(-math.exp(-0.5) * low(layer.decay, xw, torch.tanh).sigmoid())
        a, g = low(layer.rate, xa).sigmoid(), low(layer.gate, xg, torch.sigmoid)
        if first is not None:
            v = v + (first[t] - v) * low(layer.value_mix, xv).sigmoid()
        removal, k, heads = k * layer.key_scale, k * (1 + (a - 1) * layer.rate_scale), []
        for h in range(2):
            c = slice(3 * h, 3 * h + 3)
            kappa = removal[c] / removal[c].norm()
            # The paper's state is the transpose: S_t = S_{t-1} (diag(w) - kappa^T (a kappa)) + v^T k.
            S[h] = S[h] @ (torch.diag(w[c]) - torch.outer(kappa, a[c] * kappa)) + torch.outer(v[c], k[c])
            p = layer_norm(S[h] @ r[c], 0.1) * layer.norm_weight[c] + layer.norm_bias[c]
            heads.append(p + (r[c] * layer.bonus[h] * k[c]).sum() * v[c])
        ys.append(layer.out_proj.weight @ (g * torch.cat(heads)))
        before = x_t
    return torch.stack(ys)


SMALL = {"d_head": 3, "decay_rank": 2, "rate_rank": 1, "gate_rank": 2, "norm_eps": 0.1}


def test_rwkv7_is_equations_5_to_20():
    layer = drawn(RWKV7(6, **SMALL))
    check(layer, inputs(6), lambda x: rwkv7_loop(layer, x))


def test_a_later_layer_of_rwkv7_mixes_in_the_first_value():
    layer, x = drawn(RWKV7(6, **SMALL, value_rank=2)), inputs(6)
    first = inputs(6).flip(1)
    want = torch.stack([rwkv7_loop(layer, *rows) for rows in zip(x, first, strict=True)])
    with torch.no_grad():
        y, _ = layer(x, first_value=first)
        torch.testing.assert_close(y, want, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(layer(x)[0], torch.stack([rwkv7_loop(layer, row) for row in x]))
        state, steps = layer.init_state(2), []
        for t in range(T):
            y_t, state = layer.step(x[:, t], state, first_value=first[:, t])
            steps.append(y_t)
    torch.testing.assert_close(torch.stack(steps, 1), y)


def test_layers_of_a_model_read_the_value_of_its_first():
    """Whole and stepped, the second layer mixes in what the first one has made."""
    first, later = RWKV7Config(**SMALL), RWKV7Config(**SMALL, value_rank=2)
    channel = RWKVChannelConfig(d_hidden=5, receptance=False)
    parts = {"F": (SublayerConfig(first, norm=None), channel), "L": (SublayerConfig(later, norm=None), channel)}
    model = drawn(LanguageModel(ModelConfig(11, 6, parts, "FL")))
    tokens = torch.randint(11, (2, T), generator=torch.Generator().manual_seed(0))
    seen, made = [], []

    def watch(layer, args, output):
        seen.append(args[0])
        made.append(output[0])

    one, two = (block.parts[0] for block in model.blocks)
    handles = [layer.register_forward_hook(watch) for layer in (one, two)]
    with torch.no_grad():
        y, _ = model(tokens)
        for handle in handles:
            handle.remove()
        value = torch.stack([_values(one, row) for row in seen[0].double()])
        want = torch.stack([rwkv7_loop(two, *rows) for rows in zip(seen[1].double(), value, strict=True)])
        torch.testing.assert_close(made[1], want, rtol=1e-9, atol=1e-9)
        state, steps = model.init_state(2), []
        for t in range(T):
            y_t, state = model.step(tokens[:, t], state)
            steps.append(y_t)
        torch.testing.assert_close(torch.stack(steps, 1), y, rtol=1e-9, atol=1e-9)
        alone = two(seen[1])[0]
    assert not torch.allclose(alone, want)


def _values(layer: RWKV7, x: Tensor) -> Tensor:
    before = torch.cat([torch.zeros(1, 6).double(), x[:-1]])
    return (x + layer.mix[3] * (before - x)) @ layer.value.weight.T


def test_gated_linear_attention_is_section_4_4():
    layer = drawn(GLA(6, heads=2, expand_k=2 / 3, gate_rank=2, gate_temperature=2.0, norm_eps=0.1))
    weights = layer.in_proj.weight.split([4, 4, 6, 6, 2])

    def loop(x: Tensor) -> Tensor:
        S, ys = torch.zeros(2, 2, 3).double(), []
        for x_t in x:
            q, k, v, gate, low = (w @ x_t for w in weights)
            alpha = torch.sigmoid(layer.decay_proj.weight @ low + layer.decay_bias) ** 0.5
            heads = []
            for h in range(2):
                n, p = slice(2 * h, 2 * h + 2), slice(3 * h, 3 * h + 3)
                S[h] = torch.diag(alpha[n]) @ S[h] + torch.outer(k[n], v[p])
                o = S[h].T @ q[n] / math.sqrt(2)
                heads.append(o / (o.square().mean() + 0.1).sqrt())
            ys.append(layer.out_proj.weight @ (torch.cat(heads) * layer.norm.weight * F.silu(gate)))
        return torch.stack(ys)

    check(layer, inputs(6), loop)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: RWKV4(4, d_inner=0), "rwkv4: d_inner is 0"),
        (lambda: RWKVChannel(4, d_hidden=-1), "rwkv_channel: d_hidden is -1"),
        (lambda: RWKV6(5, d_head=2), "rwkv6: d_model = 5 is not a multiple of d_head = 2"),
        (lambda: RWKV7(5, d_head=2), "rwkv7: d_model = 5 is not a multiple of d_head = 2"),
        (lambda: RWKV7(4, d_head=2, value_rank=-1), "rwkv7: value_rank is -1"),
        (lambda: GLA(5, heads=2), r"gla: expand_k \* d_model = 2|gla: expand_v \* d_model = 5 is not a multiple"),
        (lambda: GLA(4, heads=2, gate_temperature=0.0), "gla: gate_temperature is 0.0"),
    ],
)
def test_options_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
