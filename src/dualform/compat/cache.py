"""The states that layers keep between calls, and the object that carries them: ``InferenceParams``."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dualform.core.errors import ArgumentError


@dataclass
class InferenceParams:
    """What a model keeps between the calls of one generation; every layer writes to its own states in place.

    Args:
        max_seqlen: room for so many elements, where a state grows with them.
        max_batch_size: rows.
        seqlen_offset: elements that the states have seen; above 0, a call is one step.
        batch_size_offset: first row, for attention.
        key_value_memory_dict: the states of each layer, by its index.
        lengths_per_sample: ``(B,)``, elements that each row of an attention cache holds.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[Any, Any] = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Begin again, with the memory that there is."""
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


class Cached(nn.Module):
    """A layer whose two states, of the convolution and of the scan, live in an ``InferenceParams``."""

    layer_idx: int | None

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """States of zeros for ``batch_size`` rows; ``max_seqlen`` is ignored, they do not grow."""
        raise NotImplementedError

    def _get_states_from_cache(
        self, inference_params: Any, batch_size: int, initialize_states: bool = False
    ) -> tuple[Tensor, Tensor]:
        where = type(self).__name__
        if self.layer_idx is None:
            raise ArgumentError(f"{where}: inference_params needs a layer_idx", hint=f"{where}(..., layer_idx=0)")
        known = inference_params.key_value_memory_dict
        if self.layer_idx not in known:
            known[self.layer_idx] = self.allocate_inference_cache(batch_size, inference_params.max_seqlen)
        conv_state, ssm_state = known[self.layer_idx]
        if conv_state.shape[0] != batch_size:
            raise ArgumentError(
                f"{where}: inference_params holds states of {conv_state.shape[0]} rows, got {batch_size}",
                hint="one InferenceParams serves one batch",
            )
        if initialize_states:
            conv_state.zero_()
            ssm_state.zero_()
        return conv_state, ssm_state


def check_step(where: str, hidden_states: Tensor, d_model: int) -> None:
    """A step takes ``(B, 1, d_model)``.

    Raises:
        ArgumentError: says what came.
    """
    if hidden_states.dim() != 3 or hidden_states.shape[1:] != (1, d_model):
        raise ArgumentError(
            f"{where}: hidden_states has shape {tuple(hidden_states.shape)}, expected (B, 1, {d_model}): a step takes "
            "one element",
            hint="for a piece of a sequence, dualform's own layers take a state and any length",
        )


def check_unsupported(where: str, **given: Any) -> None:
    """Options of tensor parallelism must be left out.

    Raises:
        ArgumentError: names the option and the way out.
    """
    for name, value in given.items():
        if value is not None:
            raise ArgumentError(
                f"{where}: {name} is {value!r}, but tensor parallelism is not a part of dualform.compat",
                hint="leave it out, and wrap the model in PyTorch's FSDP or tensor parallelism",
            )
