"""``GatedMLP`` of mamba-ssm."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualform.ops.device import explains_device


@explains_device
class GatedMLP(nn.Module):
    """``y, g = fc1(x)``; ``fc2(y * activation(g))``.

    Args:
        in_features: features.
        hidden_features: inner width; None is 8/3 of the features. It is rounded up to a multiple.
        out_features: None for as many as come in.
        activation: of the gate.
        bias: whether the maps have one.
        multiple_of: what the inner width is a multiple of.
        device: of the parameters.
        dtype: of the parameters.

    References:
        Shazeer (2020), arXiv:2002.05202, section 2.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Callable[[Tensor], Tensor] = F.silu,
        bias: bool = False,
        multiple_of: int = 128,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        hidden = int(8 * in_features / 3) if hidden_features is None else hidden_features
        hidden = -(-hidden // multiple_of) * multiple_of
        self.fc1 = nn.Linear(in_features, 2 * hidden, bias=bias, device=device, dtype=dtype)
        self.activation = activation
        out = in_features if out_features is None else out_features
        self.fc2 = nn.Linear(hidden, out, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Every position on its own."""
        y, gate = self.fc1(x).chunk(2, -1)
        return self.fc2(y * self.activation(gate))
