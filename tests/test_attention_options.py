"""The options of attention that families of models need: against a loop over tokens, and rotations against formulas."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dualform.core.errors import ArgumentError, ConfigError
from dualform.layers.attention import Attention, AttentionConfig
from dualform.layers.rotary import RotaryConfig, rotate
from dualform.models.config import ModelConfig
from dualform.ops import attention
from vectors import close

_SLOW = {"factor": 4.0, "original": 16, "slow": 0.5, "fast": 2.0}
CONFIGS = {
    "norm of each head": AttentionConfig(2, 1, 4, qk_norm="rms", bias=True),
    "norm of each head, offset, after": AttentionConfig(2, 2, 4, qk_norm="rms_offset", qk_norm_after=True),
    "norm of all heads": AttentionConfig(4, 2, 3, qk_norm="rms", qk_norm_over="all", d_rope=2),
    "layer norm of all heads, after": AttentionConfig(2, 1, 3, qk_norm="layer", qk_norm_over="all", qk_norm_after=True),
    "gate": AttentionConfig(4, 2, 2, gate=True, qk_norm="rms_offset", out_bias=True),
    "gate and convolution": AttentionConfig(2, 1, 3, gate=True, d_conv=3, d_value=2),
    "wide values": AttentionConfig(3, 1, 2, d_value=5, window=4, scale=0.7),
    "softcap": AttentionConfig(2, 1, 4, softcap=0.5, bias=True, out_bias=False),
    "softcap, window": AttentionConfig(2, 2, 3, softcap=0.3, window=3, scale=2.0),
    "interleaved": AttentionConfig(2, 1, 5, rope=RotaryConfig(interleaved=True)),
    "linear": AttentionConfig(2, 1, 4, rope=RotaryConfig(50.0, scaling="linear", factor=3.0)),
    "llama3": AttentionConfig(2, 1, 8, rope=RotaryConfig(20.0, scaling="llama3", **_SLOW)),
    "yarn": AttentionConfig(2, 1, 8, rope=RotaryConfig(20.0, scaling="yarn", **_SLOW), d_rope=6),
}


@pytest.fixture(params=CONFIGS)
def layer(request: pytest.FixtureRequest) -> Attention:
    torch.manual_seed(0)
    made = CONFIGS[request.param].build(7).double()
    with torch.no_grad():
        for norm in (made.q_norm, made.k_norm):
            for p in [] if norm is None else norm.parameters():
                p.add_(torch.randn_like(p) / 3)
    return made


def normed(vector: Tensor, norm: Any, kind: str, eps: float) -> Tensor:
    if kind == "layer":
        vector = vector - vector.mean()
    scaled = vector / torch.sqrt(vector.square().mean() + eps)
    return scaled * (norm.weight + 1 if kind == "rms_offset" else norm.weight) + (norm.bias if kind == "layer" else 0)


def turned(x: Tensor, t: int, c: AttentionConfig) -> Tensor:
    """The rotation of one head, pair by pair, in complex numbers."""
    rope = c.rope if isinstance(c.rope, RotaryConfig) else RotaryConfig(c.rope or 1.0)
    P = c.d_rope or len(x)
    half, out, size = P // 2, x.clone(), 1.0
    for i in range(half):
        speed = rope.base ** (-i / half)
        if rope.scaling == "linear":
            speed = speed / rope.factor
        if rope.scaling == "llama3":
            long, short = rope.original / rope.slow, rope.original / rope.fast
            wave = 2 * math.pi / speed
            smooth = (rope.original / wave - rope.slow) / (rope.fast - rope.slow)
            between = (1 - smooth) * speed / rope.factor + smooth * speed
            speed = speed / rope.factor if wave > long else speed if wave < short else between
        if rope.scaling == "yarn":

            def pair(turns: float) -> float:
                return 2 * half * math.log(rope.original / (turns * 2 * math.pi)) / (2 * math.log(rope.base))

            low, high = max(math.floor(pair(rope.fast)), 0), min(math.ceil(pair(rope.slow)), 2 * half - 1)
            ramp = min(max((i - low) / (high - low), 0), 1)
            speed, size = speed / rope.factor * ramp + speed * (1 - ramp), 0.1 * math.log(rope.factor) + 1
        a, b = (2 * i, 2 * i + 1) if rope.interleaved else (i, i + half)
        z = complex(x[a].item(), x[b].item()) * complex(math.cos(t * speed), math.sin(t * speed)) * size
        out[a], out[b] = z.real, z.imag
    return out


def oracle(layer: Attention, c: AttentionConfig, x: Tensor) -> Tensor:
    """One row ``(T, D)``: every softmax written out, one query and one head at a time."""
    H, G, P, V = layer.heads, layer.kv_heads, layer.d_head, layer.d_sum
    z = layer.qkv_proj(x)
    mixed = z[:, : (H + G) * P + G * V]
    if c.d_conv:
        padded = torch.cat([mixed.new_zeros(c.d_conv - 1, mixed.shape[1]), mixed])
        taps = [padded[i : i + len(mixed)] * layer.conv_weight[:, i] for i in range(c.d_conv)]
        mixed = sum(taps) + layer.conv_bias
    scale = 1 / math.sqrt(P) if c.scale is None else c.scale

    def prepare(m: Tensor, norm: Any, t: int) -> Tensor:
        def apply(m: Tensor) -> Tensor:
            if c.qk_norm is None:
                return m
            if c.qk_norm_over == "all":
                return normed(m.flatten(), norm, c.qk_norm, c.norm_eps).view_as(m)
            return torch.stack([normed(head, norm, c.qk_norm, c.norm_eps) for head in m])

        m = m if c.qk_norm_after else apply(m)
        m = torch.stack([turned(head, t, c) for head in m])
        return apply(m) if c.qk_norm_after else m

    queries = [prepare(row[: H * P].view(H, P), layer.q_norm, t) for t, row in enumerate(mixed)]
    keys = [prepare(row[H * P : (H + G) * P].view(G, P), layer.k_norm, t) for t, row in enumerate(mixed)]
    values = [row[(H + G) * P :].view(G, V) for row in mixed]
    outputs = []
    for t in range(len(x)):
        heads, first = [], 0 if c.window is None else max(0, t - c.window + 1)
        for h in range(H):
            g = h // (H // G)
            scores = [float(queries[t][h] @ keys[s][g]) * scale for s in range(first, t + 1)]
            if c.softcap:
                scores = [c.softcap * math.tanh(score / c.softcap) for score in scores]
            weights = [math.exp(score) for score in scores]
            heads.append(sum(w / sum(weights) * values[first + i][g] for i, w in enumerate(weights)))
        y = torch.cat(heads)
        outputs.append(layer.out_proj(y * torch.sigmoid(z[t, -H * V :]) if c.gate else y))
    return torch.stack(outputs)


def test_whole_stepped_and_packed_are_the_loop(layer: Attention, request: pytest.FixtureRequest) -> None:
    config = CONFIGS[request.node.callspec.params["layer"]]
    x = torch.randn(2, 6, 7, dtype=torch.float64)
    with torch.no_grad():
        y, _ = layer(x)
        for row, got in zip(x, y, strict=True):
            close(got, oracle(layer, config, row), 1e-12)
        state, outputs = layer.init_state(2), []
        for x_t in x.unbind(1):
            out, state = layer.step(x_t, state)
            outputs.append(out)
        close(torch.stack(outputs, 1), y, 1e-12)
        line = torch.cat([x[0, :2], x[1]])[None]
        packed, _ = layer(line, cu_seqlens=torch.tensor([0, 2, 8]))
        close(packed[0], torch.cat([y[0, :2], y[1]]), 1e-12)


def test_a_config_with_a_rotation_is_json() -> None:
    config = AttentionConfig(2, rope=RotaryConfig(7.0, scaling="yarn", factor=2.0), qk_norm="rms", softcap=3.0)
    model = ModelConfig(11, 8, {"A": (config,)}, "A")
    table = model.to_dict()
    assert table["parts"]["A"][0]["rope"]["kind"] == "rotary"
    assert ModelConfig.from_dict(table) == model


def test_norms_of_queries_and_keys_start_as_norms_alone() -> None:
    """And one over a head has one weight for all heads."""
    made = AttentionConfig(4, 2, 3, qk_norm="rms_offset").build(5)
    assert made.q_norm is not None and made.k_norm is not None
    assert [p.shape for p in (made.q_norm.weight, made.k_norm.weight)] == [(3,), (3,)]
    made = AttentionConfig(4, 2, 3, qk_norm="rms", qk_norm_over="all").build(5)
    assert made.q_norm is not None and made.k_norm is not None
    assert [p.shape for p in (made.q_norm.weight, made.k_norm.weight)] == [(12,), (6,)]


# Rotations as transformers has them.


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_angles_are_those_of_transformers(kind: str, truncate: bool) -> None:
    formulas = pytest.importorskip("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS
    given: dict[str, Any] = {"rope_type": kind, "rope_theta": 5e4, "factor": 8.0}
    ours: dict[str, Any] = {"base": 5e4, "scaling": kind, "factor": 8.0}
    if kind == "llama3":
        given |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}
        ours |= {"slow": 1.0, "fast": 4.0, "original": 256}
    if kind == "yarn":
        given |= {"beta_fast": 20.0, "beta_slow": 2.0, "original_max_position_embeddings": 512, "truncate": truncate}
        ours |= {"slow": 2.0, "fast": 20.0, "original": 512, "rounded": truncate}
    config = SimpleNamespace(
        hidden_size=96,
        num_attention_heads=2,
        head_dim=48,
        max_position_embeddings=4096,
        rope_parameters=given,
        standardize_rope_params=lambda: None,
    )
    want, size = formulas[kind](config)
    rope = RotaryConfig(**ours)
    close(rope.frequencies(24, torch.device("cpu"), torch.float64), want.double(), 1e-5)
    torch.testing.assert_close(rope.frequencies(24, torch.device("cpu"), torch.float64).float(), want.float())
    assert rope.size() == pytest.approx(size)


@pytest.mark.parametrize("width", [1, 2, 5, 8])
@pytest.mark.parametrize("interleaved", [False, True])
def test_a_rotation_keeps_lengths_and_knows_distances_only(width: int, interleaved: bool) -> None:
    q, k = torch.randn(2, 1, 3, 1, width, dtype=torch.float64)
    rope = RotaryConfig(50.0, interleaved=interleaved)

    def at(start: int) -> Tensor:
        places = torch.arange(3)[None] + start
        return torch.einsum("bthp,bshp->ts", rotate(q, places, rope), rotate(k, places, rope))

    close(at(1000), at(0), 1e-9)
    close(rotate(q, torch.arange(3)[None], rope).norm(dim=-1), q.norm(dim=-1), 1e-12)


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: RotaryConfig(0.0), r"rotary: base is 0\.0"),
        (lambda: RotaryConfig(factor=-1.0), r"factor is -1\.0"),
        (lambda: RotaryConfig(original=0), "original is 0"),
        (lambda: RotaryConfig(slow=4.0, fast=4.0), r"fast is 4\.0, expected more turns than slow = 4\.0"),
        (lambda: RotaryConfig(magnitude=math.nan), "magnitude is nan"),
        (lambda: RotaryConfig(1.0, scaling="yarn"), r"base is 1\.0, expected more than 1 for yarn"),
        (lambda: RotaryConfig(scaling="dynamic"), "scaling is 'dynamic', expected 'linear' or 'llama3' or 'yarn'"),  # pyright: ignore[reportArgumentType]
        (lambda: AttentionConfig(2, softcap=0.0).build(4), r"attention: softcap is 0\.0"),
        (lambda: AttentionConfig(2, scale=math.inf).build(4), "attention: scale is inf"),
        (lambda: AttentionConfig(2, d_value=0).build(4), "attention: d_value is 0"),
        (lambda: AttentionConfig(2, norm_eps=-1.0).build(4), r"attention: norm_eps is -1\.0"),
        (lambda: AttentionConfig(2, qk_norm="rmsnorm").build(4), "attention: qk_norm is 'rmsnorm', expected the name"),
        (lambda: AttentionConfig(2, rope="x"), "rope is 'x', expected a number or RotaryConfig, or none"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_what_does_not_fit_is_named(build: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build()


def test_a_bound_of_scores_that_is_not_positive_is_refused() -> None:
    x = torch.randn(1, 2, 1, 3)
    with pytest.raises(ArgumentError, match=r"attention: softcap is 0\.0, expected a positive number"):
        attention(x, x, x, softcap=0.0)
