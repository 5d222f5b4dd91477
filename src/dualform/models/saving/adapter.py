"""Adapters in a folder, in PEFT's files, beside which the weights that they change are named, not kept.

adapter_config.json        the base: a folder, or a name on the Hugging Face Hub; rank, factor and targets
adapter_model.safetensors  two matrices for each linear map; in its header the digests of the base's files

A folder of adapters is a model like any other: what is loaded from it is the base with the adapters merged into it.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dualform.core.errors import CheckpointError
from dualform.core.json_file import entry, parse_json, read_table, to_json
from dualform.core.options import brief
from dualform.models.adapters import Adaptation, adapted_map, adapter_tensors, stored_name
from dualform.models.saving.digest import file_digest
from dualform.models.saving.files import ADAPTER_CONFIG_FILE, ADAPTER_FILE, current
from dualform.models.saving.folder import model_folder
from dualform.models.saving.weights import Files, each_tensor, stored_tensors, weight_paths

_PLAIN = {"use_dora": False, "bias": "none", "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}}
_BASE = "dualform_base"  # in the header: the digests of the base's files, by name
_MOST = 2**31  # of r and lora_alpha; larger ones overflow
_HINT = "merge it with the library that wrote it, and convert the result"


class Adapter(NamedTuple):
    """What ``adapter_config.json`` of a folder says.

    Attributes:
        folder: of the adapters.
        base: the model that they change.
        rank: r.
        scale: the factor of B A.
    """

    folder: Path
    base: str
    rank: int
    scale: float


def adapter_of(folder: Path) -> Adapter | None:
    """The adapters in a folder; None where it holds none.

    Raises:
        CheckpointError: for a file that is damaged, or an adapter that is more than two matrices for a map.
    """
    path = current(folder, ADAPTER_CONFIG_FILE)
    if not path.exists():
        return None
    about = read_table(path, hint="copy the folder again")
    if (kind := about.get("peft_type")) != "LORA":
        raise CheckpointError(f"{path}: peft_type is {brief(kind)}, expected 'LORA'", hint=_HINT)
    for name, plain in _PLAIN.items():
        if (value := about.get(name) or plain) != plain:
            raise CheckpointError(f"{path}: {name} is {brief(value)}, expected {plain}", hint=_HINT)
    base, rank = entry(about, "base_model_name_or_path", str, path), entry(about, "r", int, path)
    alpha = entry(about, "lora_alpha", float, path)
    for name, value, least in (("r", rank, 1), ("lora_alpha", alpha, -_MOST)):
        if not least <= value <= _MOST:
            raise CheckpointError(
                f"{path}: {name} is {brief(value)}, expected at least {least:,} and at most {_MOST:,}"
            )
    return Adapter(folder, base, rank, alpha / (rank**0.5 if about.get("use_rslora") else rank))


def base_folder(adapter: Adapter) -> Path:
    """The folder of the model that adapters change.

    Raises:
        CheckpointError: where there is none, or it holds adapters itself.
    """
    base = model_folder(adapter.base)
    if not base.exists():
        hint = "adapters do not hold the model that they change: put it there, or write its place into that file"
        path = current(adapter.folder, ADAPTER_CONFIG_FILE)
        raise CheckpointError(
            f"{path}: base_model_name_or_path is {brief(adapter.base)}, no such folder or file", hint=hint
        )
    if current(base, ADAPTER_CONFIG_FILE).exists():
        hint = f"merge that one first: dualform convert {base} OUT"
        raise CheckpointError(f"{adapter.folder}: its base {base} holds adapters, too", hint=hint)
    return base


def base_digests(folder: Path) -> dict[str, str]:
    """The digests of the files with the weights of a folder, by name.

    Raises:
        CheckpointError: for a file that cannot be read.
    """
    try:
        return {path.name: file_digest(path) for path in weight_paths(folder)}
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror or error}") from error


def write_adapter(model: nn.Module, adaptation: Adaptation, folder: Path) -> None:
    """Write the adapters of a model into a folder that its caller makes complete."""
    tensors = {stored_name(name): t.detach().cpu().contiguous() for name, t in adapter_tensors(model).items()}
    header = {"format": "pt", _BASE: json.dumps(adaptation.digests)}
    (folder / ADAPTER_CONFIG_FILE).write_text(to_json(adaptation.options), encoding="utf-8")
    save_file(tensors, folder / ADAPTER_FILE, metadata=header)


def check_base(folder: str | os.PathLike[str], base: str | Path, digests: Mapping[str, str]) -> None:
    """Compare the weights below adapters with those that they were trained on, where that is known.

    Args:
        folder: of the adapters.
        base: the place of the weights.
        digests: of the files there.

    Raises:
        CheckpointError: for other weights, or a file of adapters that cannot be read; names it.
    """
    path = current(folder, ADAPTER_FILE)
    try:
        with safe_open(path, "pt") as file:
            wanted = parse_json((file.metadata() or {}).get(_BASE, "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}", hint="copy the folder again") from error
    if wanted and wanted != digests:
        hint = "give back the model that was there, or convert the adapters on the machine that has it"
        raise CheckpointError(f"{base}: not the weights that the adapters in {folder} were trained on", hint=hint)


def merge(adapter: Adapter, model: nn.Module) -> None:
    """Add the adapters of a folder to the weights of their base, in place: W + scale B A, rounded once.

    Raises:
        CheckpointError: for a name that is no linear map of the model, a matrix that is missing or of another shape.
    """
    files = Files([current(adapter.folder, ADAPTER_FILE)])
    matrices = dict[str, dict[str, Tensor]]()
    for stored, tensor in each_tensor(stored_tensors(files)):
        found = adapted_map(stored)
        if found is None or f"{found[0]}.weight" not in dict(model.named_parameters()):
            hint = "adapters are taken that were trained on this library's model, by dualform train or on dualform.hf"
            raise CheckpointError(f"{files.paths[0]}: {stored!r} is of no linear map of {adapter.base}", hint=hint)
        matrices.setdefault(found[0], {})[found[1]] = tensor.clone()
    with torch.no_grad():
        for name, pair in matrices.items():
            weight = model.get_parameter(f"{name}.weight")
            _check(files.paths[0], name, pair, weight, adapter.rank)
            if weight.device.type != "meta":
                a, b = (pair[mark].to(weight.device, torch.float32) for mark in ("lora_A", "lora_B"))
                weight.copy_(weight.float() + adapter.scale * (b @ a))


def _check(path: Path, name: str, pair: Mapping[str, Tensor], weight: Tensor, rank: int) -> None:
    shapes = [tuple(pair[mark].shape) if mark in pair else None for mark in ("lora_A", "lora_B")]
    a, b = shapes
    out, inputs = weight.shape
    if a != (rank, inputs) or b != (out, rank):
        raise CheckpointError(f"{path}: {name} has A {a} and B {b}, expected (r, {inputs}) and ({out}, r), r = {rank}")
