"""Hyena against the original's numbers and against the convolutions of the paper, written out; its distillation."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from dualform.core.errors import ArgumentError, ConfigError
from dualform.core.modal import fit_modes
from dualform.layers.hyena import Hyena, HyenaConfig, HyenaState
from dualform.layers.hyena_modal import HyenaModal, HyenaModalConfig
from vectors import close, load

CONFIGS = {
    "order 2": (HyenaConfig(l_max=30, d_embed=5, d_filter=6), 3),
    "order 4": (HyenaConfig(l_max=7, order=4, d_conv=1, d_embed=3, d_filter=4, filter_layers=0), 2),
    "one tap": (HyenaConfig(l_max=1, d_conv=2, d_embed=3, d_filter=4, filter_layers=1), 1),
}


@pytest.fixture(params=CONFIGS)
def layer(request: pytest.FixtureRequest) -> Hyena:
    torch.manual_seed(0)
    config, d_model = CONFIGS[request.param]
    return config.build(d_model).double()


def filters(layer: Hyena) -> Tensor:
    """The taps one by one: features, network, window. ``(N - 1, D, l_max)``."""
    f, c, taps = layer.filter, layer.config, []
    channels = torch.arange(layer.D.numel(), dtype=torch.float64).view(layer.d_model, -1).T
    slow, fast, floor = c.window
    rate = -math.log(0.01) * (1 / slow + (1 / fast - 1 / slow) * channels / max(layer.D.numel() - 1, 1))
    for t in range(c.l_max):
        z = f.positions[t]
        for layer_map in f.maps:
            z = torch.sin(f.frequency * layer_map(z))
        window = torch.exp(-rate * t / max(c.l_max - 1, 1)) + floor
        taps.append((f.out.weight @ z).view(layer.D.shape) * window)
    return torch.stack(taps, -1)


def oracle(layer: Hyena, x: Tensor) -> Tensor:
    """Definition 3.1 of the paper from the empty history, every convolution a double sum."""
    (rows, length, d), k = x.shape, filters(layer)
    p, width = layer.in_proj(x), layer.conv_weight.shape[1]
    line = torch.cat([torch.zeros(rows, width - 1, p.shape[2], dtype=x.dtype), p], 1)
    p = sum((layer.conv_weight[:, j] * line[:, j : j + length] for j in range(width)), layer.conv_bias)
    *gates, v = p.split(d, -1)
    for n, gate in enumerate(reversed(gates[1:])):
        u, out = gate * v, []
        for t in range(length):
            y_t = layer.D[n] * u[:, t]
            for s in range(max(0, t + 1 - layer.config.l_max), t + 1):
                y_t = y_t + k[n, :, t - s] * u[:, s]
            out.append(y_t)
        v = torch.stack(out, 1)
    return layer.out_proj(gates[0] * v)


@pytest.mark.parametrize("length", [1, 2, 41])
def test_oracle(layer: Hyena, length: int) -> None:
    layer.filter.rate.copy_(rates(layer))  # they were made in float32
    x = torch.randn(2, length, layer.d_model, dtype=torch.float64, requires_grad=True)
    got, want = layer(x)[0], oracle(layer, x)
    close(got, want, 1e-12)
    sources = [x, *layer.parameters()]
    weight = torch.linspace(-1, 1, got.numel(), dtype=x.dtype).view_as(got)
    pairs = [torch.autograd.grad((y * weight).sum(), sources, allow_unused=True) for y in (got, want)]
    for mine, theirs in zip(*pairs, strict=True):
        close(mine, torch.zeros_like(mine) if theirs is None else theirs, 1e-10)


def rates(layer: Hyena) -> Tensor:
    slow, fast, _ = layer.config.window
    each = torch.linspace(math.log(100) / slow, math.log(100) / fast, layer.D.numel(), dtype=torch.float64)
    return each.view(layer.d_model, -1).T


@pytest.mark.parametrize("name", ["hyena_o2", "hyena_o3", "hyena_short"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_golden(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """The original's filters and outputs; its channels of a filter are ordered by feature, then filter."""
    case = load(name)
    own, network = "sd.filter_fn.", "sd.filter_fn.implicit_filter."
    order, maps = case["sd.in_proj.weight"].shape[0] // 6 - 1, len([n for n in case if "implicit_filter" in n]) // 3

    def filters_first(z: Tensor) -> Tensor:
        return z.unflatten(0, (6, order - 1)).transpose(0, 1)

    last = f"{network}{2 * maps}.weight"
    weights = {
        "in_proj.weight": case["sd.in_proj.weight"],
        "in_proj.bias": case["sd.in_proj.bias"],
        "out_proj.weight": case["sd.out_proj.weight"],
        "out_proj.bias": case["sd.out_proj.bias"],
        "conv_weight": case["sd.short_filter.weight"][:, 0],
        "conv_bias": case["sd.short_filter.bias"],
        "D": filters_first(case[own + "bias"]),
        "filter.positions": case[own + "pos_emb.z"][0],
        "filter.rate": filters_first(case[own + "modulation.deltas"].flatten().abs()),
        "filter.frequency": case[network + "1.freq"][0],
        "filter.out.weight": filters_first(case[last]).flatten(0, 1),
    }
    for i in range(maps):
        for part in ("weight", "bias"):
            weights[f"filter.maps.{i}.{part}"] = case[f"{network}{2 * i}.{part}"]
    config = HyenaConfig(
        order=order,
        l_max=32,
        d_conv=case["sd.short_filter.weight"].shape[2],
        d_embed=5,
        d_filter=8,
        filter_layers=maps - 1,
    )
    layer, u = config.build(6).to(dtype), case["u"].to(dtype)
    close(layer.filter.rate, filters_first(case[own + "modulation.deltas"].flatten().abs()), 1e-6)
    layer.load_state_dict(weights)
    length = u.shape[1]
    close(layer.kernel(length), case["filter"][0].T.unflatten(0, (6, order - 1)).transpose(0, 1), tolerance)
    close(layer(u)[0], case["y"], tolerance)
    state = layer.init_state(2)
    for t in range(length):
        y_t, state = layer.step(u[:, t], state)
        close(y_t, case["y"][:, t], tolerance)


