"""Which table reads a folder of another library, by what its ``config.json`` says."""

from collections.abc import Mapping
from typing import Any

from dualform.core.errors import ArgumentError, CheckpointError, ConfigError
from dualform.core.options import brief, suggestion
from dualform.layers.block import COMPOSED
from dualform.layers.recall import RecallConfig
from dualform.models.config import ModelConfig, sublayers
from dualform.models.tables.bamba import BAMBA
from dualform.models.tables.falcon_h1 import FALCON_H1
from dualform.models.tables.family import Family
from dualform.models.tables.gpt_neox import GPT_NEOX
from dualform.models.tables.granite import GRANITE
from dualform.models.tables.jamba import JAMBA
from dualform.models.tables.kimi_linear import KIMI_LINEAR
from dualform.models.tables.layout import Layout
from dualform.models.tables.lfm2 import LFM2
from dualform.models.tables.lfm2_moe import LFM2_MOE
from dualform.models.tables.llama import LLAMA
from dualform.models.tables.mamba import FALCON_MAMBA, MAMBA, MAMBA2
from dualform.models.tables.mamba_ssm import MAMBA_SSM
from dualform.models.tables.minimax import MINIMAX
from dualform.models.tables.nemotron_h import NEMOTRON_H
from dualform.models.tables.olmo_hybrid import OLMO_HYBRID
from dualform.models.tables.qwen3 import QWEN3
from dualform.models.tables.qwen3_next import QWEN3_5, QWEN3_NEXT
from dualform.models.tables.recurrent_gemma import RECURRENT_GEMMA
from dualform.models.tables.rwkv import RWKV
from dualform.models.tables.rwkv7 import RWKV7_FILE, RWKV7File
from dualform.models.tables.wrapped import MODEL_TYPE, WRAPPED, Wrapped
from dualform.models.tables.xlstm import XLSTM
from dualform.models.tables.zamba import ZAMBA
from dualform.models.tables.zamba2 import ZAMBA2

Table = Layout | Family
Readable = Table | Wrapped | RWKV7File
_FAMILIES = (
    MAMBA,
    MAMBA2,
    FALCON_MAMBA,
    BAMBA,
    FALCON_H1,
    GPT_NEOX,
    GRANITE,
    JAMBA,
    KIMI_LINEAR,
    LFM2,
    LFM2_MOE,
    LLAMA,
    MINIMAX,
    NEMOTRON_H,
    OLMO_HYBRID,
    QWEN3,
    QWEN3_5,
    QWEN3_NEXT,
    RECURRENT_GEMMA,
    XLSTM,
    RWKV,
    ZAMBA,
    ZAMBA2,
)
HF = {family.model_type: family for family in _FAMILIES}
"""The families of transformers by their ``model_type``."""

SUPPORTED = f"folders of dualform, of transformers ({', '.join(HF)}) and of mamba-ssm can be read"
LAYOUTS = ("dualform", "hf", "mamba_ssm", "rwkv7", "gguf")
"""What a model can be written as; the last two are files, the others are folders."""


def layout_of(about: Mapping[str, Any], where: str) -> Readable:
    """The layout of a folder whose ``config.json`` holds ``about``.

    Raises:
        CheckpointError: for an architecture that is not in the tables; names it and those that are.
    """
    if "model_type" in about:
        name = about["model_type"]
        if name == MODEL_TYPE:
            return WRAPPED
        if not isinstance(name, str) or name not in HF:
            raise CheckpointError(f"{where}: model_type is {brief(name)}, which is not in the tables", hint=SUPPORTED)
        return HF[name]
    if {"d_model", "n_layer"} <= about.keys():
        return MAMBA_SSM
    raise CheckpointError(f"{where}: not a config of this library, nor of another one that it knows", hint=SUPPORTED)


def layout_of_file(shapes: Mapping[str, Any], where: str) -> RWKV7File:
    """The layout of a file of tensors that needs no ``config.json``: that of RWKV-7.

    Args:
        shapes: of its tensors, by their names.
        where: what errors begin with.

    Raises:
        CheckpointError: for another one.
    """
    if RWKV7_FILE.known(shapes):
        return RWKV7_FILE
    hint = "give the folder that it lies in, with its config.json; of files alone those of RWKV-7 (x070) are read"
    if any(name.startswith("blocks.0.att.time_") for name in shapes):
        raise CheckpointError(f"{where}: a model of RWKV before version 7 (x070)", hint=hint)
    named = f"tensors such as {brief(min(shapes))}" if shapes else "no tensors"
    raise CheckpointError(f"{where}: holds {named}, which do not say what model it is", hint=hint)


def written_as(config: ModelConfig, name: str) -> tuple[Table | RWKV7File, dict[str, Any]] | None:
    """The layout called ``name`` for a model, and its ``config.json``; None for this library's own.

    Raises:
        ArgumentError: for a name that there is not.
        ConfigError: for a model that the layout does not have; says what it lacks.
    """
    if name not in LAYOUTS:
        raise ArgumentError(f"save: layout is {brief(name)}", hint=suggestion(str(name), LAYOUTS))
    if name == "dualform":
        return None
    if name == RWKV7_FILE.name:
        return RWKV7_FILE, RWKV7_FILE.write(config)
    layouts: list[Table] = list(HF.values()) if name == "hf" else [MAMBA_SSM]
    kinds = {type(sub.part) for letter in config.pattern for sub in sublayers(config.parts[letter])} - {*COMPOSED}
    fitting = [layout for layout in layouts if kinds <= {*layout.parts, RecallConfig}] or layouts
    if name == "hf" and fitting is layouts:
        blocks = ", ".join(sorted(kind.__name__.removesuffix("Config") for kind in kinds))
        raise ConfigError(f"model: blocks of {blocks}, which no family of transformers has")
    errors = []
    for layout in fitting:
        try:
            return layout, layout.write(config)
        except ConfigError as error:
            errors.append(error)
    raise errors[0]
