"""RWKV-4 as transformers has it: time mixing and channel mixing, layer norms, and one behind the embedding.

To stay within float16 it halves the stream after every few blocks, and what later blocks add as often: the same model,
but for the epsilon of its norms.
"""

from string import ascii_letters
from typing import Any, NamedTuple

from dualform.core.errors import ConfigError
from dualform.layers.block import SublayerConfig, standing
from dualform.layers.rwkv4 import RWKV4Config, RWKVChannelConfig
from dualform.models.config import ModelConfig
from dualform.models.tables.family import Family, Found
from dualform.models.tables.layout import Change, Options, Piece


class _Sizes(NamedTuple):
    layers: int
    every: int


def _build(found: Found) -> ModelConfig:
    model = found.of[ModelConfig]
    time, channel = dict(found.of[RWKV4Config]), dict(found.of[RWKVChannelConfig])
    time["d_inner"] = time["d_inner"] or model["d_model"]
    channel["d_hidden"] = channel["d_hidden"] or 4 * model["d_model"]
    layers, every = found.sizes
    parts, pattern = {}, ""
    for i in range(layers):
        halved, halves = (i // every, (i + 1) % every == 0) if every > 0 else (0, False)
        if 2 * halved + halves >= len(ascii_letters):
            raise ConfigError(f"{found.where}rescale_every is {every}, too few of num_hidden_layers = {layers}")
        letter, scale = ascii_letters[2 * halved + halves], 0.5**halved
        parts[letter] = (
            SublayerConfig(RWKV4Config(**time), norm="layer", scale=scale),
            SublayerConfig(
                RWKVChannelConfig(**channel),
                norm="layer",
                scale=scale / 2 if halves else scale,
                stream=0.5 if halves else 1.0,
            ),
        )
        pattern += letter
    return ModelConfig(parts=parts, pattern=pattern, norm="layer", embed_norm="layer", **model)


def _describe(config: ModelConfig) -> dict[str, Any]:
    halving = [i for i, letter in enumerate(config.pattern) if standing(config.parts[letter][1]).stream == 0.5]
    return {"num_hidden_layers": len(config.pattern), "rescale_every": halving[0] + 1 if halving else 0}


_ROW = Change(lambda t: t.flatten(), lambda t: t[None, None])
"""One number per feature: ``(D,)`` here, ``(1, 1, D)`` there."""


def _time(part: RWKV4Config, width: int) -> dict[str, tuple[Piece, ...]]:
    mixes = {f"mix_{kind}": (Piece(f"time_mix_{kind}", _ROW),) for kind in ("key", "value", "receptance")}
    return {**mixes, "out_proj.weight": (Piece("output.weight"),)}


def _channel(part: RWKVChannelConfig, width: int) -> dict[str, tuple[Piece, ...]]:
    return {f"mix_{kind}": (Piece(f"time_mix_{kind}", _ROW),) for kind in ("key", "receptance")}


_NAMES = {"norms.0.": "ln1.", "parts.0.": "attention.", "norms.1.": "ln2.", "parts.1.": "feed_forward."}

RWKV = Family(
    model_type="rwkv",
    architecture="RwkvForCausalLM",
    options={
        ModelConfig: Options(
            ModelConfig,
            {
                "hidden_size": ("d_model", 4096),
                "vocab_size": ("vocab_size", 50277),
                "tie_word_embeddings": ("tie_embeddings", False),
            },
        ),
        RWKV4Config: Options(RWKV4Config, {"attention_hidden_size": ("d_inner", None)}),
        RWKVChannelConfig: Options(RWKVChannelConfig, {"intermediate_size": ("d_hidden", None)}),
    },
    sizes=Options(_Sizes, {"num_hidden_layers": ("layers", 32), "rescale_every": ("every", 6)}, least=0),
    build=_build,
    describe=_describe,
    outside={
        "embed": "rwkv.embeddings.",
        "embed_norm": "rwkv.blocks.0.pre_ln.",
        "norm": "rwkv.ln_out.",
        "head": "head.",
    },
    layer="rwkv.blocks.{}.",
    blocks={letter: _NAMES for letter in ascii_letters},
    names={RWKV4Config: _time, RWKVChannelConfig: _channel},
    only={"layer_norm_epsilon": (1e-5,)},  # that of the last norm, whatever the key says
)