def test_positions_at_the_start_are_time_and_oscillations() -> None:
    positions = HyenaConfig(l_max=8, d_embed=7).build(2).filter.positions
    t = torch.arange(8) / 8
    turns = [1e-4, (1e-4 + 2 - 1e-4) / 2 + 5e-5, 2.0]
    want = [torch.arange(8) / 7]
    want += [torch.cos(2 * math.pi * f * t) for f in turns] + [-torch.sin(2 * math.pi * f * t) for f in turns]
    close(positions, torch.stack(want, 1), 1e-3)


def test_the_history_grows_to_what_the_filter_sees() -> None:
    layer = HyenaConfig(l_max=20, d_embed=3, d_filter=4).build(2).double()
    x, capacities = torch.randn(1, 50, 2, dtype=torch.float64), []
    want, whole = layer(x)
    assert whole.past.shape[1] == 19
    state = layer.init_state(1)
    for t in range(50):
        y, state = layer.step(x[:, t], state)
        close(y, want[:, t], 1e-12)
        capacities.append(state.past.shape[1])
    assert sorted(set(capacities)) == [1, 2, 4, 8, 16, 19]
    close(state.past, whole.past, 1e-12)
    assert layer.init_state(3, max_len=7).past.shape == (3, 7, 1, 2)
    assert layer.init_state(3, max_len=700).past.shape == (3, 19, 1, 2)


def test_a_step_writes_in_place_only_where_nothing_is_recorded() -> None:
    layer, x = HyenaConfig(l_max=20, d_embed=3, d_filter=4).build(2), torch.randn(2, 2)
    state = layer.init_state(2, max_len=10)
    _, after = layer.step(x, state)
    assert after.past.data_ptr() != state.past.data_ptr() and not bool(state.past.any())
    with torch.no_grad():
        _, after = layer.step(x, state)
    assert after.past.data_ptr() == state.past.data_ptr()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_compiles_without_a_state() -> None:
    layer, x = HyenaConfig(l_max=20, d_embed=3, d_filter=4).build(2), torch.randn(2, 9, 2)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    (y, state), (want, want_state) = compiled(x), layer(x)
    close(y, want, 1e-5)
    close(state.past, want_state.past, 1e-5)
    parameters = [*layer.parameters()]
    for got, expected in zip(*(torch.autograd.grad(z.sum(), parameters) for z in (y, want)), strict=True):
        close(got, expected, 1e-4)
    torch.compiler.reset()
    assert bool(compiled(x, layer.init_state(2, max_len=8))[0].isnan().all())


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        layer, x = HyenaConfig(l_max=20, d_embed=3, d_filter=4).build(2), torch.empty(2, 9, 2)
        y, state = layer(x)
        y, state = layer(x, layer.init_state(2, max_len=18))
        assert layer.step(y[:, 0], state)[0].shape == (2, 2)


