"""S4 against the original's numbers, against dense matrices, and against its recurrence written out."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.core.dplr import DiscreteDPLR
from dualform.core.errors import ArgumentError, ConfigError
from dualform.core.hippo import transition
from dualform.core.nplr import nplr
from dualform.core.packing import from_lengths
from dualform.core.system import StateSpace
from dualform.layers.dss import DSSConfig
from dualform.layers.s4 import INITS, S4, S4Config
from dualform.layers.s4d import S4DConfig
from dualform.ops import spans
from dualform.ops.cauchy import cauchy_kernel
from dualform.ops.dplr_ssm import dplr_ssm
from dualform.ops.fft_conv import fft_conv
from vectors import close, load

CONFIGS = {
    "legs": (S4Config(d_state=6), 3),
    "legt": (S4Config(d_state=4, init="legt", dt_min=0.5, dt_max=2.0), 2),
    "random": (S4Config(d_state=2, init="random", rank=3), 1),
}
GOLDEN = pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 1e-4)])


@pytest.fixture(params=CONFIGS)
def layer(request: pytest.FixtureRequest) -> S4:
    config, d_model = CONFIGS[request.param]
    return config.build(d_model).double()


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short sequences have many chunks, whose states are added up in pairs several times."""
    monkeypatch.setattr(sys.modules[dplr_ssm.__module__], "CHUNK", 4)
    monkeypatch.setattr(sys.modules[dplr_ssm.__module__], "_IN_TURN", 2)


def sample(layer: S4, rows: int, length: int, states: int | None = None) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, length, layer.d_model, dtype=torch.float64)
    shape = rows if states is None else states, *layer.A_im.shape
    return x.requires_grad_(), torch.randn(shape, dtype=torch.complex128).requires_grad_()


def dense(layer: S4) -> tuple[Tensor, Tensor, Tensor]:
    """Abar ``(D, 2N, 2N)``, Bbar ``(D, 2N)``, C ``(D, 2N)``, with the conjugates side by side, by dense inverses."""

    def both(m: Tensor) -> Tensor:
        m = m[..., 0] + 1j * m[..., 1]
        return torch.cat([m, m.conj()], -1)

    A, P, B, C = -layer.log_A_re.exp() + 1j * layer.A_im, both(layer.P), both(layer.B), both(layer.C)
    A = torch.diag_embed(torch.cat([A, A.conj()], -1)) - torch.einsum("rdn,rdm->dnm", P, P.conj())
    half, eye = layer.log_dt.exp()[:, None, None] / 2 * A, torch.eye(A.shape[-1])
    step = layer.log_dt.exp()[:, None]
    left = torch.linalg.inv(eye - half)
    return left @ (eye + half), (left @ (step * B)[..., None])[..., 0], C


