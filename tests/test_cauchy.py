"""The Cauchy kernel; its backends, gradients and registration are tested with those of every operator."""

import pytest
import torch
from torch import Tensor

from dualform.core.dplr import DiscreteDPLR
from dualform.core.errors import ArgumentError
from dualform.ops import cauchy
from dualform.ops.cauchy import cauchy_kernel
from vectors import close, load


def golden(name: str, channel: int, dtype: torch.dtype) -> list[Tensor]:
    case = load(name)
    A, P, B, C = (torch.view_as_complex(case[k]).to(dtype.to_complex()) for k in "APBC")
    return [A, P, B, C[channel], case["dt"].to(dtype)]


@pytest.mark.parametrize("name", ["s4_dplr_a", "s4_dplr_b"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 1e-4)])
def test_golden(name: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch):
    """The original's kernel, and the C that it takes to the generating function; in windows of frequencies too."""
    case = load(name)
    length = case["K"].shape[-1]
    for channel in range(len(case["C"])):
        arguments = golden(name, channel, dtype)
        want = torch.view_as_complex(case["C_tilde"])[channel]
        close(cauchy._truncated(*arguments, length), want, tolerance)
        close(cauchy_kernel(*arguments, length), case["K"][channel], tolerance)
        with monkeypatch.context() as patch:
            patch.setattr(cauchy, "_ELEMENTS", 300)
            close(cauchy_kernel(*arguments, length), case["K"][channel], tolerance)


@pytest.mark.parametrize("length", [1, 2, 3, 40, 41])
def test_powers(length: int):
    """What it computes, by squaring the discrete matrix; and the same gradients."""
    arguments = [m.requires_grad_() for m in golden("s4_dplr_b", 0, torch.float64)]
    A, P, B, C, dt = arguments
    got, want = cauchy_kernel(*arguments, length), DiscreteDPLR.of(A, P, B, dt).kernel(C, length)
    close(got, want, 1e-11)
    weight = torch.randn_like(want)
    pairs = zip(*(torch.autograd.grad(k, arguments, weight) for k in (got, want)), strict=True)
    for a, b in pairs:
        close(a, b, 1e-7)  # the poles lie within 1e-4 of the border


def test_without_low_rank_term():
    A, P, B, C, dt = golden("s4_dplr_a", 0, torch.float64)
    close(cauchy_kernel(A, P[:0], B, C, dt, 30), cauchy_kernel(A, 0 * P, B, C, dt, 30), 1e-12)


def test_bad_input():
    A, P, B, C, dt = golden("s4_dplr_a", 0, torch.float64)
    assert cauchy_kernel(A, P, B, C, dt, 0).shape == (3, 0)
    with pytest.raises(ArgumentError, match="C has shape"):
        cauchy_kernel(A, P, B, C[:2], dt, 5)
    with pytest.raises(ArgumentError, match="length is -2"):
        cauchy_kernel(A, P, B, C, dt, -2)
    with pytest.raises(ArgumentError, match=r"dt is -0\.02"):
        cauchy_kernel(A, P, B, C, -dt, 5)
    with pytest.raises(ArgumentError, match=r"real part 0\.\d+: it is unstable, and its response never ends"):
        cauchy_kernel(-A, P, B, C, dt, 5)
