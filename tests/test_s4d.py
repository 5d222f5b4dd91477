"""S4D against the original's numbers and against the recurrence of the paper, written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dualform.core.errors import ArgumentError, ConfigError
from dualform.layers.diagonal import DiagonalSystem
from dualform.layers.s4d import INITS, S4D, S4DConfig
from dualform.ops.fft_conv import fft_conv
from vectors import close, load

CONFIGS = {
    "lin": (S4DConfig(d_state=6), 3),
    "bilinear": (S4DConfig(d_state=4, init="inv", rule="bilinear"), 17),
    "real": (S4DConfig(d_state=2, init="real", dt_min=0.5, dt_max=2.0), 1),
    "legs": (S4DConfig(d_state=6, init="legs"), 2),
}


@pytest.fixture(params=CONFIGS)
def layer(request: pytest.FixtureRequest) -> S4D:
    torch.manual_seed(0)
    config, d_model = CONFIGS[request.param]
    return config.build(d_model).double()


def sample(layer: S4D, rows: int, length: int, states: int | None = None) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(rows, length, layer.d_model, dtype=torch.float64, generator=draw)
    shape = rows if states is None else states, *layer.A_im.shape
    return x.requires_grad_(), torch.randn(shape, dtype=torch.complex128, generator=draw).requires_grad_()


def oracle(layer: S4D, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Equation 2 of the paper with both poles of every pair, discretised by its section 3, then its output map."""
    dt, A = layer.log_dt.exp()[:, None], -layer.log_A_re.exp() + 1j * layer.A_im
    C = layer.C[..., 0] + 1j * layer.C[..., 1]
    if layer.rule == "zoh":
        Abar, Bbar = torch.exp(dt * A), (torch.exp(dt * A) - 1) / A
    else:
        Abar, Bbar = (1 + dt / 2 * A) / (1 - dt / 2 * A), dt / (1 - dt / 2 * A)
    outputs, both = [], torch.cat([h, h.conj()], -1)
    for u in x.unbind(1):
        both = torch.cat([Abar, Abar.conj()], -1) * both + torch.cat([Bbar, Bbar.conj()], -1) * u[..., None]
        s = (torch.cat([C, C.conj()], -1) * both).sum(-1).real + layer.D * u
        W, b = layer.out_proj.weight.chunk(2), layer.out_proj.bias.chunk(2)
        g = F.gelu(s)
        outputs.append((g @ W[0].T + b[0]) * torch.sigmoid(g @ W[1].T + b[1]))
    return torch.stack(outputs, 1), both[..., : h.shape[-1]]


def gradients(layer: S4D, x: Tensor, h: Tensor, y: Tensor, last: Tensor) -> tuple[Tensor, ...]:
    loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()
    loss = loss + torch.view_as_real(last).pow(3).sum() / 10
    return torch.autograd.grad(loss, [x, h, *layer.parameters()])


@pytest.mark.parametrize("length", [1, 2, 63, 64, 150])
def test_oracle(layer: S4D, length: int) -> None:
    x, h = sample(layer, 2, length)
    y, last = layer(x, h)
    want, want_last = oracle(layer, x, h)
    close(y, want, 1e-12)
    close(last, want_last, 1e-12)
    for got, expected in zip(gradients(layer, x, h, y, last), gradients(layer, x, h, want, want_last), strict=True):
        close(got, expected, 1e-10)


@pytest.mark.parametrize("sizes", [(70, 80), (64, 1, 85), (1, 149)])
def test_split(layer: S4D, sizes: tuple[int, ...]) -> None:
    x, h = sample(layer, 2, 150)
    want, want_last = layer(x, h)
    outputs = []
    for part in x.split(list(sizes), 1):
        y, h = layer(part, h)
        outputs.append(y)
    close(torch.cat(outputs, 1), want, 1e-12)
    close(h, want_last, 1e-12)


def test_step(layer: S4D) -> None:
    x, h = sample(layer, 2, 70)
    want, want_last = layer(x, h)
    for t in range(70):
        y, h = layer.step(x[:, t], h)
        close(y, want[:, t], 1e-12)
    close(h, want_last, 1e-12)


@pytest.mark.parametrize("lengths", [(3, 0, 130, 64, 1), (0, 0), (5,), (64, 128), (0, 63, 65)])
def test_packed(layer: S4D, lengths: tuple[int, ...]) -> None:
    x, h = sample(layer, 1, sum(lengths), len(lengths))
    y, last = layer(x, h, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int())
    parts = [layer(part, h[i : i + 1]) for i, part in enumerate(x.split(list(lengths), 1))]
    want, want_last = torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts])
    assert y.shape == x.shape
    close(last, want_last, 1e-12)
    if sum(lengths):
        close(y, want, 1e-12)
        for got, expected in zip(gradients(layer, x, h, y, last), gradients(layer, x, h, want, want_last), strict=True):
            close(got, expected, 1e-10)


