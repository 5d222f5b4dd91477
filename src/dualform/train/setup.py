"""What surrounds the steps: the device, the other processes, the model with its tokenizer, before and after."""

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType

from dualform.core.errors import ArgumentError, ConfigError
from dualform.core.json_file import to_json
from dualform.core.options import brief
from dualform.layers.quantized import TRAINS
from dualform.models.adapters import adapt
from dualform.models.chat import ChatTemplate
from dualform.models.config import ModelConfig
from dualform.models.lm import LanguageModel
from dualform.models.presets import PRESETS, preset
from dualform.models.saving.adapter import adapter_of, base_digests
from dualform.models.saving.files import CHAT_TEMPLATE_FILE, replacing, replacing_file
from dualform.models.saving.folder import CHECKPOINTS, checkpoints, model_folder
from dualform.models.saving.hub import hub_name
from dualform.models.saving.model import load, write
from dualform.models.saving.undisturbed import undisturbed
from dualform.models.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, read_tokenizer
from dualform.models.usage import usage_files, usage_of
from dualform.ops.device import chosen_device
from dualform.train.checkpoint import read_position
from dualform.train.optim import freeze
from dualform.train.recipe import AUTO, RECIPE_FILE, Lora, Recipe

_LAUNCHES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU)


def build_accelerator(recipe: Recipe) -> Accelerator:
    """The device, and the other processes if ``torchrun`` or ``accelerate launch`` started this one.

    A process group that this starts lasts as long as the process, for more runs, and is destroyed when it exits.

    Raises:
        ArgumentError: for a device that cannot be used.
        ConfigError: when the batch cannot be shared out, for one device for several processes, or for a launch that
            shards the model.
    """
    cpu, joined = _wanted(recipe).type == "cpu", _joined()
    accelerator = Accelerator(cpu=cpu, mixed_precision="no")  # the loop has its own autocast
    if _joined() and not joined:
        atexit.register(_leave)
    if accelerator.distributed_type not in _LAUNCHES:
        kind = accelerator.distributed_type.value
        raise ConfigError(f"train cannot run under {kind}", hint="launch plain data parallelism, such as with torchrun")
    processes, data = accelerator.num_processes, recipe.data
    shares = processes * data.accumulate
    if data.batch % shares:
        shared = f"{processes} processes" if processes > 1 else "one process"
        raise ConfigError(
            f"recipe: data.batch is {data.batch}, which {shared} with data.accumulate {data.accumulate} cannot share",
            hint=f"a multiple of {shares}: --set data.batch={-(-data.batch // shares) * shares}",
        )
    if processes > 1 and ":" in recipe.device and not cpu:
        kind = recipe.device.partition(":")[0]
        raise ConfigError(
            f"recipe: device is {recipe.device!r}, one for {processes} processes",
            hint=f"each takes its own with --set device={kind}",
        )
    return accelerator


def device_of(recipe: Recipe, accelerator: Accelerator) -> torch.device:
    """Where this process trains: of several, on the device that the launch gave it; alone, on that of the recipe.

    Raises:
        ArgumentError: for a device that cannot be used.
    """
    return accelerator.device if accelerator.num_processes > 1 else _wanted(recipe)


def _wanted(recipe: Recipe) -> torch.device:
    """The recipe's device; under a launcher that of this process, not of all processes the first."""
    name, where = recipe.device, f"recipe: device {recipe.device!r}"
    if name in ("cuda", "xpu") and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        name = f"{name}:{os.environ.get('LOCAL_RANK', '0')}"
    return chosen_device(name, where)


