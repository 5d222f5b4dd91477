"""The gated RMS norm against the original's numbers."""

import pytest
import torch

from dualform.core.errors import ConfigError
from dualform.layers.norm import GatedRMSNorm
from vectors import close, load


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("groups, size", [(1, 0), (3, 4)])
def test_golden(dtype: torch.dtype, tolerance: float, before: bool, groups: int, size: int) -> None:
    case = load("gated_rms_norm")
    norm = GatedRMSNorm(12, groups, norm_before_gate=before).to(dtype)
    norm.load_state_dict({"weight": case["weight"]})
    got = norm(case["x"].to(dtype), case["z"].to(dtype))
    assert got.dtype == dtype
    close(got, case[f"norm_before_gate_{int(before)}_group_{size}"], tolerance)


def test_computed_in_float32_and_returned_in_the_dtype_that_came() -> None:
    norm, y, z = GatedRMSNorm(8, 2), torch.randn(3, 8).bfloat16() * 1e-3, torch.randn(3, 8).bfloat16()
    want = norm(y.float(), z.float())
    for module in (norm, GatedRMSNorm(8, 2).bfloat16()):
        got = module(y, z)
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, want.bfloat16())


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="width 6 is not a multiple of groups 4"):
        GatedRMSNorm(6, 4)
