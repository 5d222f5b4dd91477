"""Calls that do not fit: what came, what was expected and the remedy, in the words of the function that was called."""

import inspect

import pytest
import torch

import dualform as df
import dualform.check
import dualform.inspect
import dualform.train
from dualform.check.cases import CASES
from dualform.core.calls import explained
from dualform.core.errors import ArgumentError, ConfigError
from dualform.core.tree import tree_map
from dualform.layers import LSTM, S4D, Mamba2, Mamba2Config
from dualform.layers.registry import MIXERS
from dualform.train import Data, Optim, Recipe, train

MIXERS_OF_17 = {c.kind: c for c in CASES.values() if c.kind in MIXERS and c.name.endswith("d=17")}
each_mixer = pytest.mark.parametrize("case", MIXERS_OF_17.values(), ids=list(MIXERS_OF_17))
CONFIG = df.ModelConfig(256, 8, {"M": (Mamba2Config(d_state=4, d_head=4),)}, "M")
TOKENS = torch.zeros(2, 3, dtype=torch.int64)


@pytest.fixture(scope="module")
def model():
    return df.LanguageModel(CONFIG)


@pytest.fixture(scope="module")
def kalman():
    return df.KalmanFilter(df.LinearGaussian([[1.0]], [[1.0]], [[1.0]], [[1.0]], [0.0], [[1.0]]))


X = torch.zeros(2, 3, 8)
LAYERS = {
    "another's keyword": (lambda: Mamba2(8, d_head=4)(X, attention_mask=X), "'attention_mask'\n.*LanguageModel"),
    "no continuous time": (lambda: LSTM(8)(X, intervals=X), "LSTM: unknown keyword 'intervals'\n.*such as S4D"),
    "a step's keyword": (lambda: S4D(8).step(X[:, 0], None, intervals=X), r"S4D\.step: .*\n.*'interval'\?"),
    "a step without one": (lambda: LSTM(8).step(X[:, 0], None, rate=2.0), r"LSTM\.step: unknown keyword 'rate'\n.*S4"),
    "one too many": (lambda: LSTM(8)(X, None, None), "3 values, expected at most 2: x, state\n.*: cu_seqlens"),
    "twice": (lambda: LSTM(8)(X, x=X), "LSTM: x is given twice"),
    "nothing": (lambda: LSTM(8)(), "LSTM: missing keyword x"),
}  # fmt: skip


@pytest.mark.parametrize("call, said", LAYERS.values(), ids=LAYERS)
def test_a_layer_explains_a_call(call, said):
    with pytest.raises(ArgumentError, match=said):
        call()


MODELS = {
    "near": (lambda m, k: m(TOKENS, attention_msk=1), "LanguageModel: unknown keyword.*\n.*'attention_mask'"),
    "labels": (lambda m, k: m(TOKENS, labels=TOKENS), r"unknown keyword 'labels'\n.*model\.loss"),
    "loss": (lambda m, k: m.loss(TOKENS, mask=1), "loss_and_state: unknown keyword 'mask'"),
    "constructor": (lambda m, k: df.SequenceClassifier(CONFIG, 2, pool="max"), "SequenceClassifier: .*\n.*'pooling'"),
    "generate": (lambda m, k: df.generate(m, [1], 3, temperature=2), r"'temperature'\n.*Sampling\(temperature="),
    "sampling": (lambda m, k: df.generate(m, [1], 3, sampling={"top_k": 2}), "sampling is .*, expected a Sampling"),
    "tokens": (lambda m, k: df.generate(m, [1], 3.5), "max_new_tokens is 3.5, expected a whole number"),
    "seed": (lambda m, k: df.generate(m, [1], 3, seed="a"), "seed is 'a', expected a whole number"),
    "layer": (lambda m, k: df.generate(LSTM(8), [1], 3), "model is LSTM, expected a LanguageModel"),
    "load": (lambda m, k: df.load("model", devise="cpu"), "load: unknown keyword 'devise'\n.*'device'"),
    "save": (lambda m, k: df.save(m), "save: missing keyword folder"),
    "session": (lambda m, k: df.Session.load("a"), r"Session\.load: missing keyword model"),
    "preset": (lambda m, k: df.preset("byte-lstm", d_model=8), "preset: unknown keyword 'd_model'"),
    "filter": (lambda m, k: k.filter([1.0], stat=1), r"KalmanFilter\.filter: unknown keyword 'stat'\n.*'state'"),
    "kalman": (lambda m, k: df.KalmanFilter(k.model, paralel=True), "KalmanFilter: unknown keyword.*\n.*'parallel'"),
    "gaussian": (lambda m, k: df.LinearGaussian([[1.0]]), "LinearGaussian: missing keyword C, Q, R\n"),
    "system": (lambda m, k: df.StateSpace([[1.0]], [[1.0]], E=1), "StateSpace: unknown keyword 'E'"),
    "identify": (lambda m, k: df.identify([1.0], [1.0], 1, step=1), "identify: unknown keyword 'step'"),
    "train": (lambda m, k: train("my.toml"), r"train: recipe is 'my.toml', expected a Recipe\n.*Recipe\.load"),
    "package": (lambda m, k: dualform.train("my.toml"), "dualform.train is a package.*\n.*import Recipe, train"),
    "checks": (lambda m, k: dualform.check("mamba2"), "dualform.check is a package.*\n.*run_checks"),
    "pictures": (lambda m, k: dualform.inspect(m), "dualform.inspect is a package.*\n.*draw_poles"),
}  # fmt: skip


