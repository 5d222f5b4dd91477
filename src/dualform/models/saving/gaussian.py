"""A linear-Gaussian model in a folder: its matrices by their letters, and in ``config.json`` what else it is."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from dualform import __version__
from dualform.core.errors import ArgumentError, CheckpointError, ConfigError
from dualform.core.json_file import entry, kind_of, read_json, to_json
from dualform.core.options import brief
from dualform.gaussian.continuous import ContinuousLinearGaussian
from dualform.gaussian.model import LinearGaussian
from dualform.gaussian.parameters import CORES, Parameters
from dualform.models.saving.files import CONFIG_FILE, WEIGHTS_FILE, current
from dualform.models.saving.weights import Files, each_tensor, stored_tensors

KEY = "gaussian"
KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in (LinearGaussian, ContinuousLinearGaussian)}
_FORMAT = 1
_OPTIONS = {"kind": str, "prior": str, "convention": str, "stationary": bool, "time_varying": tuple[str, ...]}
_LETTERS = (*CORES, "diffuse")


def write_gaussian(model: Parameters, folder: Path) -> None:
    """Write the files of a model into a folder that its caller makes complete.

    What is parametrised is written as its value. Parameters are listed, and are parameters again when loaded.
    """
    named = {name: getattr(model, name) for name in _LETTERS}
    tensors = {name: m.detach().cpu().contiguous().clone() for name, m in named.items() if m is not None}
    about = {
        "format": _FORMAT,
        "library": f"dualform {__version__}",
        KEY: {
            **gaussian_options(model),
            "trained": [name for name, _ in model.named_parameters(recurse=False)],
        },
    }
    (folder / CONFIG_FILE).write_text(to_json(about), encoding="utf-8")
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def gaussian_options(model: Parameters) -> dict[str, Any]:
    """What beside its matrices a model is made of, as JSON values."""
    return {
        "kind": next(name for name, kind in KINDS.items() if isinstance(model, kind)),  # of a parametrised one, too
        "prior": model.prior,
        "convention": model.convention,
        "stationary": model.stationary,
        "time_varying": list(model.time_varying),
    }


def gaussian_of(folder: Path) -> dict[str, Any] | None:
    """What ``config.json`` of a folder says of a linear-Gaussian model; None where it is of another one, or missing.

    Raises:
        CheckpointError: for a file that is damaged, or of another format.
    """
    path = current(folder, CONFIG_FILE)
    if not path.is_file():
        return None
    about = read_json(path, hint="copy the folder again, or save the model again", infinite=True)
    if not isinstance(about, dict) or KEY not in about:
        return None
    if about.get("format") != _FORMAT:
        hint = f"this is dualform {__version__}; upgrade it"
        raise CheckpointError(f"{path}: format {brief(about.get('format'))}, expected {_FORMAT}", hint=hint)
    if not isinstance(found := about[KEY], dict):
        raise CheckpointError(f"{path}: {KEY} is {kind_of(found)}, expected a table of options")
    return found


def read_gaussian(
    folder: Path, about: dict[str, Any], device: torch.device | None = None, dtype: torch.dtype | None = None
) -> Any:
    """The model of a folder, given what :func:`gaussian_of` found there.

    Raises:
        CheckpointError: for an option or a tensor that is missing, unknown or of another shape.
        ConfigError: for values that make no model, such as a covariance with a negative eigenvalue; names the folder.
    """
    where = f"{current(folder, CONFIG_FILE)}: {KEY}"
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in about.items()}
    options = {name: entry(given, name, of, where) for name, of in {**_OPTIONS, "trained": tuple[str, ...]}.items()}
    kind, trained, stationary = (options.pop(name) for name in ("kind", "trained", "stationary"))
    if kind not in KINDS:
        raise CheckpointError(f"{where}: unknown kind of model {brief(kind)}", hint=f"known: {', '.join(KINDS)}")
    path = current(folder, WEIGHTS_FILE)
    stored = stored_tensors(Files([path]))
    if strange := [name for name in stored if name not in _LETTERS]:
        raise CheckpointError(f"{path}: tensors: too many, first {strange[0]!r}", hint=f"known: {', '.join(_LETTERS)}")
    if absent := [name for name in ("A", "C", "Q", "R") if name not in stored]:
        raise CheckpointError(f"{path}: tensors: {absent[0]!r} is missing", hint="copy the folder again")
    tensors: dict[str, Any] = {}
    for name, tensor in each_tensor(stored):
        made = tensor.to(device, dtype if tensor.is_floating_point() else None, copy=True)
        tensors[name] = nn.Parameter(made) if name in trained else made
    if stationary:
        tensors["P0"] = "stationary"
    try:
        return KINDS[kind](**tensors, **options)
    except (ArgumentError, RuntimeError) as error:
        raise ConfigError(f"{folder}: {error}") from error
