"""Language models that differ in their mixer alone, with as many parameters each."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch

from dualform.core.errors import ConfigError
from dualform.core.options import check_keys, check_types, suggestion
from dualform.layers.mlp import MLPConfig
from dualform.layers.registry import MIXERS
from dualform.models.config import ModelConfig
from dualform.models.lm import LanguageModel

_HEAD = 32  # features of a head, in small models


def equal_models(
    mixers: list[str],
    *,
    vocab_size: int = 256,
    d_model: int = 128,
    layers: int = 4,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, ModelConfig]:
    """A model of each kind of mixer, every block of which is the mixer and a feed-forward.

    The feed-forwards of the mixer that has most parameters are as wide as the model; those of the others are wider, so
    that all models have as many parameters, up to the ``3 d_model layers`` that one more feature costs.

    Args:
        mixers: names as in ``dualform.layers.MIXERS``.
        vocab_size: V.
        d_model: D.
        layers: blocks.
        options: of a mixer's config, by the mixer's name.

    Raises:
        ConfigError: for a name that there is not, a bidirectional mixer, or an option that it does not have.
    """
    given = options or {}
    if unused := [name for name in given if name not in mixers]:
        raise ConfigError(f"compare: options of {unused[0]!r}, which is not among the mixers {', '.join(mixers)}")
    configs = {name: _config(name, d_model, given.get(name, {})) for name in mixers}

    def model(name: str, d_hidden: int) -> ModelConfig:
        return ModelConfig(vocab_size, d_model, {"X": (configs[name], MLPConfig(d_hidden=d_hidden))}, "X" * layers)

    least = {name: _size(model(name, d_model)) for name in mixers}
    most, each = max(least.values()), 3 * d_model * layers
    return {name: model(name, d_model + round((most - least[name]) / each)) for name in mixers}


def _config(name: str, d_model: int, options: Mapping[str, Any]) -> Any:
    if name not in MIXERS:
        raise ConfigError(f"compare: no mixer {name!r}", hint=suggestion(name, list(MIXERS)))
    config = MIXERS[name]
    known = {f.name for f in fields(config)}
    where = f"compare: {name}"
    check_keys(config, {**_small(known, d_model), **options}, where)
    check_types(config, dict(options), where)
    found = config(**{**_small(known, d_model), **options})
    return replace(found, bidirectional=False) if getattr(found, "bidirectional", False) else found


def _small(known: set[str], d_model: int) -> dict[str, Any]:
    """Heads that fit into a small model, for configs that have them."""
    if "d_head" in known:
        return {"d_head": min(_HEAD, d_model)} | ({"heads": max(1, d_model // _HEAD)} if "heads" in known else {})
    return {"heads": max(1, d_model // _HEAD)} if "heads" in known else {}


def _size(config: ModelConfig) -> int:
    with torch.device("meta"):
        return LanguageModel(config).parameter_count()
