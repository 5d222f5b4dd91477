"""The ops against vectors computed by the original implementations, in every backend, float64 and float32."""

import pytest
import torch
from torch import Tensor

from dualform.ops import backend, causal_conv1d, causal_conv1d_update, selective_scan, selective_state_update, ssd
from vectors import close, load, names

PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-5)]
WITHOUT_SOFTPLUS = {"selective_scan_real_const", "selective_scan_real_constB_varC", "selective_scan_complex_const"}
SSD_WITHOUT_SOFTPLUS = {"ssd_g1_plain"}

precisions = pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=["float64", "float32"])
backends = pytest.mark.parametrize("name", ["reference", "torch"])


def floats(case: str, dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in load(case).items()}


def time_first(x: Tensor | None) -> Tensor | None:
    """(B, D, T) as stored -> (B, T, D)."""
    return None if x is None else x.transpose(1, 2).contiguous()


def a_map(m: Tensor, batch: int, length: int, is_complex: bool) -> Tensor:
    """B or C as stored: constant (D, N), (B, N, T) or (B, G, N, T), complex ones as pairs -> (B, T, G, N)."""
    constant = m.dim() == (3 if is_complex and m.shape[-1] == 2 else 2)
    if is_complex:
        m = torch.view_as_complex((m if constant else m.unflatten(-1, (-1, 2))).contiguous())
    if constant:
        return m.expand(batch, length, *m.shape)
    m = m[:, None] if m.dim() == 3 else m
    return m.permute(0, 3, 1, 2).contiguous()


@backends
@precisions
@pytest.mark.parametrize("case", names("selective_scan_"))
def test_selective_scan(case, name, dtype, tolerance):
    g = floats(case, dtype)
    is_complex = "complex" in case
    A = torch.view_as_complex(g["A"]) if is_complex else g["A"]
    u = time_first(g["u"])
    B, C = (a_map(g[k], u.shape[0], u.shape[1], is_complex) for k in "BC")
    with backend(name):
        y, state = selective_scan(
            u,
            time_first(g["delta"]),
            A,
            B,
            C,
            g.get("D"),
            time_first(g.get("z")),
            delta_bias=g.get("delta_bias"),
            delta_softplus=case not in WITHOUT_SOFTPLUS,
        )
    close(y, time_first(g["out"]), tolerance, "y")
    close(torch.view_as_real(state) if is_complex else state, g["last_state"], tolerance, "final state")


@precisions
@pytest.mark.parametrize("case", names("selective_state_update_"))
def test_selective_state_update(case, dtype, tolerance):
    g = floats(case, dtype)
    B, C = (g[k] if g[k].dim() == 3 else g[k][:, None] for k in "BC")
    y, state = selective_state_update(
        g["state"], g["x"], g["dt"], g["A"], B, C, g["D"], g["z"], dt_bias=g["dt_bias"], dt_softplus=True
    )
    close(y, g["out"], tolerance, "y")
    close(state, g["state_out"], tolerance, "state")


@backends
@precisions
@pytest.mark.parametrize("case", [c for c in names("causal_conv1d_") if "update" not in c])
def test_causal_conv1d(case, name, dtype, tolerance):
    g = floats(case, dtype)
    with backend(name):
        y, state = causal_conv1d(
            time_first(g["x"]),
            g["weight"],
            g.get("bias"),
            activation=None if case.endswith("plain") else "silu",
            initial_state=g.get("initial_states"),
            cu_seqlens=g.get("cu_seqlens"),
        )
    close(y, time_first(g["out"]), tolerance, "y")
    if "final_states" in g:
        close(state, g["final_states"], tolerance, "final state")


@precisions
@pytest.mark.parametrize("case", names("causal_conv1d_update"))
def test_causal_conv1d_update(case, dtype, tolerance):
    """Their state may be longer than the filter's reach, and a ring; ours is its newest W-1 inputs, in order."""
    g = floats(case, dtype)
    before, after, reach = g["conv_state"], g["conv_state_out"], g["weight"].shape[1] - 1
    steps = g["x"].shape[2]
    if "cache_seqlens" in g:
        positions = g["cache_seqlens"].tolist()
        before = torch.stack([b.roll(-p, -1) for b, p in zip(before, positions, strict=True)])
        after = torch.stack([a.roll(-p - steps, -1) for a, p in zip(after, positions, strict=True)])
    state, ys = before[..., -reach:], []
    for t in range(steps):
        y, state = causal_conv1d_update(g["x"][..., t], state, g["weight"], g["bias"], activation="silu")
        ys.append(y)
    close(torch.stack(ys, -1), g["out"], tolerance, "y")
    close(state, after[..., -reach:], tolerance, "state")


@backends
@precisions
@pytest.mark.parametrize("case", names("ssd_"))
def test_ssd(case, name, dtype, tolerance):
    g = floats(case, dtype)
    state = g.get("initial_states")
    if state is not None and "cu_seqlens" in g:  # theirs enters the first document only
        state = torch.cat([state, state.new_zeros(len(g["cu_seqlens"]) - 2, *state.shape[1:])])
    with backend(name):
        y, final = ssd(
            g["x"],
            g["dt"],
            g["A"],
            g["B"],
            g["C"],
            g.get("D"),
            g.get("z"),
            dt_bias=g.get("dt_bias"),
            dt_softplus=case not in SSD_WITHOUT_SOFTPLUS,
            dt_limit=(0.3, 1.1) if case == "ssd_dt_limit" else (0.0, float("inf")),
            initial_state=state,
            cu_seqlens=g.get("cu_seqlens"),
            chunk=5,
        )
    close(y, g["out"], tolerance, "y")
    for key in ("varlen_states", "final_states"):
        if key in g:
            close(final if key == "varlen_states" else final[-len(g[key]) :], g[key], tolerance, key)
