"""RetNet and lightning attention against loops over their papers' equations, and recorded numbers."""

import math

import pytest
import torch
from torch import Tensor

from dualform.core.errors import ConfigError
from dualform.layers.constant_decay import decayed_attention
from dualform.layers.lightning_attention import (
    LightningAttention,
    LightningAttentionConfig,
    LightningAttentionState,
)
from dualform.layers.retnet import RetNet, RetNetConfig, RetNetState
from vectors import close, load
from wrong_tensors import names_wrong_tensors


def recurrence(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """``(B, T, H, N or P)`` and decays ``(H,)``, step by step."""
    ys = []
    for t in range(q.shape[1]):
        h = decay[:, None, None] * h + v[:, t, :, :, None] * k[:, t, :, None]
        ys.append((h @ q[:, t, :, :, None])[..., 0])
    return torch.stack(ys, 1), h


def rotated(m: Tensor, at: Tensor, base: float) -> Tensor:
    """Features i and i + N / 2 as a complex number, times ``exp(i position base^(-2 i / N))``: equation 4."""
    half = m.shape[-1] // 2
    z = torch.complex(m[..., :half], m[..., half : 2 * half])
    angle = at[:, :, None, None] * base ** (-torch.arange(half, dtype=m.dtype) / max(half, 1))
    z = z * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag, m[..., 2 * half :]], -1)


def normalised(y: Tensor, eps: float) -> Tensor:
    return y / (y.square().mean(-1, keepdim=True) + eps).sqrt()


def retnet(layer: RetNet, x: Tensor, state: RetNetState) -> tuple[Tensor, Tensor]:
    """Equations 5 to 8, with the scale of section 2.2."""
    H, N, P = layer.heads, layer.d_head, layer.d_head * layer.config.expand
    W_q, W_k, W_v, W_g = layer.in_proj.weight.split([H * N, H * N, H * P, H * P])
    q, k, v = ((x @ W.T).unflatten(-1, (H, -1)) for W in (W_q, W_k, W_v))
    at = state.length[:, None] + torch.arange(x.shape[1])
    if layer.config.rope is not None:
        q, k = (rotated(m, at, layer.config.rope) for m in (q, k))
    gamma = 1 - 2.0 ** (-5 - torch.arange(H, dtype=x.dtype))
    y, h = recurrence(q, k / math.sqrt(N), v, gamma, state.h / math.sqrt(N))
    y = normalised(y, layer.norm.eps).flatten(2) * layer.norm.weight
    g = x @ W_g.T
    return (y * g * torch.sigmoid(g)) @ layer.out_proj.weight.T, h * math.sqrt(N)


def lightning(layer: LightningAttention, x: Tensor, state: LightningAttentionState) -> tuple[Tensor, Tensor]:
    """Section 2.2 of MiniMax-01, from right to left: ``Q (K^T V)``, decayed."""
    H = layer.heads
    q, k, v = (m.unflatten(-1, (H, -1)) for m in (x @ layer.qkv_proj.weight.T).chunk(3, -1))
    q, k, v = (m / (1 + torch.exp(-m)) for m in (q, k, v))
    slopes = torch.tensor([2 ** (-8 * (i + 1) / H) for i in range(H)], dtype=x.dtype)
    y, h = recurrence(q, k, v, torch.exp(-layer.config.decay * slopes), state.h)
    y = normalised(y.flatten(2), layer.config.norm_eps) * layer.norm.weight
    return (torch.sigmoid(x @ layer.gate_proj.weight.T) * y) @ layer.out_proj.weight.T, h


CASES = {
    "retnet": (RetNetConfig(heads=2), 8, retnet),
    "retnet odd": (RetNetConfig(heads=3, d_head=5, expand=1, rope=100.0), 4, retnet),
    "retnet no positions": (RetNetConfig(heads=1, rope=None), 3, retnet),
    "lightning": (LightningAttentionConfig(heads=2), 6, lightning),
    "lightning fast": (LightningAttentionConfig(heads=3, d_head=2, decay=2.5), 4, lightning),
    "linear": (LightningAttentionConfig(heads=1, decay=0.0), 3, lightning),
}


@pytest.mark.parametrize("case", CASES)
def test_oracle(case: str) -> None:
    config, d_model, oracle = CASES[case]
    layer = config.build(d_model).double()
    layer.norm.weight.data.uniform_(0.5, 2)
    x = torch.randn(2, 70, d_model, dtype=torch.float64, requires_grad=True)
    start = layer.init_state(2)
    start = start._replace(h=torch.randn_like(start.h).requires_grad_())
    if isinstance(start, RetNetState):
        start = start._replace(length=torch.tensor([0, 1000]))
    y, state = layer(x, start)
    found, want = (y, state.h), oracle(layer, x, start)
    gradients = []
    for y, last in (found, want):
        loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() + last.pow(3).sum()
        gradients.append(torch.autograd.grad(loss, [x, start.h, *layer.parameters()]))
    for got, expected in zip((*found, *gradients[0]), (*want, *gradients[1]), strict=True):
        close(got, expected, 1e-10)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
def test_recorded_numbers(dtype: torch.dtype, tolerance: float) -> None:
    """Retention with the decays of 4 heads, and plain linear attention; queries are scaled."""
    m = {key: x.to(dtype).transpose(1, 2) for key, x in load("retention").items()}
    rates = RetNetConfig(heads=4).build(4).to(dtype).rates()
    y, _ = decayed_attention(0.5 * m["q"], m["k"], m["v"], rates)
    close(y, m["o"], tolerance)
    for name in ("linear_attn", "linear_attn_init"):
        m = {key: x.to(dtype) for key, x in load(name).items()}
        start = m["initial_state"].mT if "initial_state" in m else None
        y, h = decayed_attention(0.5 * m["q"], m["k"], m["v"], torch.zeros(2, dtype=dtype), start)
        close(y, m["o"], tolerance)
        close(h.mT, m["final_state"], tolerance)


def test_decays_do_not_depend_on_the_dtype_of_the_weights() -> None:
    """They are constants of the config: in bfloat16, 1 - 2^-12 would be 1."""
    for config in (RetNetConfig(heads=8), LightningAttentionConfig(heads=8, decay=0.3)):
        layer = config.build(8)
        assert torch.equal(layer.bfloat16().rates(), config.build(8).rates())


@pytest.mark.parametrize(
    "config, words",
    [
        (RetNetConfig(heads=3), "d_model 4 is not a multiple of heads 3"),
        (RetNetConfig(d_head=0), "d_head is 0"),
        (RetNetConfig(expand=0), "expand is 0"),
        (RetNetConfig(rope=0.0), "rope is 0.0"),
        (RetNetConfig(norm_eps=-1.0), "norm_eps is -1.0"),
        (LightningAttentionConfig(heads=0), "heads is 0"),
        (LightningAttentionConfig(decay=-1.0), "decay is -1.0"),
        (LightningAttentionConfig(norm_eps=math.inf), "norm_eps is inf"),
    ],
)
def test_a_config_that_cannot_be_built(config: RetNetConfig | LightningAttentionConfig, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config.build(4)


@pytest.mark.parametrize("config", [RetNetConfig(), LightningAttentionConfig()], ids=lambda c: type(c).__name__)
def test_wrong_tensors_are_named(config: RetNetConfig | LightningAttentionConfig) -> None:
    names_wrong_tensors(config.build(4))
