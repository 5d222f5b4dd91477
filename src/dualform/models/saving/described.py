"""What ``config.json`` of a folder says the model is, whichever library wrote it; and what to write there."""

import os
from pathlib import Path
from typing import Any, NamedTuple

from dualform import __version__
from dualform.core.errors import ArgumentError, CheckpointError, ConfigError
from dualform.core.int8 import check_group
from dualform.core.json_file import entry, kind_of, read_json
from dualform.core.options import brief, suggestion
from dualform.models.backbone import Backbone, Quantization
from dualform.models.config import ModelConfig
from dualform.models.gguf.architectures import layout_of_gguf
from dualform.models.gguf.file import GROUP, SUFFIX, read_header
from dualform.models.gguf.layout import GGUF
from dualform.models.heads import HEADS, PooledModel, Readout
from dualform.models.lm import LanguageModel
from dualform.models.quantized import INT8, quantized_shape
from dualform.models.saving.adapter import adapter_of, base_folder
from dualform.models.saving.files import CONFIG_FILE, current
from dualform.models.saving.gaussian import KEY
from dualform.models.saving.weights import FILES, Files, stored_tensors
from dualform.models.tables.registry import SUPPORTED, Readable, layout_of, layout_of_file, written_as

FORMAT = 1
_HEAD = {"outputs": int, "inputs": int | None}
_OPTIONS = {
    "window": int,
    "standardise": bool | str,
    "missing": str,
    "multi_label": bool,
    "class_names": tuple[str, ...],
    "quantiles": tuple[float, ...],
}
Folder = str | os.PathLike[str]


class Described(NamedTuple):
    """A model in a folder or a file, without its weights."""

    path: Path  # of config.json, or of the file
    kind: type[Any]
    config: ModelConfig
    head: dict[str, Any]  # options of a classifier or regressor
    layout: Readable | GGUF | None  # of another library; None for this one's
    quantization: Quantization | None = None  # where matrices have 8 bits

    def build(self) -> Backbone:
        """The model.

        Raises:
            ConfigError: for options that cannot be; names the file.
        """
        model = self._built()
        if self.quantization is None:
            return model
        try:
            return quantized_shape(model, self.quantization)
        except AttributeError as error:
            raise CheckpointError(f"{self.path}: quantization: {error}") from error

    def _built(self) -> Backbone:
        try:
            if not issubclass(self.kind, Readout):
                return self.kind(self.config)
            where, pooled = f"{self.path}: head", {"pooling": str} if issubclass(self.kind, PooledModel) else {}
            options = {name: entry(self.head, name, of, where) for name, of in {**_HEAD, **pooled}.items()}
            for name in self.head.keys() - options:
                if name not in _OPTIONS:
                    raise CheckpointError(f"{where}: unknown key {name!r}", hint=suggestion(name, list(_OPTIONS)))
                given = self.head[name]
                table = {name: tuple(given) if isinstance(given, list) else given}
                options[name] = entry(table, name, _OPTIONS[name], where)
            return self.kind.from_options(self.config, options)
        except (ArgumentError, ConfigError) as error:  # an argument that the kind does not have
            raise ConfigError(f"{self.path}: {error}") from error


def described(folder: Folder) -> Described:
    """The model of a folder.

    Raises:
        CheckpointError: where there is none that can be read; says which can.
        ConfigError: when its config has an unknown or missing key, or a value that cannot be; names it.
    """
    if (adapter := adapter_of(Path(folder))) is not None:
        return described(base_folder(adapter))
    if Path(folder).is_file() and Path(folder).suffix in FILES:
        return _of_file(Path(folder))
    path, about = _read_about(folder)
    if KEY in about:
        hint = "its matrices are in model.safetensors; dualform.load reads it, and dualform watch"
        raise CheckpointError(f"{folder}: a linear-Gaussian model, expected one that is made of blocks", hint=hint)
    own = "format" in about and "model" in about
    layout = None if own else layout_of(about, str(path))
    try:
        config = ModelConfig.from_dict(about["model"]) if layout is None else layout.read(about, "")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    head, how = (about.get("head"), _quantization(about, path)) if own else (None, None)
    if head is None:
        return Described(path, LanguageModel, config, {}, layout, how)
    if not isinstance(head, dict):
        raise CheckpointError(f"{path}: head is {brief(head)}, expected a table of options")
    name = head.pop("kind", None)
    if not isinstance(name, str) or name not in HEADS:
        raise CheckpointError(f"{folder}: unknown kind of model {brief(name)}", hint=f"known: {', '.join(HEADS)}")
    return Described(path, HEADS[name], config, head, None, how)