@contextmanager
def all_or_none(accelerator: Accelerator) -> Iterator[None]:
    """What one process alone does for all: where it raises, every process ends, and the others say nothing.

    Raises:
        SystemExit: on the others.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    failed = torch.tensor(float(failure is not None), device=accelerator.device)
    if cast("torch.Tensor", accelerator.reduce(failed, "sum")).item():
        raise failure or SystemExit(2)


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def _leave() -> None:
    if _joined():
        dist.destroy_process_group()


def settled(recipe: Recipe, resume: bool) -> Recipe:
    """The recipe with a number of warm-up steps, where the run is counted in steps; a resumed run keeps its own.

    Raises:
        ArgumentError: for what is no recipe.
        CheckpointError: for a damaged checkpoint.
        ConfigError: for a damaged recipe in the run's folder.
    """
    if not isinstance(recipe, Recipe):
        hint = "Recipe.load reads one from a file, such as Recipe.load('my.toml')"
        raise ArgumentError(f"train: recipe is {brief(recipe)}, expected a Recipe", hint=hint)
    out = Path(recipe.out)
    if resume and recipe.optim.warmup == AUTO:
        if saved := checkpoints(out / CHECKPOINTS):
            warmup = read_position(saved[-1])[1].optim.warmup
        elif (out / RECIPE_FILE).exists():
            warmup = Recipe.load(out).optim.warmup
        else:
            warmup = AUTO
        recipe = replace(recipe, optim=replace(recipe.optim, warmup=warmup))
    return recipe.settled()


def uses_bfloat16(recipe: Recipe, device: torch.device) -> bool:
    """Whether matrix products are taken in bfloat16; weights, states and sums stay float32."""
    if recipe.precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return recipe.precision == "bfloat16"


def build_model(recipe: Recipe) -> tuple[LanguageModel, Tokenizer]:
    """The model before the first step, and what makes tokens for it.

    Raises:
        ConfigError: for a preset that does not exist, a table with a wrong key, a tokenizer with other tokens than
            the model's, or a name in ``optim.freeze`` that the model does not have.
        CheckpointError: for a model or tokenizer that cannot be read.
    """
    torch.manual_seed(recipe.seed)
    given, tokenizer = recipe.model, None
    if isinstance(given, str) and _is_saved(given):

        def read(folder: Path) -> tuple[LanguageModel, Tokenizer | None]:
            model = load(folder, dtype=torch.float32, kind=LanguageModel)
            if model.quantization is not None:
                raise ConfigError(f"recipe: {given}: a quantised model is not trained", hint=TRAINS)
            own = None if recipe.data.tokenizer else load_tokenizer(folder, model.config.vocab_size)
            if recipe.lora.rank:
                _lay_adapters(recipe.lora, model, given, folder)
            return model, own

        model, tokenizer = undisturbed(lambda: model_folder(given), read)
    elif recipe.lora.rank:
        hint = "name a saved model: --set model=FOLDER, or owner/name of the Hugging Face Hub"
        raise ConfigError(f"recipe: lora.rank is {recipe.lora.rank} for a model without trained weights", hint=hint)
    else:
        model = LanguageModel(ModelConfig.from_dict(given) if isinstance(given, dict) else preset(given))
    model.config = replace(model.config, **recipe.rates)
    if recipe.data.tokenizer:
        tokenizer = read_tokenizer(recipe.data.tokenizer)
    tokenizer = tokenizer or ByteTokenizer()
    size, wanted = model.config.vocab_size, tokenizer.vocab_size
    if size < wanted or (isinstance(tokenizer, ByteTokenizer) and size != wanted):
        named = "bytes are" if isinstance(tokenizer, ByteTokenizer) else "the tokenizer has"
        raise ConfigError(
            f"the model has {size} tokens, but {named} {wanted}",
            hint=f"take the model's own: --set data.tokenizer=FILE, or another model: --set model.vocab_size={wanted}",
        )
    freeze(model, recipe.optim.freeze)
    return model, tokenizer


def template_of(recipe: Recipe, model: LanguageModel, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template that writes conversations, of the model that the run goes on from; None where text is trained on.

    Raises:
        ConfigError: for conversations without a template.
        CheckpointError: for a template that cannot be read.
    """
    given = recipe.model
    if not recipe.data.chat:
        return None
    found = None
    if isinstance(given, str) and _is_saved(given):
        found = usage_of(given, tokenizer, model.config.vocab_size).template
    if found is None:
        hint = f"go on from a model that chats: --set model=FOLDER; or put its {CHAT_TEMPLATE_FILE} beside the weights"
        raise ConfigError("recipe: data.chat is true for a model without a chat template", hint=hint)
    return found


def save_model(folder: Path, recipe: Recipe, model: LanguageModel, tokenizer: Tokenizer) -> None:
    """Write a trained model with all that says how it is used, of the model that the run went on from.

    Raises:
        CheckpointError: when the disk refuses; what was saved there before still loads.
    """
    usage = _usage_of(recipe)
    with replacing(folder) as new:
        for name, content in usage.items():
            (new / name).write_bytes(content)
        write(model, new, tokenizer)


def _usage_of(recipe: Recipe) -> dict[str, bytes]:
    """The files that say how the model is used that a run goes on from, by their names; none for another tokenizer."""
    given = recipe.model
    if recipe.data.tokenizer or not isinstance(given, str) or not _is_saved(given):
        return {}
    return undisturbed(lambda: model_folder(given), usage_files)


def _is_saved(model: str) -> bool:
    """Whether a recipe's model is a folder, a file or a name on the Hub, and no preset."""
    return model not in PRESETS and (Path(model).exists() or bool(hub_name(model)))


def _lay_adapters(lora: Lora, model: LanguageModel, given: str, folder: Path) -> None:
    """Adapters on a model of a folder, which may be that of a name on the Hub."""
    if adapter_of(folder) is not None:
        hint = f"go on with them: dualform train RUN --resume; or merge them first: dualform convert {given} OUT"
        raise ConfigError(f"recipe: model {given!r} has adapters already", hint=hint)
    if model.config.shared:  # PEFT lays an adapter on one of the places of a map, and merging would change all
        what = f"a block that stands in several places of it ({', '.join(map(repr, model.config.shared))})"
        raise ConfigError(f"recipe: no adapters for model {given!r}: it has {what}", hint="train it without lora")
    base = given if hub_name(given) else folder.resolve()
    model.adaptation = adapt(model, base, base_digests(folder), **asdict(lora))


def write_recipe(recipe: Recipe) -> None:
    """Write the recipe into the run's folder, which is then enough to resume it."""
    with replacing_file(Path(recipe.out) / RECIPE_FILE) as path:
        path.write_text(to_json(recipe.to_dict()), encoding="utf-8")
