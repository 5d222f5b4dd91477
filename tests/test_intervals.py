"""Irregular sampling: the law of intervals for every layer that takes them; the contract has cases of its own."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dualform.check.cases import CASES, Irregular
from dualform.core.discretize import EXPONENTS, RULES, hold
from dualform.core.errors import ArgumentError
from dualform.core.laws import LAWS
from dualform.core.tree import leaves
from dualform.layers.dss import DSSConfig
from dualform.layers.lru import LRUConfig
from dualform.layers.mamba import MambaConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.layers.registry import MIXERS
from dualform.layers.s4d import S4DConfig
from dualform.layers.s5 import S5, S5Config
from dualform.ops import spans
from vectors import close

# The convolutions of Mamba count samples, not time: the law is that of the recurrence, seen with a width of 1.
LAYERS: dict[str, Any] = {
    "s4d zoh": S4DConfig(d_state=6, dt_max=0.5),
    "s4d bilinear": S4DConfig(d_state=6, rule="bilinear", dt_max=3.0),
    "s4d bidirectional": S4DConfig(d_state=6, bidirectional=True, dt_max=0.5),
    "s4d real bilinear": S4DConfig(d_state=6, init="real", rule="bilinear", dt_max=3.0),
    "dss softmax": DSSConfig(d_state=6, length=9),
    "dss exp": DSSConfig(d_state=6, kernel="exp", dt_max=0.5),
    "s5 zoh": S5Config(d_state=6, dt_max=0.5),
    "s5 bilinear": S5Config(d_state=6, rule="bilinear", dt_max=3.0),
    "s5 bidirectional": S5Config(d_state=6, bidirectional=True),
    "lru": LRUConfig(d_state=5),
    "mamba": MambaConfig(d_state=3, d_conv=1, dt_max=0.5),
    "mamba2": Mamba2Config(d_state=3, d_head=2, groups=2, d_conv=1, dt_max=0.5, dt_limit=(0.01, 0.3)),
}
CONTINUOUS = {"dss", "s4d", "s5", "lru", "mamba", "mamba2"}


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> Any:
    return LAYERS[request.param].build(4).double()


def samples(*shape: int) -> Tensor:
    return torch.randn(*shape, 4, dtype=torch.float64)


def states(state: Any) -> list[Tensor]:
    """The leaves; a convolution of width 1 has an empty one."""
    return [leaf for leaf in leaves(state) if leaf.numel()]


def test_an_interval_of_two_is_two_steps_under_a_held_input(layer: Any) -> None:
    """And 3 of 3; intervals need not be whole, since 0.3 and 0.7 make 1: everywhere and in one call."""
    x, counts = samples(2, 4), torch.tensor([2, 1, 3, 1])
    held_input, ends = x.repeat_interleave(counts, 1), counts.cumsum(0) - 1
    want, want_state = layer(held_input)
    parts = torch.tensor([0.3, 0.7, 1, 1, 2.5, 0.5, 1]).expand(2, 7)
    forms = [
        (layer(x, intervals=counts.expand(2, 4)), slice(None)),
        (layer(x.repeat_interleave(torch.tensor([3, 1, 2, 1]), 1), intervals=parts), [2, 3, 5, 6]),
    ]
    if isinstance(layer, S5) and not layer.causal:  # its second recurrence reads the beginning of an interval
        system = layer._systems(1.0)[0]
        h = torch.zeros(2, len(system.a), dtype=system.a.dtype)
        want, want_state = system.run(held_input, h, None)
        forms = [(system.run(x, h, None, counts.expand(2, 4).double()), slice(None))]
    for (y, state), at in forms:
        close(y[:, at], want[:, ends], 1e-10)
        for got, expected in zip(states(state), states(want_state), strict=True):
            close(got, expected, 1e-10)


def test_a_step_of_interval_two_is_two_steps(layer: Any) -> None:
    if not layer.causal:
        return
    x, two = samples(2), torch.full((2,), 2.0, dtype=torch.float64)
    _, start = layer(samples(2, 3))
    y, state = layer.step(x, start, two)
    _, between = layer.step(x, start)
    want, want_state = layer.step(x, between)
    close(y, want, 1e-10)
    for got, expected in zip(states(state), states(want_state), strict=True):
        close(got, expected, 1e-10)


def test_intervals_of_one_change_nothing(layer: Any) -> None:
    x = samples(2, 9).requires_grad_()
    results = []
    for intervals in (None, torch.ones(2, 9), torch.ones(2, 9, dtype=torch.int32)):
        y, state = layer(x, intervals=intervals)
        results.append((y, *states(state), *torch.autograd.grad(y.pow(2).sum(), [x, *layer.parameters()])))
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            close(got, want, 1e-10)


def test_long_sequences_run_in_spans(layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed or not, the same outputs, states and gradients, those by the intervals among them."""
    x, intervals = samples(1, 25), (torch.rand(1, 25, dtype=torch.float64) * 3 + 0.1).requires_grad_()

    def results(cu_seqlens: Tensor | None) -> list[Tensor]:
        y, state = layer(x, cu_seqlens=cu_seqlens, intervals=intervals)
        loss = y.pow(2).sum() + sum((leaf * leaf.conj()).real.sum() for leaf in states(state))
        return [y, *states(state), *torch.autograd.grad(loss, [intervals, *layer.parameters()], allow_unused=True)]

    for cu_seqlens in (None, torch.tensor([0, 0, 3, 4, 4, 19, 25, 25])):
        with monkeypatch.context() as patch:
            want = results(cu_seqlens)
            patch.setattr(spans, "_CPU_ELEMENTS", 100)  # 1 to 8 steps of these layers
            for got, expected in zip(results(cu_seqlens), want, strict=True):
                close(got, expected, 1e-10)