def oracle(layer: S4, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The discrete system of section 2.3 of the paper, step by step, then the output map of the authors' block."""
    Abar, Bbar, C = dense(layer)
    outputs, both = [], torch.cat([h, h.conj()], -1)
    for u in x.unbind(1):
        both = torch.einsum("dnm,bdm->bdn", Abar, both) + Bbar * u[..., None]
        s = (C * both).sum(-1).real + layer.D * u
        W, b = layer.out_proj.weight.chunk(2), layer.out_proj.bias.chunk(2)
        g = F.gelu(s)
        outputs.append((g @ W[0].T + b[0]) * torch.sigmoid(g @ W[1].T + b[1]))
    return torch.stack(outputs, 1), both[..., : h.shape[-1]]


def gradients(layer: S4, x: Tensor, h: Tensor, y: Tensor, last: Tensor) -> tuple[Tensor, ...]:
    loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()
    loss = loss + torch.view_as_real(last).pow(3).sum() / 10
    return torch.autograd.grad(loss, [x, h, *layer.parameters()])


@pytest.mark.parametrize("length", [1, 2, 63, 64, 150])
def test_oracle(layer: S4, length: int):
    x, h = sample(layer, 2, length)
    y, last = layer(x, h)
    want, want_last = oracle(layer, x, h)
    close(y, want, 1e-12)
    close(last, want_last, 1e-12)
    for got, expected in zip(gradients(layer, x, h, y, last), gradients(layer, x, h, want, want_last), strict=True):
        close(got, expected, 1e-9)


@pytest.mark.parametrize("length", [3, 21, 48, 67])
def test_many_chunks(layer: S4, length: int, small_chunks: None):
    x, h = sample(layer, 2, length)
    y, last = layer(x, h)
    want, want_last = oracle(layer, x, h)
    close(y, want, 1e-12)
    close(last, want_last, 1e-12)
    for got, expected in zip(gradients(layer, x, h, y, last), gradients(layer, x, h, want, want_last), strict=True):
        close(got, expected, 1e-9)


@pytest.mark.parametrize("lengths", [None, (70, 0, 1, 58, 64, 7)])
def test_a_long_sequence_runs_in_spans(
    layer: S4, lengths: tuple[int, ...] | None, small_chunks: None, monkeypatch: pytest.MonkeyPatch
):
    """The same outputs, states and gradients; the borders of spans lie inside of sequences and between them."""
    borders = None if lengths is None else from_lengths(torch.tensor(lengths))
    x, h = sample(layer, 2, 150) if lengths is None else sample(layer, 1, sum(lengths), len(lengths))
    want, want_last = layer(x, h, cu_seqlens=borders)
    before = gradients(layer, x, h, want, want_last)
    monkeypatch.setattr(spans, "_CPU_ELEMENTS", 0)  # 64 steps
    y, last = layer(x, h, cu_seqlens=borders)
    close(y, want, 1e-12)
    close(last, want_last, 1e-12)
    for got, expected in zip(gradients(layer, x, h, y, last), before, strict=True):
        close(got, expected, 1e-10)


@pytest.mark.parametrize("lengths", [(3, 0, 66, 64, 1), (0, 0), (45,), (4, 32), (0, 63, 65), (17, 18, 19, 2, 40)])
def test_packed_in_many_chunks(layer: S4, lengths: tuple[int, ...], small_chunks: None):
    x, h = sample(layer, 1, sum(lengths), len(lengths))
    y, last = layer(x, h, cu_seqlens=from_lengths(torch.tensor(lengths)))
    parts = [oracle(layer, part, h[i : i + 1]) for i, part in enumerate(x.split(list(lengths), 1)) if part.numel()]
    close(last, torch.cat([layer(part, h[i : i + 1])[1] for i, part in enumerate(x.split(list(lengths), 1))]), 1e-12)
    if parts:
        want = torch.cat([part for part, _ in parts], 1)
        close(y, want, 1e-12)
        for got, expected in zip(*(gradients(layer, x, h, m, h) for m in (y, want)), strict=True):
            close(got, expected, 1e-9)


def test_step(layer: S4):
    x, h = sample(layer, 2, 70)
    want, want_last = layer(x, h)
    for t in range(70):
        y, h = layer.step(x[:, t], h)
        close(y, want[:, t], 1e-12)
    close(h, want_last, 1e-12)


def test_long_convolution(layer: S4):
    """From the zero state the models are one convolution; the generating function gives the same kernel."""
    x, _ = sample(layer, 2, 150)
    kernel = layer.kernel(150)
    close(layer(x)[0], F.glu(layer.out_proj(F.gelu(fft_conv(x, kernel, layer.D)))), 1e-12)
    A = torch.complex(-layer.log_A_re.exp(), layer.A_im)
    P, B, C = map(torch.view_as_complex, (layer.P, layer.B, layer.C))
    close(cauchy_kernel(A, P, B, C, layer.log_dt.exp(), 150), kernel, 1e-11)
    assert layer.kernel(0).shape == (layer.d_model, 0)


@pytest.mark.parametrize("measure", ["legs", "legt", "lagt", "fout"])
def test_the_measure_is_the_dense_hippo_matrix(measure: str):
    """The kernel of the rotated system, diagonal plus low rank, is that of the matrix that it came from."""
    form, (A, B) = nplr(measure, 16), transition(measure, 16)
    C = torch.randn(16, dtype=torch.float64)
    want = StateSpace(A, B, C).discretize_recurrence(0.05, "bilinear").kernel(60)[:, 0, 0]
    step = torch.tensor([0.05], dtype=torch.float64)
    system = DiscreteDPLR.of(form.Lambda[None], form.P[:, None], form.B[None], step)
    close(system.kernel((C.to(form.V.dtype) @ form.V)[None], 60)[0], want, 1e-10)
    layer = S4Config(d_state=16, init=measure).build(3).double()
    close(torch.complex(-layer.log_A_re.exp(), layer.A_im)[1], form.Lambda - 1e-4 * (form.Lambda.real > -1e-4), 1e-6)
    close(torch.view_as_complex(layer.P)[:, 2], form.P, 1e-6)


def weights(case: dict[str, Tensor], layer: S4, channel: int) -> dict[str, Tensor]:
    A, D = torch.view_as_complex(case["A"]), case["D"][channel]
    own = {"log_dt": case["dt"].log(), "log_A_re": (-A.real).log(), "A_im": A.imag, "P": case["P"], "B": case["B"]}
    return {**layer.state_dict(), **own, "C": case["C"][channel], "D": D}


@pytest.mark.parametrize("name", ["s4_dplr_a", "s4_dplr_b"])
@GOLDEN
def test_golden(name: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch):
    """The original's discrete matrices, kernel, outputs and states, per output channel."""
    case = load(name)
    rank, width, pairs, _ = case["P"].shape
    layer = S4Config(d_state=2 * pairs, init="random", rank=rank).build(width).to(dtype)
    monkeypatch.setattr(layer, "_out", lambda s, x: s)  # the models alone
    u, h0 = case["u"].mT.to(dtype), torch.view_as_complex(case["state0"]).to(dtype.to_complex())
    for channel in range(len(case["C"])):
        layer.load_state_dict(weights(case, layer, channel))
        mine = slice(width * channel, width * (channel + 1))
        close(layer.kernel(u.shape[1]), case["K"][channel], tolerance)
        close(layer(u)[0].mT, case["y"][:, mine], tolerance)
        y, h = layer(u, h0)
        close(y.mT, case["y_with_state"][:, mine], tolerance)
        close(h, torch.view_as_complex(case["state_out"]), tolerance)
        h, outputs = layer.init_state(len(u)), []
        for t in range(u.shape[1]):
            y, h = layer.step(u[:, t], h)
            outputs.append(y)
        close(torch.stack(outputs, 2), case["y_step"][:, mine], tolerance)
        close(torch.cat([h, h.conj()], -1), torch.view_as_complex(case["state_step_final"]), tolerance)
    if dtype == torch.float64:
        Abar, Bbar, C = dense(layer)
        for got, key in ((Abar, "A_bar"), (Bbar, "B_bar"), (C, "C_bar")):
            want = torch.view_as_complex(case[key])
            close(got, want[-1] if key == "C_bar" else want, tolerance)


@GOLDEN
def test_golden_bidirectional_block(dtype: torch.dtype, tolerance: float):
    """The original's block, whole: two kernels, GELU, gated output map."""
    case = load("s4_block_bidirectional_dplr")
    layer = S4Config(d_state=8, bidirectional=True).build(6).to(dtype)
    names = {"log_A_re": "A_real", "C": "C", "P": "P"}
    layer.load_state_dict(
        {
            **{ours: case[f"sd.layer.kernel.{theirs}"] for ours, theirs in names.items()},
            "log_dt": case["sd.layer.kernel.inv_dt"][:, 0],
            "A_im": -case["sd.layer.kernel.A_imag"],
            "B": case["sd.layer.kernel.B"][0],
            "D": case["sd.layer.D"][0],
            "out_proj.weight": case["sd.output_linear.0.weight"],
            "out_proj.bias": case["sd.output_linear.0.bias"],
        }
    )
    close(layer.kernel(33), case["K"], tolerance)
    y, state = layer(case["u"].mT.to(dtype))
    close(y.mT, case["y"], tolerance)
    assert state == ()


BIDIRECTIONAL = {
    "s4": S4Config(d_state=4, bidirectional=True),
    "s4d": S4DConfig(d_state=4, bidirectional=True),
    "dss": DSSConfig(d_state=4, bidirectional=True),
}


@pytest.mark.parametrize("config", BIDIRECTIONAL.values(), ids=BIDIRECTIONAL)
def test_bidirectional(config: S4Config):
    """A sum over the past and one over the future, from the next input on; packed sequences do not see each other."""
    layer, x = config.build(3).double(), torch.randn(2, 9, 3, dtype=torch.float64)
    past, future = layer.kernel(9)
    s = fft_conv(x, past, layer.D)
    for t in range(9):
        for i in range(t + 1, 9):
            s[:, t] += future[:, i - t - 1] * x[:, i]
    close(layer(x)[0], F.glu(layer.out_proj(F.gelu(s))), 1e-12)

    lengths = (70, 0, 1, 64, 0)
    x = torch.randn(1, sum(lengths), 3, dtype=torch.float64)
    y, state = layer(x, cu_seqlens=from_lengths(torch.tensor(lengths)))
    close(y, torch.cat([layer(part)[0] for part in x.split(lengths, 1)], 1), 1e-12)
    assert state == () and not layer.causal
    assert layer(x[:, :0])[1] == ()


@pytest.mark.parametrize("config", BIDIRECTIONAL.values(), ids=BIDIRECTIONAL)
def test_a_bidirectional_layer_has_no_state(config: S4Config):
    layer, x = config.build(3), torch.randn(2, 9, 3)
    for call in (
        lambda: layer.init_state(2),
        lambda: layer.step(x[:, 0], layer._zeros(2)),
        lambda: layer(x, layer._zeros(2)),
        lambda: layer(x, ()),
    ):
        with pytest.raises(ArgumentError, match="bidirectional layer has no state"):
            call()


@pytest.mark.parametrize("config", [S4Config(d_state=6), S4DConfig(d_state=6), DSSConfig(d_state=6, kernel="exp")])
def test_rate_multiplies_the_step(config: S4Config):
    layer, other, x = config.build(2).double(), config.build(2).double(), torch.randn(2, 20, 2, dtype=torch.float64)
    other.load_state_dict({**layer.state_dict(), "log_dt": layer.log_dt + math.log(2)})
    (y, h), (want, want_h) = layer(x, rate=2.0), other(x)
    close(y, want, 1e-12)
    close(h, want_h, 1e-12)
    close(layer.kernel(20, rate=2.0), other.kernel(20), 1e-12)
    close(layer.step(x[:, 0], h, rate=2.0)[0], other.step(x[:, 0], h)[0], 1e-12)
    for rate in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ArgumentError, match=f"rate is {rate}"):
            layer(x, rate=rate)


