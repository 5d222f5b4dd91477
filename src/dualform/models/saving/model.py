"""A model in a folder: ``config.json``, ``model.safetensors``, perhaps ``tokenizer.json``, and ``manifest.json``.

``config.json`` holds the format, the library's version, the model's config and, for a classifier or regressor, its
head; ``model.safetensors`` every tensor once, in the dtype it had, under its name in the model. Weights that several
names share are stored under the first.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar, overload, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dualform import __version__
from dualform.core.calls import explained
from dualform.core.errors import ArgumentError, CheckpointError, ConfigError
from dualform.core.json_file import entry, read_json, to_json
from dualform.core.options import brief
from dualform.core.shapes import dtype_of
from dualform.models.backbone import Backbone
from dualform.models.config import ModelConfig
from dualform.models.heads import PooledModel, SequenceClassifier, SequenceRegressor
from dualform.models.lm import LanguageModel
from dualform.models.saving.files import CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE, current, replacing
from dualform.models.saving.folder import model_folder
from dualform.models.saving.manifest import MANIFEST_FILE
from dualform.models.saving.verify import check_files, manifest_of
from dualform.ops.device import usable_device

FORMAT = 1
_OF_A_LAYER = (
    "of a layer: safetensors.torch.save_file(layer.state_dict(), 'layer.safetensors'), and into another one "
    "safetensors.torch.load_model(layer, 'layer.safetensors')"
)
_OTHER_MODEL = f"{CONFIG_FILE} beside it describes another model"
Folder = str | os.PathLike[str]
Model = TypeVar("Model", bound=Backbone)
_POOLED: dict[str, type[PooledModel]] = {kind.__name__: kind for kind in (SequenceClassifier, SequenceRegressor)}


@runtime_checkable
class SavedTokenizer(Protocol):
    """What saving needs of a tokenizer."""

    def to_json(self) -> str | None:
        """The content of ``tokenizer.json``, or None for a tokenizer that needs no file."""
        ...


@explained
def save(model: Backbone, folder: Folder, tokenizer: SavedTokenizer | None = None) -> None:
    """Write a model to a folder: ``config.json``, ``model.safetensors`` and, if given, ``tokenizer.json``.

    ``manifest.json`` lists their sizes and digests, which :func:`load` compares. The files replace those of the same
    name all at once: a full disk or a kill leaves what was saved there before. Without a tokenizer, one that is there
    stays.

    Raises:
        ArgumentError: for what is none of the library's models, such as a layer; says how to save that.
        CheckpointError: when the disk refuses.
    """
    if not isinstance(model, Backbone):
        kinds = ", ".join(kind.__name__ for kind in (LanguageModel, *_POOLED.values()))
        raise ArgumentError(f"save: model is {type(model).__name__}, expected one of {kinds}", hint=_OF_A_LAYER)
    with replacing(folder) as new:
        write(model, new, tokenizer)


def write(model: Backbone, folder: Path, tokenizer: SavedTokenizer | None = None) -> None:
    """Write the files of :func:`save` into a folder that its caller makes complete, such as one by ``replacing``."""
    about: dict[str, Any] = {"format": FORMAT, "library": f"dualform {__version__}", "model": model.config.to_dict()}
    if isinstance(model, PooledModel):
        about["head"] = model.head_options()
    text = tokenizer.to_json() if tokenizer is not None else None
    tensors = {name: t.detach().cpu().contiguous() for name, t in unique_tensors(model).items()}
    (folder / CONFIG_FILE).write_text(to_json(about), encoding="utf-8")
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    if text is not None:
        (folder / TOKENIZER_FILE).write_text(text, encoding="utf-8")


@overload
def load(
    folder: Folder,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    kind: None = None,
    verify: bool = False,
) -> Any: ...
@overload
def load(
    folder: Folder,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    kind: type[Model],
    verify: bool = False,
) -> Model: ...
@explained
def load(
    folder: Folder,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    kind: type[Any] | None = None,
    verify: bool = False,
) -> Any:
    """Read the model that :func:`save` wrote: a language model, classifier or regressor, whichever it is.

    The global random generators are left as they are.

    Args:
        folder: where it was saved; of a training run, the run's model or else its newest checkpoint.
        device: where to put it.
        dtype: of its floating tensors, such as ``"bfloat16"``; None keeps what was saved.
        kind: a class it must be of, such as ``LanguageModel``; None takes any.
        verify: whether to read all files once more and compare their digests with those that were saved. Without it
            sizes alone are compared, and a byte that changed inside of a tensor is not noticed.

    Raises:
        CheckpointError: for a missing folder or file, one of another size than was saved, a model of another kind, a
            tensor too many, too few or of another shape; with ``verify`` also for a damaged file, or a folder
            without digests; names it.
        ConfigError: for a config with an unknown or missing key; names it.
        ArgumentError: for a device that is not there, or a dtype that is not floating.
    """
    device = usable_device(device, f"load: device {str(device)!r}", numbers=False)
    dtype = None if dtype is None else dtype_of("load", dtype)
    folder = model_folder(folder)
    found, config, head = _described(folder)
    if kind is not None and not issubclass(found, kind):
        raise CheckpointError(f"{folder}: a {found.__name__}, expected a {kind.__name__}")
    if verify and manifest_of(folder) is None:
        hint = "load it without verify, or save it again: that writes them"
        raise CheckpointError(f"{folder}: no {MANIFEST_FILE}, so there are no digests to verify", hint=hint)
    with torch.device("meta"):  # where sizes that no file confirms take no memory
        tensors = read_tensors(folder, _built(folder, found, config, head), verify=verify)
    with torch.random.fork_rng(devices=[]), _Blank():
        model = _built(folder, found, config, head)
    model.load_state_dict(tensors, strict=False, assign=True)
    return model.to(device=device, dtype=dtype)


def shape(folder: Folder) -> Backbone:
    """The model of a folder on the meta device, without its weights, whatever its kind; it costs no memory.

    Raises:
        CheckpointError: for a folder without a model of this library.
        ConfigError: for a config with an unknown or missing key; names it.
    """
    folder = model_folder(folder)
    with torch.device("meta"):
        return _built(folder, *_described(folder))


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


def read_tensors(folder: Folder, model: nn.Module, *, verify: bool = False) -> dict[str, Tensor]:
    """The tensors of a saved model by name, exactly those of ``model``.

    The sizes of all files of the folder are compared with its manifest, and with ``verify`` their digests.

    Raises:
        CheckpointError: for a file that is missing, truncated or damaged, or a tensor too many, too few or of another
            shape.
    """
    with _weights(folder, model) as (file, names):
        check_files(folder, digests=verify)
        return {name: file.get_tensor(name).clone() for name in names}  # owned: the file may change


def check_tensors(folder: Folder) -> None:
    """Compare the names, shapes and dtypes of the weights of a folder with its config; their values are not read.

    Raises:
        CheckpointError: as :func:`read_tensors`.
        ConfigError: for a config with an unknown or missing key; names it.
    """
    with _weights(folder, shape(folder)):
        pass


@contextmanager
def _weights(folder: Folder, model: nn.Module) -> Iterator[tuple[Any, list[str]]]:
    """The open file of weights, once it is known to hold the tensors of ``model``, and their names."""
    path = current(folder, WEIGHTS_FILE)
    if not path.exists():
        raise CheckpointError(f"{folder}: no {WEIGHTS_FILE}", hint=f"{CONFIG_FILE} is there; copy the weights too")
    expected = unique_tensors(model)
    try:
        with safe_open(path, framework="pt") as file:
            _check_names(path, expected, set(file.keys()))
            for name, tensor in expected.items():
                _check_tensor(path, name, tensor, file.get_slice(name))
            yield file, list(expected)
    except (OSError, SafetensorError) as error:
        hint = "the file is truncated or no safetensors file; copy or save it again"
        raise CheckpointError(f"{path}: cannot be read: {error}", hint=hint) from error


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, each once, under the first of its names."""
    seen: set[int] = set()
    tensors = model.state_dict(keep_vars=True).items()
    return {name: t for name, t in tensors if not (id(t) in seen or seen.add(id(t)))}