def test_spans_bound_the_memory_of_a_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between forward and backward, states of a few spans are kept, not the states of every step."""
    layer, x = S5Config(d_state=64).build(2), torch.randn(1, 4096, 2)
    monkeypatch.setattr(spans, "_CPU_ELEMENTS", 512 * 32)

    def kept(intervals: Tensor | None) -> int:
        found: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer(x, intervals=intervals)
        return sum(found.values())

    every_step = 4096 * 32 * 8
    assert kept(None) < every_step / 2
    assert kept(torch.rand(1, 4096) + 0.5) < every_step / 2


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.kind == "intervals"])
def test_the_contract_in_spans(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = CASES[name].trial(33)
    monkeypatch.setattr(spans, "_CPU_ELEMENTS", 200)
    for law in ("split", "step", "packed", "gradient"):
        found = LAWS[law](trial)
        assert found is not None and found.error <= 1e-9, (law, found)


def test_which_layers_take_intervals() -> None:
    heads = {key: {"d_head": 4} for key in ("mamba2", "rwkv6", "rwkv7")}
    options: dict[str, dict[str, Any]] = {**heads, "attention": {"heads": 2}}
    for kind, config in MIXERS.items():
        mixer = config(**options.get(kind, {})).build(8)
        assert mixer.continuous == ("intervals" in inspect.signature(mixer.forward).parameters), kind
        assert mixer.continuous == ("interval" in inspect.signature(mixer.step).parameters), kind
        assert mixer.continuous or kind not in CONTINUOUS, kind
        if not mixer.continuous:
            with pytest.raises(ArgumentError, match=r"unknown keyword 'intervals'\n.*continuous time"):
                mixer(torch.randn(2, 3, 8), intervals=torch.ones(2, 3))
    covered = {type(case.trial(1).f.mixer) for case in CASES.values() if case.kind == "intervals"}
    every = {type(config(**options.get(kind, {})).build(8)) for kind, config in MIXERS.items()}
    assert covered == {mixer for mixer in every if mixer.continuous}
    assert Irregular in {type(case.trial(1).f) for case in CASES.values()}


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s.index_fill(1, torch.tensor([1]), 0), "value 0, expected positive"),
        (lambda s: -s, "value -1, expected positive"),
        (lambda s: s / 0, "value inf, expected positive and finite"),
        (lambda s: s * torch.nan, "value nan"),
        (lambda s: s[:, :2], r"intervals has shape \(2, 2\)"),
        (lambda s: s[0], r"intervals has shape \(3,\), expected 2 axes"),
        (lambda s: s[..., None], r"intervals has shape \(2, 3, 1\)"),
        (lambda s: s > 0, "intervals is torch.bool"),
        (lambda s: 1.0, "intervals is float, expected a tensor"),
    ],
)
@pytest.mark.parametrize("name", ["s4d zoh", "s5 zoh", "lru", "mamba", "mamba2"])
def test_bad_intervals_are_named(name: str, change: Callable[[Tensor], Any], words: str) -> None:
    layer, x = LAYERS[name].build(4), torch.randn(2, 3, 4)
    with pytest.raises(ArgumentError, match=words):
        layer(x, intervals=change(torch.ones(2, 3)))


@pytest.mark.parametrize("name", ["s4d zoh", "s5 zoh", "lru", "mamba", "mamba2"])
def test_a_bad_interval_of_a_step_is_named(name: str) -> None:
    layer, x = LAYERS[name].build(4), torch.randn(2, 4)
    for interval, words in ((torch.zeros(2), "interval has the value 0"), (torch.ones(2, 1), "interval has shape")):
        with pytest.raises(ArgumentError, match=words):
            layer.step(x, layer.init_state(2), interval)


@pytest.mark.parametrize("rule", EXPONENTS)
def test_exponents_are_logarithms_of_the_rules(rule: str) -> None:
    A = torch.complex(-torch.rand(50, dtype=torch.float64) * 5 - 1e-9, torch.randn(50, dtype=torch.float64) * 5)
    for dt in (1e-6, 0.1, 1.0):
        step = torch.tensor(dt, dtype=torch.float64)
        close(EXPONENTS[rule](A, step).exp(), RULES[rule](A, step)[0], 1e-12)
    A, step = A[:1].to(torch.complex64), torch.tensor(1e-6)
    close(EXPONENTS[rule](A, step), A * step, 1e-6, "no cancellation where steps are tiny")


def test_hold_is_a_geometric_series() -> None:
    log_a = torch.complex(-torch.rand(20, dtype=torch.float64), torch.randn(20, dtype=torch.float64))
    a, weight = hold(log_a, torch.tensor(5.0))
    close(a, log_a.exp() ** 5, 1e-12)
    close(weight, sum(log_a.exp() ** k for k in range(5)), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hold_near_a_decay_of_one(dtype: torch.dtype) -> None:
    """No cancellation where steps are tiny, and a limit, with its gradient by s, where a is 1."""
    log_a = -torch.tensor([0.0, 1e-300, 1e-30, 1e-12, 1e-7, 1e-4], dtype=torch.float64).to(dtype)
    log_a, s = log_a.requires_grad_(), torch.full((6,), 2.5, dtype=dtype, requires_grad=True)
    a, weight = hold(log_a, s)
    close(weight, s + log_a * s * (s - 1) / 2, 1e-6)
    by_log_a, by_s = torch.autograd.grad((a + weight).sum(), [log_a, s])
    assert bool(by_log_a.isfinite().all())
    close(by_s, torch.ones_like(s), 1e-3)