def test_a_signal_sampled_at_another_rate():
    """Half as many samples of a smooth signal and twice the step: nearly the same outputs where both have one."""
    layer = S4Config(d_state=16, dt_min=5e-3, dt_max=1e-2).build(4).double()
    layer._out = lambda s, x: s  # type: ignore[method-assign]
    t = torch.arange(1, 401, dtype=torch.float64)
    x = torch.stack([torch.sin(2 * math.pi * t / period) for period in (100, 130, 200, 400)], -1)[None]
    y, half = layer(x)[0], layer(x[:, 1::2], rate=2.0)[0]
    close(half[:, 20:], y[:, 1::2][:, 20:], 0.05)


def test_every_initialisation_is_stable_and_contracts():
    """Parameters cannot leave the stable region: Abar is a contraction wherever they are."""
    for init in INITS:
        layer = S4Config(d_state=6, init=init, dt_max=1.0).build(2).double()
        for trained in (False, True):
            with torch.no_grad():
                for parameter in (layer.log_A_re, layer.A_im, layer.log_dt, layer.P) if trained else ():
                    parameter.uniform_(-5, 5)
                Abar = dense(layer)[0]
                y, h = layer(torch.ones(1, 300, 2, dtype=torch.float64))
            assert float(torch.linalg.matrix_norm(Abar, 2).max()) <= 1 + 1e-12, init
            assert bool(y.isfinite().all()) and bool(h.isfinite().all()), init


