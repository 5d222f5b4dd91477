"""The plain forms of mamba-ssm beside its kernels."""

import pytest
import torch

from dualform.compat.conv import causal_conv1d_varlen_states
from dualform.compat.gated_norms import rmsnorm_fn
from dualform.compat.references import (
    mamba_chunk_scan,
    mamba_split_conv1d_scan_ref,
    rms_norm_ref,
    ssd_chunk_scan_combined_ref,
)
from dualform.compat.ssd import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined
from dualform.core.errors import ArgumentError


def r(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("group", [None, 3])
@pytest.mark.parametrize("gated", [True, False])
def test_the_gated_norm(first, group, gated):
    torch.manual_seed(0)
    x, z, weight, bias = r(2, 5, 12), r(2, 5, 12) if gated else None, r(12), r(12)
    want = rmsnorm_fn(x, weight, bias, z, 1e-3, group, first)
    torch.testing.assert_close(rms_norm_ref(x, weight, bias, z, 1e-3, group, first), want)
    narrow = [m if m is None else m.half() for m in (x, weight, bias, z)]
    got = rms_norm_ref(*narrow, 1e-3, group, first, upcast=False)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2)


def test_the_scan_of_mamba2():
    """The plain form is a loop, and equals a loop that is written here."""
    torch.manual_seed(0)
    x, dt, A, B, C, D = r(2, 7, 4, 3), r(2, 7, 4), -r(4).abs(), r(2, 7, 2, 5), r(2, 7, 2, 5), r(4)
    bias = r(4)
    h, ys = torch.zeros(2, 4, 3, 5, dtype=torch.float64), []
    step = torch.nn.functional.softplus(dt + bias)
    for t in range(7):
        b, c = (m[:, t].repeat_interleave(2, 1)[:, :, None] for m in (B, C))
        h = (step[:, t] * A).exp()[..., None, None] * h + step[:, t, :, None, None] * x[:, t, ..., None] * b
        ys.append((h * c).sum(-1) + D[:, None] * x[:, t])
    for scan in (ssd_chunk_scan_combined_ref, mamba_chunk_scan):
        y = scan(x, dt, A, B, C, 4, D, dt_bias=bias, dt_softplus=True)
        torch.testing.assert_close(y, torch.stack(ys, 1))


def test_the_layer_of_mamba2_behind_its_projection():
    torch.manual_seed(0)
    arguments = (r(2, 7, 2 * 12 + 2 * 10 + 4), r(12 + 20, 4), r(32), r(4), -r(4).abs(), r(4), 8)
    options = {"rmsnorm_weight": r(12), "outproj_weight": r(6, 12), "headdim": 3, "ngroups": 2, "dt_limit": (0.1, 2.0)}
    want = mamba_split_conv1d_scan_combined(*arguments, **options)
    torch.testing.assert_close(mamba_split_conv1d_scan_ref(*arguments, **options), want)


def test_what_lies_behind_the_last_border_is_padding():
    """As in mamba-ssm's generation from prompts of unequal lengths on one line."""
    x = r(9, 3)
    want = torch.stack([torch.cat([0 * x[:2], x[:1]]), x[3:6]]).mT
    torch.testing.assert_close(causal_conv1d_varlen_states(x, torch.tensor([0, 1, 6]), 3), want)
    with pytest.raises(ArgumentError, match="must rise from 0"):
        causal_conv1d_varlen_states(x, torch.tensor([0, 1, 10]), 3)


@pytest.mark.parametrize("begins", [False, True])
def test_a_scan_ends_where_its_last_sequence_does(begins):
    x, dt, A, B = r(1, 9, 4, 3), r(1, 9, 4).abs(), -r(4).abs(), r(1, 9, 2, 5)
    options = {"return_final_states": True, "return_varlen_states": True}
    options |= {"cu_seqlens": torch.tensor([0, 2, 6]), "initial_states": r(1, 4, 3, 5) if begins else None}
    want = mamba_chunk_scan_combined(*(m[:, :6] for m in (x, dt)), A, *(m[:, :6] for m in (B, B)), 4, **options)
    y, *states = mamba_chunk_scan_combined(x, dt, A, B, B, 4, **options)
    for got, exact in zip((y[:, :6], *states), want, strict=True):
        torch.testing.assert_close(got, exact)