@pytest.mark.parametrize("call, said", MODELS.values(), ids=MODELS)
def test_functions_and_models_explain_a_call(model, kalman, call, said):
    with pytest.raises(ArgumentError, match=said):
        call(model, kalman)


@pytest.mark.parametrize(
    "build, said",
    [
        (lambda: Recipe(step=3), "Recipe: unknown keyword 'step'\n.*did you mean 'steps'"),
        (lambda: Data(pth="a"), "Data: unknown keyword 'pth'\n.*did you mean 'path'"),
        (lambda: Optim(learning_rate=1e-3), "Optim: unknown keyword 'learning_rate'\n.*known: lr"),
        (lambda: df.LanguageModel(CONFIG.to_dict()), r"config is \{.*expected a ModelConfig\n.*from_dict"),
    ],
)  # fmt: skip
def test_configs_explain_a_call(build, said):
    with pytest.raises(ConfigError, match=said):
        build()


def test_an_error_inside_of_a_function_is_its_own():
    @explained
    def fails(x: int) -> None:
        raise TypeError("inside")

    with pytest.raises(TypeError, match="inside"):
        fails(1)
    with pytest.raises(ArgumentError, match="fails: unknown keyword 'y'"):
        fails(1, y=2)


def test_signatures_are_those_of_the_functions(model):
    assert list(inspect.signature(df.generate).parameters)[:3] == ["model", "prompt_tokens", "max_new_tokens"]
    assert list(inspect.signature(model.forward).parameters)[:2] == ["tokens", "state"]
    assert list(inspect.signature(df.SequenceClassifier).parameters)[:4] == ["config", "classes", "inputs", "pooling"]
    assert list(inspect.signature(Recipe).parameters)[:2] == ["model", "out"]
    assert inspect.signature(LSTM(8).step).parameters.keys() == {"x", "state"}


@each_mixer
def test_a_state_with_other_rows_is_told_by_the_layer(case):
    layer, x = case.trial(3).f, case.sample(2, 3, torch.Generator())
    name, said = type(layer).__name__, "state has 3 rows, expected {}: one for each row of the input, or"
    for expected, call in {
        2: lambda: layer(x, layer.init_state(3)),
        1: lambda: layer(x[:1], layer.init_state(3), cu_seqlens=torch.tensor([0, 3])),
    }.items():
        with pytest.raises(ArgumentError, match=f"^{name}: {said.format(expected)}"):
            call()
    with pytest.raises(ArgumentError, match=f"^{name}: {said.format(2)}"):
        layer.step(x[:, 0], layer.init_state(3))


@each_mixer
def test_an_input_or_a_state_on_another_device_is_told_by_the_layer(case):
    layer, x = case.trial(3).f, case.sample(2, 3, torch.Generator())
    name, away = type(layer).__name__, tree_map(lambda leaf: leaf.to("meta"), layer.init_state(2))
    with pytest.raises(ArgumentError, match=f"^{name}: state is on meta, but the layer is on cpu"):
        layer(x, away)
    with pytest.raises(ArgumentError, match=f"^{name}: state is on meta, but the layer is on cpu"):
        layer.step(x[:, 0], away)
    if case.kind != "attention":  # its maps and products take tensors on meta beside others, as PyTorch's do
        with pytest.raises(ArgumentError, match=f"^{name}: x is on meta, but the layer is on cpu"):
            layer(x.to("meta"))


def test_a_model_names_itself_and_its_rows(model):
    with pytest.raises(ArgumentError, match="LanguageModel: tokens is on meta, but the model is on cpu"):
        model(TOKENS.to("meta"))
    classifier = df.SequenceClassifier(CONFIG, 2)
    for of in (model, classifier):
        for call in (lambda of=of: of(TOKENS, of.init_state(3)), lambda of=of: of.step(TOKENS[:, 0], of.init_state(3))):
            with pytest.raises(ArgumentError, match=f"^{type(of).__name__}: state has 3 rows, expected 2"):
                call()


def test_a_bidirectional_layer_says_that_it_has_no_state():
    layer = S4D(8, bidirectional=True)
    with pytest.raises(ArgumentError, match="bidirectional"):
        layer(X, torch.zeros(3, 8, 32))