def _described(folder: Folder) -> tuple[type[Backbone], ModelConfig, dict[str, Any]]:
    """Class, config, and the options of the head."""
    path, about = _read_about(folder)
    config, head = read_config(folder), about.get("head")
    if head is None:
        return LanguageModel, config, {}
    if not isinstance(head, dict):
        raise CheckpointError(f"{path}: head is {brief(head)}, expected a table of options")
    name = head.pop("kind", None)
    if not isinstance(name, str) or name not in _POOLED:
        raise CheckpointError(f"{folder}: unknown kind of model {brief(name)}", hint=f"known: {', '.join(_POOLED)}")
    return _POOLED[name], config, head


def _read_about(folder: Folder) -> tuple[Path, dict[str, Any]]:
    """The path of ``config.json`` and what it holds."""
    path = current(_existing(folder), CONFIG_FILE)
    if not path.exists():
        raise CheckpointError(
            f"{folder}: no {CONFIG_FILE}", hint="give a folder written by save, or that of a training run"
        )
    about = read_json(path, hint="copy the folder again, or save the model again")
    if not isinstance(about, dict) or "format" not in about or "model" not in about:
        foreign = isinstance(about, dict) and about.get("model_type")
        raise CheckpointError(
            f"{path}: not a config of this library" + (f", but of a {brief(foreign)} model" if foreign else ""),
            hint="checkpoints of other libraries cannot be read yet; give a folder written by save",
        )
    if about["format"] != FORMAT:
        library = about.get("library", "an unknown version")
        raise CheckpointError(
            f"{path}: format {brief(about['format'])} of {library if isinstance(library, str) else brief(library)}, "
            f"expected {FORMAT}",
            hint=f"this is dualform {__version__}; upgrade it",
        )
    return path, about


def _built(folder: Folder, kind: type[Any], config: ModelConfig, head: dict[str, Any]) -> Backbone:
    path = current(folder, CONFIG_FILE)
    try:
        if not issubclass(kind, PooledModel):
            return kind(config)
        types = {"outputs": int, "inputs": int | None, "pooling": str}
        outputs, inputs, pooling = (entry(head, name, of, f"{path}: head") for name, of in types.items())
        return kind(config, outputs, inputs=inputs, pooling=pooling)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _existing(folder: Folder) -> Path:
    path = Path(folder)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{folder}: a file, expected the folder of a saved model", hint=f"try {path.parent}")
    hint = "give a folder written by save, or that of a training run"
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


class _Blank(TorchFunctionMode):
    """Leaves out the random fills of a new model, whose values a checkpoint replaces."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_"):  # of torch.nn.init and Tensor
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))
