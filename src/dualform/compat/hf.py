"""``mamba_ssm.utils.hf``: a config and weights from a folder."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dualform.core.errors import CheckpointError
from dualform.core.json_file import read_table
from dualform.models.saving.files import CONFIG_FILE, WEIGHTS_FILE, current
from dualform.ops.device import explains_device


def load_config_hf(model_name: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``config.json`` of a folder holds.

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
    """The tensors of ``model.safetensors`` of a folder, by upstream's names.

    Args:
        model_name: the folder.
        device: where the tensors go; None is the CPU.
        dtype: None is the one that each has.

    Raises:
        CheckpointError: where there is no such folder or file, or it cannot be read.
    """
    folder = _folder(model_name)
    path = current(folder, WEIGHTS_FILE)
    if not path.exists():
        if (folder / "pytorch_model.bin").exists():
            raise CheckpointError(
                f"{folder}: pytorch_model.bin is a pickle, which can run code when it is read, and is not read here",
                hint=f"convert it where you trust it: safetensors.torch.save_file(torch.load(..., weights_only=True), "
                f"'{WEIGHTS_FILE}')",
            )
        raise CheckpointError(f"{folder}: no {WEIGHTS_FILE}", hint="copy the weights, too")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        hint = "the file is truncated or no safetensors file; download or copy it again"
        raise CheckpointError(f"{path}: cannot be read: {error}", hint=hint) from error
    return {name: m.to(device=device, dtype=dtype) for name, m in tensors.items()}


def _folder(model_name: str | os.PathLike[str]) -> Path:
    folder = Path(model_name)
    if not folder.is_dir():
        raise CheckpointError(
            f"{model_name}: no such folder",
            hint="for a model of the Hugging Face Hub, give the folder that "
            f"huggingface_hub.snapshot_download({str(model_name)!r}) returns",
        )
    return folder
