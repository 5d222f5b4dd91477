"""What comes before the first step: the device, the model with its tokenizer, the run's folder and its tokens."""

import json
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from dualform.core.errors import CheckpointError, ConfigError
from dualform.models.config import ModelConfig
from dualform.models.lm import LanguageModel
from dualform.models.presets import PRESETS, preset
from dualform.models.saving.files import replacing_file
from dualform.models.saving.model import load
from dualform.models.tokenizer import ByteTokenizer, SubwordTokenizer, Tokenizer, load_tokenizer
from dualform.train.checkpoint import checkpoints
from dualform.train.data import prepare
from dualform.train.recipe import RECIPE_FILE, Recipe

CHECKPOINTS, DATA, MODEL, SUMMARY_FILE = "checkpoints", "data", "model", "summary.json"
_LAUNCHES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU)


def build_accelerator(recipe: Recipe) -> Accelerator:
    """The device, and the other processes if ``torchrun`` or ``accelerate launch`` started this one.

    Raises:
        ConfigError: when the batch cannot be shared out, or for a launch that shards the model.
    """
    accelerator = Accelerator(cpu=recipe.device == "cpu", mixed_precision="no")  # the loop has its own autocast
    if accelerator.distributed_type not in _LAUNCHES:
        kind = accelerator.distributed_type.value
        raise ConfigError(f"train cannot run under {kind}", hint="launch plain data parallelism, such as with torchrun")
    processes, data = accelerator.num_processes, recipe.data
    if data.batch % (processes * data.accumulate):
        shared = f"{processes} processes" if processes > 1 else "one process"
        raise ConfigError(
            f"recipe: data.batch is {data.batch}, which {shared} with data.accumulate {data.accumulate} cannot share",
            hint=f"a multiple of {processes * data.accumulate}",
        )
    return accelerator


def uses_bfloat16(recipe: Recipe, device: torch.device) -> bool:
    """Whether matrix products are taken in bfloat16; weights, states and sums stay float32."""
    if recipe.precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return recipe.precision == "bfloat16"


def build_model(recipe: Recipe) -> tuple[LanguageModel, Tokenizer]:
    """The model before the first step, and what makes tokens for it.

    Raises:
        ConfigError: for a preset that does not exist, a table with a wrong key, or a tokenizer with other tokens
            than the model's.
        CheckpointError: for a model or tokenizer that cannot be read.
    """
    torch.manual_seed(recipe.seed)
    given, tokenizer = recipe.model, None
    if isinstance(given, str) and given not in PRESETS and Path(given).is_dir():
        model = load(given, dtype=torch.float32, kind=LanguageModel)
        tokenizer = load_tokenizer(given, model.config.vocab_size)
    else:
        model = LanguageModel(ModelConfig.from_dict(given) if isinstance(given, dict) else preset(given))
    if recipe.data.tokenizer:
        tokenizer = SubwordTokenizer.from_file(recipe.data.tokenizer)
    tokenizer = tokenizer or ByteTokenizer()
    size, wanted = model.config.vocab_size, tokenizer.vocab_size
    if size < wanted or (isinstance(tokenizer, ByteTokenizer) and size != wanted):
        named = "bytes are" if isinstance(tokenizer, ByteTokenizer) else "the tokenizer has"
        raise ConfigError(
            f"the model has {size} tokens, but {named} {wanted}",
            hint=f"set data.tokenizer to the model's own, or model.vocab_size={wanted}",
        )
    return model, tokenizer


def claim_folder(recipe: Recipe, tokenizer: Tokenizer, resume: bool) -> None:
    """Make the run's folder with its tokens, or make sure that it holds a run to resume.

    Raises:
        CheckpointError: for a folder with a run that is not to be resumed, without one that is, or that cannot be
            written.
        DataError: for data that cannot be trained on.
    """
    out = Path(recipe.out)
    exists = (out / RECIPE_FILE).is_file() or bool(checkpoints(out / CHECKPOINTS))
    if resume and not exists:
        raise CheckpointError(f"{out}: no run to resume", hint="check the folder, or start a run without resuming")
    if exists and not resume:
        raise CheckpointError(
            f"{out}: a run is there already", hint=f"resume it, or choose another folder: out={out}-2"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not exists:
            prepare(recipe.data, tokenizer, out / DATA)
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"{out}: cannot be written: {reason}", hint="choose another folder with out=") from error


def write_recipe(recipe: Recipe) -> None:
    """Write the recipe into the run's folder, which is then enough to resume it."""
    with replacing_file(Path(recipe.out) / RECIPE_FILE) as path:
        path.write_text(json.dumps(recipe.to_dict(), indent=2) + "\n", encoding="utf-8")
