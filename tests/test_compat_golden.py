"""The names of mamba-ssm and causal-conv1d against recorded numbers, in two precisions; and NaN that keeps to its row.

The scans and steps in float64 are in ``test_compat_ops.py``.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.compat.block import Block
from dualform.compat.cache import InferenceParams
from dualform.compat.conv import causal_conv1d_fn, causal_conv1d_varlen_states
from dualform.compat.conv_update import causal_conv1d_update
from dualform.compat.gated_norms import layernorm_fn, rmsnorm_fn
from dualform.compat.inner import bimamba_inner_fn, mamba_inner_fn, mamba_inner_fn_no_out_proj
from dualform.compat.mamba import Mamba
from dualform.compat.mamba2 import Mamba2
from dualform.compat.mamba2_simple import Mamba2Simple
from dualform.compat.mha import MHA
from dualform.compat.mlp import GatedMLP
from dualform.compat.norms import layer_norm_fn, rms_norm_fn
from dualform.compat.scan import selective_scan_fn
from dualform.compat.ssd import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined
from dualform.compat.ssd_minimal import ssd_minimal_discrete
from dualform.compat.step import selective_state_update
from vectors import close, load, names

PRECISIONS = {"float64": (torch.float64, 1e-10), "float32": (torch.float32, 1e-5)}
precisions = pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS.values(), ids=PRECISIONS)
SCANS = [case for case in names("selective_scan_real") if "const" not in case]


def golden(case: str, dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in load(case).items()}


@precisions
@pytest.mark.parametrize("case", [c for c in names("causal_conv1d_") if "update" not in c])
def test_convolution(case, dtype, tolerance):
    g = golden(case, dtype)
    ids = None
    if "cu_seqlens" in g:
        lengths = g["cu_seqlens"].diff()
        ids = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(lengths)[None]
    activation = None if case.endswith("plain") else "silu"
    y = causal_conv1d_fn(g["x"], g["weight"], g.get("bias"), ids, g.get("initial_states"), activation=activation)
    close(y, g["out"], tolerance, "y")
    if ids is None and "final_states" in g:
        y, state = causal_conv1d_fn(
            g["x"], g["weight"], g.get("bias"), None, g.get("initial_states"), True, activation=activation
        )
        close(y, g["out"], tolerance, "y")
        close(state, g["final_states"], tolerance, "state")


@precisions
@pytest.mark.parametrize("case", names("causal_conv1d_update"))
def test_steps_of_the_convolution(case, dtype, tolerance):
    g = golden(case, dtype)
    state, places = g["conv_state"].clone(), g.get("cache_seqlens")
    y = causal_conv1d_update(g["x"], state, g["weight"], g["bias"], "silu", places)
    close(y, g["out"], tolerance, "y")
    close(state, g["conv_state_out"], tolerance, "state")


@pytest.mark.parametrize("case", SCANS)
def test_scan_in_float32(case):
    g = golden(case, torch.float32)
    given = (g[k] for k in ("u", "delta", "A", "B", "C"))
    y, last = selective_scan_fn(*given, g.get("D"), g.get("z"), g.get("delta_bias"), True, True)
    close(y, g["out"], 1e-5, "y")
    close(last, g["last_state"], 1e-5, "state")


@pytest.mark.parametrize("case", names("selective_state_update_"))
def test_one_step_in_float32(case):
    g = golden(case, torch.float32)
    state = g["state"].clone()
    y = selective_state_update(state, *(g[k] for k in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")), True)
    close(y, g["out"], 1e-5, "y")
    close(state, g["state_out"], 1e-5, "state")


@pytest.mark.parametrize("case", ["ssd_g1_full", "ssd_g2_full_init"])
def test_dual_scan_in_float32(case):
    g = golden(case, torch.float32)
    given = (g[k] for k in ("x", "dt", "A", "B", "C"))
    options = (g.get("D"), g.get("z"), g.get("dt_bias"), g.get("initial_states"))
    y, final = mamba_chunk_scan_combined(*given, 16, *options, dt_softplus=True, return_final_states=True)
    close(y, g["out"], 1e-5, "y")
    close(final, g["final_states"], 1e-5, "state")


@precisions
@pytest.mark.parametrize("first", [False, True])
def test_split_scan(first, dtype, tolerance):
    """The recorded loop norms all features, upstream's kernel and ours a group's: so the norm is taken behind it."""
    g = golden(f"mamba2_split_conv1d_scan_nbg{int(first)}", dtype)
    given = (g[k] for k in ("zxbcdt", "conv1d_weight", "conv1d_bias", "dt_bias", "A", "D"))
    gated, z = mamba_split_conv1d_scan_combined(*given, 16, headdim=3, ngroups=2), g["zxbcdt"][..., :12]
    y = rmsnorm_fn(gated / F.silu(z), g["rmsnorm_weight"], None, z, 1e-6, norm_before_gate=first)
    close(F.linear(y, g["outproj_weight"], g["outproj_bias"]), g["out"], tolerance, "y")


MIXERS: dict[str, Callable[[], Any]] = {
    "mamba1_mixer_0": lambda: Mamba(12, d_state=6, dt_rank=3, layer_idx=0),
    "mamba1_mixer_1": lambda: Mamba(10, d_state=4, dt_rank=2, d_conv=3, bias=True, conv_bias=False, layer_idx=0),
    "mamba2_mixer_0": lambda: Mamba2(12, d_state=5, headdim=4, layer_idx=0),
    "mamba2_mixer_1": lambda: Mamba2(8, d_state=6, headdim=4, ngroups=2, bias=True, dt_limit=(0.1, 0.9), layer_idx=0),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)], ids=PRECISIONS)
@pytest.mark.parametrize("case", MIXERS)
@torch.no_grad()
def test_mixers_of_transformers(case, dtype, tolerance):
    """Their weights by their own names; whole, and step by step from the states after the prompt."""
    g = golden(case, dtype)
    m = MIXERS[case]().to(dtype)
    m.load_state_dict({k.removeprefix("sd."): v for k, v in g.items() if k.startswith("sd.")})
    memory = InferenceParams(max_seqlen=22, max_batch_size=2)
    close(m(g["x"], inference_params=memory), g["y"], tolerance, "y")
    conv, state = memory.key_value_memory_dict[0]
    close(conv, g["conv_state"], tolerance, "convolution state")
    close(state, g["ssm_state"].to(dtype), tolerance, "state")
    close(m(torch.cat([g["x"], g["x_next"]], 1)), g["y_full"], tolerance, "both at once")
    steps = []
    for memory.seqlen_offset, x in enumerate(g["x_next"].unbind(1), g["x"].shape[1]):
        steps.append(m(x[:, None], inference_params=memory))
    want = g["y_full"][:, g["x"].shape[1] :] if case == "mamba2_mixer_1" else g["y_decode"]  # its decode drops dt_limit
    close(torch.cat(steps, 1), want, tolerance, "steps")


B, D, T, N, H, P = 3, 6, 7, 4, 2, 3


def rows(*shape: int) -> Tensor:
    return torch.randn(B, *shape, dtype=torch.float64)


def plain(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def rates(*shape: int) -> Tensor:
    return -torch.rand(*shape, dtype=torch.float64) - 0.1


def inner(m: Callable[..., Tensor], out: bool, both: bool = False) -> Callable[[Tensor], Tensor]:
    """A fused layer with fixed weights."""
    back = [rates(D, N)] if both else []
    last = [plain(5, D), None] if out else []
    weights = [plain(D, 1, 4), plain(D), plain(2 + 2 * N, D), plain(D, 2), *last, rates(D, N), *back]
    skip, bias = plain(D), plain(D)
    return lambda xz: m(xz, *weights, D=skip, delta_bias=bias, delta_softplus=True)


def stepped(u: Tensor, table: Tensor, dt: Tensor, b: Tensor, c: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """One step, whose state is written in place."""
    table = table.clone()
    return selective_state_update(table, u, dt, A, b, c, dt_softplus=True), table


def shifted(x: Tensor, table: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    table = table.clone()
    return causal_conv1d_update(x, table, weight, None, "silu"), table


def calls() -> dict[str, tuple[Callable[..., Any], list[Tensor]]]:
    """Every function and module with what it is given row by row."""
    torch.manual_seed(0)
    A, W = rates(D, N), plain(D, 4)
    return {
        "causal_conv1d_fn": (
            lambda x, h: causal_conv1d_fn(x, W, None, None, h, True, activation="silu"),
            [rows(D, T), rows(D, 3)],
        ),
        "causal_conv1d_update": (lambda x, h: shifted(x, h, W), [rows(D, 2), rows(D, 3)]),
        "selective_scan_fn": (
            lambda u, dt, b, c, z: selective_scan_fn(u, dt, A, b, c, W[:, 0], z, None, True, True),
            [rows(D, T), rows(D, T), rows(N, T), rows(N, T), rows(D, T)],
        ),
        "selective_state_update": (
            lambda u, h, dt, b, c: stepped(u, h, dt, b, c, A),
            [rows(D), rows(D, N), rows(D), rows(N), rows(N)],
        ),
        "mamba_chunk_scan_combined": (
            lambda x, dt, b, c, z: mamba_chunk_scan_combined(
                x, dt, A[:H, 0], b, c, 16, None, z, dt_softplus=True, return_final_states=True
            ),
            [rows(T, H, P), rows(T, H), rows(T, 1, N), rows(T, 1, N), rows(T, H, P)],
        ),
        "mamba_split_conv1d_scan_combined": (
            lambda m: mamba_split_conv1d_scan_combined(
                m,
                W[:1].expand(H * P + 2 * N, 4),
                None,
                W[:H, 0],
                A[:H, 0],
                W[:H, 1],
                16,
                return_final_states=True,
                headdim=P,
                rmsnorm_weight=W[:, 2],
            ),
            [rows(T, 2 * H * P + 2 * N + H)],
        ),
        "ssd_minimal_discrete": (
            lambda x, a, b, c: ssd_minimal_discrete(x, -a.abs(), b, c, 7),
            [rows(T, H, P), rows(T, H), rows(T, H, N), rows(T, H, N)],
        ),
        "mamba_inner_fn": (inner(mamba_inner_fn, True), [rows(2 * D, T)]),
        "mamba_inner_fn_no_out_proj": (inner(mamba_inner_fn_no_out_proj, False), [rows(2 * D, T)]),
        "bimamba_inner_fn": (inner(bimamba_inner_fn, True, both=True), [rows(2 * D, T)]),
        "layer_norm_fn": (lambda x, r: layer_norm_fn(x, W[:, 0], W[:, 1], r, prenorm=True), [rows(T, D), rows(T, D)]),
        "rms_norm_fn": (lambda x, r: rms_norm_fn(x, W[:, 0], None, r), [rows(T, D), rows(T, D)]),
        "layernorm_fn": (lambda x, z: layernorm_fn(x, W[:, 0], W[:, 1], z), [rows(T, D), rows(T, D)]),
        "rmsnorm_fn": (
            lambda x, z: rmsnorm_fn(x, W[:, 0], None, z, group_size=3, norm_before_gate=False),
            [rows(T, D), rows(T, D)],
        ),
        "Mamba": (Mamba(8, d_state=3).double(), [rows(T, 8)]),
        "Mamba v2": (Mamba(8, d_state=3, bimamba_type="v2").double(), [rows(T, 8)]),
        "Mamba2": (Mamba2(8, d_state=3, headdim=4).double(), [rows(T, 8)]),
        "Mamba2Simple": (Mamba2Simple(8, d_state=3, headdim=4).double(), [rows(T, 8)]),
        "MHA": (MHA(8, 2, causal=True, d_conv=3, rotary_emb_dim=2).double(), [rows(T, 8)]),
        "GatedMLP": (GatedMLP(8).double(), [rows(T, 8)]),
        "Block": (
            Block(8, lambda d: Mamba(d, d_state=3), GatedMLP, torch.nn.LayerNorm).double(),
            [rows(T, 8), rows(T, 8)],
        ),
    }


with torch.random.fork_rng(devices=[]):
    CALLS = calls()


@pytest.mark.parametrize(("call", "given"), CALLS.values(), ids=CALLS)
def test_nan_stays_in_its_row(call, given):
    """In outputs, in states, and in the gradients of what is given row by row; wherever in the row it is."""

    def run(given: list[Tensor]) -> list[Tensor]:
        leaves = [m.detach().clone().requires_grad_() for m in given]
        found = call(*leaves)
        found = [m for m in (found if isinstance(found, tuple) else (found,)) if m is not None]
        loss = sum((m * torch.arange(1.0, m[0].numel() + 1).view(m[0].shape)).sum() for m in found if m.requires_grad)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True) if isinstance(loss, Tensor) else []
        return [m.detach() for m in (*found, *grads) if m is not None]

    want = run(given)
    for i, m in enumerate(given):
        spoiled = m.clone()
        spoiled[1].view(-1)[m[1].numel() // 2] = torch.nan
        got = run([*given[:i], spoiled, *given[i + 1 :]])
        assert got[0][1].isnan().any(), "the row of the NaN has it"
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a[[0, 2]], b[[0, 2]])


def test_nan_stays_in_its_sequence():
    """Where sequences lie end to end, too."""
    borders, ids = (
        torch.tensor([0, 3, 4, 7], dtype=torch.int32),
        torch.tensor([[0, 0, 0, 1, 2, 2, 2]], dtype=torch.int32),
    )
    x, weight = plain(7, D), plain(D, 4)
    spoiled = x.clone()
    spoiled[3] = torch.nan
    others = [0, 1, 2, 4, 5, 6]

    def conv(x: Tensor) -> Tensor:
        return causal_conv1d_fn(x.T[None], weight, seq_idx=ids)[0].T

    torch.testing.assert_close(conv(spoiled)[others], conv(x)[others])
    states = [causal_conv1d_varlen_states(m, borders, 3) for m in (spoiled, x)]
    torch.testing.assert_close(states[0][[0, 2]], states[1][[0, 2]])
    m, u = Mamba2(D, d_state=3, headdim=4).double(), (spoiled[None], x[None])
    for options in ({"seq_idx": ids}, {"cu_seqlens": borders}):
        torch.testing.assert_close(m(u[0], **options)[0, others], m(u[1], **options)[0, others])
