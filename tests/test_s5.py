"""S5 against the original's numbers, and against its recurrence with the state matrix dense and in blocks."""

import math

import pytest
import torch
from torch import Tensor

from dualform.core.errors import ArgumentError, ConfigError
from dualform.core.hippo import legs
from dualform.core.nplr import nplr
from dualform.layers.s5 import S5, S5Config
from dualform.ops import spans
from vectors import close, load, names

CONFIGS = {
    "zoh": (S5Config(d_state=6), 3),
    "bilinear": (S5Config(d_state=12, blocks=3, rule="bilinear", dt_max=0.5), 5),
    "no pairs": (S5Config(d_state=4, conj_pairs=False), 1),
    "bidirectional": (S5Config(d_state=6, bidirectional=True), 3),
}


@pytest.fixture(params=CONFIGS)
def layer(request: pytest.FixtureRequest) -> S5:
    config, d_model = CONFIGS[request.param]
    return config.build(d_model).double()


def oracle(layer: S5, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Equation 3 of the paper, discretised pole by pole, every pole of a pair written out, then the gate."""
    c, n = layer.config, len(layer.A_im)
    A, dt = -layer.log_A_re.exp() + 1j * layer.A_im, layer.log_dt.exp()
    B, C = torch.view_as_complex(layer.B), torch.view_as_complex(layer.C)
    if c.rule == "zoh":
        Abar, Bbar = torch.exp(dt * A), ((torch.exp(dt * A) - 1) / A)[:, None] * B
    else:
        Abar, Bbar = (1 + dt / 2 * A) / (1 - dt / 2 * A), (dt / (1 - dt / 2 * A))[:, None] * B
    both = (lambda m, axis: torch.cat([m, m.conj()], axis)) if c.conj_pairs else lambda m, axis: m
    decay, into = both(Abar, 0), both(Bbar, 0)

    def run(x: Tensor, h: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        h, ys = both(h, 1), []
        for u in x.unbind(1):
            h = decay * h + u.to(h.dtype) @ into.T
            ys.append((h @ both(C, 1).T).real)
        return torch.stack(ys, 1), h[:, :n]

    s, last = run(x, h, C[:, :n])
    if c.bidirectional:
        s = s + run(x.flip(1), h, C[:, n:])[0].flip(1)
    g = torch.nn.functional.gelu(s + layer.D * x)
    return g * torch.sigmoid(g @ layer.gate.weight.T + layer.gate.bias), last


@pytest.mark.parametrize("length", [1, 30])
def test_oracle(layer: S5, length: int) -> None:
    x = torch.randn(2, length, layer.d_model, dtype=torch.float64, requires_grad=True)
    h = torch.zeros(2, len(layer.A_im), dtype=torch.complex128)
    h = torch.randn_like(h).requires_grad_() if layer.causal else h
    y, last = layer(x, h if layer.causal else None)
    want, want_last = oracle(layer, x, h)
    close(y, want, 1e-12)
    sources, losses = [x, *layer.parameters()], [(y, want)]
    if layer.causal:
        close(last, want_last, 1e-12)
        sources.append(h)
        losses.append((torch.view_as_real(last), torch.view_as_real(want_last)))
    weights = [torch.randn_like(a) for a, _ in losses]
    got, expected = (
        torch.autograd.grad(sum((pair[i] * w).sum() for pair, w in zip(losses, weights, strict=True)), sources)
        for i in (0, 1)
    )
    for a, b in zip(got, expected, strict=True):
        close(a, b, 1e-10)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", [n for n in names("s5_") if n != "s5_hippo_init"])
def test_golden(name: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state space model of the original code, before its activation."""
    case = load(name)
    A, poles, width = torch.view_as_complex(case["Lambda"]), *case["B"].shape[:2]
    pairs, both = "noconj" not in name, "bidi" in name
    rule = "bilinear" if "bilinear" in name else "zoh"
    config = S5Config(d_state=poles * (1 + pairs), rule=rule, conj_pairs=pairs, bidirectional=both)
    layer = config.build(width).to(dtype)
    log_dt = case["log_step"] + math.log(0.7 if rule == "bilinear" else 1.0)  # the original's step_rescale
    weights = {"log_dt": log_dt, "log_A_re": (-A.real).log(), "A_im": A.imag, "B": case["B"], "C": case["C"]}
    layer.load_state_dict({**layer.state_dict(), **weights, "D": case["D"]})
    monkeypatch.setattr(layer, "_out", lambda s, x: s)
    system = layer._systems(1.0)[0]
    close(system.a, torch.view_as_complex(case["Lambda_bar"]), tolerance, "Abar")
    close(system.B, torch.view_as_complex(case["B_bar"]), tolerance, "Bbar")
    u = case["u"][None].to(dtype)
    y, h = layer(u)
    close(y[0], case["y"], tolerance, "y")
    if both:
        h = system.run(u, torch.zeros(1, poles, dtype=dtype.to_complex()), None)[1]
    close(h[0], torch.view_as_complex(case["x_final_forward"]), tolerance, "state")


@pytest.mark.parametrize("n", [8, 20])
def test_golden_hippo(n: int) -> None:
    """What the initialisation builds on: poles, and the sizes of the rotated vectors, by imaginary part."""
    case, form = load("s5_hippo_init"), nplr("legs", n)
    close(torch.cat([form.Lambda.conj().flip(0), form.Lambda]), torch.view_as_complex(case[f"Lambda_{n}"]), 1e-10)
    close(torch.cat([form.P[0].abs().flip(0), form.P[0].abs()]), case[f"absP_{n}"], 1e-10)
    close(torch.cat([form.B.abs().flip(0), form.B.abs()]), case[f"absB_{n}"], 1e-10)


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("blocks", [1, 2])
def test_it_starts_as_real_blocks_of_hippo(blocks: int, pairs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the eigenvectors of HiPPO-N, the drawn B and C are the real and dense ones of a block diagonal system."""
    drawn: list[Tensor] = []
    normal = torch.nn.init.trunc_normal_
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda *args: drawn.append(normal(*args)) or drawn[-1])
    torch.set_default_dtype(torch.float64)
    try:
        layer = S5Config(d_state=8, blocks=blocks, conj_pairs=pairs).build(300)
    finally:
        torch.set_default_dtype(torch.float32)
    A, b = legs(8 // blocks)
    dense = torch.block_diag(*[A + torch.outer(b, b) / 2] * blocks)
    B, C = drawn[0], torch.view_as_complex(drawn[1]).T  # (8, D) real, (D, 8) complex
    assert abs(B.std().item() * math.sqrt(8) - 1) < 0.1 and abs(drawn[1].std().item() * math.sqrt(8) - 1) < 0.1
    poles = -layer.log_A_re.exp() + 1j * layer.A_im
    for power in range(3):
        # The eigenvectors kept make a projection of the dense response; with all of them it is the response itself.
        got = torch.view_as_complex(layer.C) * poles**power @ torch.view_as_complex(layer.B)
        if pairs:  # the real part of C meets both poles of every pair; its imaginary part does not survive
            got, V = got.real * 2, torch.block_diag(*[nplr("legs", 8 // blocks).V] * blocks)
            want = 2 * (C @ V * poles**power @ V.mH @ B.to(C.dtype)).real
        else:
            want = C @ torch.linalg.matrix_power(dense, power).to(C.dtype) @ B.to(C.dtype)
        close(got, want, 1e-10)
    close(layer.A_im.view(blocks, -1)[0], layer.A_im.view(blocks, -1)[-1], 0)
    assert bool((layer.log_dt.exp() >= 0.999e-3).all()) and bool((layer.log_dt.exp() <= 1.001e-1).all())


def test_a_long_sequence_runs_in_spans(layer: S5, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 40, layer.d_model, dtype=torch.float64, requires_grad=True)
    packed = torch.tensor([0, 11, 11, 12, 31, 40, 40])

    def results() -> list[Tensor]:
        found = []
        for cu_seqlens in (None, packed):
            y, state = layer(x, cu_seqlens=cu_seqlens)
            loss = y.pow(2).sum() + (torch.view_as_real(state).pow(2).sum() if layer.causal else 0)
            found += [y, *torch.autograd.grad(loss, [x, *layer.parameters()])]
        return found

    want = results()
    monkeypatch.setattr(spans, "_CPU_ELEMENTS", 7 * len(layer.A_im))
    for got, expected in zip(results(), want, strict=True):
        close(got, expected, 1e-12)


def test_bidirectional_is_both_directions_and_each_packed_sequence_alone() -> None:
    layer = S5Config(d_state=6, bidirectional=True).build(3).double()
    x = torch.randn(1, 20, 3, dtype=torch.float64)
    y, state = layer(x, cu_seqlens=torch.tensor([0, 7, 7, 8, 20]).int())
    assert state == ()
    close(y, torch.cat([layer(part)[0] for part in x.split([7, 1, 12], 1)], 1), 1e-12)
    mirrored = S5Config(d_state=6, bidirectional=True).build(3).double()
    weights = layer.state_dict()
    mirrored.load_state_dict({**weights, "C": weights["C"].roll(3, 1)})
    close(mirrored(x.flip(1))[0].flip(1), layer(x)[0], 1e-12)


def test_bidirectional_refuses_what_needs_a_past_without_a_future() -> None:
    layer, x = S5Config(d_state=4, bidirectional=True).build(3), torch.randn(2, 5, 3)
    assert not layer.causal and S5Config().build(3).causal
    state = torch.zeros(2, 2, dtype=torch.complex64)
    for refused in (lambda: layer(x, state), lambda: layer.init_state(2), lambda: layer.step(x[:, 0], state)):
        with pytest.raises(ArgumentError, match="bidirectional layer has no state"):
            refused()


def test_poles_cannot_leave_the_left_half_plane() -> None:
    layer = S5Config(d_state=4).build(2)
    with torch.no_grad():
        for parameter in (layer.log_A_re, layer.A_im, layer.log_dt):
            parameter.uniform_(-5, 5)
        y, h = layer(torch.ones(1, 1000, 2))
    assert bool(y.isfinite().all()) and bool(h.isfinite().all())
    assert {name for name, hint in layer.hints.items() if not hint.decay} >= {"log_dt", "log_A_re", "A_im", "B"}


def test_low_precision_is_computed_in_float32() -> None:
    layer, x = S5Config(d_state=4).build(4), torch.randn(1, 30, 4)
    want, want_h = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, h = layer(x)
    close(h, want_h, 1e-6)
    close(y, want, 2e-2)
    y, h = layer.bfloat16()(x.bfloat16())
    assert (y.dtype, h.dtype) == (torch.bfloat16, torch.complex64)
    y_t, _ = layer.step(x[:, 0].bfloat16(), layer.init_state(1))
    close(y_t, y[:, 0], 2e-2)


@pytest.mark.parametrize(
    "config, words",
    [
        (S5Config(d_state=5), "d_state 5"),
        (S5Config(d_state=0), "d_state 0"),
        (S5Config(d_state=6, blocks=2), "2 blocks"),
        (S5Config(blocks=0), "0 blocks"),
        (S5Config(rule="euler"), "rule 'euler' is unknown"),
        (S5Config(dt_min=0.0), "dt_min"),
        (S5Config(dt_min=1.0), "dt_min"),
    ],
)
def test_a_config_that_cannot_be_built(config: S5Config, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config.build(4)


def test_wrong_tensors_are_named() -> None:
    layer = S5Config().build(3)
    with pytest.raises(ArgumentError, match="x has shape"):
        layer(torch.randn(2, 5, 4))
    with pytest.raises(ArgumentError, match="state has 3 rows, expected 2"):
        layer(torch.randn(2, 5, 3), layer.init_state(3))
