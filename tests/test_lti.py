"""The family of linear time-invariant layers: prepared steps, linear systems, empty batches, the weights of now."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.packing import from_lengths
from dualform.core.tree import clone, leaves
from dualform.layers.mamba import MambaConfig
from dualform.layers.mixer import Mixer
from dualform.layers.registry import MIXERS
from dualform.layers.s4d import S4DConfig
from dualform.models.config import ModelConfig
from dualform.models.heads import SequenceClassifier
from dualform.models.lm import LanguageModel
from dualform.ops.op import backend
from vectors import close

FAMILY = ("s4", "s4d", "dss", "s5", "lru", "h3", "hyena_modal")
RATED = ("s4", "s4d", "dss", "s5", "lru")


@pytest.fixture(params=FAMILY)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def build(kind: str, **options: object) -> Mixer:
    return MIXERS[kind](**{"d_state": 6, **options}).build(4).double()


def samples(*shape: int) -> Tensor:
    return torch.randn(*shape, 4, dtype=torch.float64)


@torch.no_grad()
def test_prepared_steps_are_the_steps(kind: str) -> None:
    layer, x = build(kind), samples(3, 5)
    prepared, state, other = layer.prepare(), layer.init_state(3), layer.init_state(3)
    for x_t in x.unbind(1):
        want, state = layer.step(x_t, state)
        got, other = prepared.step(x_t, other)
        close(got, want, 1e-12)
    for got, want in zip(leaves(other), leaves(state), strict=True):
        close(got, want, 1e-12)


@torch.no_grad()
@pytest.mark.parametrize("kind", RATED)
def test_prepared_at_another_rate_and_with_intervals(kind: str) -> None:
    layer, x = build(kind), samples(2)
    more = (torch.tensor([0.3, 2.0], dtype=torch.float64),) if layer.continuous else ()
    _, start = layer(samples(2, 3))
    got, want = layer.prepare(rate=2.0).step(x, clone(start), *more), layer.step(x, clone(start), *more, rate=2.0)
    close(got[0], want[0], 1e-12)
    close(got[1], want[1], 1e-12)


@pytest.mark.parametrize("kind", RATED)
def test_a_rate_of_two_is_two_steps_under_a_held_input(kind: str) -> None:
    """For the zero-order hold; the bilinear rule of S4 only approaches it, and DSS has its own normalisation."""
    if kind in ("s4", "dss"):
        return
    layer, x = build(kind), samples(2, 4)
    y, h = layer(x, rate=2.0)
    want, want_h = layer(x.repeat_interleave(2, 1))
    close(y, want[:, 1::2], 1e-12)
    close(h, want_h, 1e-12)


def test_what_was_prepared_is_a_snapshot_and_the_layer_is_not(kind: str) -> None:
    """``p.data`` changes without a trace in the version counter, as in moving averages of weights."""
    layer, x = build(kind), samples(2)
    names = [name for name, _ in layer.named_parameters(recurse=False) if name not in ("D", "conv_weight", "conv_bias")]
    with torch.no_grad():
        _, start = layer(samples(2, 3))
        before, prepared = layer.step(x, clone(start))[0], layer.prepare()
        for name in names:
            getattr(layer, name).data.mul_(1.1)
        close(prepared.step(x, clone(start))[0], before, 1e-12)
        after = layer.step(x, clone(start))[0]
        assert (after - before).abs().max() > 1e-4
        close(layer.prepare().step(x, clone(start))[0], after, 1e-12)
        close(layer(x[:, None], clone(start))[0][:, 0], after, 1e-12)


def test_prepared_steps_are_refused_where_gradients_are_recorded(kind: str) -> None:
    layer, x = build(kind), samples(2)
    with pytest.raises(ArgumentError, match=r"prepare: gradients are being recorded.*\n.*no_grad"):
        layer.prepare()
    with torch.inference_mode():
        prepared, state = layer.prepare(), layer.init_state(2)
    with pytest.raises(ArgumentError, match="gradients are being recorded"):
        prepared.step(x, state)


@torch.no_grad()
def test_a_mixer_with_nothing_to_prepare_steps_with_its_weights() -> None:
    layer, x = MIXERS["lstm"]().build(4).double(), samples(2)
    got, want = layer.prepare().step(x, layer.init_state(2)), layer.step(x, layer.init_state(2))
    close(got[0], want[0], 1e-12)


@torch.no_grad()
def test_models_prepare_their_blocks() -> None:
    """A language model and a classifier, with a block that is used twice."""
    config = ModelConfig(
        vocab_size=7, d_model=4, parts={"S": (S4DConfig(),), "M": (MambaConfig(),)}, pattern="SMS", shared="S"
    )
    models: list[tuple[Any, Tensor]] = [
        (LanguageModel(config), torch.tensor([3, 5])),
        (SequenceClassifier(config, classes=3), torch.tensor([3, 5])),
    ]
    for model, x in models:
        got, want = model.prepare().step(x, model.init_state(2)), model.step(x, model.init_state(2))
        close(got[0], want[0], 1e-6)
        for a, b in zip(leaves(got[1]), leaves(want[1]), strict=True):
            close(a, b, 1e-6)


@pytest.mark.parametrize("kind", ["s4", "s4d", "dss", "s5"])
@torch.no_grad()
def test_a_bidirectional_layer_prepares_nothing(kind: str) -> None:
    with pytest.raises(ArgumentError, match="no state and no step"):
        build(kind, bidirectional=True).prepare()


def test_an_empty_batch_steps(kind: str) -> None:
    layer = build(kind)
    y, state = layer.step(samples(0), layer.init_state(0))
    assert y.shape == (0, 4)
    assert [leaf.shape for leaf in leaves(state)] == [leaf.shape for leaf in leaves(layer.init_state(0))]
    with torch.no_grad():
        assert layer.prepare().step(samples(0), layer.init_state(0))[0].shape == (0, 4)


@pytest.mark.parametrize("kind, expected", [("h3", [(6, 1)] * 4 + [(6, 1)] * 4), ("hyena_modal", [(6, 1)] * 4)])
def test_systems_of_layers_with_several(kind: str, expected: list[tuple[int, int]]) -> None:
    """Those of H3 are the shifts, then the diagonal models; their impulse responses are the layer's kernels."""
    layer = build(kind)
    systems = layer.systems()
    assert [(len(system.A), system.B.shape[1]) for system in systems] == expected
    kernels = torch.stack([system.kernel(9)[:, 0, 0] for system in systems])
    if kind == "h3":
        close(kernels[:4], torch.nn.functional.pad(layer.shift.detach(), (0, 3)), 1e-12)
        close(kernels[4:], layer.kernel(9), 1e-12)
    else:
        close(kernels, layer.kernel(9)[0], 1e-12)


