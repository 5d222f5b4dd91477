"""What every mixer says of tensors and states that do not fit."""

from typing import Any

import pytest
import torch

from dualform.core.errors import ArgumentError


def names_wrong_tensors(layer: Any) -> None:
    """A layer of width 4 whose state is a named tuple refuses another width, another batch and a bare tuple."""
    with pytest.raises(ArgumentError, match="x has shape"):
        layer(torch.randn(2, 5, 3))
    with pytest.raises(ArgumentError, match="has 3 rows, expected 2"):
        layer(torch.randn(2, 5, 4), layer.init_state(3))
    with pytest.raises(ArgumentError, match="state is tuple, expected"):
        layer.step(torch.randn(2, 4), tuple(layer.init_state(2)))