def test_long_convolution(layer: S4D) -> None:
    """The third form: from the zero state the models are one long convolution with their kernel."""
    x, _ = sample(layer, 2, 150)
    s = fft_conv(x, layer.kernel(150), layer.D)
    close(layer(x)[0], F.glu(layer.out_proj(F.gelu(s))), 1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_golden_layer(dtype: torch.dtype, tolerance: float) -> None:
    """The minimal S4D of the original authors, whole."""
    case = load("s4d_standalone_layer")
    layer = S4DConfig(d_state=8).build(5).to(dtype)
    weights = {
        "log_dt": case["sd.kernel.log_dt"],
        "log_A_re": case["sd.kernel.log_A_real"],
        "A_im": case["sd.kernel.A_imag"],
        "C": case["sd.kernel.C"],
        "D": case["sd.D"],
        "out_proj.weight": case["sd.output_linear.0.weight"][..., 0],
        "out_proj.bias": case["sd.output_linear.0.bias"],
    }
    layer.load_state_dict(weights)
    close(layer.kernel(43), case["K"], tolerance)
    close(layer(case["u"].mT.to(dtype))[0].mT, case["y"], tolerance)


@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_golden_recurrence(rule: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The original's kernel, outputs and states, per output channel; B, which is part of C here, scales the state."""
    case = load(f"s4d_{rule}")
    A, B, C, state, want_state = (torch.view_as_complex(case[k]) for k in ("A", "B", "C", "state0", "state_out"))
    layer = S4DConfig(d_state=16, rule=rule).build(3).to(dtype)
    monkeypatch.setattr(layer, "_out", lambda s, x: s)  # the models alone
    for channel in range(2):
        layer.load_state_dict(
            {
                "log_dt": case["dt"].log(),
                "log_A_re": (-A.real).log(),
                "A_im": A.imag,
                "C": torch.view_as_real(C[channel] * B),
                "D": case["D"][channel],
                "out_proj.weight": layer.out_proj.weight,
                "out_proj.bias": layer.out_proj.bias,
            }
        )
        mine, u = slice(3 * channel, 3 * channel + 3), case["u"].mT.to(dtype)
        close(layer.kernel(64), case["K"][channel], tolerance)
        close(layer(u)[0].mT, case["y"][:, mine], tolerance)
        y, h = layer(u, (state / B).to(dtype.to_complex()))
        close(y.mT, case["y_with_state"][:, mine], tolerance)
        close(h * B, want_state, tolerance)
        h = layer.init_state(2)
        for t in range(64):
            _, h = layer.step(u[:, t], h)
        close(h * B, torch.view_as_complex(case["state_step_final"]), tolerance)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("n", [32, 64])
def test_golden_initialisation(init: str, n: int) -> None:
    want = torch.view_as_complex(load("hippo_s4d_inits")[f"A_{init}_{n}"])
    want = torch.complex(want.real, want.imag.abs())  # the other half of the pairs
    order = want.imag.argsort() if init == "legs" else slice(None)
    close(INITS[init](n), want[order], 1e-6 if init == "legs" else 1e-10)  # the original solves for legs in float32
    layer = S4DConfig(d_state=n, init=init).build(2)
    A = torch.complex(-layer.log_A_re.exp(), layer.A_im)
    close(A, INITS[init](n).expand(2, -1), 1e-6)
    assert bool((layer.log_dt.exp() >= 0.999e-3).all()) and bool((layer.log_dt.exp() <= 1.001e-1).all())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 1e-4)])
def test_golden_bidirectional_block(dtype: torch.dtype, tolerance: float) -> None:
    """The original's block, whole: two kernels, GELU, gated output map; B is part of C here."""
    case = load("s4_block_bidirectional_s4d")
    layer = S4DConfig(d_state=8, bidirectional=True).build(6).to(dtype)
    B, C = (torch.view_as_complex(case[f"sd.layer.kernel.{name}"]) for name in "BC")
    layer.load_state_dict(
        {
            "log_dt": case["sd.layer.kernel.inv_dt"][:, 0],
            "log_A_re": case["sd.layer.kernel.A_real"],
            "A_im": -case["sd.layer.kernel.A_imag"],
            "C": torch.view_as_real(B * C),
            "D": case["sd.layer.D"][0],
            "out_proj.weight": case["sd.output_linear.0.weight"],
            "out_proj.bias": case["sd.output_linear.0.bias"],
        }
    )
    close(layer.kernel(33), case["K"], tolerance)
    close(layer(case["u"].mT.to(dtype))[0].mT, case["y"], tolerance)


@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
def test_bidirectional_intervals(rule: str) -> None:
    """Both sums are read where an interval ends: irregular samples are the same held inputs, seen there."""
    layer = S4DConfig(d_state=6, rule=rule, dt_max=0.5, bidirectional=True).build(3).double()
    x, counts = torch.randn(2, 4, 3, dtype=torch.float64), torch.tensor([2, 1, 3, 1])
    want = layer(x.repeat_interleave(counts, 1))[0][:, counts.cumsum(0) - 1]
    close(layer(x, intervals=counts.expand(2, 4))[0], want, 1e-12)


