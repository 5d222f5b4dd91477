"""Models as plain values: what they are as JSON values, and their tensors as arrays."""

from typing import Any

import numpy as np
import torch

from dualform.models.config import ModelConfig
from dualform.models.heads import HEADS, SequenceClassifier, SequenceRegressor

Model = SequenceClassifier | SequenceRegressor


def to_arrays(model: Model) -> dict[str, Any]:
    """A model as ``config`` and ``head``, JSON values, and ``tensors``, arrays by their names."""
    tensors = {name: tensor.detach().cpu().numpy().copy() for name, tensor in model.state_dict().items()}
    return {"config": model.config.to_dict(), "head": model.head_options(), "tensors": tensors}


def from_arrays(values: dict[str, Any]) -> Model:
    """The model that :func:`to_arrays` gave, in evaluation."""
    model = build(values["config"], values["head"])
    tensors: dict[str, np.ndarray] = values["tensors"]
    model.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in tensors.items()})
    return model.eval()


def build(config: dict[str, Any], head: dict[str, Any]) -> Model:
    """A fresh model of such a description."""
    options = {name: tuple(v) if isinstance(v, list) else v for name, v in head.items() if name != "kind"}
    kind: Any = HEADS[head["kind"]]
    return kind.from_options(ModelConfig.from_dict(config), options)
