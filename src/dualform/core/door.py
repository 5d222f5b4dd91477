"""What a recurrence says of an input or a state that is on another device than its weights, or has other rows."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dualform.core.errors import ArgumentError
from dualform.core.shapes import check_tensors, once_per_shape


def other_device(where: str, whole: str, device: torch.device, given: Mapping[str, Any]) -> ArgumentError | None:
    """The error of the first of ``given`` that is not on the device; None where all are.

    Args:
        where: the first word of the error.
        whole: what has the weights, such as "layer".
        device: that of the weights.
        given: inputs and states by the names that the caller knows; what is no tree of tensors is left out.
    """
    for name, tree in given.items():
        for leaf in _tensors(tree):
            if leaf.device != device:
                move = f"{name}.to({str(device)!r})"
                if not isinstance(tree, Tensor):
                    move = f"dualform.core.tree.tree_map(lambda leaf: leaf.to({str(device)!r}), {name})"
                if device.type == "meta":
                    move = f"a {whole} on meta has shapes and no numbers: load it, or build it without torch.device"
                elif leaf.device.type == "meta":
                    move = f"what is on meta has a shape and no numbers: make {name} on {device}"
                return ArgumentError(f"{where}: {name} is on {leaf.device}, but the {whole} is on {device}", hint=move)
    return None


@once_per_shape
def check_line(where: str, name: str, letters: str, tokens: Tensor, weight: Tensor) -> None:
    """Tokens by their axes and their device; the weight is one of the model's.

    Raises:
        ArgumentError: names what came and what was expected.
    """
    if wrong := other_device(where, "model", weight.device, {name: tokens}):
        raise wrong
    check_tensors(where, **{name: (tokens, letters)})


def other_rows(where: str, state: Any, rows: int) -> ArgumentError | None:
    """The error of a state with other rows than the batch or the packed sequences; None where each leaf has as many."""
    for leaf in _tensors(state):
        if leaf.dim() and leaf.shape[0] != rows:
            return ArgumentError(
                f"{where}: state has {leaf.shape[0]} rows, expected {rows}: one for each row of the input, or for each "
                "sequence of cu_seqlens",
                hint=f"init_state({rows}) makes one; dualform.core.tree.take picks rows",
            )
    return None


def _tensors(tree: Any) -> list[Tensor]:
    """The leaves in order, whatever else there is."""
    if isinstance(tree, Tensor):
        return [tree]
    return [leaf for part in tree for leaf in _tensors(part)] if isinstance(tree, tuple) else []
