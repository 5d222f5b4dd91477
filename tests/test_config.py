"""Configs survive JSON exactly, and what cannot be built is refused by name."""

import copy
import json
import math
from dataclasses import FrozenInstanceError, dataclass, replace

import pytest

from dualform.core.errors import ConfigError
from dualform.core.options import suggestion
from dualform.layers.attention import AttentionConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.layers.mlp import MLPConfig
from dualform.layers.registry import FEEDFORWARDS, MIXERS
from dualform.models.config import ModelConfig

KINDS = {**MIXERS, **FEEDFORWARDS}
HYBRID = ModelConfig(
    vocab_size=17,
    d_model=12,
    parts={
        "M": (Mamba2Config(d_state=8, d_head=4, dt_limit=(0.01, math.inf)),),
        "A": (AttentionConfig(heads=2, kv_heads=None, window=5, rope=None), MLPConfig(d_hidden=20)),
    },
    pattern="MMAMA",
    shared="A",
    tie_embeddings=False,
    norm_eps=1e-6,
)


def through_json(config):
    text = json.dumps(config.to_dict(), allow_nan=False)
    return ModelConfig.from_dict(json.loads(text))


def test_json_round_trip_is_exact():
    again = through_json(HYBRID)
    assert again == HYBRID and hash(again) == hash(HYBRID) and repr(again) == repr(HYBRID)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_survives_json(kind):
    config = ModelConfig(5, 8, {"x": (KINDS[kind](),)}, "xx")
    assert through_json(config) == config
    assert config.to_dict()["parts"]["x"][0]["kind"] == kind


def test_optional_keys_may_be_left_out():
    table = {"vocab_size": 5, "d_model": 8, "pattern": "M", "parts": {"M": [{"kind": "mamba2"}]}}
    assert ModelConfig.from_dict(table) == ModelConfig(5, 8, {"M": (Mamba2Config(),)}, "M")


def test_infinity_in_a_toml_table_is_infinity():
    part = {"kind": "mamba2", "dt_limit": [0.0, math.inf]}
    table = {"vocab_size": 5, "d_model": 8, "pattern": "M", "parts": {"M": [part]}}
    assert ModelConfig.from_dict(table).parts["M"] == (Mamba2Config(),)


def test_it_is_a_value():
    parts = {"M": [Mamba2Config()]}
    config = ModelConfig(5, 64, parts, "M")
    parts["M"].append(MLPConfig())
    assert config.parts == {"M": (Mamba2Config(),)}
    assert copy.deepcopy(config) == config and {config: 1}[replace(config)] == 1
    assert replace(config, d_model=32) != config
    with pytest.raises(FrozenInstanceError):
        config.d_model = 3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"pattern": ""}, "pattern is empty"),
        ({"pattern": "MXAZ"}, "uses X, Z\n.*parts defines M, A"),
        ({"shared": "Q"}, "shared names Q"),
        ({"pattern": "MM"}, "shared names A"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"d_model": -1}, "d_model is -1"),
        ({"d_model": 12.0}, "d_model is 12.0, expected a whole number"),
        ({"d_model": True}, "d_model is True, expected a whole number"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"tie_embeddings": "yes"}, "tie_embeddings is 'yes', expected true or false"),
        ({"parts": {"MA": (Mamba2Config(),)}}, "key 'MA', expected one letter"),
        ({"parts": {"M": ()}, "pattern": "M", "shared": ""}, r"parts\['M'\] is \(\)"),
        ({"parts": {"M": Mamba2Config()}, "pattern": "M", "shared": ""}, r"written \(config,\)"),
        ({"parts": {"M": (Mamba2Config,)}, "pattern": "M", "shared": ""}, "expected a config"),
        ({"parts": {"M": ("mamba2",)}, "pattern": "M", "shared": ""}, "has 'mamba2', expected a config"),
    ],
)
def test_what_cannot_be_built(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(HYBRID, **change)


def table(**change):
    base = {"vocab_size": 5, "d_model": 8, "pattern": "M", "parts": {"M": [{"kind": "mamba2"}]}}
    return {k: v for k, v in {**base, **change}.items() if v is not None}


def part(**options):
    return table(parts={"M": [options]})


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "expected a table"),
        (table(d_modle=8), "unknown key 'd_modle'\n.*did you mean 'd_model'"),
        (table(d_model=None), "missing key d_model"),
        (table(pattern=None, vocab_size=None), "missing key vocab_size, pattern"),
        (table(parts=[]), "parts is list"),
        (table(parts={"M": {"kind": "mamba2"}}), "parts.M is dict, expected a list"),
        (part(), "has no kind"),
        (table(parts={"M": ["mamba2"]}), "has no kind"),
        (part(kind="mamba22"), "unknown kind 'mamba22'\n.*did you mean 'mamba2'"),
        (part(kind="nothing"), f"known: {', '.join(KINDS)}"),
        (part(kind=["mamba2"]), "unknown kind"),
        (part(kind="mamba2", d_stat=3), r"parts.M\[0\] \(mamba2\): unknown key 'd_stat'\n.*'d_state'"),
        (part(kind="mamba2", d_state="big"), "d_state is 'big', expected a whole number"),
        (part(kind="mamba2", d_state=1.5), "d_state is 1.5"),
        (part(kind="mamba2", dt_limit=[0.0]), "dt_limit"),
        (part(kind="mamba2", dt_limit=0.5), "dt_limit"),
        (part(kind="mamba2", bias=1), "bias is 1, expected true or false"),
        (part(kind="attention", window="wide"), r"window is 'wide', expected a whole number, or none"),
    ],
)
def test_from_dict_names_the_trouble(options, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict(options)


@dataclass(frozen=True)
class MineConfig:
    width: int

    def build(self, d_model):
        raise NotImplementedError


def test_a_layer_of_ones_own(monkeypatch):
    config = ModelConfig(5, 8, {"x": (MineConfig(3),)}, "x")
    with pytest.raises(ConfigError, match="MineConfig has no kind"):
        config.to_dict()
    monkeypatch.setitem(MIXERS, "mine", MineConfig)
    assert through_json(config) == config
    with pytest.raises(ConfigError, match="missing key width"):
        ModelConfig.from_dict({**config.to_dict(), "parts": {"x": [{"kind": "mine"}]}})


def test_suggestion():
    assert suggestion("mamba", ["mamba2", "lstm"]) == "did you mean 'mamba2'? known: mamba2, lstm"
    assert suggestion("zzz", []) == "known: none"
