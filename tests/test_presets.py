"""Presets have the sizes of the published checkpoints."""

import math

import pytest
import torch

from dualform.core.errors import ConfigError
from dualform.models.config import ModelConfig
from dualform.models.lm import LanguageModel
from dualform.models.presets import PRESETS, preset


def count(name):
    with torch.device("meta"):
        return LanguageModel(preset(name)).parameter_count()


def mamba(layers, d_model, vocab=50280, n=16, w=4):
    inner, rank = 2 * d_model, math.ceil(d_model / 16)
    step = rank * inner + inner
    mixer = (
        d_model * 2 * inner + inner * w + inner + inner * (rank + 2 * n) + step + inner * n + inner + inner * d_model
    )
    return layers * (mixer + d_model) + vocab * d_model + d_model


def mamba2(layers, d_model, vocab=50288, n=128, p=64, w=4):
    inner = 2 * d_model
    heads, conv = inner // p, inner + 2 * n
    mixer = d_model * (inner + conv + heads) + conv * w + conv + 3 * heads + inner + inner * d_model
    return layers * (mixer + d_model) + vocab * d_model + d_model


MAMBA = {  # layers, d_model, parameters of the published checkpoint
    "mamba-130m": (24, 768, 129_135_360),
    "mamba-370m": (48, 1024, 371_516_416),
    "mamba-790m": (48, 1536, 793_204_224),
    "mamba-1.4b": (48, 2048, 1_372_178_432),
    "mamba-2.8b": (64, 2560, 2_768_345_600),
}
MAMBA2 = {  # layers, d_model, millions in the name of the published checkpoint
    "mamba2-130m": (24, 768, 130),
    "mamba2-370m": (48, 1024, 370),
    "mamba2-780m": (48, 1536, 780),
    "mamba2-1.3b": (48, 2048, 1300),
    "mamba2-2.7b": (64, 2560, 2700),
}


@pytest.mark.parametrize("name", MAMBA)
def test_mamba_sizes(name):
    layers, d_model, published = MAMBA[name]
    assert count(name) == mamba(layers, d_model) == published


@pytest.mark.parametrize("name", MAMBA2)
def test_mamba2_sizes(name):
    layers, d_model, millions = MAMBA2[name]
    assert count(name) == mamba2(layers, d_model)
    assert count(name) == pytest.approx(millions * 1e6, rel=0.04)


def test_every_preset_of_a_paper_is_tested():
    assert {name for name in PRESETS if not name.startswith("byte-")} == MAMBA.keys() | MAMBA2.keys()


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("byte-")])
def test_byte_presets_are_small_and_alike(name):
    torch.manual_seed(0)
    model = LanguageModel(preset(name))
    assert 450_000 <= model.active_parameter_count() <= 600_000
    x = torch.randint(256, (2, 40))
    model.loss(x).backward()
    with torch.no_grad():
        y, state = model(x)
        step, _ = model.step(x[:, 0], state)
    assert y.shape == (2, 40, 256) and step.isfinite().all()
    assert model.loss(x).item() == pytest.approx(math.log(256), rel=0.05)  # no opinion before training


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_a_round_trip(name):
    assert ModelConfig.from_dict(preset(name).to_dict()) == preset(name)


def test_the_byte_hybrid_keeps_a_state_of_constant_size():
    model = LanguageModel(preset("byte-hybrid"))
    assert [leaf.shape for leaf in model.init_state(1)[2][0]] == [
        leaf.shape for leaf in model.init_state(1, max_len=9999)[2][0]
    ]


def test_an_unknown_preset_suggests_the_nearest():
    with pytest.raises(
        ConfigError, match=r"unknown preset 'mamba-130'\n.*did you mean 'mamba-130m'\? known: .*byte-hybrid"
    ):
        preset("mamba-130")