def _quantization(about: dict[str, Any], path: Path) -> Quantization | None:
    """How a model of this library is quantised, if it is."""
    given = about.get("quantization")
    if given is None:
        return None
    table = given if isinstance(given, dict) else {}
    group, kept = table.get("group"), table.get("kept", [])
    named = isinstance(kept, list) and all(isinstance(name, str) and name for name in kept)
    if not named or table not in ({"kind": INT8, "group": group}, {"kind": INT8, "group": group, "kept": kept}):
        raise CheckpointError(
            f"{path}: quantization is {brief(given)}, expected {{'kind': {INT8!r}, 'group': a whole number}}",
            hint=f"this is dualform {__version__}; a newer one may read it",
        )
    try:
        check_group("quantization", group)
    except ArgumentError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return Quantization(table["group"], tuple(kept))


def _of_file(path: Path) -> Described:
    """The model of a file: by its keys where it has some, else by the names and shapes of its tensors."""
    if path.suffix == SUFFIX:
        table, config = layout_of_gguf(read_header(path), f"{path}: ")
        how = Quantization(GROUP, tuple(sorted(table.kept))) if table.whole else None
        return Described(path, LanguageModel, config, {}, table, how)
    shapes = {name: stored.shape for name, stored in stored_tensors(Files([path])).items()}
    layout = layout_of_file(shapes, str(path))
    return Described(path, LanguageModel, layout.read(shapes, f"{path}: "), {}, layout)


def described_as(model: Backbone, layout: str) -> tuple[dict[str, Any], Readable | None]:
    """What ``config.json`` of a saved model holds, and the layout, None for this library's own.

    Raises:
        ArgumentError: for a layout that there is not, or a model with adapters in that of another library.
        ConfigError: for a model that the layout does not have; says what it lacks.
    """
    if model.adaptation is not None and layout != "dualform":
        hint = f"save it as it is, and then: dualform convert FOLDER OUT --to {layout}"
        raise ArgumentError(f"save: a model with adapters as {layout!r}", hint=hint)
    if model.quantization is not None and layout != "dualform":
        hint = "convert the model that it was made of, or save it in the layout 'dualform'"
        raise ConfigError(f"save: a quantised model as {str(layout)!r}, which has no matrices of 8 bits", hint=hint)
    written = written_as(model.config, layout)
    if written is not None:
        if not isinstance(model, LanguageModel):
            raise ConfigError(f"save: a {type(model).__name__} as {layout!r}, which takes language models")
        table, about = written
        return about if layout != "hf" else {**about, "torch_dtype": _dtype(model)}, table
    about = {"format": FORMAT, "library": f"dualform {__version__}", "model": model.config.to_dict()}
    if isinstance(model, Readout):
        about["head"] = model.head_options()
    if model.quantization is not None:
        group, kept = model.quantization
        about["quantization"] = {"kind": INT8, "group": group, **({"kept": list(kept)} if kept else {})}
    return about, None


def read_config(folder: Folder) -> ModelConfig:
    """The config of a saved model.

    Raises:
        CheckpointError: when there is no model in the folder that can be read.
        ConfigError: when its config has an unknown or missing key.
    """
    return described(folder).config


def _dtype(model: Backbone) -> str:
    return str(model.norm.weight.dtype).removeprefix("torch.")


def _read_about(folder: Folder) -> tuple[Path, dict[str, Any]]:
    """The path of ``config.json`` and what it holds."""
    path = current(_existing(folder), CONFIG_FILE)
    if not path.exists():
        alone = sorted(found for end in ("pth", "gguf") for found in path.parent.glob(f"*.{end}") if found.is_file())
        hint = f"give the file: {alone[0]}" if alone else "give a folder written by save, or that of a training run"
        raise CheckpointError(f"{folder}: no {CONFIG_FILE}", hint=hint)
    hint = "copy the folder again, or save the model again"
    about = read_json(path, hint=hint, infinite=True)
    if not isinstance(about, dict):
        raise CheckpointError(f"{path}: not a config of this library, but {kind_of(about)}", hint=SUPPORTED)
    if "format" not in about or "model" not in about:
        return path, about
    about = read_json(path, hint=hint)  # where infinities are words
    if about["format"] != FORMAT:
        library = about.get("library", "an unknown version")
        raise CheckpointError(
            f"{path}: format {brief(about['format'])} of {library if isinstance(library, str) else brief(library)}, "
            f"expected {FORMAT}",
            hint=f"this is dualform {__version__}; upgrade it",
        )
    return path, about


def _existing(folder: Folder) -> Path:
    path = Path(folder)
    if path.is_dir():
        return path
    if path.exists():
        hint = f"try {path.parent}; or a file of RWKV-7 or GGUF, which ends in {', '.join(FILES)}"
        raise CheckpointError(f"{folder}: a file, expected the folder of a saved model", hint=hint)
    raise CheckpointError(
        f"{folder}: no such folder",
        hint="give a folder written by save, that of a training run, or a name of the Hugging Face Hub, owner/name",
    )
