"""``mamba_ssm.utils.hf``: a config and weights from a folder, or from the Hugging Face Hub."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualform.core.errors import CheckpointError
from dualform.core.json_file import read_table
from dualform.models.saving.files import CONFIG_FILE, current
from dualform.models.saving.hub import hub_name, snapshot
from dualform.models.saving.undisturbed import undisturbed
from dualform.models.saving.weights import each_tensor, found_files, stored_tensors
from dualform.ops.device import explains_device


def load_config_hf(model_name: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``config.json`` of a folder holds, or of a model of the Hub by its name, ``owner/name``.

    Raises:
        CheckpointError: where there is no such folder or file, or it cannot be read.
    """
    path = current(_folder(model_name), CONFIG_FILE)
    if not path.exists():
        raise CheckpointError(f"{model_name}: no {CONFIG_FILE}", hint="give the folder of a model of mamba-ssm")
    return read_table(path, hint="download or copy the folder again")


@explains_device
def load_state_dict_hf(
    model_name: str | os.PathLike[str],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The tensors of a folder, or of a model of the Hub by its name, under upstream's names.

    They are read from safetensors, or else from ``pytorch_model.bin``, as tensors and nothing else.

    Args:
        model_name: the folder, or ``owner/name``.
        device: where the tensors go; None is the CPU.
        dtype: None is the one that each has.

    Raises:
        CheckpointError: where there is no such folder or file, or it cannot be read.
    """

    def read(folder: Path) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, tensor in each_tensor(stored_tensors(found_files(folder))):
            found[name] = tensor.to(device=device, dtype=dtype, copy=True)
            del tensor
        return found

    return undisturbed(lambda: _folder(model_name), read)


def _folder(model_name: str | os.PathLike[str]) -> Path:
    if name := hub_name(model_name):
        return snapshot(name)
    folder = Path(model_name)
    if not folder.is_dir():
        hint = "give a folder, or a name of the Hugging Face Hub, owner/name"
        raise CheckpointError(f"{model_name}: no such folder", hint=hint)
    return folder
