"""The functions between the matrices of a feed-forward, by the names that configs use."""

from collections.abc import Callable

from torch import Tensor

from dualform.core.errors import ConfigError
from dualform.core.options import suggestion
from dualform.ops.mlp_step import ACTIVATIONS


def activation(where: str, name: str) -> Callable[[Tensor], Tensor]:
    """The function called ``name``.

    Raises:
        ConfigError: for a name that does not exist; suggests the nearest.
    """
    if name not in ACTIVATIONS:
        raise ConfigError(f"{where}: activation {name!r} is unknown", hint=suggestion(name, list(ACTIVATIONS)))
    return ACTIVATIONS[name]
