"""Saving and loading models: a folder with ``config.json`` and ``model.safetensors``, never pickle."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from dualform.models.checkpoint import Folder, read_config, read_tensors, write_model
from dualform.models.lm import LanguageModel
from dualform.models.tokenizer import Tokenizer


def save(model: LanguageModel, folder: Folder, tokenizer: Tokenizer | None = None) -> None:
    """Write a model to a folder: ``config.json``, ``model.safetensors`` and, if given, ``tokenizer.json``.

    The files replace those of the same name all at once: a full disk or a kill leaves what was saved there before.
    Without a tokenizer, one that is there stays.

    Raises:
        CheckpointError: when the disk refuses.
    """
    write_model(folder, model.config, model, tokenizer)


def load(folder: Folder, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> LanguageModel:
    """Read a model that :func:`save` wrote.

    The global random generators are left as they are.

    Args:
        folder: where it was saved.
        device: where it shall live.
        dtype: of its floating tensors; None keeps what was saved.

    Raises:
        CheckpointError: for a missing folder or file, a truncated one, a tensor too many, too few or of another
            shape; names it.
        ConfigError: for a config with an unknown or missing key; names it.
    """
    config = read_config(folder)
    with torch.random.fork_rng(devices=[]), _Blank():
        model = LanguageModel(config)
    model.load_state_dict(read_tensors(folder, model), strict=False, assign=True)
    return model.to(device=device, dtype=dtype)


class _Blank(TorchFunctionMode):
    """Leaves out the random fills of a new model, whose values a checkpoint replaces."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_"):  # of torch.nn.init and Tensor
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))
