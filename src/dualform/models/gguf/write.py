"""Models of this library as files of GGUF, for llama.cpp and what is built on it: Mamba, Falcon-Mamba and Mamba-2."""

import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dualform.core.errors import ConfigError
from dualform.layers.quantized import quantized_within
from dualform.models.backbone import Backbone
from dualform.models.config import ModelConfig
from dualform.models.gguf.file import ALIGNMENT, GROUP, MAGIC, Q8_0
from dualform.models.gguf.layout import GGUF
from dualform.models.gguf.vocabulary import keys_of
from dualform.models.tables.mamba import FALCON_MAMBA, MAMBA, MAMBA2

_KINDS = {torch.float32: 0, torch.float16: 1, torch.float64: 28, torch.bfloat16: 30}
_CONTEXT = 2**20  # tokens; a number that readers ask for, and that these models do not have
_SHARED = {
    "conv_kernel": "ssm.conv_kernel",
    "state_size": "ssm.state_size",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "layer_norm_epsilon": "attention.layer_norm_rms_epsilon",
}
_FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32, torch.int8: 7}


def described_as_gguf(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """The architecture of a model there, and its keys.

    Raises:
        ConfigError: for a model that is none of those that are written; says what it lacks.
    """
    errors = []
    for family in (MAMBA, FALCON_MAMBA, MAMBA2):
        try:
            table = family.write(config)
        except ConfigError as error:
            errors.append(error)
            continue
        return _keys(table, config)
    kinds = {type(part).__name__.removesuffix("Config") for letter in config.pattern for part in config.parts[letter]}
    if kinds <= {"Mamba", "Mamba2"} and len(kinds) == 1:
        raise errors[-1] if kinds == {"Mamba2"} else errors[0]
    raise ConfigError(
        f"model: blocks of {', '.join(sorted(kinds))}, and files of GGUF are written for Mamba and Mamba-2",
        hint="llama.cpp's own program converts a folder that was written with --to hf",
    )


def _keys(table: Mapping[str, Any], config: ModelConfig) -> tuple[str, dict[str, Any]]:
    architecture = "mamba2" if table["model_type"] == "mamba2" else "mamba"
    keys = {there: table[here] for here, there in _SHARED.items()}
    keys |= {"context_length": _CONTEXT, "feed_forward_length": 0, "attention.head_count": 0}
    keys["vocab_size"] = config.vocab_size
    if architecture == "mamba2":
        channels = table["num_heads"] * table["head_dim"]
        keys |= {"ssm.time_step_rank": table["num_heads"], "ssm.group_count": table["n_groups"]}
    else:
        channels = table["intermediate_size"]
        inner = table["model_type"] == "falcon_mamba"
        if inner and table["mixer_rms_eps"] != table["layer_norm_epsilon"]:
            raise ConfigError(
                f"model: norm_maps = {table['mixer_rms_eps']} and norm_eps = {table['layer_norm_epsilon']}, "
                "which are one number in a file of GGUF"
            )
        keys |= {"ssm.time_step_rank": table["time_step_rank"], "ssm.dt_b_c_rms": inner}
    if channels != 2 * config.d_model:
        raise ConfigError(
            f"model: {channels} channels beside a width of {config.d_model}, where llama.cpp has twice it"
        )
    keys["ssm.inner_size"] = channels
    return architecture, {f"{architecture}.{key}": value for key, value in keys.items()}


def write_gguf(model: Backbone, path: Path, tokenizer: str | None, ends: Sequence[int], name: str) -> None:
    """Write a model to a file that is not there yet.

    Vectors, convolutions and rates of decay are float32, as llama.cpp has them; matrices are as they are here. Those of
    8 bits become blocks of type Q8_0.

    Args:
        model: a language model.
        path: of the file.
        tokenizer: the content of a ``tokenizer.json``; None for bytes, or for none.
        ends: tokens that end a text.
        name: of the model.

    Raises:
        ConfigError: for a model that is none of those that are written, or whose scales are not numbers of 16 bits.
        OSError: from the operating system.
    """
    architecture, keys = described_as_gguf(model.config)
    if (dtype := _of_matrices(model)) not in _FILE_TYPES:
        raise ConfigError(f"model: weights of {dtype}, which llama.cpp does not have", hint="--dtype float32")
    about: dict[str, Any] = {"general.architecture": architecture, "general.name": name, **keys}
    about["general.file_type"] = _FILE_TYPES[dtype]
    about |= keys_of(tokenizer, model.config.vocab_size, ends)
    parts: dict[str, tuple[int, tuple[int, ...], Any]] = {}
    layout = GGUF(architecture, {})
    eight = quantized_within(model)
    linear = {n for n, m in model.named_modules() if type(m) in (nn.Linear, nn.Embedding)}
    seen: set[int] = set()
    for name_here, tensor in model.state_dict(keep_vars=True).items():
        module, _, kind = name_here.rpartition(".")
        if id(tensor) in seen or (module in eight and kind == "scales"):
            continue
        seen.add(id(tensor))
        for piece in layout.pieces(model.config, name_here):
            if module in eight and kind == "weight":
                rows = _blocks(name_here, eight[module].weight, eight[module].scales, eight[module].group)
                parts[piece.name] = (Q8_0, tuple(tensor.shape), rows)
            else:
                matrix = module in linear and kind == "weight"
                stored = piece.of(tensor.detach() if matrix else tensor.detach().float()).cpu()
                parts[piece.name] = (_KINDS[stored.dtype], tuple(stored.shape), stored.contiguous())
    write_file(path, about, parts)


def _of_matrices(model: Backbone) -> torch.dtype:
    return torch.int8 if model.quantization is not None else next(model.parameters()).dtype


def _blocks(name: str, whole: Tensor, scales: Tensor, group: int) -> Tensor:
    """Whole numbers and their scales as blocks of type Q8_0."""
    if group != GROUP or whole.shape[1] % GROUP:
        raise ConfigError(
            f"model: {name} of {whole.shape[1]} columns in groups of {group}; files of GGUF have groups of {GROUP}",
            hint="write the model that it was made of, and quantise that file with llama-quantize",
        )
    half = scales.half()
    if not torch.equal(half.float(), scales):
        raise ConfigError(
            f"model: the scales of {name} are no numbers of 16 bits, as files of GGUF have them",
            hint="write the model that it was made of, and quantise that file with llama-quantize",
        )
    parts = half.reshape(-1, 1).view(torch.uint8), whole.reshape(-1, GROUP).view(torch.uint8)
    return torch.cat(parts, 1)


def write_file(path: Path, about: Mapping[str, Any], parts: Mapping[str, tuple[int, tuple[int, ...], Tensor]]) -> None:
    """Write keys and tensors: the type of each, its shape, and its bytes as a tensor.

    Raises:
        OSError: from the operating system.
    """
    head = [MAGIC, struct.pack("<IQQ", 3, len(parts), len(about))]
    for key, value in about.items():
        head += [_text(key), *_value(value)]
    offset = 0
    for name, (kind, shape, data) in parts.items():
        head += [
            _text(name),
            struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1]),
            struct.pack("<IQ", kind, offset),
        ]
        offset += _up(data.nbytes)
    first = b"".join(head)
    with open(path, "wb") as file:
        file.write(first.ljust(_up(len(first)), b"\0"))
        for _, _, data in parts.values():
            data.reshape(-1).view(torch.uint8).numpy().tofile(file)
            file.write(bytes(_up(data.nbytes) - data.nbytes))
        file.flush()
        os.fsync(file.fileno())


def _value(value: Any) -> list[bytes]:
    """The type of a value, and the value."""
    if isinstance(value, str):
        return [struct.pack("<I", 8), _text(value)]
    if isinstance(value, bool):
        return [struct.pack("<I?", 7, value)]
    if isinstance(value, int):
        return [struct.pack("<II", 4, value)]
    if isinstance(value, float):
        return [struct.pack("<If", 6, value)]
    if all(isinstance(one, str) for one in value):
        return [struct.pack("<IIQ", 9, 8, len(value)), *map(_text, value)]
    return [struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)]


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