def test_a_state_of_another_layer_is_named(kind: str) -> None:
    layer, x = build(kind), samples(2)
    with pytest.raises(ArgumentError, match="state is"):
        layer.step(x, (torch.zeros(2), torch.zeros(2), torch.zeros(2)))
    with pytest.raises(ArgumentError, match="state has 3 rows, expected 2"):
        layer.step(x, layer.init_state(3))


LENGTHS = (3, 70, 0, 66, 1)


def variants() -> list[Any]:
    """Every layer, its forms and backends."""
    found: list[Any] = []
    for kind in FAMILY:
        found.append(pytest.param(kind, {}, False, id=kind))
        if kind in ("s4", "s4d", "dss", "s5"):
            found.append(pytest.param(kind, {"bidirectional": True}, False, id=f"{kind}-bidirectional"))
        if kind in ("s4d", "dss", "s5", "lru"):
            found.append(pytest.param(kind, {}, True, id=f"{kind}-intervals"))
    found.append(pytest.param("h3", {"d_head": 2, "d_state": 40}, False, id="h3-wide"))
    return found


@pytest.mark.parametrize("kind, options, irregular", variants())
@pytest.mark.parametrize("name", ["", "torch"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_sequence(
    kind: str, options: dict[str, Any], irregular: bool, name: str, value: float
) -> None:
    """Packed, and in the rows of a batch: outputs, final states and gradients of the inputs."""
    layer = build(kind, **options)
    x = samples(1, sum(LENGTHS))
    bad = x.clone()
    bad[0, 3 + 40] = value  # in the middle of the second sequence
    intervals = torch.rand(1, sum(LENGTHS), dtype=torch.float64) + 0.5
    keep = torch.ones(sum(LENGTHS), dtype=torch.bool)
    keep[3:73] = False
    others = [0, 2, 3, 4]

    def run(x: Tensor, **more: Any) -> tuple[Tensor, list[Tensor], Tensor]:
        x = x.clone().requires_grad_()
        y, state = layer(x, **({"intervals": intervals.expand(x.shape[:2])} if irregular else {}), **more)
        (dx,) = torch.autograd.grad(y.nan_to_num().pow(2).sum(), x)
        return y.detach(), leaves(state), dx

    borders = from_lengths(torch.tensor(LENGTHS))
    with backend(name):
        got, want = run(bad, cu_seqlens=borders), run(x, cu_seqlens=borders)
        close(got[0][:, keep], want[0][:, keep], 1e-12)
        close(got[2][:, keep], want[2][:, keep], 1e-12)
        for a, b in zip(got[1], want[1], strict=True):
            close(a[others], b[others], 1e-12)
        got, want = run(torch.cat([x, bad, x])), run(torch.cat([x, x, x]))
        close(got[0][[0, 2]], want[0][[0, 2]], 1e-12)
        close(got[2][[0, 2]], want[2][[0, 2]], 1e-12)
        for a, b in zip(got[1], want[1], strict=True):
            close(a[[0, 2]], b[[0, 2]], 1e-12)
        if layer.causal:
            y, _ = layer.step(torch.cat([x, bad, x])[:, 43], layer.init_state(3))
            assert bool(y[[0, 2]].isfinite().all())


def test_empty_sequences_and_batches(kind: str) -> None:
    layer = build(kind)
    for x in (samples(2, 0), samples(0, 5), samples(0, 0)):
        y, state = layer(x)
        assert y.shape == x.shape
        assert [leaf.shape for leaf in leaves(state)] == [leaf.shape for leaf in leaves(layer.init_state(len(x)))]
