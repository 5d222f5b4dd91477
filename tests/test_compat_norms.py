"""Norms, feed-forward, attention and blocks of mamba-ssm against plain PyTorch in float64, forward and backward."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualform.compat import gated_norms, norms
from dualform.compat.block import Block
from dualform.compat.cache import InferenceParams
from dualform.compat.mamba import Mamba
from dualform.compat.mamba2_simple import Mamba2Simple
from dualform.compat.mha import MHA
from dualform.compat.mlp import GatedMLP
from dualform.compat.simple_block import Block as FirstBlock
from dualform.compat.ssd_minimal import ssd_minimal_discrete
from dualform.core.errors import ArgumentError
from vectors import close, load

D = 6


def real(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def agree(got: Tensor | tuple, want: Tensor | tuple, *leaves: Tensor | None) -> None:
    got, want = ((m,) if isinstance(m, Tensor) else m for m in (got, want))
    weights, inputs = [torch.randn_like(m) for m in want], [m for m in leaves if m is not None]
    assert len(got) == len(want)
    sums = [sum((m * w).sum() for m, w in zip(ms, weights, strict=True)) for ms in (got, want)]
    torch.testing.assert_close(got, tuple(want))
    torch.testing.assert_close(*(torch.autograd.grad(s, inputs, retain_graph=True, allow_unused=True) for s in sums))


def normed(x: Tensor, eps: float, rms: bool, group: int | None = None) -> Tensor:
    x = x.unflatten(-1, (-1, group or x.shape[-1]))
    x = x if rms else x - x.mean(-1, keepdim=True)
    return (x / (x.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize("centered", [False, True])
def test_norm_of_a_sum(rms, with_residual, second, prenorm, centered):
    x, weight, bias = real(2, 3, D), real(D), None if rms else real(D)
    residual = real(2, 3, D) if with_residual else None
    x1, weight1, bias1, scale = (real(2, 3, D), real(D), real(D), real(2, 3)) if second else (None,) * 4
    r = x if scale is None else x * scale[..., None]
    r = r if x1 is None else r + x1
    r = r if residual is None else r + residual
    n, more = normed(r, 1e-3, rms), 1 if centered else 0
    want = [n * (weight + more) + (0 if bias is None else bias)]
    want += [n * (weight1 + more) + bias1] if second else []
    want += [r] if prenorm else []
    options = {"residual": residual, "x1": x1, "weight1": weight1, "bias1": bias1, "eps": 1e-3, "rowscale": scale}
    options |= {"prenorm": prenorm, "zero_centered_weight": centered}
    got = norms.layer_norm_fn(x, weight, bias, **options, is_rms_norm=rms)
    agree(got, tuple(want), x, weight, bias, residual, x1, weight1, bias1, scale)
    if rms:
        torch.testing.assert_close(norms.rms_norm_fn(x, weight, bias, **options), got)


def test_dtypes_of_the_stream():
    x, weight = torch.randn(3, D, dtype=torch.bfloat16), torch.ones(D, dtype=torch.bfloat16)
    for options, want in (
        ({}, torch.bfloat16),
        ({"residual_in_fp32": True}, torch.float32),
        ({"residual": x.float(), "residual_in_fp32": False}, torch.float32),
        ({"residual": x, "residual_in_fp32": True}, torch.bfloat16),
    ):
        y, r = norms.rms_norm_fn(x, weight, None, prenorm=True, **options)
        assert (y.dtype, r.dtype) == (torch.bfloat16, want)


def test_dropout_of_both_branches():
    x, x1 = torch.full((50, D), 1.0), torch.full((50, D), 10.0)
    _, r = norms.layer_norm_fn(x, torch.ones(D), None, x1=x1, dropout_p=0.75, prenorm=True)
    assert set(r.unique().tolist()) == {0.0, 4.0, 40.0, 44.0}
    module = norms.RMSNorm(D, dropout_p=0.75)
    y, r = module(x, prenorm=True)
    assert set(r.unique().tolist()) == {0.0, 4.0} and y.shape == x.shape
    assert torch.equal(module.eval()(x, prenorm=True)[1], x)


def test_the_module():
    x, residual = real(2, D), real(2, D)
    module = norms.RMSNorm(D, eps=1e-3, zero_centered_weight=True).double()
    assert not module.weight.any() and module.bias is None and list(module.state_dict()) == ["weight"]
    y, r = module(x, residual, prenorm=True)
    agree((y, r), (normed(x + residual, 1e-3, True), x + residual), x, residual)
    assert norms.RMSNorm(D).weight.eq(1).all()


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("group", [None, 2])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_norm_with_a_gate(rms, group, first, gated):
    module = (gated_norms.RMSNorm if rms else gated_norms.LayerNorm)(D, 1e-3, group, first).double()
    assert list(module.state_dict()) == (["weight"] if rms else ["weight", "bias"])
    nn.init.normal_(module.weight)
    x, z = real(2, 3, D), real(2, 3, D) if gated else None
    y = normed(x if z is None or first else x * F.silu(z), 1e-3, rms, group) * module.weight
    y = y if module.bias is None else y + module.bias
    agree(module(x, z), y * F.silu(z) if gated and first else y, x, z, *module.parameters())
    if rms:
        torch.testing.assert_close(gated_norms.rmsnorm_fn(x, module.weight, None, z, 1e-3, group, first), module(x, z))


def test_norm_with_a_gate_equals_recorded_numbers():
    g = load("gated_rms_norm")
    for first in (0, 1):
        for group in (0, 4):
            y = gated_norms.rmsnorm_fn(g["x"], g["weight"], None, g["z"], 1e-5, group or None, bool(first))
            close(y, g[f"norm_before_gate_{first}_group_{group}"], 1e-10)
    close(gated_norms.rmsnorm_fn(g["x"], g["weight"], None, eps=1e-5), g["no_gate"], 1e-10)


def test_feed_forward():
    mlp, x = GatedMLP(D, hidden_features=5, out_features=3, bias=True, multiple_of=4).double(), real(2, D)
    assert {k: tuple(v.shape) for k, v in mlp.state_dict().items()} == {
        "fc1.weight": (16, D),
        "fc1.bias": (16,),
        "fc2.weight": (3, 8),
        "fc2.bias": (3,),
    }
    y, gate = (x @ mlp.fc1.weight.T + mlp.fc1.bias).split(8, -1)
    agree(mlp(x), (y * gate * gate.sigmoid()) @ mlp.fc2.weight.T + mlp.fc2.bias, x, *mlp.parameters())
    assert GatedMLP(48).fc1.weight.shape == (256, 48)


ATTENTION = [
    {"causal": True},
    {"causal": False, "softmax_scale": 0.3},
    {"causal": True, "num_heads_kv": 2, "head_dim": 4, "qkv_proj_bias": False, "out_proj_bias": False},
    {"causal": True, "rotary_emb_dim": 2},
    {"causal": True, "head_dim": 4, "rotary_emb_dim": 4, "rotary_emb_interleaved": True, "rotary_emb_base": 100.0},
    {"causal": True, "d_conv": 3, "mlp_dim": 200},
]


def attended(m: MHA, x: Tensor) -> Tensor:
    """Head by head, element by element."""
    qkv, beside = (x @ m.in_proj.weight.T + (0 if m.in_proj.bias is None else m.in_proj.bias)).split(
        [m.head_dim * (m.num_heads + 2 * m.num_heads_kv), m.mlp_dim], -1
    )
    if m.d_conv:
        qkv = m.conv1d(qkv.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
    heads = [
        h.unflatten(-1, (-1, m.head_dim))
        for h in qkv.split([m.head_dim * n for n in (m.num_heads, *[m.num_heads_kv] * 2)], -1)
    ]

    def turn(v: Tensor, t: int) -> Tensor:
        v, half = v.clone(), m.rotary_emb_dim // 2
        for i in range(half):
            a, b = (2 * i, 2 * i + 1) if m.rotary_emb_interleaved else (i, i + half)
            angle = t * m.rotary_emb_base ** (-i / half)
            va, vb = v[..., a].clone(), v[..., b].clone()
            v[..., a] = va * math.cos(angle) - vb * math.sin(angle)
            v[..., b] = va * math.sin(angle) + vb * math.cos(angle)
        return v

    q, k, v = heads
    q, k = (torch.stack([turn(n[:, t], t) for t in range(x.shape[1])], 1) for n in (q, k))
    k, v = (n.repeat_interleave(m.num_heads // m.num_heads_kv, 2) for n in (k, v))
    scores = torch.einsum("bthp,bshp->bhts", q, k) * (m.softmax_scale or m.head_dim**-0.5)
    if m.causal:
        scores = scores.masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -math.inf)
    y = torch.einsum("bhts,bshp->bthp", scores.softmax(-1), v).flatten(2)
    if m.mlp_dim:
        up, gate = beside.chunk(2, -1)
        y = torch.cat([y, up * F.silu(gate)], -1)
    return y @ m.out_proj.weight.T + (0 if m.out_proj.bias is None else m.out_proj.bias)


@pytest.mark.parametrize("options", ATTENTION)
def test_attention(options):
    m, x = MHA(12, 4, layer_idx=0, **options).double(), real(2, 5, 12)
    agree(m(x), attended(m, x), x, *m.parameters())
    if not m.causal:
        with pytest.raises(ArgumentError, match="inference_params without causal"):
            m(x, InferenceParams(5, 2))
        return
    memory = InferenceParams(max_seqlen=5, max_batch_size=2)
    with torch.no_grad():
        pieces = []
        for begin, end in ((0, 2), (2, 3), (3, 5)):
            memory.seqlen_offset = begin
            pieces.append(m(x[:, begin:end], inference_params=memory))
        torch.testing.assert_close(torch.cat(pieces, 1), m(x))
        memory.seqlen_offset = 5
        with pytest.raises(ArgumentError, match=r"5 \+ 1 elements, but the cache has room for 5"):
            m(x[:, :1], inference_params=memory)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("norm", [nn.LayerNorm, norms.RMSNorm])
def test_block(fused, norm):
    block = Block(D, Mamba, lambda d: GatedMLP(d, 8, multiple_of=8), norm, fused, True).double()
    x, residual = real(2, 5, D), real(2, 5, D)
    r = x + residual
    y = block.mixer(block.norm(r))
    r = y + r
    want = block.mlp(block.norm2(r)), r
    got = block(x, residual)
    if fused:
        agree(got, want, x, residual, *block.parameters())
    else:
        assert got[1].dtype == torch.float32  # as upstream's: the stream is rounded
        torch.testing.assert_close(got[1], want[1].float())
    first = FirstBlock(D, Mamba, norm, fused_add_norm=fused).double()
    assert {k.split(".")[0] for k in first.state_dict()} == {"norm", "mixer"}
    torch.testing.assert_close(first(x), (first.mixer(first.norm(x)), x))


def test_mamba2_simple():
    m = Mamba2Simple(8, d_state=3, headdim=4, ngroups=2, learnable_init_states=True).double()
    nn.init.normal_(m.init_states)
    assert {k: tuple(v.shape) for k, v in m.state_dict().items()} == {
        "init_states": (4, 4, 3),
        "dt_bias": (4,),
        "A_log": (4,),
        "D": (4,),
        "in_proj.weight": (48, 8),
        "conv1d.weight": (28, 1, 4),
        "conv1d.bias": (28,),
        "norm.weight": (16,),
        "out_proj.weight": (8, 16),
    }
    u = real(2, 5, 8)
    z, xBC, dt = m.in_proj(u).split([16, 28, 4], -1)
    x, b, c = F.silu(m.conv1d(xBC.transpose(1, 2))[..., :5]).transpose(1, 2).split([16, 6, 6], -1)
    x, dt, h, ys = x.unflatten(-1, (4, 4)), F.softplus(dt + m.dt_bias), m.init_states, []
    b, c = (n.unflatten(-1, (2, 3)).repeat_interleave(2, 2)[:, :, :, None] for n in (b, c))
    for t in range(5):
        h = (dt[:, t] * -m.A_log.exp()).exp()[..., None, None] * h + (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t]
        ys.append((h * c[:, t]).sum(-1) + m.D[:, None] * x[:, t])
    y = normed(torch.stack(ys, 1).flatten(2) * F.silu(z), 1e-5, True, 8) * m.norm.weight
    agree(m(u), m.out_proj(y), u, *m.parameters())


def test_minimal_dual_scan():
    X, A, B, C, h0 = real(2, 6, 3, 4), real(2, 6, 3), real(2, 6, 3, 2), real(2, 6, 3, 2), real(2, 1, 3, 4, 2)
    h, ys = h0[:, 0], []
    for t in range(6):
        h = A[:, t].exp()[..., None, None] * h + X[:, t, ..., None] * B[:, t, :, None]
        ys.append((h * C[:, t, :, None]).sum(-1))
    agree(ssd_minimal_discrete(X, A, B, C, 3, h0), (torch.stack(ys, 1), h), X, A, B, C, h0)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda x: norms.layer_norm_fn(x, torch.ones(5), None), r"x has shape \(2, 6\), expected \(2, 5\)"),
        (lambda x: norms.layer_norm_fn(x, torch.ones(6), None, rowscale=torch.ones(3)), "rowscale has shape"),
        (lambda x: norms.rms_norm_fn(x, torch.ones(6), None, return_dropout_mask=True), "rms_norm_fn: return_dropout"),
        (lambda x: gated_norms.rmsnorm_fn(x, torch.ones(6), None, group_size=4), "group_size is 4, which does not"),
        (lambda x: gated_norms.layernorm_fn(x, torch.ones(6), None, x[:1]), "layernorm_fn: z has shape"),
        (lambda x: MHA(6, 4), "num_heads is 4"),
        (lambda x: MHA(6, 2, rotary_emb_dim=5), "rotary_emb_dim is 5"),
        (lambda x: Block(6, Mamba, nn.Identity, nn.Identity, fused_add_norm=True), "a norm of the class Identity"),
        (lambda x: Mamba2Simple(6), "12 inner features are no multiple"),
        (lambda x: Mamba2Simple(6, headdim=4, activation="gelu"), "activation is 'gelu'"),
        (lambda x: ssd_minimal_discrete(x, x, x, x, 0), "block_len is 0"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(make, sentence):
    with pytest.raises(ArgumentError, match=sentence):
        make(torch.randn(2, 6))
