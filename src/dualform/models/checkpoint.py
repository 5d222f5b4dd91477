"""The files of a saved model: ``config.json``, ``model.safetensors`` and perhaps ``tokenizer.json``.

``config.json`` holds the format, the library's version, the model's config and, for a classifier or regressor, its
head; ``model.safetensors`` every tensor once, in the dtype it had, under its name in the model. Weights that several
names share are stored under the first.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dualform import __version__
from dualform.core.errors import CheckpointError, ConfigError
from dualform.models.config import ModelConfig
from dualform.models.files import current, replacing
from dualform.models.tokenizer import TOKENIZER_FILE, Tokenizer

FORMAT = 1
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
_OTHER_MODEL = f"{CONFIG_FILE} beside it describes another model"
Folder = str | os.PathLike[str]


def write_model(
    folder: Folder,
    config: ModelConfig,
    model: nn.Module,
    tokenizer: Tokenizer | None = None,
    head: Mapping[str, Any] | None = None,
) -> None:
    """Write the files of a model, all or none; without a tokenizer, one that is there stays.

    ``head`` is what beside the config it takes to build a classifier or regressor; None for a language model.

    Raises:
        CheckpointError: when the disk refuses; what was saved there before still loads.
    """
    about: dict[str, Any] = {"format": FORMAT, "library": f"dualform {__version__}", "model": config.to_dict()}
    if head is not None:
        about["head"] = dict(head)
    text = tokenizer.to_json() if tokenizer is not None else None
    tensors = {name: t.detach().cpu().contiguous() for name, t in unique_tensors(model).items()}
    with replacing(folder) as new:
        (new / CONFIG_FILE).write_text(json.dumps(about, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        save_file(tensors, new / WEIGHTS_FILE, metadata={"format": "pt"})
        if text is not None:
            (new / TOKENIZER_FILE).write_text(text, encoding="utf-8")


def read_config(folder: Folder) -> ModelConfig:
    """The config of a saved model.

    Raises:
        CheckpointError: when there is no model of this library in the folder.
        ConfigError: when its config has an unknown or missing key.
    """
    path, about = _read_about(folder)
    try:
        return ModelConfig.from_dict(about["model"])
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def read_head(folder: Folder) -> dict[str, Any] | None:
    """What the head of a saved classifier or regressor is; None for a language model.

    Raises:
        CheckpointError: when there is no model of this library in the folder.
    """
    path, about = _read_about(folder)
    head = about.get("head")
    if head is not None and not isinstance(head, dict):
        raise CheckpointError(f"{path}: head is {head!r}, expected a table of options")
    return head


def _read_about(folder: Folder) -> tuple[Path, dict[str, Any]]:
    """The path of ``config.json`` and what it holds."""
    path = current(_existing(folder), CONFIG_FILE)
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: no {CONFIG_FILE}", hint="give a folder written by save") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(about, dict) or "format" not in about or "model" not in about:
        foreign = isinstance(about, dict) and about.get("model_type")
        raise CheckpointError(
            f"{path}: not a config of this library" + (f", but of a {foreign!r} model" if foreign else ""),
            hint="checkpoints of other libraries cannot be read yet; give a folder written by save",
        )
    if about["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: format {about['format']!r} of {about.get('library', 'an unknown version')}, expected {FORMAT}",
            hint=f"this is dualform {__version__}; upgrade it",
        )
    return path, about


def read_tensors(folder: Folder, model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a saved model by name, exactly those of ``model``.

    Raises:
        CheckpointError: for a file that is missing or truncated, or a tensor too many, too few or of another shape.
    """
    path = current(folder, WEIGHTS_FILE)
    if not path.exists():
        raise CheckpointError(f"{folder}: no {WEIGHTS_FILE}", hint=f"{CONFIG_FILE} is there; copy the weights too")
    expected = unique_tensors(model)
    try:
        with safe_open(path, framework="pt") as file:
            _check_names(path, expected, set(file.keys()))
            for name, tensor in expected.items():
                _check_tensor(path, name, tensor, file.get_slice(name))
            return {name: file.get_tensor(name).clone() for name in expected}  # owned: the file may change
    except (OSError, SafetensorError) as error:
        hint = "the file is truncated or no safetensors file; copy or save it again"
        raise CheckpointError(f"{path}: cannot be read: {error}", hint=hint) from error


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, each once, under the first of its names."""
    seen: set[int] = set()
    tensors = model.state_dict(keep_vars=True).items()
    return {name: t for name, t in tensors if not (id(t) in seen or seen.add(id(t)))}


def _existing(folder: Folder) -> Path:
    path = Path(folder)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{folder}: a file, expected the folder of a saved model", hint=f"try {path.parent}")
    hint = "give a folder written by save"
    if len(path.parts) == 2 and not path.is_absolute():
        hint += "; models on the Hugging Face Hub cannot be read yet"
    raise CheckpointError(f"{folder}: no such folder", hint=hint)


def _check_names(path: Path, expected: dict[str, Tensor], found: set[str]) -> None:
    missing, extra = [name for name in expected if name not in found], sorted(found - expected.keys())
    sides = [(missing, "missing"), (extra, "too many")]
    if problems := [f"{len(names)} {what}, first {names[0]!r}" for names, what in sides if names]:
        raise CheckpointError(f"{path}: tensors: {'; '.join(problems)}", hint=_OTHER_MODEL)


def _check_tensor(path: Path, name: str, expected: Tensor, found: Any) -> None:
    shape, dtype = tuple(found.get_shape()), found.get_dtype()
    if shape != tuple(expected.shape):
        raise CheckpointError(f"{path}: {name} has shape {shape}, expected {tuple(expected.shape)}", hint=_OTHER_MODEL)
    if dtype.startswith(("F", "BF")) != expected.is_floating_point() or dtype.startswith("C") != expected.is_complex():
        raise CheckpointError(f"{path}: {name} is {dtype}, expected {expected.dtype} or alike", hint=_OTHER_MODEL)
