"""Multi-head latent attention against a loop over tokens; what its cache holds; adapters around its maps."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dualform.core.errors import ConfigError
from dualform.core.tree import nbytes
from dualform.layers.mla import MLA, LatentState, MLAConfig
from dualform.layers.rotary import RotaryConfig, rotate
from vectors import close

CONFIGS = {
    "plain": MLAConfig(3, 4, 2, 5, 6),
    "queries of a vector": MLAConfig(2, 3, 4, 3, 5, d_query=4, bias=True, scale=0.7),
    "no positions": MLAConfig(2, 3, 2, 4, 3, rope=None),
    "nothing rotated": MLAConfig(2, 4, 0, 1, 3),
    "window, interleaved": MLAConfig(2, 4, 6, 5, 4, window=3, rope=RotaryConfig(30.0, interleaved=True)),
}


@pytest.fixture(params=CONFIGS)
def layer(request: pytest.FixtureRequest) -> MLA:
    torch.manual_seed(0)
    made = CONFIGS[request.param].build(7).double()
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "norm" in name:
                p.add_(torch.randn_like(p) / 3)
    return made


def rms(v: Tensor, weight: Tensor, eps: float) -> Tensor:
    return v / torch.sqrt(v.square().mean() + eps) * weight


def oracle(layer: MLA, x: Tensor) -> Tensor:
    """One row ``(T, D)``, with the key and the value of every head and token, one softmax at a time."""
    c, queries, keys, values = layer.config, [], [], []
    P, R = c.d_head, c.d_rope

    def turn(v: Tensor, t: int) -> Tensor:
        if layer.rope is None:
            return v
        return rotate(v[None, None, None], torch.tensor([[t]]), layer.rope)[0, 0, 0]

    up = layer.kv_up.weight.view(c.heads, P + c.d_value, c.d_latent)
    for t, x_t in enumerate(x):
        q = layer.q_proj(x_t) if c.d_query is None else layer.q_up(rms(layer.q_down(x_t), layer.q_norm.weight, 1e-6))
        q = q.view(c.heads, P + R)
        both = layer.kv_down(x_t)
        latent, shared = rms(both[: c.d_latent], layer.kv_norm.weight, 1e-6), turn(both[c.d_latent :], t)
        queries.append([torch.cat([q[h, :P], turn(q[h, P:], t)]) for h in range(c.heads)])
        keys.append([torch.cat([up[h, :P] @ latent, shared]) for h in range(c.heads)])
        values.append([up[h, P:] @ latent for h in range(c.heads)])
    scale = 1 / math.sqrt(P + R) if c.scale is None else c.scale
    outputs = []
    for t in range(len(x)):
        first, heads = 0 if c.window is None else max(0, t - c.window + 1), []
        for h in range(c.heads):
            weights = [math.exp(scale * float(queries[t][h] @ keys[s][h])) for s in range(first, t + 1)]
            heads.append(sum(w / sum(weights) * values[first + i][h] for i, w in enumerate(weights)))
        outputs.append(layer.out_proj(torch.cat(heads)))
    return torch.stack(outputs)


def test_whole_stepped_and_packed_are_the_loop(layer: MLA) -> None:
    x = torch.randn(2, 6, 7, dtype=torch.float64)
    with torch.no_grad():
        y, _ = layer(x)
        for row, got in zip(x, y, strict=True):
            close(got, oracle(layer, row), 1e-12)
        state, outputs = layer.init_state(2), []
        for x_t in x.unbind(1):
            out, state = layer.step(x_t, state)
            outputs.append(out)
        close(torch.stack(outputs, 1), y, 1e-12)
        packed, _ = layer(torch.cat([x[0, :2], x[1]])[None], cu_seqlens=torch.tensor([0, 2, 8]))
        close(packed[0], torch.cat([y[0, :2], y[1]]), 1e-12)


def test_the_cache_does_not_grow_with_the_number_of_heads() -> None:
    states = [MLAConfig(heads, 32, 16, 32, 64).build(64).init_state(2, max_len=10) for heads in (1, 16)]
    assert isinstance(states[0], LatentState) and states[0].latent.shape == (2, 10, 80)
    assert nbytes(states[0]) == nbytes(states[1])


class Adapted(nn.Module):
    """A linear map with something added to it, as PEFT wraps one."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.added = base, nn.Linear(base.in_features, base.out_features, bias=False).double()

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.added(x)


def test_no_form_goes_past_an_adapter(layer: MLA) -> None:
    x = torch.randn(2, 5, 7, dtype=torch.float64)
    adapted: Any = Adapted(layer.kv_up)
    layer.kv_up = adapted
    y, _ = layer(x)
    before, state = layer(x[:, :2])
    after, _ = layer(x[:, 2:], state)
    close(torch.cat([before, after], 1), y, 1e-12)
    (slope,) = torch.autograd.grad(after[:, 0].square().sum(), adapted.added.weight)
    (want,) = torch.autograd.grad(y[:, 2].square().sum(), adapted.added.weight)
    close(slope, want, 1e-10)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"heads": 0}, "mla: heads is 0"),
        ({"d_latent": 0}, "mla: d_latent is 0"),
        ({"d_query": -1}, "mla: d_query is -1"),
        ({"d_rope": -1}, "mla: d_rope is -1"),
        ({"rope": 0.0}, r"mla: rope is 0\.0"),
        ({"scale": 0.0}, r"mla: scale is 0\.0"),
        ({"window": 0}, "mla: window is 0"),
    ],
)
def test_what_does_not_fit_is_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        MLAConfig(**options).build(8)