def test_filters_follow_the_parameters() -> None:
    """Weights that are averaged, stepped, loaded, cast or written through ``data`` change what the layer computes."""
    torch.manual_seed(0)
    layer, other = (HyenaConfig(l_max=20, d_embed=3, d_filter=4).build(2).double() for _ in range(2))
    x, outputs = torch.randn(1, 15, 2, dtype=torch.float64), []

    def check() -> None:
        with torch.no_grad():
            y, _ = layer(x)
            outputs.append(y)
            close(layer.step(x[:, 0], layer.init_state(1))[0], y[:, 0], 1e-12)
        close(y, oracle(layer, x), 1e-9)

    layer.filter.rate.copy_(rates(layer))
    other.filter.rate.copy_(rates(other))
    check()
    for p in layer.filter.parameters():
        p.data.mul_(1.5)
    check()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    layer.kernel(20).sum().backward()
    optimizer.step()
    check()
    layer.load_state_dict(other.state_dict())
    check()
    assert all(not torch.equal(a, b) for a, b in pairwise(outputs))


def test_prepared_steps_are_those_of_the_layer() -> None:
    layer = HyenaConfig(l_max=6, d_embed=3, d_filter=4).build(2).double()
    x, state, again = torch.randn(2, 9, 2, dtype=torch.float64), layer.init_state(2), layer.init_state(2)
    with torch.no_grad():
        prepared = layer.prepare()
        for t in range(9):
            want, state = layer.step(x[:, t], state)
            got, again = prepared.step(x[:, t], again)
            close(got, want, 1e-14)


@pytest.mark.parametrize("modes", [1, 3])
def test_modes_of_a_finite_system_are_found(modes: int) -> None:
    draw = torch.Generator().manual_seed(0)
    poles = torch.polar(
        0.5 + 0.2 * torch.rand(2, modes, generator=draw, dtype=torch.float64),
        torch.linspace(0, 2, modes, dtype=torch.float64).expand(2, -1),  # a real pole and pairs
    )
    residues = torch.randn(2, modes, generator=draw, dtype=torch.complex128) + 1
    k = 2 * (residues[..., None] * poles[..., None] ** torch.arange(100)).sum(1).real
    found, weights = fit_modes(k, modes)
    close(found.gather(1, found.angle().argsort()), poles, 1e-8)
    close(2 * (weights[..., None] * found[..., None] ** torch.arange(100)).sum(1).real, k, 1e-9)
    more, weights = fit_modes(k, modes + 4)
    assert more.shape == weights.shape == (2, modes + 4) and bool((more.abs() < 1).all())
    close(2 * (weights[..., None] * more[..., None] ** torch.arange(100)).sum(1).real, k, 1e-9)


def test_modes_of_short_filters_and_of_nothing() -> None:
    for taps in (3, 4, 5):
        poles, residues = fit_modes(torch.randn(3, taps), 4)
        assert poles.shape == residues.shape == (3, 4) and bool((poles.abs() < 1).all())
    poles, residues = fit_modes(torch.zeros(2, 9), 2)
    assert bool((poles.abs() < 1).all()) and not bool(residues.any())
    with pytest.raises(ArgumentError, match="0 modes for 9 taps"):
        fit_modes(torch.zeros(2, 9), 0)


