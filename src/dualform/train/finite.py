"""Whether the numbers of a run are finite, asked where they are saved or reported."""

import math

import torch
from torch import Tensor, nn

_MOMENTS = {"exp_avg": 2.0, "exp_avg_sq": math.inf}  # and the norm of each


def magnitude(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    """A scalar on their device that is finite where parameters and moments are, and can be trained on.

    It is the Euclidean norm of the parameters, plus that of the first moments, plus the largest second moment: beyond
    the root of the largest float32 the squares in the next step's norms and second moments would overflow.
    """
    found = {"weights": [p.detach() for p in model.parameters() if p.numel()], **{name: [] for name in _MOMENTS}}
    for state in optimizer.state.values():
        for name in _MOMENTS:
            found[name] += [state[name]] if name in state and state[name].numel() else []
    norms = [nn.utils.get_total_norm(tensors, _MOMENTS.get(name, 2.0)) for name, tensors in found.items() if tensors]
    return torch.stack(norms).sum()


def not_finite(**numbers: float) -> str:
    """The first that is not finite, as ``"the loss is nan"``; empty where all of them are."""
    return next((f"the {name.replace('_', ' ')} is {n}" for name, n in numbers.items() if not math.isfinite(n)), "")
