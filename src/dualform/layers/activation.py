"""The functions between the matrices of a feed-forward, by the names that configs use."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from dualform.core.errors import ConfigError
from dualform.core.options import suggestion


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": _relu2,
}
"""``silu`` is ``x s(x)`` with the logistic function s; ``gelu_tanh`` the approximation of ``gelu`` by a tanh; ``relu2``
the square of ``relu``: So et al. (2021), arXiv:2109.08668."""


def activation(where: str, name: str) -> Callable[[Tensor], Tensor]:
    """The function called ``name``.

    Raises:
        ConfigError: for a name that does not exist; suggests the nearest.
    """
    if name not in ACTIVATIONS:
        raise ConfigError(f"{where}: activation {name!r} is unknown", hint=suggestion(name, list(ACTIVATIONS)))
    return ACTIVATIONS[name]