@torch.no_grad()
def test_distillation() -> None:
    """More states, less error; the errors are those of the filters, and the outputs follow."""
    torch.manual_seed(0)
    layer = HyenaConfig(order=3, l_max=128, d_embed=5, d_filter=16, frequency=1.0).build(4).double()
    exact, x = layer.kernel(128), torch.randn(1, 128, 4, dtype=torch.float64)
    want, errors = layer(x)[0], []
    for order in (4, 16, 48):
        mixer, error, tail = layer.distill(order)
        assert isinstance(mixer, HyenaModal) and mixer.phase.shape == (2, 4, order // 2)
        assert error.shape == tail.shape == (2, 4) and bool((tail < 0.2).all())
        found = mixer.kernel(128) + (mixer.D - layer.D)[..., None] * torch.eye(1, 128)[0]
        close((found - exact).norm(dim=-1) / exact.norm(dim=-1), error, 1e-6)
        close(found[..., 0], exact[..., 0], 1e-10)
        errors.append(float(error.max()))
        assert float((mixer(x)[0] - want).norm() / want.norm()) < 20 * errors[-1]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-3
    state = layer.distill(16).mixer.init_state(1)
    sizes = [leaf.shape for leaf in state]
    mixer = layer.distill(16).mixer
    assert [leaf.shape for leaf in mixer(torch.randn(1, 500, 4, dtype=torch.float64), state)[1]] == sizes


def test_a_distilled_layer_trains_and_keeps_the_dtype() -> None:
    layer = HyenaConfig(l_max=32, d_embed=5, d_filter=8).build(4)
    mixer = layer.distill(8).mixer
    assert {p.dtype for p in mixer.parameters()} == {torch.float32}
    mixer(torch.randn(1, 10, 4))[0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())
    with pytest.raises(ConfigError, match="d_state is 5"):
        layer.distill(5)


def test_modal_oracle() -> None:
    """Filters of finite state by their definition, as one long convolution."""
    layer = HyenaModalConfig(order=3, d_state=6, d_conv=2).build(3).double()
    x = torch.randn(2, 70, 3, dtype=torch.float64)
    log_a = torch.complex(-layer.log_decay.exp(), layer.phase)
    powers = torch.exp(log_a[..., None] * torch.arange(70))
    k = 2 * (torch.view_as_complex(layer.C)[..., None] * powers).sum(2).real
    close(layer.kernel(70), k, 1e-12)
    p = torch.nn.functional.pad(layer.in_proj(x), (0, 0, 1, 0))
    p = layer.conv_weight[:, 0] * p[:, :-1] + layer.conv_weight[:, 1] * p[:, 1:] + layer.conv_bias
    x0, x1, x2, v = p.split(3, -1)
    for n, gate in enumerate((x2, x1)):
        u = gate * v
        v = torch.stack([(k[n].T[: t + 1].flip(0) * u[:, : t + 1]).sum(1) for t in range(70)], 1) + layer.D[n] * u
    close(layer(x)[0], layer.out_proj(x0 * v), 1e-12)


@pytest.mark.parametrize("config", [HyenaConfig(l_max=40, d_embed=3, d_filter=4), HyenaModalConfig(d_state=4)])
def test_low_precision_is_computed_in_float32(config: Any) -> None:
    torch.manual_seed(0)
    layer, x = config.build(4), torch.randn(1, 80, 4)
    want, want_state = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x)
    close(y, want, 5e-2)
    assert [leaf.dtype for leaf in state] == [leaf.dtype for leaf in want_state]
    y, state = layer.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16 and [leaf.dtype for leaf in state] == [leaf.dtype for leaf in want_state]
    y_t, _ = layer.step(x[:, 0].bfloat16(), layer.init_state(1))
    close(y_t, y[:, 0], 5e-2)


@pytest.mark.parametrize(
    "config, words",
    [
        (HyenaConfig(order=1), "order is 1"),
        (HyenaConfig(l_max=0), "l_max is 0"),
        (HyenaConfig(d_embed=4), "d_embed is 4"),
        (HyenaConfig(d_conv=0), "d_conv is 0"),
        (HyenaConfig(window=(0.3, 1.5, 0.0)), "window is"),
        (HyenaModalConfig(order=0), "order is 0"),
        (HyenaModalConfig(d_state=3), "d_state is 3"),
        (HyenaModalConfig(dt_min=0.0), "dt_min"),
    ],
)
def test_a_config_that_cannot_be_built(config: HyenaConfig | HyenaModalConfig, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config.build(4)


def test_wrong_tensors_are_named() -> None:
    layer = HyenaConfig(l_max=9).build(3)
    with pytest.raises(ArgumentError, match="x has shape"):
        layer(torch.randn(2, 5, 4))
    state = layer.init_state(2)
    with pytest.raises(ArgumentError, match="state has 1 rows, expected 2"):
        layer(torch.randn(2, 5, 3), HyenaState(state.conv, state.past[:1], state.length))
    with pytest.raises(ArgumentError, match="state has 1 rows, expected 2"):
        HyenaModalConfig().build(3)(torch.randn(2, 5, 3), HyenaModalConfig().build(3).init_state(1))