def test_low_rank_term_of_a_diagonal_init():
    layer = S4Config(d_state=6, init="diag-inv").build(2).double()
    layer(torch.randn(1, 9, 2, dtype=torch.float64))[0].sum().backward()
    assert not layer.P.any() and layer.P.grad is not None and not layer.P.grad.any()
    assert S4Config(d_state=6, init="dplr-inv", rank=2).build(2).P.shape == (2, 2, 3, 2)
    assert {"legs", "fout", "random", "diag-lin", "diag-legs"} <= set(INITS)


def test_float32_stays_close_over_a_thousand_steps():
    for init in ("legs", "fout"):
        layer, x = S4Config(init=init).build(2), torch.randn(1, 1000, 2)
        exact = S4Config().build(2).double()
        exact.load_state_dict(layer.state_dict())
        with torch.no_grad():
            y, h = layer(x)
            want, want_h = exact(x.double())
            close(y, want, 1e-4)
            close(h, want_h, 1e-4)
            state, y_t = layer.init_state(1), y[:, 0]
            for t in range(1000):
                y_t, state = layer.step(x[:, t], state)
            close(y_t, y[:, -1], 1e-4)
            close(state, h, 1e-4)


def test_low_precision_is_computed_in_float32():
    layer, x = S4Config(d_state=4, init="random", rank=3, dt_max=1.0).build(4), torch.randn(1, 80, 4)
    kernel, (want, want_h) = layer.kernel(80), layer(x)
    _, want_next = layer.step(x[:, 0], want_h)
    with torch.autocast("cpu", torch.bfloat16):
        y, h = layer(x)
        y_t, after = layer.step(x[:, 0], want_h)
        close(layer.kernel(80), kernel, 1e-6)
    close(h, want_h, 1e-6)
    close(after, want_next, 1e-6)
    close(y, want, 2e-2)
    close(y_t, layer.step(x[:, 0], want_h)[0], 2e-2)
    y, h = layer.bfloat16()(x.bfloat16())
    assert (y.dtype, h.dtype) == (torch.bfloat16, torch.complex64)
    y_t, _ = layer.step(x[:, 0].bfloat16(), layer.init_state(1))
    close(y_t, y[:, 0], 2e-2)


