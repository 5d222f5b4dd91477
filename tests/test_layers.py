"""What all layers have in common: how they are imported, written, explained and initialised."""

import copy
import io
import re
import subprocess
import sys

import pytest
import torch

import dualform
from dualform.check.cases import CASES
from dualform.core.errors import ConfigError
from dualform.core.tree import leaves
from dualform.layers.block import Block
from dualform.layers.lstm import LSTMConfig
from dualform.layers.registry import FEEDFORWARDS, MIXERS

KINDS = {**MIXERS, **FEEDFORWARDS}
every_kind = pytest.mark.parametrize("kind", KINDS)


def test_layers_are_imported_without_torch():
    code = "import sys, dualform.layers; assert 'torch' not in sys.modules; from dualform.layers import Mamba2"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_layer_and_config_is_a_name_of_the_package():
    names = {*dualform.layers.__all__}
    for config in KINDS.values():
        layer = config.__name__.removesuffix("Config")
        assert {layer, config.__name__} <= names
        assert getattr(dualform.layers, config.__name__) is config
    assert all(hasattr(dualform.layers, name) and name in dir(dualform.layers) for name in names)
    with pytest.raises(AttributeError, match=r"'dualform\.layers' has no attribute 'Mamba7'"):
        _ = dualform.layers.Mamba7


@every_kind
def test_a_layer_is_written_without_its_config(kind):
    config = KINDS[kind]
    layer = getattr(dualform.layers, config.__name__.removesuffix("Config"))
    torch.manual_seed(1)
    want = config().build(64).state_dict()
    for args, keywords in (((64,), {}), ((), {"d_model": 64}), ((config(), 64), {}), ((config(),), {"d_model": 64})):
        torch.manual_seed(1)
        made = layer(*args, **keywords)
        assert type(made) is layer
        assert all(torch.equal(a, b) for a, b in zip(made.state_dict().values(), want.values(), strict=True))


def test_options_of_a_layer_are_those_of_its_config():
    layer = dualform.layers.Mamba2(64, d_state=16, d_head=32)
    assert layer.config == dualform.layers.Mamba2Config(d_state=16, d_head=32)
    assert type(copy.deepcopy(layer)) is type(layer)


@pytest.mark.parametrize(
    "build, said",
    [
        (lambda: dualform.layers.Mamba2Config(headdim=8), "Mamba2Config: unknown keyword 'headdim'"),
        (lambda: dualform.layers.Mamba2(64, headdim=8), "unknown keyword 'headdim'\n.*did you mean 'd_head'"),
        (lambda: dualform.layers.Mamba2Config(d_state="16"), "Mamba2Config: d_state is '16', expected a whole number"),
        (lambda: dualform.layers.Mamba2Config(16, d_state=16), "d_state is given twice"),
        (lambda: dualform.layers.MLPConfig(1, True, "relu", True, 1, 3), "MLPConfig: 6 values, expected at most 5: "),
        (lambda: dualform.layers.Mamba2(), r"Mamba2: d_model is nothing, expected one whole number\n.*Mamba2\(64\)"),
        (lambda: dualform.layers.Mamba2(64, 16), "d_model is 64, 16, expected one whole number\n.*d_state"),
        (lambda: dualform.layers.Mamba2(64.0), "d_model is 64.0"),
        (lambda: dualform.layers.Mamba2(d_state=16), "d_model is nothing"),
        (lambda: dualform.ModelConfig(256, 64, {}, patern="M"), "unknown keyword 'patern'\n.*did you mean 'pattern'"),
        (lambda: dualform.ModelConfig(256), "ModelConfig: missing keyword d_model, parts, pattern"),
        (lambda: dualform.Sampling(temp=1.0), "Sampling: unknown keyword 'temp'\n.*did you mean 'temperature'"),
        (lambda: dualform.preset("mamba2-130"), "unknown preset 'mamba2-130'\n.*did you mean 'mamba2-130m'"),
    ],
)  # fmt: skip
def test_what_a_user_types_first_is_explained(build, said):
    with pytest.raises((ConfigError, dualform.DualformError), match=said):
        build()


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64], ids=str)
def test_an_input_of_another_dtype_is_explained(kind, dtype):
    """Or computed, where a layer casts it; never an error of a matrix product somewhere inside."""
    layer = KINDS[kind]().build(64)
    x = torch.ones(2, 3, 64, dtype=dtype)
    calls = [lambda: layer(x)]
    if kind in MIXERS:
        calls.append(lambda: layer.step(x[:, 0], layer.init_state(2)))
    for call in calls:
        try:
            call()
        except dualform.DualformError as error:
            assert re.search(r"(x|u|inputs?) is torch\.(float64|int64)", str(error)), error


def test_float64_into_a_float32_layer():
    layer, said = (
        dualform.layers.Mamba2(64, d_state=8),
        r"Mamba2: x is torch.float64, but the weights are torch.float32",
    )
    x = torch.ones(2, 3, 64, dtype=torch.float64)
    for call in (lambda: layer(x), lambda: layer.step(x[:, 0], layer.init_state(2))):
        with pytest.raises(dualform.core.errors.ArgumentError, match=said + r"\n.*x.to\(torch.float32\)"):
            call()


@every_kind
def test_the_initialisation_scales_what_a_part_adds_to_the_stream(kind):
    """By the root of the number of parts, or, behind a gate or a GELU, not far from it."""
    config = LSTMConfig(hidden=40) if kind == "lstm" else KINDS[kind]()  # as wide as the stream it has no last map
    block, x = Block((config,), 64), torch.randn(4, 20, 64)
    part = block.parts[0]
    scaled = [name for name, _ in part.named_parameters() if name in part.residual]
    assert scaled, "a part names the parameters of its last linear map"
    block.initialise(1)
    before = {name: p.detach().clone() for name, p in part.named_parameters()}
    with torch.no_grad():
        added = block(x)[0] - x
        block.initialise(16)
        less = block(x)[0] - x
    for name, p in part.named_parameters():
        torch.testing.assert_close(p, before[name] / (4 if name in part.residual else 1))
    assert 1 / 8 < less.std() / added.std() < 1 / 2.5


@pytest.mark.parametrize("case", {case.kind: case for case in CASES.values()}.values(), ids=lambda case: case.kind)
def test_a_state_is_saved_and_loaded_without_running_code(case):
    trial = case.trial(3)
    _, state = trial.f.forward(trial.inputs, trial.state)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    again = torch.load(file, weights_only=True)
    assert type(again) is type(state)
    assert all(torch.equal(a, b) for a, b in zip(leaves(again), leaves(state), strict=True))
    flat, spec = torch.utils._pytree.tree_flatten(state)
    spec = torch.utils._pytree.treespec_loads(torch.utils._pytree.treespec_dumps(spec))
    assert type(torch.utils._pytree.tree_unflatten(flat, spec)) is type(state)


def test_an_exported_layer_is_written_and_read_with_its_state():
    layer = dualform.layers.Mamba2(8, d_state=4, d_head=4).eval()
    x, state = torch.randn(2, 5, 8), layer.init_state(2)
    program, file = torch.export.export(layer, (x, state)), io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    y, after = torch.export.load(file).module()(x, state)
    want, last = layer(x, state)
    torch.testing.assert_close((y, *after), (want, *last))
    assert type(after) is type(last)
