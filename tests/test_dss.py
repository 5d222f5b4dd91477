"""DSS against the original's kernel and against the formulas of the paper."""

import pytest
import torch
import torch.nn.functional as F

from dualform.core.errors import ConfigError
from dualform.layers.dss import DSS, DSSConfig
from dualform.ops.fft_conv import fft_conv
from vectors import close, load


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_golden(dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch):
    """The original's softmax kernel and outputs, per output channel; the B of its code is part of C here."""
    case = load("dss_kernel")
    A, B, C = (torch.view_as_complex(case[k]) for k in "ABC")
    layer = DSSConfig(d_state=16, length=64).build(3).to(dtype)
    monkeypatch.setattr(layer, "_out", lambda s, x: s)  # the models alone
    for channel in range(2):
        own = {"log_dt": case["dt"].log(), "log_A_re": (-A.real).log(), "A_im": A.imag, "D": case["D"][channel]}
        layer.load_state_dict({**layer.state_dict(), **own, "C": torch.view_as_real(C[channel] * B)})
        mine, u = slice(3 * channel, 3 * channel + 3), case["u"].mT.to(dtype)
        close(layer.kernel(64), case["K"][channel], tolerance)
        close(layer(u)[0].mT, case["y"][:, mine], tolerance)
        h, outputs = layer.init_state(2), []
        for t in range(64):
            y, h = layer.step(u[:, t], h)
            outputs.append(y)
        close(torch.stack(outputs, 2), case["y"][:, mine], tolerance)


def formula(layer: DSS, kernel: str, length: int) -> torch.Tensor:
    """Proposition 1 of the paper, with the softmax written as one."""
    A, C = -layer.log_A_re.exp() + 1j * layer.A_im, torch.view_as_complex(layer.C)
    dt = layer.log_dt.exp()[:, None]
    powers = torch.exp((dt * A)[..., None] * torch.arange(length))
    row = powers / powers.sum(-1, keepdim=True) if kernel == "softmax" else (torch.exp(dt * A) - 1)[..., None] * powers
    return torch.einsum("dn,dnl->dl", C / A, row).real


@pytest.mark.parametrize("kernel", ["softmax", "exp"])
def test_oracle(kernel: str):
    layer = DSSConfig(d_state=6, kernel=kernel, length=70, dt_min=0.1).build(3).double()
    x, tolerance = torch.randn(2, 70, 3, dtype=torch.float64), 1e-5 if kernel == "softmax" else 1e-12
    want = formula(layer, kernel, 70)
    close(layer.kernel(70), want, tolerance)  # the paper's bounded reciprocal is an approximation
    s = fft_conv(x, want, layer.D)
    close(layer(x)[0], F.glu(layer.out_proj(F.gelu(s))), tolerance)


def test_the_softmax_normalises_over_a_stretch_of_time():
    """Whatever the sequence at hand, and at another rate over as many fewer taps: there the rows sum up to one."""
    layer = DSSConfig(d_state=2, init="real", length=16, dt_min=0.1).build(2).double()
    close(layer.kernel(40)[:, :9], layer.kernel(9), 1e-12)
    want = -layer.C[:, 0, 0] / layer.log_A_re[:, 0].exp()
    close(layer.kernel(16).sum(1), want, 1e-5)
    close(layer.kernel(8, rate=2.0).sum(1), want, 1e-5)


def test_initialisation():
    """Poles of the HiPPO matrix twice as large as there are poles; the parts of C from the standard normal."""
    layer = DSSConfig(d_state=128).build(64)
    close(layer.log_A_re.exp(), torch.full((64, 64), 0.5), 1e-6)
    assert 0.97 < float(layer.C.detach().std()) < 1.03
    assert layer.A_im.shape == (64, 64) and bool((layer.A_im > 0).all())


@pytest.mark.parametrize(
    "config, words",
    [
        (DSSConfig(d_state=3), "d_state is 3"),
        (DSSConfig(kernel="relu"), "kernel 'relu' is unknown\n.*softmax, exp"),
        (DSSConfig(init="fout"), "init 'fout' is unknown\n.*legs, lin"),
        (DSSConfig(length=0), "length is 0"),
        (DSSConfig(dt_min=-1.0), "dt_min -1.0"),
    ],
)
def test_a_config_that_cannot_be_built(config: DSSConfig, words: str):
    with pytest.raises(ConfigError, match=words):
        config.build(4)
