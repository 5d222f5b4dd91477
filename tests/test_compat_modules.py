"""``Mamba`` and ``Mamba2`` as mamba-ssm names them: keys, states, forms, and what is refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.compat.cache import InferenceParams
from dualform.compat.mamba import Mamba
from dualform.compat.mamba2 import Mamba2
from dualform.core.errors import ArgumentError

MAMBA = {
    "A_log": (16, 3),
    "D": (16,),
    "in_proj.weight": (32, 8),
    "conv1d.weight": (16, 1, 4),
    "conv1d.bias": (16,),
    "x_proj.weight": (7, 16),
    "dt_proj.weight": (16, 1),
    "dt_proj.bias": (16,),
    "out_proj.weight": (8, 16),
}
MAMBA2 = {
    "dt_bias": (4,),
    "A_log": (4,),
    "D": (4,),
    "in_proj.weight": (2 * 16 + 2 * 2 * 3 + 4, 8),
    "conv1d.weight": (16 + 2 * 2 * 3, 1, 4),
    "conv1d.bias": (16 + 2 * 2 * 3,),
    "norm.weight": (16,),
    "out_proj.weight": (8, 16),
}
SIZES2 = {"d_state": 3, "headdim": 4, "ngroups": 2}
OTHER2 = [
    {},
    {"d_ssm": 8},
    {"D_has_hdim": True},
    {"rmsnorm": False},
    {"norm_before_gate": True, "bias": True, "conv_bias": False, "conv_init": 0.3},
    {"dt_limit": (0.01, 0.02), "d_conv": 2},
]


def shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(m.shape) for name, m in module.state_dict().items()}


def test_the_keys_are_upstreams():
    assert shapes(Mamba(8, d_state=3)) == MAMBA
    assert shapes(Mamba(8, d_state=3, bias=True, conv_bias=False)) == {
        **{name: shape for name, shape in MAMBA.items() if name != "conv1d.bias"},
        "in_proj.bias": (32,),
        "out_proj.bias": (8,),
    }
    assert shapes(Mamba2(8, **SIZES2)) == MAMBA2
    plain = shapes(Mamba2(8, **SIZES2, d_ssm=8, D_has_hdim=True, rmsnorm=False))
    assert plain == {
        "dt_bias": (2,),
        "A_log": (2,),
        "D": (8,),
        "in_proj.weight": (2 * 16 + 12 + 2, 8),
        "conv1d.weight": (8 + 12, 1, 4),
        "conv1d.bias": (8 + 12,),
        "out_proj.weight": (8, 16),
    }


def test_the_keys_of_vision_forks():
    back = {f"{k.split('.')[0]}_b{k.removeprefix(k.split('.')[0])}" for k in MAMBA if "A_log" not in k}
    back = {k for k in back if not k.startswith(("in_proj", "out_proj"))} | {"A_b_log"}
    sides = {k.replace("_b.", "_s.").replace("A_b", "A_s").replace("D_b", "D_s") for k in back}
    found = {v: shapes(Mamba(8, d_state=3, bimamba_type=v)).keys() - MAMBA.keys() for v in ("v1", "v2", "v3")}
    assert found == {"v1": {"A_b_log"}, "v2": back, "v3": back | sides}
    assert shapes(Mamba(8, d_state=3, bimamba=True)).keys() == MAMBA.keys() | back
    assert shapes(Mamba(8, d_state=3, init_layer_scale=0.1))["gamma"] == (8,)


def test_flags_of_parameters():
    one, two = Mamba(8), Mamba2(8, headdim=4)
    undecayed = (one.A_log, one.D, two.A_log, two.D, two.dt_bias)
    assert all(p._no_weight_decay for p in undecayed) and one.dt_proj.bias._no_reinit
    low = Mamba(8, dtype=torch.bfloat16)
    assert low.A_log.dtype == low.D.dtype == torch.float32 and low.in_proj.weight.dtype == torch.bfloat16
    steps = F.softplus(Mamba(64, dt_min=0.02, dt_max=0.03, dt_init_floor=0.025).dt_proj.bias)
    assert steps.min() >= 0.0249 and steps.max() <= 0.0301
    assert torch.equal(one.A_log[3].exp().round(), torch.arange(1, 17.0))


def by_hand(m: Mamba, u: Tensor, suffix: str = "", rates: str = "A_log", x: Tensor | None = None) -> Tensor:
    """One pass before the last projection, as loops: ``(B, T, d_model) -> (B, T, D)``."""
    part = {name: getattr(m, name + suffix) for name in ("conv1d", "x_proj", "dt_proj", "D")}
    x_in, z = m.in_proj(u).chunk(2, -1)
    if x is None:
        taps = part["conv1d"].weight[:, 0]
        padded = F.pad(x_in, (0, 0, taps.shape[1] - 1, 0))
        x = torch.stack([(padded[:, t : t + taps.shape[1]] * taps.T).sum(1) for t in range(u.shape[1])], 1)
        x = F.silu(x + part["conv1d"].bias)
    low, b, c = part["x_proj"](x).split([m.dt_rank, m.d_state, m.d_state], -1)
    dt = F.softplus(part["dt_proj"](low))
    A, h, ys = -getattr(m, rates).exp(), 0, []
    for t in range(u.shape[1]):
        h = (dt[:, t, :, None] * A).exp() * h + (dt[:, t] * x[:, t])[..., None] * b[:, t, None]
        ys.append((h * c[:, t, None]).sum(-1) + part["D"] * x[:, t])
    return torch.stack(ys, 1) * F.silu(z)


def agree(module: torch.nn.Module, got: Tensor, want: Tensor, u: Tensor) -> None:
    torch.testing.assert_close(got, want)
    weight, leaves = torch.randn_like(want), [u, *module.parameters()]
    ours, theirs = (torch.autograd.grad((y * weight).sum(), leaves, retain_graph=True) for y in (got, want))
    torch.testing.assert_close(ours, theirs)


def test_mamba_is_the_loop():
    m, u = Mamba(8, d_state=3, dt_rank=2, bias=True).double(), torch.randn(2, 7, 8).double().requires_grad_()
    agree(m, m(u), m.out_proj(by_hand(m, u)), u)


@pytest.mark.parametrize("divide", [{}, {"if_divide_out": True}, {"if_devide_out": True}])
def test_two_directions(divide):
    m = Mamba(8, d_state=3, bimamba_type="v2", init_layer_scale=0.5, **divide).double()
    u = torch.randn(2, 7, 8).double().requires_grad_()
    y = by_hand(m, u) + by_hand(m, u.flip(1), "_b", "A_b_log").flip(1)
    agree(m, m(u), m.out_proj(y / 2 if divide else y) * m.gamma, u)


def test_two_directions_over_one_convolution():
    m, u = Mamba(8, d_state=3, bimamba_type="v1").double(), torch.randn(2, 7, 8).double().requires_grad_()
    x = F.silu(m.conv1d(m.in_proj(u).chunk(2, -1)[0].transpose(1, 2))[..., :7]).transpose(1, 2)
    y = by_hand(m, u) + by_hand(m, u.flip(1), "", "A_b_log", x.flip(1)).flip(1)
    agree(m, m(u), m.out_proj(y), u)


def test_three_directions():
    m, u = Mamba(8, d_state=3, bimamba_type="v3", nslices=3).double(), torch.randn(2, 6, 8).double().requires_grad_()
    woven = [0, 2, 4, 1, 3, 5]  # first of each slice of two, second of each
    y = by_hand(m, u) + by_hand(m, u.flip(1), "_b", "A_b_log").flip(1)
    side = by_hand(m, u[:, woven], "_s", "A_s_log")
    y = y + side[:, [woven.index(t) for t in range(6)]]
    agree(m, m(u), m.out_proj(y), u)
    with pytest.raises(ArgumentError, match="nslices is 3, which does not divide the length 7"):
        m(torch.randn(2, 7, 8).double())


@pytest.mark.parametrize("options", OTHER2)
def test_mamba2_is_the_loop(options):
    m, u = Mamba2(8, **SIZES2, **options).double(), torch.randn(2, 7, 8).double().requires_grad_()
    beside, heads = m.d_inner - m.d_ssm, m.nheads
    gate, value, z, xBC, dt = m.in_proj(u).split([beside, beside, m.d_ssm, m.d_ssm + 12, heads], -1)
    xBC = F.silu(m.conv1d(xBC.transpose(1, 2))[..., :7]).transpose(1, 2)
    x, b, c = xBC.split([m.d_ssm, 6, 6], -1)
    x = x.unflatten(-1, (heads, 4))
    b, c = (n.unflatten(-1, (2, 3)).repeat_interleave(heads // 2, 2)[:, :, :, None] for n in (b, c))
    dt, A, h, ys = F.softplus(dt + m.dt_bias).clamp(*m.dt_limit), -m.A_log.exp(), 0, []
    skip = m.D.view(heads, -1)
    for t in range(7):
        h = (dt[:, t] * A).exp()[..., None, None] * h + (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t]
        ys.append((h * c[:, t]).sum(-1) + skip * x[:, t])
    y = torch.stack(ys, 1).flatten(2)

    def rms(v: Tensor) -> Tensor:
        v = v.unflatten(-1, (2, -1))
        return (v / (v.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * m.norm.weight

    gated = y * F.silu(z)
    if m.rmsnorm:
        gated = rms(y) * F.silu(z) if m.norm_before_gate else rms(gated)
    agree(m, m(u), m.out_proj(torch.cat([F.silu(gate) * value, gated], -1)), u)


@pytest.mark.parametrize("start", [1, 2, 6])
@pytest.mark.parametrize(
    "make",
    [
        lambda: Mamba(8, d_state=3, layer_idx=0),
        *[lambda o=o: Mamba2(8, **SIZES2, **o, layer_idx=0) for o in OTHER2],
    ],
)
def test_step_by_step_is_the_whole(make, start):
    m, u = make().double(), torch.randn(2, 7, 8).double()
    memory = InferenceParams(max_seqlen=7, max_batch_size=2)
    with torch.no_grad():
        whole, pieces = m(u), [m(u[:, :start], inference_params=memory)]
        states = memory.key_value_memory_dict[0]
        for t in range(start, 7):
            memory.seqlen_offset = t
            pieces.append(m(u[:, t : t + 1], inference_params=memory))
        torch.testing.assert_close(torch.cat(pieces, 1), whole)
        assert all(a is b for a, b in zip(states, memory.key_value_memory_dict[0], strict=True))
        fresh = [s.zero_() for s in m.allocate_inference_cache(2, 7)]
        y = torch.cat([m.step(u[:, t : t + 1], *fresh)[0] for t in range(7)], 1)
        torch.testing.assert_close(y, whole)
        torch.testing.assert_close(fresh, list(states))
    memory.reset(9, 2)
    assert (memory.seqlen_offset, memory.max_seqlen) == (0, 9)


def test_sequences_of_mamba2():
    m, u = Mamba2(8, **SIZES2, layer_idx=3).double(), torch.randn(1, 7, 8).double()
    alone = torch.cat([m(u[:, :3]), m(u[:, 3:4]), m(u[:, 4:])], 1)
    borders = torch.tensor([0, 3, 4, 7], dtype=torch.int32)
    torch.testing.assert_close(m(u, seq_idx=torch.tensor([[0, 0, 0, 1, 2, 2, 2]], dtype=torch.int32)), alone)
    torch.testing.assert_close(m(u, cu_seqlens=borders), alone)
    torch.testing.assert_close(m(u[0], seqlen=7), m(u)[0])
    memory, one = InferenceParams(8, 3), InferenceParams(8, 1)
    with torch.no_grad():
        m(u, cu_seqlens=borders, inference_params=memory)
        m(u[:, 4:], inference_params=one)
    for several, single in zip(memory.key_value_memory_dict[3], one.key_value_memory_dict[3], strict=True):
        torch.testing.assert_close(several[2:], single)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Mamba(8, dt_init="ones"), "dt_init is 'ones'"),
        (lambda: Mamba(8, dt_rank="full"), "dt_rank is 'full'"),
        (lambda: Mamba(8, bimamba_type="v9"), "bimamba_type is 'v9', expected 'none', 'v1', 'v2', 'v3'"),
        (lambda: Mamba2(8), "d_ssm is 16, expected a multiple of headdim = 64"),
        (lambda: Mamba2(8, headdim=4, ngroups=3), "4 heads cannot be shared out over ngroups = 3"),
        (lambda: Mamba2(8, headdim=4, process_group=object()), "tensor parallelism is not a part"),
        (lambda: Mamba2(8, headdim=4, A_init_range=(0, 1)), "A_init_range is"),
        (lambda: Mamba(8)(torch.zeros(2, 3)), "hidden_states has shape"),
        (lambda: Mamba(8)(torch.zeros(1, 1, 8), InferenceParams(1, 1)), "inference_params needs a layer_idx"),
        (lambda: Mamba(8, bimamba=True)(torch.zeros(1, 1, 8), InferenceParams(1, 1)), "with bimamba_type 'v2'"),
        (lambda: Mamba(8, layer_idx=0)(torch.zeros(1, 2, 8), InferenceParams(9, 1, 4)), "a step takes one element"),
        (
            lambda: Mamba(8, layer_idx=0)(
                torch.zeros(1, 1, 8), InferenceParams(9, 1, 4, 0, {0: Mamba(8).allocate_inference_cache(2, 9)})
            ),
            "holds states of 2 rows, got 1",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(make, sentence):
    with pytest.raises(ArgumentError, match=sentence):
        make()
