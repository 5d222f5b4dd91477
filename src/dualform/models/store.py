"""Saving and loading models: a folder with ``config.json`` and ``model.safetensors``, never pickle."""

from typing import Any, TypeVar, overload

import torch
from torch.overrides import TorchFunctionMode

from dualform.core.errors import CheckpointError, ConfigError
from dualform.models.backbone import Backbone
from dualform.models.checkpoint import CONFIG_FILE, Folder, read_config, read_head, read_tensors, write_model
from dualform.models.config import ModelConfig
from dualform.models.heads import PooledModel, SequenceClassifier, SequenceRegressor
from dualform.models.lm import LanguageModel
from dualform.models.tokenizer import Tokenizer

Model = TypeVar("Model", bound=Backbone)
_POOLED: dict[str, type[PooledModel]] = {kind.__name__: kind for kind in (SequenceClassifier, SequenceRegressor)}


def save(model: LanguageModel | PooledModel, folder: Folder, tokenizer: Tokenizer | None = None) -> None:
    """Write a model to a folder: ``config.json``, ``model.safetensors`` and, if given, ``tokenizer.json``.

    The files replace those of the same name all at once: a full disk or a kill leaves what was saved there before.
    Without a tokenizer, one that is there stays.

    Raises:
        CheckpointError: when the disk refuses.
    """
    head = model.head_options() if isinstance(model, PooledModel) else None
    write_model(folder, model.config, model, tokenizer, head)


@overload
def load(folder: Folder, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> LanguageModel: ...
@overload
def load(
    folder: Folder, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, *, kind: type[Model]
) -> Model: ...
def load(
    folder: Folder,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    *,
    kind: type[Any] = LanguageModel,
) -> Any:
    """Read a model that :func:`save` wrote.

    The global random generators are left as they are.

    Args:
        folder: where it was saved.
        device: where it shall live.
        dtype: of its floating tensors; None keeps what was saved.
        kind: the class expected: ``LanguageModel``, ``SequenceClassifier``, ``SequenceRegressor``, or a base of them.

    Raises:
        CheckpointError: for a missing folder or file, a truncated one, a model of another kind, a tensor too many,
            too few or of another shape; names it.
        ConfigError: for a config with an unknown or missing key; names it.
    """
    found, config, head = _described(folder)
    if not issubclass(found, kind):
        name = found.__name__
        raise CheckpointError(f"{folder}: a {name}, expected a {kind.__name__}", hint=f"load(..., kind={name})")
    with torch.random.fork_rng(devices=[]), _Blank():
        model = _built(folder, found, config, head)
    model.load_state_dict(read_tensors(folder, model), strict=False, assign=True)
    return model.to(device=device, dtype=dtype)


def shape(folder: Folder) -> Backbone:
    """The model of a folder on the meta device, without its weights, whatever its kind; it costs no memory.

    Raises:
        CheckpointError: for a folder without a model of this library.
        ConfigError: for a config with an unknown or missing key; names it.
    """
    with torch.device("meta"):
        return _built(folder, *_described(folder))


def _described(folder: Folder) -> tuple[type[Backbone], ModelConfig, dict[str, Any]]:
    """Class, config, and the options of the head."""
    config, head = read_config(folder), read_head(folder)
    if head is None:
        return LanguageModel, config, {}
    name = head.pop("kind", None)
    if name not in _POOLED:
        raise CheckpointError(f"{folder}: unknown kind of model {name!r}", hint=f"known: {', '.join(_POOLED)}")
    return _POOLED[name], config, head


def _built(folder: Folder, kind: type[Any], config: ModelConfig, head: dict[str, Any]) -> Backbone:
    if not issubclass(kind, PooledModel):
        return kind(config)
    try:
        outputs, inputs, pooling = head["outputs"], head["inputs"], head["pooling"]
        return kind(config, outputs, inputs=inputs, pooling=pooling)
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(
            f"{folder}: {CONFIG_FILE} describes no {kind.__name__} in its head: {error}", hint="save the model again"
        ) from error


class _Blank(TorchFunctionMode):
    """Leaves out the random fills of a new model, whose values a checkpoint replaces."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_"):  # of torch.nn.init and Tensor
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))