def test_kernel_of_a_pole_that_dies_at_once() -> None:
    """The bilinear rule maps ``dt A = -2`` to zero, whose logarithm is minus infinity."""
    layer = S4DConfig(d_state=2, init="real", rule="bilinear").build(1).double()
    with torch.no_grad():
        layer.log_dt.zero_()
        layer.log_A_re.fill_(2.0).log_()
    x = torch.zeros(1, 4, 1, dtype=torch.float64)
    x[:, 0] = 1
    close(F.glu(layer.out_proj(F.gelu(fft_conv(x, layer.kernel(4), layer.D)))), layer(x)[0], 1e-12)


def test_float32_stays_close_over_thousands_of_steps() -> None:
    torch.manual_seed(0)
    layer, x = S4DConfig().build(3), torch.randn(1, 2000, 3)
    exact = S4DConfig().build(3).double()
    exact.load_state_dict(layer.state_dict())
    with torch.no_grad():
        y, h = layer(x)
        want, want_h = exact(x.double())
        close(y, want, 1e-4)
        close(h, want_h, 1e-4)
        state = layer.init_state(1)
        for t in range(2000):
            y_t, state = layer.step(x[:, t], state)
        close(y_t, y[:, -1], 1e-4)
        close(state, h, 1e-4)


def test_a_mode_that_the_input_does_not_reach() -> None:
    """Its state only fades, and its input vector still has a gradient."""
    a, C = torch.randn(2, 1, 3, dtype=torch.complex128) / 3
    b = torch.tensor([[1e-3, 0, -3e-16]], dtype=torch.complex128, requires_grad=True)
    system, u = DiagonalSystem(a.log(), a, b, 2 * C), torch.randn(2, 9, 1, dtype=torch.float64)
    h = torch.randn(2, 1, 3, dtype=torch.complex128)
    for start in (torch.zeros_like(h), h):
        y, last = system.run(u, start, None)
        want = start
        for t in range(9):
            s, want = system.step(u[:, t], want)
            close(y[:, t], s, 1e-12)
        close(last, want, 1e-12)
        if start is not h:
            got, expected = (torch.autograd.grad(torch.view_as_real(x).pow(2).sum(), b)[0] for x in (last, want))
            close(got, expected, 1e-10)


def test_low_precision_is_computed_in_float32() -> None:
    torch.manual_seed(0)
    layer, x = S4DConfig(d_state=4).build(4), torch.randn(1, 80, 4)
    want, want_h = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, h = layer(x)
    close(h, want_h, 1e-6)
    close(y, want, 2e-2)
    y, h = layer.bfloat16()(x.bfloat16())
    assert (y.dtype, h.dtype) == (torch.bfloat16, torch.complex64)
    assert layer._systems(1.0)[0].run(x.bfloat16(), h, None)[0].dtype == torch.bfloat16
    y_t, _ = layer.step(x[:, 0].bfloat16(), layer.init_state(1))
    close(y_t, y[:, 0], 2e-2)


def test_poles_cannot_leave_the_left_half_plane() -> None:
    layer = S4DConfig(d_state=4).build(2)
    with torch.no_grad():
        for parameter in (layer.log_A_re, layer.A_im, layer.log_dt):
            parameter.uniform_(-5, 5)
        y, h = layer(torch.ones(1, 3000, 2))
    assert bool(y.isfinite().all()) and bool(h.isfinite().all())
    assert {name for name, hint in layer.hints.items() if not hint.decay} >= {"log_dt", "log_A_re", "A_im"}


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        for init in INITS:
            layer = S4DConfig(init=init).build(4)
            assert layer(torch.empty(2, 70, 4))[1].shape == (2, 4, 32)


@pytest.mark.parametrize(
    "config, words",
    [
        (S4DConfig(d_state=5), "d_state is 5"),
        (S4DConfig(d_state=0), "d_state is 0"),
        (S4DConfig(init="legt"), "init 'legt' is unknown"),
        (S4DConfig(rule="euler"), "rule 'euler' is unknown"),
        (S4DConfig(dt_min=0.0), "dt_min"),
        (S4DConfig(dt_min=1.0), "dt_min"),
    ],
)
def test_a_config_that_cannot_be_built(config: S4DConfig, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config.build(4)


def test_wrong_tensors_are_named() -> None:
    layer = S4DConfig().build(3)
    with pytest.raises(ArgumentError, match="x has shape"):
        layer(torch.randn(2, 5, 4))
    with pytest.raises(ArgumentError, match="state has 3 rows, expected 2"):
        layer(torch.randn(2, 5, 3), layer.init_state(3))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's tracer does it
def test_compiles_to_one_graph() -> None:
    layer, x = S4DConfig(d_state=4).build(3), torch.randn(2, 70, 3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    outputs = compiled(x)[0], layer(x)[0]
    close(*outputs, 1e-5)
    for got, want in zip(*(torch.autograd.grad(y.sum(), [*layer.parameters()]) for y in outputs), strict=True):
        close(got, want, 1e-4)