def test_on_the_meta_device():
    with torch.device("meta"):
        layer = S4Config(init="random").build(4)
        assert layer(torch.empty(2, 70, 4))[1].shape == (2, 4, 32)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's tracer does it
def test_compiles_to_one_graph():
    layer, x = S4Config(d_state=4).build(3), torch.randn(2, 70, 3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    outputs = compiled(x)[0], layer(x)[0]
    close(*outputs, 1e-5)
    for got, want in zip(*(torch.autograd.grad(y.sum(), [*layer.parameters()]) for y in outputs), strict=True):
        close(got, want, 1e-4)


def test_hints():
    assert {name for name, hint in S4.hints.items() if not hint.decay and hint.max_lr == 1e-3} == {
        "log_dt",
        "log_A_re",
        "A_im",
        "P",
        "B",
    }


@pytest.mark.parametrize(
    "config, words",
    [
        (S4Config(d_state=5), "d_state is 5"),
        (S4Config(init="hippo"), "init 'hippo' is unknown\n.*legs.*fout.*random.*diag-lin"),
        (S4Config(rank=2), "rank is 2, but that of 'legs' is 1"),
        (S4Config(init="random", rank=0), "rank is 0"),
        (S4Config(dt_min=0.0), "dt_min 0.0"),
        (S4Config(dt_min=1.0), "dt_min 1.0"),
    ],
)
def test_a_config_that_cannot_be_built(config: S4Config, words: str):
    with pytest.raises(ConfigError, match=words):
        config.build(4)
